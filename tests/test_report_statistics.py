from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import run_files

from decdec_core.config import Compensation, DecDECError
from decdec_eval.bootstrap import Bootstrap
from decdec_eval.report.load import read_runs
from decdec_eval.report.statistics import pareto, points

BASE = ("awq", 3)
FEW = Bootstrap(500)


def made(selection: str, task: str = "perplexity", seed: int = 0) -> dict[str, Any]:
    return run_files.run(task, BASE, Compensation(selection, 16, seed=seed), None)


def full(task: str = "perplexity") -> dict[str, Any]:
    return run_files.run(task, None, None, None)


def points_of(out: Path, *runs: dict[str, Any]) -> pd.DataFrame:
    for run in runs:
        run_files.write_run(out, run)
    return points(read_runs(out), FEW).set_index("selection")


def test_differences_are_paired(tmp_path: Path) -> None:
    none, dynamic = made("none"), made("dynamic")
    found = points_of(tmp_path, full(), none, dynamic)
    a, b = dynamic["items"]["values"]["nll"], none["items"]["values"]["nll"]
    change = found.nll_vs_none["dynamic"]
    assert change.mean == pytest.approx(statistics.fmean(a) - statistics.fmean(b))
    error = statistics.stdev(x - y for x, y in zip(a, b, strict=True)) / math.sqrt(len(a))
    assert change.high - change.low == pytest.approx(2 * 1.96 * error, rel=0.2)
    # windows differ by much more than methods do
    assert error < found.nll_stderr["dynamic"] / 3
    assert found.nll_vs_full["dynamic"].mean > 0
    assert found.nll_vs_none["none"] is None
    assert found.nll_vs_full["full"] is None
    assert found.token_perplexity["dynamic"] == pytest.approx(dynamic["metrics"]["token_perplexity"])
    assert found.kl["dynamic"] == dynamic["metrics"]["kl"]
    assert found.kl_stderr["dynamic"] == dynamic["metrics"]["kl_stderr"]


def test_an_interval_that_holds_zero_says_so(tmp_path: Path) -> None:
    none, static = made("none"), made("static")
    nll = np.array(none["items"]["values"]["nll"])
    nll[::2] += 0.01
    nll[1::2] -= 0.01
    static["items"]["values"]["nll"] = nll.tolist()
    static["metrics"]["mean_nll"] = float(nll.mean())
    found = points_of(tmp_path, none, static, made("dynamic"))
    assert found.nll_vs_none["static"].holds_zero
    assert not found.nll_vs_none["dynamic"].holds_zero
    assert found.nll_vs_full["static"] is None  # full precision was not run


def test_seeds_are_averaged_and_their_spread_is_in_the_error(tmp_path: Path) -> None:
    runs = [made("random", seed=seed) for seed in range(3)]
    for run, shift in zip(runs, (-0.3, 0.0, 0.3), strict=True):
        run["items"]["values"]["nll"] = [x + shift for x in run["items"]["values"]["nll"]]
        run["metrics"]["mean_nll"] += shift
    found = points_of(tmp_path, made("none"), *runs).loc["random"]
    means = [run["metrics"]["mean_nll"] for run in runs]
    matrix = np.array([run["items"]["values"]["nll"] for run in runs])
    over_items = matrix.mean(axis=0).std(ddof=1) / math.sqrt(matrix.shape[1])
    assert found.seeds == 3
    assert found.nll == pytest.approx(statistics.fmean(means))
    assert found.nll_stderr == pytest.approx(
        math.hypot(over_items, statistics.stdev(means) / math.sqrt(3)), rel=1e-6
    )
    assert found.token_perplexity == pytest.approx(math.exp(statistics.fmean(means)))
    assert found.nll_vs_none.high - found.nll_vs_none.low > 0.4  # the seeds' own error is 0.17


def test_the_interval_over_seeds_and_items_holds_the_truth() -> None:
    draw, bootstrap, held = np.random.default_rng(3), Bootstrap(400), 0
    trials, seeds, items = 300, 5, 40
    for _ in range(trials):
        values = (
            draw.normal(0, 1, items) + draw.normal(0, 0.3, (seeds, 1)) + draw.normal(0, 0.5, (seeds, items))
        )
        low, high = bootstrap.interval(values, np.ones(items)) or (0, 0)
        held += low <= 0 <= high
    # five seeds know their own spread badly: 0.95 is what many would give
    assert 0.88 <= held / trials <= 0.98


def test_weights_of_items_are_taken(tmp_path: Path) -> None:
    none, dynamic = made("none", "fidelity"), made("dynamic", "fidelity")
    found = points_of(tmp_path, full("fidelity"), none, dynamic)
    weights = dynamic["items"]["weights"]
    changes = np.subtract(dynamic["items"]["values"]["kl"], none["items"]["values"]["kl"])
    assert found.kl_vs_none["dynamic"].mean == pytest.approx(np.average(changes, weights=weights))


def test_other_items_are_refused(tmp_path: Path) -> None:
    other = made("dynamic")
    other["items"]["ids"] = other["items"]["ids"][::-1]
    with pytest.raises(DecDECError, match="must have the same windows in the same order, got others in"):
        points_of(tmp_path, made("none"), other)


def test_answers_that_a_judge_left_unrated_take_no_part(tmp_path: Path) -> None:
    none, dynamic = made("none", "mt_bench"), made("dynamic", "mt_bench")
    for key in ("ids", "values"):
        items = dynamic["items"]
        if key == "ids":
            items["ids"] = items["ids"][1:]
        else:
            items["values"] = {name: values[1:] for name, values in items["values"].items()}
    found = points_of(tmp_path, none, dynamic)
    wanted = np.mean(np.subtract(dynamic["items"]["values"]["score"], none["items"]["values"]["score"][1:]))
    assert found.score_vs_none["dynamic"].mean == pytest.approx(wanted)


def test_lm_eval_metrics_are_those_that_all_runs_have(tmp_path: Path) -> None:
    none, dynamic = made("none", "bbh"), made("dynamic", "bbh")
    dynamic["metrics"] |= {"acc": 0.5, "acc_stderr": 0.1}
    for run in (none, dynamic):
        run["metrics"] |= {"f1,strict": 0.25, "f1_stderr,strict": 0.125}
    found = points_of(tmp_path, none, dynamic)
    assert found.metric_names["none"] == ("exact_match", "f1,strict")
    assert found["f1,strict_stderr"]["dynamic"] == 0.125
    assert found["f1,strict_vs_none"]["dynamic"] is None  # no items


def test_runs_that_share_no_metric_are_refused(tmp_path: Path) -> None:
    dynamic = made("dynamic", "bbh")
    dynamic["metrics"] = {"acc": 0.5}
    with pytest.raises(DecDECError, match="runs of task decdec_bbh_mini must share a metric, got none in"):
        points_of(tmp_path, made("none", "bbh"), dynamic)


def test_one_item_has_no_interval(tmp_path: Path) -> None:
    runs = [run_files.run("perplexity", BASE, Compensation(s, 16), None, items=1) for s in ("none", "static")]
    for run in runs:
        run["metrics"] = {
            name: None if name.endswith("stderr") else value for name, value in run["metrics"].items()
        }
    found = points_of(tmp_path, *runs)
    assert math.isnan(found.nll_vs_none["static"].low)
    assert math.isnan(found.nll_stderr["static"])


def test_diagnostics_are_no_points(tmp_path: Path) -> None:
    run_files.write_run(tmp_path, run_files.diagnostics())
    assert not len(points(read_runs(tmp_path)))


@pytest.mark.parametrize(
    ("costs", "values", "front"),
    [
        ([0, 1, 2], [3, 2, 1], [0, 1, 2]),
        ([0, 1, 2], [1, 2, 3], [0]),
        ([1, 1, 1], [3, 2, 2], [1]),
        ([2, 0, 1, 3], [1, 5, 2, 1], [1, 2, 0]),
        ([0, 1], [math.nan, 1], [1]),
        ([], [], []),
    ],
)
def test_the_front(costs: list[float], values: list[float], front: list[int]) -> None:
    assert pareto(costs, values) == front
