"""A stated slowdown -> what to compensate on this GPU, measured on whole decoding steps."""

from __future__ import annotations

import statistics
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from tqdm import tqdm

from decdec_core.budget import compensation_of
from decdec_core.config import Compensation, WeightQuant, total_channels
from decdec_core.decode import Decoder
from decdec_core.decode_bench import Setup, peak_memory
from decdec_core.kernel_bench import markdown
from decdec_core.latency import GPUS, knee
from decdec_core.model import set_compensation
from decdec_core.packing import channel_bytes
from decdec_core.profiles import Budget, Profile, key_of, shapes_of_model
from decdec_core.provenance import environment
from decdec_core.timing import N_TB, measure
from decdec_core.tuner import Choice, TimingTable, best_round, correct, is_met, search, search_quality

_MOST_ROUNDS = 6  # of one target
_TURNS = 3  # of with and without, for one measurement
_RATES = ("tokens_per_second", "baseline_tokens_per_second")
_BYTES = ("gpu_bytes", "baseline_gpu_bytes")

Energy = Mapping[str, Sequence[float]]


@dataclass(frozen=True)
class Measured:
    """A decoding step with and without compensation: percent that it takes longer, tokens per second, most
    bytes of GPU memory."""

    percent: float
    tokens_per_second: float
    baseline_tokens_per_second: float
    gpu_bytes: int
    baseline_gpu_bytes: int

    def fields(self) -> dict[str, float]:
        """Return the fields of a Budget."""
        rates = {name: round(getattr(self, name), 2) for name in _RATES}
        return {"measured_percent": round(self.percent, 3), **rates, **{n: getattr(self, n) for n in _BYTES}}


def budgets(
    table: TimingTable,
    targets: Sequence[float],
    measure_step: Callable[[Choice], Measured],
    energy: Energy | None = None,
) -> list[Budget]:
    """Return the choice for each target that was measured within tuner.TOLERANCE_POINTS of it, or else the
    nearest that is not over by more; where all are, nothing is compensated.

    measure_step: measures a choice. energy: maximise it, see tuner.search_quality; without it the paper's
    search. The search's own target is corrected from round to round, because the linear layers are a part of
    the step only (tuner.correct).
    """
    return [_budget(table, target, measure_step, energy) for target in targets]


def _budget(
    table: TimingTable, target: float, measure_step: Callable[[Choice], Measured], energy: Energy | None
) -> Budget:
    history: list[tuple[float, float]] = []
    choices: list[Choice] = []
    measured: dict[tuple[int, ...], Measured] = {}
    for _ in range(_MOST_ROUNDS):
        internal = correct(target, history)
        choice = search(table, internal) if energy is None else search_quality(table, internal, energy)
        setting = (choice.n_tb, *choice.k_chunk)
        if setting not in measured:
            measured[setting] = measure_step(choice)
        history.append((internal, measured[setting].percent if choice.n_tb else 0.0))
        choices.append(choice)
        if is_met(target, history[-1][1]):
            break
    best = best_round(target, history)
    if best is None:
        return Budget(target, 0, (0, 0, 0, 0), 0.0, objective=choices[0].objective)
    choice = choices[best]
    return Budget.of(target, choice, **measured[choice.n_tb, *choice.k_chunk].fields())


class Steps:
    """Measures decoding steps of a model: `measure` for budgets."""

    def __init__(self, model: Any, setup: Setup, selection: str = "dynamic") -> None:
        self.model, self.setup, self.selection = model, setup, selection
        self.decoder = Decoder(model, setup.prompt + setup.tokens)
        self.ids = setup.ids(model.config.vocab_size)
        self.progress = tqdm(desc="measuring steps", unit="setting")

    def measure(self, choice: Choice) -> Measured:
        """Return what `choice` costs, by medians of runs in turns with and without."""
        settings = (Compensation("none"), compensation_of(choice, selection=self.selection))
        runs: tuple[list[float], list[float]] = ([], [])
        most = [0, 0]
        for _ in range(_TURNS):
            for which, compensation in enumerate(settings):
                set_compensation(self.model, compensation)
                with peak_memory(self.decoder.device) as peak:
                    done = self.decoder.generate(self.ids, self.setup.tokens, stop=())
                runs[which].append(done.spread()["median_s"])
                most[which] = max(most[which], peak.bytes)
        self.progress.update()
        without, with_ = (statistics.median(measured) for measured in runs)
        return Measured(100 * (with_ / without - 1), 1 / with_, 1 / without, most[1], most[0])


def tuned_profile(
    profile: Profile, model: Any, targets: Sequence[float], setup: Setup, energy: Energy | None = None
) -> Profile:
    """Return `profile`, which has measured rows, with a budget for each target, measured on `model`."""
    steps = Steps(model, setup, profile.selection)
    found = budgets(profile.table(), targets, steps.measure, energy)
    steps.progress.close()
    set_compensation(model, Compensation("none"))
    return replace(profile, choices=[*profile.choices, *found])


def measured_profile(
    model: str, config: Any, weight: WeightQuant, selection: str = "dynamic", n_tb: Sequence[int] = N_TB
) -> Profile:
    """Return the profile of the current CUDA device for a model of these sizes, its rows measured, without
    budgets.

    model: its name. config: of transformers. Raises DecDECError without a CUDA device, and for bits that the
    kernels do not have.
    """
    shapes, bits = shapes_of_model(config), weight.widths[0]
    rows = measure(shapes, bits, weight.format, n_tb, selection=selection)
    device = torch.device("cuda")
    name = torch.cuda.get_device_name(device)
    return Profile(
        gpu=name,
        gpu_key=key_of(name),
        driver=driver_version(),
        model=model,
        shapes=shapes,
        blocks=config.num_hidden_layers,
        bits=bits,
        format=weight.format,
        selection=selection,
        predicted=False,
        base_us={row["kind"]: row["time_us"] for row in rows if not row["k_chunk"]},
        rows=rows,
        choices=[],
        environment=environment(device),
        model_bits=weight.bits,
    )


def budget_rows(profile: Profile) -> list[dict[str, Any]]:
    """Return a row per budget: what was asked for, what it gives, the bytes over PCIe for a token, and which
    share of the link's bandwidth (latency.GPUS) these take where tokens per second were measured."""
    rows = []
    link = GPUS[profile.gpu_key].link_gb_per_s if profile.gpu_key in GPUS else None
    for budget in profile.choices:
        channels = zip(profile.shapes.values(), budget.k_chunk, strict=True)
        fetched = sum(total_channels(i, k) * channel_bytes(o, 4) for (i, o), k in channels) * profile.blocks
        rate = budget.tokens_per_second
        share = None if rate is None or link is None else round(fetched * rate / link / 1e7, 2)
        rows.append(
            {
                "gpu": profile.gpu,
                "shapes": profile.model,
                "bits": profile.model_bits,
                "format": profile.format,
                "selection": profile.selection,
                **budget.to_dict(),
                "pcie_bytes_per_token": fetched,
                "link_percent": share,
            }
        )
    return rows


def driver_version() -> str | None:
    """Return the version of the NVIDIA driver, None where its tool does not say."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.split("\n")[0].strip() or None


def table_of(profile: Profile) -> str:
    """Return the budgets for people."""
    head = ["slowdown %", "objective", "n_tb", "k_chunk", "predicted %", "measured %"]
    body = []
    for budget in profile.choices:
        measured = "" if budget.measured_percent is None else f"{budget.measured_percent:.2f}"
        k_chunk = "/".join(map(str, budget.k_chunk))
        cells = [f"{budget.target_percent:g}", budget.objective, str(budget.n_tb), k_chunk]
        body.append([*cells, f"{budget.predicted_percent:.2f}", measured])
    knees = ", ".join(f"{kind} {k_chunk}" for kind, k_chunk in profile.table().knees().items())
    lines = [f"{profile.gpu}: {profile.about()}", f"knees: {knees}"]
    if profile.gpu_key in GPUS:
        lines[1] += f"; of the two bandwidths {knee(GPUS[profile.gpu_key], profile.bits):.1f}"
    return "\n".join([*lines, "", markdown(head, body)])
