from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import run_files

from decdec_core.config import Compensation, DecDECError
from decdec_eval.report.load import read_runs

AWQ = ("awq", 3)


def one(selection: str = "dynamic", budget: run_files.Budget | None = None) -> dict[str, Any]:
    return run_files.run("perplexity", ("awq", 3), Compensation(selection, 16), budget)


def test_a_row_says_what_was_run(tmp_path: Path) -> None:
    path = run_files.write_run(tmp_path, one())
    row = read_runs(tmp_path).iloc[0]
    assert (row.file, row.base, row.selection, row.axis, row.level) == (
        path.name,
        "AWQ 3 bits",
        "dynamic",
        "k_chunk",
        16,
    )
    assert row.bits_per_weight == 3.2
    assert not row.predicted


def test_a_budget_is_an_axis_of_its_own(tmp_path: Path) -> None:
    run_files.write_run(tmp_path, one(budget=run_files.Budget("rtx-4050-mobile", 5.0, True)))
    row = read_runs(tmp_path).iloc[0]
    assert (row.axis, row.level, row.predicted, row.expected_percent) == ("rtx-4050-mobile", 5.0, True, 4.65)


def test_without_compensation_there_is_no_axis(tmp_path: Path) -> None:
    run_files.write_run(tmp_path, one("none"))
    run_files.write_run(tmp_path, run_files.run("perplexity", None, None, None))
    rows = read_runs(tmp_path)
    assert set(rows.base) == {"AWQ 3 bits", "full"}
    assert set(rows.axis) == {""}
    assert all(math.isnan(level) for level in rows.level)


def changed(change: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
    made = one()
    change(made)
    return made


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda run: run.update(format_version=2), "must be a run of format_version 1, got 2"),
        (lambda run: run.pop("format_version"), "must be a run of format_version 1, got None"),
        (lambda run: run.pop("metrics"), "must be a run with metrics, got None"),
        (lambda run: run["configuration"].pop("task"), "must be a whole run, got KeyError: 'task'"),
        (lambda run: run["configuration"]["task"].update(kind="perplexty"), "did you mean 'perplexity'?"),
        (lambda run: run["configuration"]["compensation"].update(k=1), "got unknown key 'k'"),
        (lambda run: run["configuration"]["base"]["weight"].update(bits=7), "bits must be one of"),
        (lambda run: run["items"]["values"]["nll"].pop(), "items' nll must be 20 like their ids, got 19"),
        (lambda run: run["metrics"].update(mean_nll=1.0), "items' mean nll must be the metric, 1, got"),
        (lambda run: run["items"].update(weights=[1.0]), "items' weights must be 20 like their ids, got 1"),
        (
            lambda run: run["configuration"]["task"].update(kind="diagnostics"),
            "diagnostics must have layers, got None",
        ),
    ],
)
def test_a_file_that_is_no_run_costs_one_line(
    change: Callable[[dict[str, Any]], Any], message: str, tmp_path: Path
) -> None:
    path = run_files.write_run(tmp_path, changed(change))
    with pytest.raises(DecDECError) as caught:
        read_runs(tmp_path)
    assert message in str(caught.value)
    assert path.name in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["{", "[]", "3", ""])
def test_what_is_no_json_of_a_run_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "a.json").write_text(text)
    with pytest.raises(DecDECError, match=r"a\.json must be a run"):
        read_runs(tmp_path)


def test_two_runs_of_one_cell_are_refused(tmp_path: Path) -> None:
    first = run_files.write_run(tmp_path, one())
    made = one()
    made["configuration"]["versions"] = {**made["configuration"]["versions"], "torch": "2.12.0"}
    second = run_files.write_run(tmp_path, made)
    with pytest.raises(DecDECError, match="must differ in more than versions") as caught:
        read_runs(tmp_path)
    assert all(path.name in str(caught.value) for path in (first, second))


def test_no_runs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DecDECError, match=r"a folder with runs/\*\.json, got .* without any"):
        read_runs(tmp_path)


def test_order_of_files_does_not_matter(tmp_path: Path) -> None:
    run_files.write_grid(tmp_path, bases=[AWQ], k_chunks=(8,))
    rows = read_runs(tmp_path)
    assert list(rows.file) == list(read_runs(tmp_path).file)
    assert len(rows) == 1 + 1 + 3 + 3  # full, none, random with three seeds, three others
    assert json.loads(rows.setting[0])["model"] == "smollm2"
