"""What a tuner found on a GPU for a model's shapes, as JSON: times, and what they allow at each slowdown.

A file holds one profile, or several: {"format_version": 1, "profiles": [...]}. The package carries one file
for each GPU, named by its key. Predicted ones (latency.py) are written by write_predicted; a test compares.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from decdec_core.architectures import require_supported
from decdec_core.config import (
    FORMATS,
    KERNEL_BITS,
    PROJECTION_KINDS,
    SELECTIONS,
    Config,
    DecDECError,
    require_int,
    require_one_of,
    suggest,
)
from decdec_core.files import write_text
from decdec_core.latency import FITTED, GPUS, Gpu, Model, gpu_of, predicted_rows
from decdec_core.shapes import config_of, matrices_of
from decdec_core.tuner import (
    OBJECTIVES,
    Choice,
    TimingTable,
    require_kinds,
    require_number,
    search,
)

FORMAT_VERSION = 1
TARGETS = (2.5, 5.0, 10.0, 20.0)  # slowdowns that the paper evaluates, in percent
PREDICTED_N_TB = (1, 2, 4, 8, 16)
_ROW_KEYS = ("kind", "n_tb", "k_chunk", "time_us")
_FOLDER = Path(__file__).parent
# fields of a Budget that only a measurement gives
MEASURED = (
    *("measured_percent", "tokens_per_second", "baseline_tokens_per_second"),
    *("gpu_bytes", "baseline_gpu_bytes"),
)
_ROUNDED = 0.01  # points: percents and times are written with three decimals
PREDICTED_MODELS = ("llama-3-8b", "phi-3-medium", "smollm2-135m")  # of shapes.MODELS, at PREDICTED_BITS
PREDICTED_BITS = (3, 4)


@dataclass(frozen=True)
class Budget(Config):
    """What was chosen for a slowdown of target_percent: n_tb, k_chunk, predicted_percent and objective as in
    tuner.Choice. measured_percent: of a whole decoding step, None where it was not measured, and so are
    tokens_per_second and gpu_bytes, with and without (baseline) compensation in one run; gpu_bytes are the
    most that torch had allocated."""

    target_percent: float
    n_tb: int
    k_chunk: tuple[int, int, int, int]
    predicted_percent: float
    measured_percent: float | None = None
    objective: str = "speed"
    tokens_per_second: float | None = None
    baseline_tokens_per_second: float | None = None
    gpu_bytes: int | None = None
    baseline_gpu_bytes: int | None = None

    def __post_init__(self) -> None:
        require_number("target_percent", self.target_percent)
        if self.target_percent < 0:
            raise DecDECError(f"target_percent must be 0 or more, got {self.target_percent!r}")
        for which in MEASURED:
            if getattr(self, which) is not None:
                require_number(which, getattr(self, which))
        choice = Choice(self.n_tb, self.k_chunk, self.predicted_percent, self.objective)
        object.__setattr__(self, "k_chunk", choice.k_chunk)

    @classmethod
    def of(cls, target_percent: float, choice: Choice, **measured: float) -> Budget:
        """Return what `choice` is for that target; `measured`: the fields of a measurement."""
        predicted = round(choice.predicted_percent, 3)
        budget = cls(target_percent, choice.n_tb, choice.k_chunk, predicted, objective=choice.objective)
        return replace(budget, **measured)  # type: ignore[arg-type]

    def unmeasured(self) -> Budget:
        """Return it without what was measured."""
        return replace(self, **dict.fromkeys(MEASURED))  # type: ignore[arg-type]


@dataclass(frozen=True)
class Profile(Config):
    """Timing rows of one GPU, model, bits and format, and the budgets that follow.

    gpu: the device's own name, or gpu_key where it is predicted. driver: None where it is predicted. shapes:
    (in, out) of each of PROJECTION_KINDS. blocks: decoder blocks. selection: with which rows were measured.
    predicted: whether rows come from the analytic model. base_us: each product alone, as in the rows.
    rows: {"kind", "n_tb", "k_chunk", "time_us"}, see tuner.TimingTable. choices: at most one for a target
    and objective. model_bits: of the model that they were measured on, half a bit more where half of its
    blocks have a bit more. environment: provenance.environment of the measurement, or None. Refused values
    raise DecDECError.
    """

    gpu: str
    gpu_key: str
    driver: str | None
    model: str
    shapes: Mapping[str, tuple[int, int]]
    blocks: int
    bits: int
    format: str
    selection: str
    predicted: bool
    base_us: Mapping[str, float]
    rows: Sequence[Mapping[str, Any]]
    choices: Sequence[Budget]
    environment: Mapping[str, Any] | None = None
    model_bits: int | float | None = None
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        if self.format_version != FORMAT_VERSION or isinstance(self.format_version, (bool, float)):
            raise DecDECError(f"format_version must be {FORMAT_VERSION}, got {self.format_version!r}")
        for which in ("gpu", "gpu_key", "model"):
            if not isinstance(getattr(self, which), str) or not getattr(self, which):
                raise DecDECError(f"{which} must be a name, got {getattr(self, which)!r}")
        for which, kind, wanted in (("driver", str, "a name"), ("environment", Mapping, "an object")):
            if getattr(self, which) is not None and not isinstance(getattr(self, which), kind):
                raise DecDECError(f"{which} must be {wanted} or null, got {getattr(self, which)!r}")
        require_int("blocks", self.blocks, 1, 10_000)
        require_one_of("bits", self.bits, KERNEL_BITS)
        model_bits = self.bits if self.model_bits is None else self.model_bits
        require_one_of("model_bits", model_bits, (self.bits, self.bits + 0.5))
        object.__setattr__(self, "model_bits", model_bits)
        require_one_of("format", self.format, FORMATS)
        require_one_of("selection", self.selection, SELECTIONS)
        require_one_of("predicted", self.predicted, (True, False))
        object.__setattr__(self, "shapes", _checked_shapes(self.shapes))
        for row in self.rows:
            _require_keys("a timing row", row, _ROW_KEYS)
        object.__setattr__(self, "rows", [dict(row) for row in self.rows])
        table = self.table()
        base = dict(zip(PROJECTION_KINDS, table.base_us.tolist(), strict=True))
        if dict(self.base_us) != base:
            raise DecDECError(f"base_us must be as in the rows, {base}, got {dict(self.base_us)}")
        object.__setattr__(self, "choices", [_budget(choice) for choice in self.choices])
        for choice in self.choices:
            _require_offered(choice, table)
            if choice.measured_percent is not None and (self.predicted or self.environment is None):
                raise DecDECError(
                    "measured_percent must be in a measured profile with its environment, got it without"
                )
        targets = [(choice.target_percent, choice.objective) for choice in self.choices]
        if len(set(targets)) < len(targets):
            raise DecDECError(f"choices must be one for a target and objective, got {targets}")

    def table(self) -> TimingTable:
        """Return the rows as a tuner takes them."""
        return TimingTable.from_rows(self.rows, self.shapes)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types, format_version first."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        values["shapes"] = {kind: list(shape) for kind, shape in self.shapes.items()}
        values["choices"] = [choice.to_dict() for choice in self.choices]
        return {"format_version": values.pop("format_version"), **values}

    def about(self) -> str:
        """Return model, bits, format and whether it was measured, for people."""
        return f"{self.model} {self.bits} bits {self.format} {'predicted' if self.predicted else 'measured'}"


_CHOICE_KEYS = [f.name for f in fields(Budget)]  # the first four must be there


def _checked_shapes(shapes: Mapping[str, Sequence[int]]) -> dict[str, tuple[int, int]]:
    require_kinds("shapes", shapes)
    checked = {}
    for kind in PROJECTION_KINDS:
        shape = shapes[kind]
        if not isinstance(shape, (tuple, list)) or len(shape) != 2:
            raise DecDECError(f"shapes of {kind} must be in and out, got {shape!r}")
        for size in shape:
            require_int(f"shapes of {kind}", size, 1, 2**24)
        checked[kind] = (shape[0], shape[1])
    return checked


def _budget(choice: Budget | Mapping[str, Any]) -> Budget:
    return choice if isinstance(choice, Budget) else Budget.from_dict(choice)


def _require_offered(choice: Budget, table: TimingTable) -> None:
    """Raise DecDECError for a choice that the rows do not offer, or at another slowdown than they say."""
    about = f"of the choice for {choice.target_percent:g} %"
    if choice.n_tb and choice.n_tb not in table.curves:
        counts = ", ".join(map(str, sorted(table.curves)))
        raise DecDECError(f"n_tb {about} must be in the rows, one of {counts}, got {choice.n_tb}")
    curves = table.curves.get(choice.n_tb, ())
    for kind, k_chunk, curve in zip(PROJECTION_KINDS, choice.k_chunk, curves, strict=False):
        if k_chunk >= len(curve):
            raise DecDECError(
                f"k_chunk {about} must be in the rows, 0..{len(curve) - 1} of {kind}, got {k_chunk}"
            )
    percent = 100 * (table.time_us(choice.n_tb, choice.k_chunk) / float(table.base_us.sum()) - 1)
    if abs(percent - choice.predicted_percent) > _ROUNDED:
        raise DecDECError(
            f"predicted_percent {about} must be {percent:.3f}, as in the rows, got {choice.predicted_percent}"
        )


def _require_keys(which: str, got: object, keys: Sequence[str], optional: Sequence[str] = ()) -> None:
    if not isinstance(got, Mapping):
        raise DecDECError(f"{which} must be an object of {', '.join(keys)}, got {got!r}")
    known = (*keys, *optional)
    for key in got:
        if key not in known:
            hint = suggest(str(key), known)
            raise DecDECError(f"{which} takes {', '.join(known)}, got unknown key {key!r}{hint}")
    for key in keys:
        if key not in got:
            raise DecDECError(f"{which} must have {', '.join(keys)}, got no {key}")


def read_profiles(path: Path) -> list[Profile]:
    """Return the profiles of a file. Raises DecDECError for a missing file or one that is no profile's."""
    if not path.is_file():
        raise DecDECError(f"profile {path} must be a file, got none")
    try:
        body = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise DecDECError(f"profile {path} must be JSON, got {error}") from None
    many = isinstance(body, dict) and "profiles" in body
    try:
        if many:
            _require_keys("a file of profiles", body, ("format_version", "profiles"))
            require_one_of("format_version", body["format_version"], (FORMAT_VERSION,))
            if not isinstance(body["profiles"], list):
                raise DecDECError(f"profiles must be a list, got {body['profiles']!r}")
        found = [_profile_of(values) for values in (body["profiles"] if many else [body])]
        if not found:
            raise DecDECError("profiles must be at least one, got none")
        return found
    except DecDECError as error:
        raise DecDECError(f"profile {path}: {error}") from None


def _profile_of(values: object) -> Profile:
    if not isinstance(values, dict):
        raise DecDECError(f"a profile must be a JSON object, got {type(values).__name__}")
    _require_keys("a profile", values, [f.name for f in fields(Profile)])
    for which, kind in (("shapes", dict), ("base_us", dict), ("rows", list), ("choices", list)):
        if not isinstance(values[which], kind):
            wanted = "an object" if kind is dict else "a list"
            raise DecDECError(f"{which} must be {wanted}, got {values[which]!r}")
    for choice in values["choices"]:
        _require_keys("a choice", choice, _CHOICE_KEYS[:4], _CHOICE_KEYS[4:])
    return Profile.from_dict(values)


def read_profile(path: Path) -> Profile:
    """Return the profile of a file that holds one."""
    profiles = read_profiles(path)
    if len(profiles) != 1:
        raise DecDECError(f"profile {path} must hold one profile, got {len(profiles)}")
    return profiles[0]


def write_profile(path: Path, profile: Profile) -> None:
    """Write one profile to `path`."""
    write_text(path, _text(profile.to_dict()) + "\n")


def write_profiles(path: Path, profiles: Iterable[Profile]) -> None:
    """Write a file of several profiles."""
    texts = ",\n".join(_text(profile.to_dict()) for profile in profiles)
    write_text(path, f'{{"format_version": {FORMAT_VERSION}, "profiles": [\n{texts}\n]}}\n')


def of_one_gpu(profiles: Iterable[Profile]) -> list[Profile]:
    """Return profiles that belong together, ordered by model, bits and format. Raises DecDECError unless they
    are of one GPU, and each for shapes, bits and format of its own."""
    found = sorted(profiles, key=lambda p: (p.model, p.bits, p.format, p.predicted))
    if not found:
        raise DecDECError("profiles must be one or more, got none")
    gpus = sorted({profile.gpu_key for profile in found})
    if len(gpus) > 1:
        raise DecDECError(f"profiles must be of one GPU, got {', '.join(gpus)}")
    for one, other in pairwise(found):
        if (one.shapes, one.bits, one.format) == (other.shapes, other.bits, other.format):
            raise DecDECError(f"profiles must each be of other shapes, bits or format, got {one.about()} twice")
    return found


def _text(values: Mapping[str, Any]) -> str:
    """Return a JSON object with a line for each key, and for each item of a list."""
    lines = []
    for key, value in values.items():
        if isinstance(value, list) and value:
            items = ",\n  ".join(json.dumps(item) for item in value)
            lines.append(f"{json.dumps(key)}: [\n  {items}\n ]")
        else:
            lines.append(f"{json.dumps(key)}: {json.dumps(value)}")
    return "{\n " + ",\n ".join(lines) + "\n}"


def bundled() -> list[str]:
    """Return the keys of the GPUs of which there are bundled profiles."""
    return sorted(path.stem for path in _FOLDER.glob("*.json"))


def read_bundled(key: str) -> list[Profile]:
    """Return the bundled profiles of a GPU's key. Raises DecDECError where there are none."""
    if key not in bundled():
        raise DecDECError(f"gpu must be one of {', '.join(bundled())}, got {key!r}{suggest(key, bundled())}")
    return read_profiles(_FOLDER / f"{key}.json")


def key_of(name: str) -> str:
    """Return the key of a GPU from the name that the driver gives it: "NVIDIA GeForce RTX 4050 Laptop GPU" is
    "rtx-4050-mobile"; a key is its own."""
    words = re.sub(r"\b(nvidia|geforce)\b", "", name.lower()).replace("laptop gpu", "mobile")
    return "-".join(words.split()).replace("-super", "s")


def fitting(
    profiles: Sequence[Profile], shapes: Mapping[str, tuple[int, int]], bits: int | float, format: str
) -> Profile:
    """Return the one of `profiles` for these shapes, a measured one before a predicted one. Where there is
    none, DecDECError says what there is."""
    wanted = {kind: tuple(shape) for kind, shape in shapes.items()}
    found = [p for p in profiles if (p.shapes, p.bits, p.format) == (wanted, bits, format)]
    if not found:
        sizes = ", ".join(f"{kind} {wanted[kind][0]}x{wanted[kind][1]}" for kind in PROJECTION_KINDS)
        there = ", ".join(dict.fromkeys(p.about() for p in profiles))
        raise DecDECError(
            f"a profile of {profiles[0].gpu} must be one of {there}, got {sizes} at {bits} bits {format}"
        )
    return min(found, key=lambda profile: profile.predicted)


def choice_for(profile: Profile, slowdown_percent: float) -> Budget:
    """Return the stored budget of that target, one for speed before one for quality; where there is none,
    what the paper's search finds in the profile's rows, without a measured slowdown."""
    stored = [budget for budget in profile.choices if budget.target_percent == slowdown_percent]
    if stored:
        return min(stored, key=lambda budget: OBJECTIVES.index(budget.objective))
    return Budget.of(slowdown_percent, search(profile.table(), slowdown_percent))


def shapes_of_model(config: Any) -> dict[str, tuple[int, int]]:
    """Return (in, out) of each projection kind of a transformers `config`, fused as the kernels run them.
    Raises DecDECError for an architecture that is not supported."""
    require_supported(config)
    return matrices_of(config)


def predicted_profile(
    key: str,
    model: str,
    shapes: Mapping[str, tuple[int, int]],
    blocks: int,
    bits: int,
    format: str,
    targets: Sequence[float] = TARGETS,
    gpu: Gpu | None = None,
    constants: Model = FITTED,
) -> Profile:
    """Return the profile that the analytic model predicts (latency.py).

    key: of GPUS, or any where `gpu` gives the numbers. model: its name. blocks: its decoder blocks.
    """
    rows = predicted_rows(gpu or gpu_of(key), shapes, bits, format, PREDICTED_N_TB, model=constants)
    table = TimingTable.from_rows(rows, shapes)
    return Profile(
        gpu=key,
        gpu_key=key,
        driver=None,
        model=model,
        shapes=shapes,
        blocks=blocks,
        bits=bits,
        format=format,
        selection="dynamic",
        predicted=True,
        base_us=dict(zip(PROJECTION_KINDS, table.base_us.tolist(), strict=True)),
        rows=[{name: row[name] for name in _ROW_KEYS} for row in rows],
        choices=[Budget.of(target, search(table, target)) for target in targets],
    )


def predicted_bundle(key: str) -> list[Profile]:
    """Return the predicted profiles that are bundled for a GPU."""
    found = []
    for model in PREDICTED_MODELS:
        config = config_of(model)
        shapes, blocks = matrices_of(config), config.num_hidden_layers
        found += [
            predicted_profile(key, model, shapes, blocks, bits, format)
            for bits in PREDICTED_BITS
            for format in FORMATS
        ]
    return found


def write_predicted(folder: Path = _FOLDER) -> None:
    """Write the bundled predictions: of each of GPUS whose numbers are from a data sheet."""
    for key, gpu in GPUS.items():
        if gpu.source == "data sheet":
            write_profiles(folder / f"{key}.json", predicted_bundle(key))
