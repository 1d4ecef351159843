"""From a slowdown to budgets: the loop on made-up steps, and the command with predictions."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_artifacts import write_tiny
from transformers import AutoModelForCausalLM

from decdec_core import cli, tuning
from decdec_core.budget import compensation_of
from decdec_core.config import PROJECTION_KINDS, DecDECError, WeightQuant
from decdec_core.decode_bench import Setup
from decdec_core.fusing import fuse
from decdec_core.model import state_of
from decdec_core.profiles import Budget, Profile, read_profile, shapes_of_model
from decdec_core.tuner import Choice, TimingTable
from decdec_core.tuning import Measured, budget_rows, budgets, tuned_profile

SHAPES = {"qkv": (1024, 1024), "o": (1024, 512), "gate_up": (1024, 4096), "down": (2048, 1024)}


def rows() -> list[dict[str, Any]]:
    """Return times of 10 us each, of which the first 8 channels are free and each further one costs 0.1."""
    found = [{"kind": kind, "n_tb": 0, "k_chunk": 0, "time_us": 10.0} for kind in PROJECTION_KINDS]
    for kind in PROJECTION_KINDS:
        for k_chunk, time_us in ((1, 10.0), (8, 10.0), (208, 30.0)):
            found.append({"kind": kind, "n_tb": 8, "k_chunk": k_chunk, "time_us": time_us})
    return found


TABLE = TimingTable.from_rows(rows(), SHAPES)


def linear_percent(choice: Choice) -> float:
    """Return the slowdown of the four products as the table has it."""
    return 100 * (TABLE.time_us(choice.n_tb, choice.k_chunk) / 40 - 1)


@pytest.mark.parametrize("share", [1.0, 0.6, 0.3])
@pytest.mark.parametrize("offset", [0.0, 3.0])
def test_the_search_is_corrected_until_steps_meet_the_target(share: float, offset: float) -> None:
    """A step of which the products are a share, with what else compensation costs it."""
    asked: list[Choice] = []

    def percent_of(choice: Choice) -> float:
        return share * linear_percent(choice) + offset

    def step(choice: Choice) -> Measured:
        asked.append(choice)
        return measured(percent_of(choice))

    targets = [5.0, 10.0, 20.0]
    for target, budget in zip(targets, budgets(TABLE, targets, step), strict=True):
        choice = Choice(budget.n_tb, budget.k_chunk, budget.predicted_percent, budget.objective)
        assert budget.target_percent == target
        assert abs(budget.measured_percent - target) <= 1
        assert budget.measured_percent == pytest.approx(percent_of(choice), abs=1e-3)
        assert budget.tokens_per_second < budget.baseline_tokens_per_second == 100
    assert len(asked) <= 6 * 3


def measured(percent: float) -> Measured:
    """Return a step of 10 ms that takes `percent` longer."""
    return Measured(percent, 100 / (1 + percent / 100), 100.0, 2000, 1000)


def test_knees_are_where_time_begins_to_rise() -> None:
    # 5 % of 10 us are five channels more than the eight that are free
    assert TABLE.knees() == dict.fromkeys(PROJECTION_KINDS, 13)


def test_a_narrow_layers_knee_is_counted_from_its_first_channel() -> None:
    shapes = {kind: (160, out) for kind, (_, out) in SHAPES.items()}
    slow = [{**row, "time_us": 12 + 0.1 * row["k_chunk"]} if row["n_tb"] else row for row in rows()]
    table = TimingTable.from_rows([row for row in slow if row["k_chunk"] != 1], shapes)
    assert table.curves[8][0][[6, 7]].tolist() == [10, 12.8]  # no channel up to 6
    assert table.knees()["qkv"] == 14  # of 13.4 us, and 5 % more are 13.44


def test_where_nothing_fits_nothing_is_compensated() -> None:
    (budget,) = budgets(TABLE, [2.5], lambda _choice: measured(50.0))
    assert budget.n_tb == 0
    assert budget.k_chunk == (0, 0, 0, 0)
    assert budget.measured_percent is None, "that nothing costs nothing was not measured"
    assert compensation_of(budget).n_tb == 16


def test_a_setting_is_measured_once() -> None:
    seen: list[tuple[int, ...]] = []

    def step(choice: Choice) -> Measured:
        seen.append(choice.k_chunk)
        return measured(4.0 if choice.k_chunk[0] < 40 else 40.0)  # a step that no setting meets

    (budget,) = budgets(TABLE, [20.0], step)
    assert budget.measured_percent == 4.0
    assert len(set(seen)) == len(seen)


def test_quality_takes_what_removes_most() -> None:
    energy = {kind: [0.0] * 209 for kind in PROJECTION_KINDS}
    energy["down"] = list(range(209))
    (budget,) = budgets(TABLE, [10.0], lambda choice: measured(linear_percent(choice)), energy)
    # 4 us, at 0.1 each, all for the one that gains; the others have what is free or nothing
    assert budget.k_chunk[3] == 48
    assert budget.objective == "quality"


def test_a_profile_is_tuned_on_a_model(tiny_artifact_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_artifact_dir, dtype=torch.float32)
    fuse(model)
    asked: list[Any] = []

    def generate(decoder: Any, *_arguments: Any, **_options: Any) -> Any:
        compensation = state_of(decoder.model).compensation
        asked.append(compensation)
        seconds = 1.0 + sum(compensation.k_chunk) / 1000
        return type("Run", (), {"spread": lambda self: {"median_s": seconds}})()

    monkeypatch.setattr(tuning.Decoder, "generate", generate)
    shapes = shapes_of_model(model.config)
    profile = Profile(
        *("gpu", "gpu", None, "tiny", shapes, 2, 3, "uniform", "dynamic", False),
        base_us=dict.fromkeys(PROJECTION_KINDS, 10.0),
        rows=rows(),
        choices=[],
        environment={"hardware": "gpu"},
    )
    tuned = tuned_profile(profile, model, [10.0, 20.0], Setup(8, 4))
    for budget in tuned.choices:
        assert budget.measured_percent == pytest.approx(sum(budget.k_chunk) / 10, abs=1e-3)
        assert abs(budget.measured_percent - budget.target_percent) <= 1
        assert budget.baseline_tokens_per_second == 1
        assert (budget.gpu_bytes, budget.baseline_gpu_bytes) == (0, 0)  # on a CPU
    row = budget_rows(tuned)[0]
    assert row["link_percent"] is None, "nothing is known of that GPU's link"
    fast = replace(tuned.choices[0], tokens_per_second=5000.0)
    on_h200 = budget_rows(replace(tuned, gpu_key="h200", blocks=10_000, choices=[fast]))[0]
    share = 100 * on_h200["pcie_bytes_per_token"] * 5000 / 51.4e9
    assert on_h200["link_percent"] == pytest.approx(share, abs=0.01)
    assert share > 100  # which no measurement gives
    # 160 inputs are 5 of 32 channels, 4 bits of each output; down has 1120
    channels = [5 * k // 32 for k in row["k_chunk"][:3]] + [
        row["k_chunk"][3] + row["k_chunk"][3] * 96 // 1024
    ]
    outputs = [480, 160, 2240, 160]
    assert row["pcie_bytes_per_token"] == 2 * sum(c * o // 2 for c, o in zip(channels, outputs, strict=True))
    assert (row["shapes"], row["target_percent"], row["bits"]) == ("tiny", 10.0, 3)
    assert asked[0].selection == "none"
    assert asked[1].n_tb == 8
    assert state_of(model).compensation.selection == "none"


def test_the_command_predicts(
    tiny_artifact_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, figure = tmp_path / "p.json", tmp_path / "p.png"
    arguments = ["tune", str(tiny_artifact_dir), "--gpu", "rtx-4050-mobile", "--slowdown", "5", "20"]
    assert cli.main([*arguments, "--out", str(out), "--figure", str(figure)]) == 0
    profile = read_profile(out)
    assert profile.predicted
    assert profile.model == tiny_artifact_dir.name
    assert [budget.target_percent for budget in profile.choices] == [5, 20]
    assert all(budget.measured_percent is None for budget in profile.choices)
    printed = capsys.readouterr().out
    assert "3 bits uniform predicted" in printed
    assert "; of the two bandwidths 64.0" in printed
    assert figure.stat().st_size > 10_000


def test_the_command_predicts_for_quality_and_for_numbers(tiny_artifact_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "p.json"
    numbers = ["--gpu", "mine", "--memory-gb-s", "300", "--link-gb-s", "12"]
    quality = ["--objective", "quality", "--calibration", "pydoc", "--calibration-sequences", "1"]
    assert cli.main(["tune", str(tiny_artifact_dir), *numbers, *quality, "--out", str(out)]) == 0
    values = json.loads(out.read_text())
    assert values["gpu"] == "mine"
    assert {choice["objective"] for choice in values["choices"]} == {"quality"}
    assert [choice["target_percent"] for choice in values["choices"]] == [2.5, 5, 10, 20]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "tune must have either DIR or --shapes, got neither"),
        (["x", "--shapes", "llama-3-8b"], "tune must have either DIR or --shapes, got both"),
        (["--shapes", "llama-3-8b", "--gpu", "rtx-4090", "--tokens", "-5"], "tokens must be 2"),
        (
            ["--shapes", "llama-3-8b", "--gpu", "rtx-4090", "--calibration-sequences", "0"],
            "calibration sequences must be 1",
        ),
        (["--shapes", "llama-3-8b", "--gpu", "x"], "or any name with its bandwidths (--memory-gb-s, "),
        (
            ["--shapes", "llama-3-8b", "--gpu", "h200", "--link-gb-s", "3"],
            "must have a name of its own, got h200",
        ),
        (["--shapes", "llama-3-8b", "--objective", "quality"], "objective quality must be with an artifact"),
        (["--shapes", "llama-3-8b", "--link-gb-s", "3"], "--link-gb-s must be with --gpu NAME, got no name"),
        (
            ["--shapes", "llama-3-8b", "--gpu", "x", "--link-gb-s", "3"],
            "must have --memory-gb-s, got none",
        ),
        (["--shapes", "llama-3-8b", "--gpu", "rtx-4050"], "got 'rtx-4050' (did you mean 'rtx-4"),
        (["--shapes", "llama-3-8b", "--gpu", "rtx-4090", "--slowdown", "-1"], "slowdown must be 0 to 1000"),
        (["x", "--gpu", "rtx-4090", "--bits", "3"], "--bits must be absent with DIR, got 3"),
        (["nowhere", "--gpu", "rtx-4090"], "got nowhere"),
    ],
)
def test_refused_commands(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["tune", *arguments, "--out", str(tmp_path / "p.json")]) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"residual_bits": 8}, "residual_bits must be 4 for a budget, got 8"),
        ({"weight": WeightQuant("rtn", 5)}, "bits of a model with a budget must be one of 2, 3, 4, got 5"),
        ({"weight": WeightQuant("rtn", 3, 64)}, "group_size must be 128 for a budget, got 64"),
    ],
)
def test_layers_that_the_timed_kernels_do_not_take_are_refused(
    options: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_tiny(tmp_path / "a", **options)
    assert cli.main(["tune", str(folder), "--gpu", "rtx-4090", "--out", str(tmp_path / "p.json")]) == 2
    assert message in capsys.readouterr().err


def test_two_results_in_one_file_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = ["--out", str(tmp_path / "p.json"), "--json", str(tmp_path / "." / "p.json")]
    assert cli.main(["tune", "--shapes", "llama-3-8b", "--gpu", "h200", *files]) == 2
    assert "--out, --json and --figure must be different files, got" in capsys.readouterr().err


def test_a_target_named_twice_is_one(tiny_artifact_dir: Path, tmp_path: Path) -> None:
    out, rows = tmp_path / "p.json", tmp_path / "rows.json"
    arguments = ["tune", str(tiny_artifact_dir), "--gpu", "rtx-4090", "--slowdown", "5", "5.0"]
    assert cli.main([*arguments, "--out", str(out), "--json", str(rows)]) == 0
    assert len(read_profile(out).choices) == 1
    written = json.loads(rows.read_text())
    assert not written["measured"]
    assert len(written["rows"]) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a CUDA device")
def test_measuring_needs_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["tune", "--shapes", "llama-3-8b", "--out", str(tmp_path / "p.json")]) == 2
    assert "must have a CUDA device, or --gpu NAME to predict for, got neither" in capsys.readouterr().err


def test_an_unknown_target_in_a_profile_is_refused() -> None:
    with pytest.raises(DecDECError, match="target_percent must be 0 or more, got -1"):
        Budget(-1.0, 8, (1, 1, 1, 1), 0.0)
