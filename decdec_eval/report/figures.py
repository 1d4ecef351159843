"""Points -> figures: quality against slowdown, k_chunk, bits and memory, and bars of tasks."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from decdec_eval.presentation import MARKER, METHOD_NAMES, STYLE, save_figure
from decdec_eval.report.load import FULL
from decdec_eval.report.statistics import SELECTIONS, pareto
from decdec_eval.report.tables import LOWER_IS_BETTER, axis_title, metric_title, slug

_FEW = 12  # values that have room beside their points
_LINE = {"linewidth": 1.5, "markersize": 5}
_SUFFIXES = (".svg", ".png")
_BITS = (("bits_per_weight", "bits per weight"), ("gpu_bytes", "weights in GPU memory, MB"))


@dataclass(frozen=True)
class Drawn:
    """A figure, what it is called, and what a reader must know of it. commands: that made its runs."""

    name: str
    title: str
    caption: str
    figure: Figure
    commands: tuple[str, ...]


@dataclass(frozen=True)
class Picture:
    """A figure's file, and what Drawn says of it."""

    path: Path
    title: str
    caption: str
    commands: tuple[str, ...]


def write_figures(folder: Path, drawn: Iterable[Drawn]) -> list[Picture]:
    """Write NAME.svg and NAME.png of each figure to `folder`, made where it is not; return the former."""
    folder.mkdir(parents=True, exist_ok=True)
    pictures = []
    for one in drawn:
        for suffix in _SUFFIXES:
            save_figure(one.figure, folder / f"{one.name}{suffix}")
        path = folder / f"{one.name}{_SUFFIXES[0]}"
        pictures.append(Picture(path, one.title, one.caption, one.commands))
    return pictures


def figures_of(points: pd.DataFrame, title: str) -> Iterator[Drawn]:
    """Yield the figures of one setting: of perplexity curves, of other tasks bars."""
    if points.kind.iloc[0] != "perplexity":
        if points.base.ne(FULL).any():
            yield _bars(points, title)
        return
    stated = points[(points.axis != "") & points.level.notna()]
    for axis in sorted(set(stated.axis)):
        part = pd.concat([stated[stated.axis == axis], points[points.axis == ""]])
        for method in _methods(part[part.axis == axis]):
            yield _curves(part[part.method.isin([method, FULL])], axis, method, title)
    for method in _methods(points):
        own = points[points.method.isin([method, FULL])]
        if own[own.base != FULL].bits.nunique() > 1:
            yield _against_bits(own, method, title)


def _methods(points: pd.DataFrame) -> list[str]:
    return sorted(set(points.method) - {FULL})


def _bases(points: pd.DataFrame) -> list[str]:
    return list(dict.fromkeys(points[points.base != FULL].base))


def _commands(points: pd.DataFrame) -> tuple[str, ...]:
    return tuple(sorted({command for commands in points.commands for command in commands}))


def _curves(points: pd.DataFrame, axis: str, method: str, title: str) -> Drawn:
    """Draw perplexity, and against k_chunk KL too, by selection, a panel for each base."""
    metrics = ["token_perplexity", "kl"] if axis == "k_chunk" else ["token_perplexity"]
    metrics = [metric for metric in metrics if points[metric].notna().any()]
    bases = [base for base in _bases(points) if (points[points.base == base].axis == axis).any()]
    figure, panels = panels_of(len(metrics), len(bases))
    for row, metric in enumerate(metrics):
        for place, base in enumerate(bases):
            axes = panels[row][place]
            _draw_curves(axes, points[points.base.isin([base, FULL])], metric, axis)
            if row == 0:
                axes.set_title(base, fontsize=10)
            if row == len(metrics) - 1:
                axes.set_xlabel(_x_label(points, axis))
        panels[row][0].set_ylabel(_y_label(metric))
    name = f"{title}, {METHOD_NAMES.get(method, method)}, {axis_title(axis)}"
    finish(figure, panels, name)
    return Drawn(slug(name), name, _curves_caption(points, axis), figure, _commands(points))


def _x_label(points: pd.DataFrame, axis: str) -> str:
    if axis == "k_chunk":
        return "k_chunk: channels of 1024"
    return f"slowdown on {axis}, %{_of_times(points[points.axis == axis])}"


def _of_times(points: pd.DataFrame) -> str:
    if points.predicted.all():
        return " (predicted)"
    return " (hollow: predicted)" if points.predicted.any() else " (measured)"


def _curves_caption(points: pd.DataFrame, axis: str) -> str:
    words = [
        "Bands: 95 % bootstrap interval of the difference to the same base without compensation, paired, or "
        "where that is not known one standard error"
    ]
    if axis != "k_chunk":
        words.append(
            "rings: the Pareto front, to which nothing measured is at once as fast and as good; "
            "the slowdown is the one asked for, which the table compares with what came of it"
        )
        if points.predicted.any():
            words.append("dashed and hollow: predicted slowdowns, by an analytic model of the GPU")
    return "; ".join(words) + "."


def _draw_curves(axes: Any, points: pd.DataFrame, metric: str, axis: str) -> None:
    _levels(axes, points, metric)
    own = points[points.axis == axis]
    few = len(own) <= _FEW
    for selection in SELECTIONS:
        rows = own[own.selection == selection].sort_values("level")
        if not len(rows):
            continue
        bands = [_band(row, points, metric) for row in rows.to_dict("records")]
        colour, label = STYLE[selection]
        axes.fill_between(
            rows.level, [low for low, _ in bands], [high for _, high in bands], color=colour, alpha=0.18, lw=0
        )
        predicted = bool(rows.predicted.all())
        style = {"linestyle": "--" if predicted else "-", "markerfacecolor": "white" if predicted else None}
        axes.plot(
            *(rows.level, rows[metric]), color=colour, marker=MARKER[selection], label=label, **style, **_LINE
        )
        if rows.predicted.nunique() > 1:
            hollow = rows[rows.predicted]
            axes.plot(
                *(hollow.level, hollow[metric]),
                **{**_LINE, "linestyle": "", "color": colour, "marker": MARKER[selection]},
                markerfacecolor="white",
            )
        if few or (axis == "k_chunk" and selection == "dynamic"):
            _print_values(axes, rows.level, rows[metric], metric, below=selection in ("dynamic", "exact"))
    if axis == "k_chunk":
        axes.set_xscale("log", base=2)
        ticks = sorted(set(own.level))
    else:
        ticks = [0.0, *sorted(set(own.level))]
        _draw_front(axes, points, own, metric, few)
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks], fontsize=8)
    axes.minorticks_off()
    axes.margins(x=0.1, y=0.12)


def _levels(axes: Any, points: pd.DataFrame, metric: str, left: bool = False) -> None:
    """Draw full precision and none as levels, with their values at the right end, or at the left."""
    for name in ("none", FULL):
        for level in points[points.selection == name][metric].dropna():
            if name == FULL and metric in ("kl", "top1"):
                continue  # 0 and 1, by definition
            colour, label = STYLE[name]
            axes.axhline(level, color=colour, linestyle=":", linewidth=1.2, label=label, zorder=1)
            axes.annotate(
                _short(level, metric),
                (0.01 if left else 0.99, level),
                xycoords=("axes fraction", "data"),
                textcoords="offset points",
                xytext=(0, 2),
                ha="left" if left else "right",
                fontsize=7,
                color="#555555",
            )


def _band(row: Mapping[str, Any], points: pd.DataFrame, metric: str) -> tuple[float, float]:
    none = points[points.selection == "none"]
    found = row.get("nll_vs_none" if metric == "token_perplexity" else f"{metric}_vs_none")
    if found is None or not len(none) or math.isnan(found.low):
        error = row[f"{metric}_stderr"]
        return row[metric] - error, row[metric] + error
    level = none[metric].iloc[0]
    if metric == "token_perplexity":
        return level * math.exp(found.low), level * math.exp(found.high)
    return level + found.low, level + found.high


def _draw_front(axes: Any, points: pd.DataFrame, own: pd.DataFrame, metric: str, printed: bool) -> None:
    none = points[points.selection == "none"].assign(level=0.0)
    if len(none):
        colour = STYLE["none"][0]
        axes.plot(none.level, none[metric], color=colour, marker="D", linestyle="", markersize=5)
    every = pd.concat([none, own])
    front = every.iloc[pareto(list(every.level), list(every[metric]))]
    axes.plot(
        front.level,
        front[metric],
        marker="o",
        markersize=11,
        markerfacecolor="none",
        markeredgecolor="#000000",
        markeredgewidth=0.9,
        linestyle="",
        label="Pareto front",
        zorder=5,
    )
    if not printed:
        _print_values(axes, front.level, front[metric], metric, below=True)


def _print_values(axes: Any, xs: Sequence[float], ys: Sequence[float], metric: str, below: bool) -> None:
    for x, y in zip(xs, ys, strict=True):
        axes.annotate(
            _short(y, metric),
            (x, y),
            textcoords="offset points",
            xytext=(0, -8 if below else 7),
            ha="center",
            va="top" if below else "bottom",
            fontsize=7,
        )


def _short(value: float, metric: str) -> str:
    return f"{value:.1f}" if metric == "token_perplexity" else f"{value:.3g}"


def common_point(points: pd.DataFrame) -> tuple[str, float] | None:
    """Return the axis and level that most bases and selections have; of several, on a measured slowdown
    before a predicted one and k_chunk last, the middle level."""
    stated = points[(points.axis != "") & points.level.notna()]
    if not len(stated):
        return None
    counts: dict[tuple[bool, bool, str, float], int] = {}
    predicted = stated.groupby("axis").predicted.any()
    for axis, level in zip(stated.axis, stated.level, strict=True):
        key = (axis == "k_chunk", bool(predicted[axis]), axis, level)
        counts[key] = counts.get(key, 0) + 1
    most = sorted(key for key, count in counts.items() if count == max(counts.values()))
    same = [key for key in most if key[:3] == most[0][:3]]
    return same[len(same) // 2][2:]


def _at_common_point(points: pd.DataFrame) -> tuple[pd.DataFrame, str]:
    """Return the points without compensation and those at the common point, and what that is."""
    found = common_point(points)
    if found is None:
        return points[points.axis == ""], "without compensation"
    axis, level = found
    chosen = points[(points.axis == "") | ((points.axis == axis) & (points.level == level))]
    if axis == "k_chunk":
        return chosen, f"k_chunk {level:g}"
    return chosen, f"slowdown {level:g} % on {axis}{_of_times(chosen[chosen.axis == axis])}"


def _against_bits(points: pd.DataFrame, method: str, title: str) -> Drawn:
    """Draw perplexity and KL against bits per weight and against GPU memory, by selection."""
    chosen, point = _at_common_point(points)
    metrics = [metric for metric in ("token_perplexity", "kl") if chosen[metric].notna().any()]
    figure, panels = panels_of(len(metrics), len(_BITS), width=4.2)
    for row, metric in enumerate(metrics):
        for axes, (column, label) in zip(panels[row], _BITS, strict=True):
            scale = 1e-6 if column == "gpu_bytes" else 1.0
            _levels(axes, chosen[chosen.base == FULL], metric, left=True)
            for selection in SELECTIONS[1:]:
                rows = chosen[(chosen.selection == selection) & chosen[column].notna()].sort_values(column)
                if len(rows):
                    colour, name = STYLE[selection]
                    xs = rows[column] * scale
                    marker = MARKER.get(selection, "D")
                    axes.plot(xs, rows[metric], color=colour, marker=marker, label=name, **_LINE)
                    if selection in ("none", "dynamic"):
                        _print_values(axes, xs, rows[metric], metric, below=selection == "dynamic")
            axes.margins(x=0.1, y=0.15)
            if row == len(metrics) - 1:
                axes.set_xlabel(label)
        panels[row][0].set_ylabel(_y_label(metric))
    name = f"{title}, {METHOD_NAMES.get(method, method)}, by bits and memory"
    finish(figure, panels, f"{name}; {point}")
    caption = f"Compensated points are those at {point}; their residuals are in host memory."
    return Drawn(slug(name), name, caption, figure, _commands(chosen))


def _bars(points: pd.DataFrame, title: str) -> Drawn:
    """Draw a bar for each base and selection, a panel for each metric; full precision is a level."""
    chosen, point = _at_common_point(points)
    metrics = list(chosen.metric_names.iloc[0])[:2]
    bases = _bases(chosen)
    shown = [s for s in SELECTIONS[1:] if (chosen.selection == s).any()]
    width = 0.8 / max(1, len(shown))
    figure, panels = panels_of(len(metrics), 1, width=max(5.5, 0.27 * len(bases) * len(shown) + 1.5))
    for (axes,), metric in zip(panels, metrics, strict=True):
        _levels(axes, chosen[chosen.base == FULL], metric)
        for number, selection in enumerate(shown):
            rows = chosen[chosen.selection == selection].drop_duplicates("base").set_index("base")
            places = [index for index, base in enumerate(bases) if base in rows.index]
            values = [rows[metric][bases[index]] for index in places]
            errors = [rows[f"{metric}_stderr"][bases[index]] for index in places]
            xs = [place + (number - (len(shown) - 1) / 2) * width for place in places]
            colour, label = STYLE[selection]
            hollow = [bool(rows.predicted[bases[index]]) for index in places]
            bars = axes.bar(xs, values, width * 0.92, color=colour, label=label, zorder=2)
            for bar, predicted in zip(bars, hollow, strict=True):
                if predicted:
                    bar.set(facecolor="white", edgecolor=colour, hatch="////")
            axes.errorbar(xs, values, errors, fmt="none", ecolor="#333333", capsize=2, linewidth=1, zorder=3)
            if len(bases) * len(shown) <= _FEW:
                tops = [v + (0 if math.isnan(e) else e) for v, e in zip(values, errors, strict=True)]
                for x, y, value in zip(xs, tops, values, strict=True):
                    axes.annotate(
                        f"{value:.3g}", (x, y), (0, 2), textcoords="offset points", ha="center", fontsize=7
                    )
        axes.set_xticks(range(len(bases)), bases, fontsize=8)
        axes.margins(y=0.12)
        axes.set_ylabel(_y_label(metric))
    finish(figure, panels, f"{title}; {point}")
    hatched = " Hatched: at a predicted slowdown." if chosen.predicted.any() else ""
    caption = f"Compensated bars are those at {point}; error bars are one standard error.{hatched}"
    return Drawn(slug(f"{title}, bars"), title, caption, figure, _commands(chosen))


def _y_label(metric: str) -> str:
    better = "lower" if metric in LOWER_IS_BETTER else "higher"
    return f"{metric_title(metric)}\n({better} is better)"


def panels_of(rows: int, columns: int, width: float = 3.4) -> tuple[Figure, Any]:
    """Return a figure and its panels, (rows, columns); `width` inches a column."""
    size = (max(6.0, width * columns + 0.6), 2.9 * rows + 1.1)
    return plt.subplots(rows, columns, figsize=size, sharex="col", squeeze=False, layout="constrained")


def finish(figure: Figure, panels: Any, title: str) -> None:
    """Give a figure its title and one legend for all of its panels."""
    labels: dict[str, Any] = {}
    for axes in panels.flat:
        axes.grid(alpha=0.3)
        axes.tick_params(labelsize=8)
        handles, names = axes.get_legend_handles_labels()
        for handle, name in zip(handles, names, strict=True):
            labels.setdefault(name, handle)
    lines = math.ceil(len(labels) / max(2, int(figure.get_figwidth() / 1.6)))
    columns = math.ceil(len(labels) / lines) if labels else 1
    figure.legend(labels.values(), labels.keys(), loc="outside lower center", ncols=columns, fontsize=8)
    figure.suptitle(title, fontsize=10).set_parse_math(False)
