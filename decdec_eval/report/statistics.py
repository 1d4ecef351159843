"""Runs -> points: one row per cell, seeds averaged, with errors and paired differences.

A point's value is the mean over its seeds, and of perplexity exp of the mean loss. Its standard error covers
items (windows, questions, conversations) and seeds: the squares of both add up. Differences are to the same
base without compensation and to full precision, of the same items, with 95 % bootstrap intervals over items
and seeds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from decdec_core.config import DecDECError
from decdec_eval.bootstrap import Bootstrap
from decdec_eval.report.load import CELL, DIAGNOSTICS, FULL, MEANS

AGAINST = ("none", "full")
SAMPLES = 4000  # the ends of an interval differ by a hundredth of its width or two from draw to draw
Run = Mapping[str, Any]  # a row of load.read_runs
_OF_KIND = {"perplexity": ("nll", "kl", "top1"), "fidelity": ("kl", "top1"), "mt_bench": ("score",)}
_KEPT = [
    *("kind", "task", "model", "dtype", "device", "method", "bits", "expected_percent", "bits_per_weight"),
    *("gpu_bytes", "host_bytes", "bytes_per_token", "disk_bytes", "hardware", "commit", "versions"),
]
SELECTIONS = ("full", "none", "random", "static", "dynamic", "exact")


@dataclass(frozen=True)
class Difference:
    """A mean difference and its 95 % interval, whose ends are nan where there was one item."""

    mean: float
    low: float
    high: float

    @property
    def holds_zero(self) -> bool:
        return not (self.low > 0 or self.high < 0)


def points(runs: pd.DataFrame, bootstrap: Bootstrap | None = None) -> pd.DataFrame:
    """Return one row per cell of `runs` (of load.read_runs; diagnostics are left out), sorted by setting,
    base and selection.

    Beside what the cell is: seeds, their number; unit and item_count; commands, files; metric_names; for each
    metric its value, <metric>_stderr (nan where not known), <metric>_vs_none and <metric>_vs_full (a
    Difference or None); and token_perplexity with its error where the metric is nll.
    """
    bootstrap = bootstrap or Bootstrap(SAMPLES)
    settings: dict[str, list[Run]] = {}
    for run in runs[runs.kind != DIAGNOSTICS].to_dict("records"):
        settings.setdefault(run["setting"], []).append(run)
    rows = []
    for setting in settings.values():
        names = metric_names(setting)
        baselines = {(run["base"], run["selection"]): run for run in setting}
        cells: dict[tuple[str, ...], list[Run]] = {}
        for run in setting:
            cells.setdefault(tuple(str(run[name]) for name in CELL), []).append(run)
        for group in cells.values():
            against = {"none": baselines.get((group[0]["base"], "none")), "full": baselines.get((FULL, FULL))}
            rows.append(_point(group, names, against, bootstrap))
    rows.sort(key=_order)
    return pd.DataFrame(rows) if rows else pd.DataFrame(columns=[*CELL, *_KEPT, "seeds", "metric_names"])


def _order(row: Mapping[str, Any]) -> tuple[Any, ...]:
    quantized = row["base"] != FULL
    base = (quantized, row["method"], row["bits"] if quantized else 0.0, row["base"])
    level = math.inf if math.isnan(row["level"]) else row["level"]
    point = (row["axis"], SELECTIONS.index(row["selection"]), level, row["k_chunk"], row["predicted"])
    return (row["setting"], *base, *point, row["compensate"], row["n_tb"])


def metric_names(setting: Sequence[Run]) -> list[str]:
    """Return what is compared in a setting: the metrics of its kind, or of an lm-eval task all that its runs
    share."""
    kind = setting[0]["kind"]
    if kind in _OF_KIND:
        return list(_OF_KIND[kind])
    shared = set.intersection(*(_numbers(run["metrics"]) for run in setting))
    if not shared:
        files = ", ".join(run["file"] for run in setting)
        raise DecDECError(f"runs of task {setting[0]['task']} must share a metric, got none in {files}")
    return sorted(shared)


def _numbers(metrics: Mapping[str, Any]) -> set[str]:
    return {
        name
        for name, value in metrics.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and "_stderr" not in name
    }


def _point(
    group: Sequence[Run], names: Sequence[str], baselines: Mapping[str, Run | None], bootstrap: Bootstrap
) -> dict[str, Any]:
    row: dict[str, Any] = {name: group[0][name] for name in [*CELL, *_KEPT]}
    items = group[0]["items"] or {}
    row |= {
        "seeds": len(group),
        "unit": items.get("unit") or "",
        "item_count": len(items["ids"]) if items else math.nan,
        "metric_names": tuple(names),
        "commands": tuple(sorted({run["command"] for run in group if run["command"]})),
        "files": tuple(run["file"] for run in group),
    }
    for name in names:
        row[name], row[f"{name}_stderr"] = value_of(group, name)
        for which, baseline in baselines.items():
            itself = baseline is None or baseline["file"] in row["files"]
            row[f"{name}_vs_{which}"] = None if itself else difference(group, baseline, name, bootstrap)
    if "nll" in names:
        row["token_perplexity"] = math.exp(row["nll"])
        row["token_perplexity_stderr"] = row["token_perplexity"] * row["nll_stderr"]
    return row


def value_of(group: Sequence[Run], name: str) -> tuple[float, float]:
    """Return a metric's mean over the seeds of `group` and its standard error; nan for what is not known."""
    key = MEANS.get(name, name)
    each = [_float(run["metrics"].get(key)) for run in group]
    metric, comma, filtered = key.partition(",")  # lm-eval's "exact_match,strict-match"
    given = [_float(run["metrics"].get(f"{metric}_stderr{comma}{filtered}")) for run in group]
    mean = math.fsum(each) / len(each)
    if len(each) == 1:
        return mean, given[0]
    matrix, weights = items_of(group, name)
    over_items = float(np.sqrt(np.mean(np.square(given)))) if matrix is None else _stderr(matrix, weights)
    over_seeds = float(np.std(each, ddof=1)) / math.sqrt(len(each))
    return mean, math.hypot(over_items, over_seeds)


def items_of(group: Sequence[Run], name: str) -> tuple[np.ndarray | None, np.ndarray]:
    """Return a metric's values, (runs, items), and the items' weights, the least of the runs'; None where a
    run has no such items.

    Runs of other items than each other's raise DecDECError, but for scores of a judge, who may have left some
    answers unrated: of those, what all runs have.
    """
    if not all(run["items"] and run["items"]["values"].get(name) for run in group):
        return None, np.empty(0)
    every = [run["items"] for run in group]
    ids = every[0]["ids"]
    if group[0]["kind"] == "mt_bench":
        ids = [item for item in ids if all(item in items["ids"] for items in every)]
    else:
        for other in group[1:]:
            _require_same_items(group[0], other)
    places = [{item: place for place, item in enumerate(items["ids"])} for items in every]
    given = [items.get("weights") or [1.0] * len(items["ids"]) for items in every]

    def of(rows: Sequence[Sequence[float]]) -> np.ndarray:
        picked = [[row[at[item]] for item in ids] for row, at in zip(rows, places, strict=True)]
        return np.array(picked, dtype=float).reshape(len(rows), len(ids))

    return of([items["values"][name] for items in every]), of(given).min(axis=0)


def _stderr(matrix: np.ndarray, weights: np.ndarray) -> float:
    """Return the standard error over items of their weighted mean, averaged over seeds first."""
    values, weights = _known(matrix, weights)
    count = values.shape[1]
    if count < 2:
        return math.nan
    each = values.mean(axis=0)
    mean = (each * weights).sum() / weights.sum()
    squares = np.square(weights * (each - mean)).sum()
    return float(np.sqrt(squares * count / (count - 1)) / weights.sum())


def _known(matrix: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    known = ~np.isnan(matrix).any(axis=0)
    return matrix[:, known], weights[known]


def difference(group: Sequence[Run], baseline: Run, name: str, bootstrap: Bootstrap) -> Difference | None:
    """Return how much more `group`, the seeds of a cell, has of a metric than `baseline` on the same items,
    those without a value for either left out; None where items are not known. Other items raise
    DecDECError."""
    matrix, weights = items_of([*group, baseline], name)
    if matrix is None:
        return None
    changes, weights = _known(matrix[:-1] - matrix[-1], weights)
    if not changes.size:
        return None
    mean = float((changes * weights).sum() / (weights.sum() * len(changes)))
    low, high = bootstrap.interval(changes * weights, weights) or (math.nan, math.nan)
    return Difference(mean, low, high)


def _require_same_items(one: Run, other: Run) -> None:
    if one["items"]["ids"] != other["items"]["ids"]:
        raise DecDECError(
            f"runs of one task must have the same {one['items'].get('unit', 'item')}s in the same order, "
            f"got others in {other['file']} than in {one['file']}"
        )


def _float(value: Any) -> float:
    return math.nan if value is None else float(value)


def pareto(costs: Sequence[float], values: Sequence[float]) -> list[int]:
    """Return the places of the points to which no other is at once as cheap and as low, and better in one;
    of points that are the same, the first."""
    order = sorted(range(len(costs)), key=lambda i: (costs[i], values[i], i))
    front, best = [], math.inf
    for place in order:
        if values[place] < best:
            front.append(place)
            best = values[place]
    return front
