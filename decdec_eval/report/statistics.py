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
_OF_KIND = {"perplexity": ("nll", "kl", "top1"), "fidelity": ("kl", "top1"), "mt_bench": ("score",)}
_KEPT = [
    *("kind", "task", "model", "dtype", "device", "method", "bits", "expected_percent", "bits_per_weight"),
    *("gpu_bytes", "host_bytes", "bytes_per_token", "disk_bytes"),
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
    """Return one row per cell of `runs` (of load.read_runs; diagnostics are left out), sorted by setting, base
    and selection.

    Beside what the cell is: seeds, their number; commands, files; metric_names; for each metric its value,
    <metric>_stderr (nan where not known), <metric>_vs_none and <metric>_vs_full (a Difference or None); and
    token_perplexity with its error where the metric is nll.
    """
    bootstrap = bootstrap or Bootstrap()
    measured = runs[runs.kind != DIAGNOSTICS]
    rows = []
    for _, setting in measured.groupby("setting", sort=True):
        names = metric_names(setting)
        cells = {key: group for key, group in setting.groupby(CELL, dropna=False)}
        for group in cells.values():
            baselines = {
                "none": _baseline(setting, str(group.base.iloc[0]), "none"),
                "full": _baseline(setting, FULL, FULL),
            }
            rows.append(_point(group, names, baselines, bootstrap))
    if not rows:
        return pd.DataFrame(columns=[*CELL, *_KEPT, "seeds", "metric_names"])
    found = pd.DataFrame(rows)
    order = found.selection.map(SELECTIONS.index)
    full_first = found.base.ne(FULL)
    found = found.assign(order=order, quantized=full_first)
    found = found.sort_values(
        ["setting", "quantized", "method", "bits", "base", "axis", "order", "level", "k_chunk", "predicted"],
        kind="stable",
        ignore_index=True,
    )
    return found.drop(columns=["order", "quantized"])


def metric_names(setting: pd.DataFrame) -> list[str]:
    """Return what is compared in a setting: the metrics of its kind, or of an lm-eval task all that its runs
    share."""
    kind = setting.kind.iloc[0]
    if kind in _OF_KIND:
        return list(_OF_KIND[kind])
    shared = set.intersection(*(set(_numbers(metrics)) for metrics in setting.metrics))
    if not shared:
        files = ", ".join(setting.file)
        raise DecDECError(f"runs of task {setting.task.iloc[0]} must share a metric, got none in {files}")
    return sorted(shared)


def _numbers(metrics: Mapping[str, Any]) -> list[str]:
    return [
        name
        for name, value in metrics.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and not name.endswith("_stderr")
    ]


def _baseline(setting: pd.DataFrame, base: str, selection: str) -> pd.Series | None:
    found = setting[(setting.base == base) & (setting.selection == selection)]
    return found.iloc[0] if len(found) else None


def _point(
    group: pd.DataFrame,
    names: Sequence[str],
    baselines: Mapping[str, pd.Series | None],
    bootstrap: Bootstrap,
) -> dict[str, Any]:
    first = group.iloc[0]
    row: dict[str, Any] = {name: first[name] for name in [*CELL, *_KEPT]}
    row |= {
        "seeds": len(group),
        "metric_names": tuple(names),
        "commands": tuple(sorted({command for command in group.command if command})),
        "files": tuple(group.file),
    }
    for name in names:
        row[name], row[f"{name}_stderr"] = value_of(group, name)
        for which, baseline in baselines.items():
            itself = baseline is not None and baseline.file in tuple(group.file)
            found = None if baseline is None or itself else difference(group, baseline, name, bootstrap)
            row[f"{name}_vs_{which}"] = found
    if "nll" in names:
        row["token_perplexity"] = math.exp(row["nll"])
        row["token_perplexity_stderr"] = row["token_perplexity"] * row["nll_stderr"]
    return row


def value_of(group: pd.DataFrame, name: str) -> tuple[float, float]:
    """Return a metric's mean over the seeds of `group` and its standard error; nan for what is not known."""
    key = MEANS.get(name, name)
    each = [_float(metrics.get(key)) for metrics in group.metrics]
    given = [_float(metrics.get(f"{key}_stderr")) for metrics in group.metrics]
    mean = math.fsum(each) / len(each)
    if len(each) == 1:
        return mean, given[0]
    matrix, weights = items_of(group, name)
    over_items = float(np.sqrt(np.mean(np.square(given)))) if matrix is None else _stderr(matrix, weights)
    over_seeds = float(np.std(each, ddof=1)) / math.sqrt(len(each))
    return mean, math.hypot(over_items, over_seeds)


def items_of(group: pd.DataFrame, name: str) -> tuple[np.ndarray | None, np.ndarray]:
    """Return a metric's values, (seeds, items), and the items' weights; None where a run has no such items.
    Seeds of other items than each other's raise DecDECError."""
    found = [items["values"].get(name) if items else None for items in group["items"]]
    if any(values is None or not len(values) for values in found):
        return None, np.empty(0)
    first = group.iloc[0]
    for other in group.itertuples():
        _require_same_items(first["items"], other.items, (first.file, other.file))
    matrix = np.array(found, dtype=float)
    weights = first["items"].get("weights")
    return matrix, np.ones(matrix.shape[1]) if weights is None else np.array(weights, dtype=float)


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


def difference(
    group: pd.DataFrame, baseline: pd.Series, name: str, bootstrap: Bootstrap
) -> Difference | None:
    """Return how much more `group` has of a metric than `baseline` on the same items, those without a value
    for either left out; None where items are not known. Other items raise DecDECError."""
    matrix, weights = items_of(group, name)
    items = baseline["items"]
    other = items["values"].get(name) if items else None
    if matrix is None or not other:
        return None
    _require_same_items(items, group["items"].iloc[0], (baseline.file, group.file.iloc[0]))
    changes, weights = _known(matrix - np.array(other, dtype=float), weights)
    if not changes.size:
        return None
    mean = float((changes * weights).sum() / (weights.sum() * len(changes)))
    low, high = bootstrap.interval(changes * weights, weights) or (math.nan, math.nan)
    return Difference(mean, low, high)


def _require_same_items(one: Mapping[str, Any], other: Mapping[str, Any], files: Sequence[str]) -> None:
    if one["ids"] != other["ids"]:
        raise DecDECError(
            f"runs of one task must have the same {one.get('unit', 'item')}s in the same order, "
            f"got others in {files[1]} than in {files[0]}"
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
