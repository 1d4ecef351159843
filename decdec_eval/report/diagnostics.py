"""Files of `decdec_eval.diagnostics` -> recall and energy by projection kind, and the map of outliers."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd

from decdec_core.config import DecDECError
from decdec_eval.presentation import MARKER, STYLE, with_error
from decdec_eval.report.figures import Drawn, finish, panels_of
from decdec_eval.report.load import DIAGNOSTICS
from decdec_eval.report.statistics import SELECTIONS
from decdec_eval.report.tables import Cell, Table, slug

_SHOWN = {"recall": "recall of exact's channels", "energy_left": "error energy left"}
_MAP = "#0072B2"  # of the same palette, and no selection's
_ALWAYS = 0.5  # of the steps: a channel that is an outlier in as many is marked


def diagnostics_of(runs: pd.DataFrame) -> Iterator[tuple[list[Table], list[Drawn]]]:
    """Yield the table and figures of each diagnostics file."""
    found = runs[runs.kind == DIAGNOSTICS]
    for place, run in enumerate(found.to_dict("records")):
        title = f"{run['model'].rpartition('/')[2]}, {run['base']}, diagnostics on {run['task']}"
        name = slug(title if place == 0 else f"{title}, {run['file'][:6]}")
        try:
            rows = shares_of(run["layers"])
            drawn = [_draw_shares(rows, title, name, run)]
            if run["outliers"]:
                drawn.append(_draw_outliers(run["outliers"], title, name, run))
        except (KeyError, TypeError, ValueError) as error:
            raise DecDECError(
                f"{run['file']} must have layers and outliers, got {type(error).__name__}: {error}"
            ) from None
        yield [_table(rows, title, name, run)], drawn


def shares_of(layers: Mapping[str, Any]) -> pd.DataFrame:
    """Return one row per kind, measure, selection and k_chunk: its mean and standard error over layers."""
    rows = []
    for kind, measures in layers.items():
        for measure in _SHOWN:
            for selection, values in measures.get(measure, {}).items():
                if isinstance(values, Mapping):  # none's energy is the number 1
                    for k_chunk, (mean, error) in values.items():
                        rows.append((kind, measure, selection, int(k_chunk), mean, error))
    frame = pd.DataFrame(rows, columns=["kind", "measure", "selection", "k_chunk", "mean", "stderr"])
    return frame.astype({"mean": float, "stderr": float})


def _commands(run: Mapping[str, Any]) -> tuple[str, ...]:
    return (run["command"],) if run["command"] else ()


def _table(rows: pd.DataFrame, title: str, name: str, run: Mapping[str, Any]) -> Table:
    columns = [
        (measure, selection)
        for measure in _SHOWN
        for selection in SELECTIONS
        if ((rows.measure == measure) & (rows.selection == selection)).any()
    ]
    lines = []
    for (kind, k_chunk), group in rows.groupby(["kind", "k_chunk"], sort=False):
        cells = [Cell(str(kind), str(kind)), Cell(str(k_chunk), float(k_chunk))]
        for measure, selection in columns:
            found = group[(group.measure == measure) & (group.selection == selection)]
            cells += [Cell(with_error(m, e), m) for m, e in zip(found["mean"], found["stderr"], strict=True)]
            cells += [Cell("")] * (1 - len(found))
        lines.append(tuple(cells))
    head = ["layers", "k_chunk", *(f"{_SHOWN[measure]}, {selection}" for measure, selection in columns)]
    caption = (
        "Recall: the share of exact selection's channels that another finds; energy: squared output error, "
        "of that without compensation; means over layers ± one standard error over layers."
    )
    return Table(name, title, caption, tuple(head), tuple(lines), rows, _commands(run))


def _draw_shares(rows: pd.DataFrame, title: str, name: str, run: Mapping[str, Any]) -> Drawn:
    kinds = list(dict.fromkeys(rows.kind))
    figure, panels = panels_of(len(_SHOWN), len(kinds), width=2.7)
    ticks = sorted(set(rows.k_chunk))
    for row, (measure, label) in zip(panels, _SHOWN.items(), strict=True):
        for axes, kind in zip(row, kinds, strict=True):
            for selection in SELECTIONS:
                part = rows[(rows.kind == kind) & (rows.measure == measure) & (rows.selection == selection)]
                part = part.sort_values("k_chunk")
                if len(part):
                    colour, text = STYLE[selection]
                    errors = part["stderr"].fillna(0.0)
                    low, high = part["mean"] - errors, part["mean"] + errors
                    axes.fill_between(part.k_chunk, low, high, color=colour, alpha=0.18, lw=0)
                    marker = MARKER.get(selection, "D")
                    axes.plot(part.k_chunk, part["mean"], color=colour, marker=marker, ms=4, label=text)
            axes.set_xscale("log", base=2)
            axes.set_xticks(ticks, [str(tick) for tick in ticks])
            axes.minorticks_off()
            axes.set_ylim(-0.03, 1.05)
            if measure == "recall":
                axes.set_title(kind, fontsize=10)
            else:
                axes.set_xlabel("k_chunk")
        row[0].set_ylabel(label)
    finish(figure, panels, title)
    caption = "Bands: one standard error over layers."
    return Drawn(f"{name}-recall", f"{title}: recall and energy", caption, figure, _commands(run))


def _draw_outliers(outliers: Mapping[str, Any], title: str, name: str, run: Mapping[str, Any]) -> Drawn:
    """Draw a mark for each channel that is an outlier in a step; those that are in most steps are named."""
    top: Sequence[Sequence[int]] = outliers["top"]
    steps = [step for step, channels in enumerate(top) for _ in channels]
    channels = [channel for channels in top for channel in channels]
    often = [c for c, count in sorted(Counter(channels).items()) if count >= _ALWAYS * len(top)]
    figure, axes = plt.subplots(figsize=(8.0, 4.6), layout="constrained")
    axes.scatter(steps, channels, s=5, marker="s", linewidths=0, color=_MAP, label="in some steps")
    fixed = [(step, channel) for step, channel in zip(steps, channels, strict=True) if channel in often]
    if fixed:
        label = f"in at least {100 * _ALWAYS:g} % of the steps"
        axes.scatter(*zip(*fixed, strict=True), s=5, marker="s", linewidths=0, color="#000000", label=label)
    axes.set_xlim(-1, len(top))
    axes.set_ylim(-0.01 * outliers["in_features"], 1.01 * outliers["in_features"])
    axes.set_xlabel("decoding step")
    axes.set_ylabel("input channel")
    size = len(top[0]) if top else 0
    axes.set_title(f"{outliers['layer']}: the {size} largest of {outliers['in_features']}", fontsize=10)
    figure.legend(loc="outside lower center", ncols=2, fontsize=8, markerscale=2)
    share = outliers.get("persistent_share", math.nan)
    words = [f"{outliers['steps']} decoding steps, in all {len(set(channels))} channels"]
    if not math.isnan(share):
        words.append(f"{share:.0%} of a step's are among the calibration text's largest")
    caption = "; ".join(words) + "."
    return Drawn(f"{name}-outliers", f"{title}: activation outliers", caption, figure, _commands(run))
