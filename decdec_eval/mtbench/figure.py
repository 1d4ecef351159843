"""Scores as the radar that readers of MT-Bench know: a spoke for each category, a line for each model."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import patheffects
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from decdec_eval.mtbench.scores import ALL, HIGHEST, ScoreRow
from decdec_eval.presentation import save_figure

# Okabe and Ito's palette, told apart by all eyes, without its yellow, which is faint on white
_COLOURS = ("#000000", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_MARKERS = "osD^vPX*<>"  # ten, and seven colours: seventy models before two look the same
_LINES = ("-", "--", "-.", ":")
_NAMES = {"stem": "STEM"}
_LEGEND_CHARACTERS = 24
_TITLE_CHARACTERS = 100


def draw(rows: Sequence[ScoreRow], caption: str, path: Path) -> None:
    """Write the radar of `rows` to `path`, a .png, .svg or .pdf."""
    save_figure(radar(rows, caption), path)


def radar(rows: Sequence[ScoreRow], caption: str) -> Figure:
    """Return the figure: for each model of `rows` its scores of both turns, on an axis from 0 to 10.

    A category in which a model has no rating is a gap in its line, and the legend names it.
    """
    both = [row for row in rows if row.turn == "both"]
    categories = list(dict.fromkeys(row.category for row in both if row.category != ALL))
    angles = np.arange(len(categories)) * 2 * np.pi / len(categories)
    figure = plt.figure(figsize=(8, 5))
    # matplotlib's own layouts forget a circle's names: beside it is room for them, and for the legend
    axes = figure.add_axes((0.085, 0.07, 0.475, 0.76), projection="polar")
    _set_axes(axes, angles, categories)
    for index, model in enumerate(dict.fromkeys(row.model for row in both)):
        own = {row.category: row for row in both if row.model == model}
        scores = [row.score.mean if (row := own[category]).score else np.nan for category in categories]
        axes.plot(
            [*angles, angles[0]],
            [*scores, scores[0]],
            color=_COLOURS[index % len(_COLOURS)],
            marker=_MARKERS[index % len(_MARKERS)],
            linestyle=_LINES[index // len(_COLOURS) % len(_LINES)],
            markersize=5,
            linewidth=1.8,
            clip_on=False,  # a marker at 10 stays whole
            zorder=3,
            label=_label(own),
        )
    legend = figure.legend(
        loc="center left", bbox_to_anchor=(0.67, 0.45), frameon=False, fontsize=10, title="model: mean of all"
    )
    title = figure.suptitle(
        "\n".join(textwrap.wrap(caption, _TITLE_CHARACTERS)), fontsize=10, x=0.01, ha="left"
    )
    for text in (title, *legend.get_texts()):
        text.set_parse_math(False)  # a $ in a name is a $
    return figure


def _set_axes(axes: Any, angles: np.ndarray, categories: Sequence[str]) -> None:
    """Name the spokes and the rings, in text: polar axes' own tick labels lie under the lines, leave out 0,
    and are cut off where they are aligned away from the circle."""
    axes.set_theta_zero_location("N")
    axes.set_theta_direction(-1)
    axes.set_xticks(angles, [""] * len(angles))
    for angle, category in zip(angles, categories, strict=True):
        side = np.sin(angle)
        align = "center" if abs(side) < 0.1 else "left" if side > 0 else "right"
        name = _NAMES.get(category, category.capitalize())
        axes.text(angle, 1.06 * HIGHEST, name, fontsize=11, ha=align, va="center")
    axes.set_ylim(0, HIGHEST)
    rings = range(0, HIGHEST + 1, 2)
    axes.set_yticks(rings, [""] * len(rings))
    between = np.pi / len(categories)
    for ring in rings:
        text = axes.text(between, ring, str(ring), fontsize=9, ha="center", va="center", zorder=4)
        text.set_path_effects([patheffects.withStroke(linewidth=3, foreground="white")])
    axes.grid(color="#CCCCCC", linewidth=0.8)
    axes.spines["polar"].set_color("#999999")


def _label(own: dict[str, ScoreRow]) -> str:
    whole = own[ALL]
    mean = f"{whole.score.mean:.2f}" if whole.score else "none rated"
    lines = textwrap.wrap(f"{whole.model}: {mean}", _LEGEND_CHARACTERS)
    absent = [category for category, row in own.items() if category != ALL and row.score is None]
    if absent and whole.score:
        lines += textwrap.wrap(f"(no rating: {', '.join(absent)})", _LEGEND_CHARACTERS)
    return "\n".join(lines)
