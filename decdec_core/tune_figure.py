"""A profile as a picture: time against k_chunk, what was chosen, and where the analytic knee lies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from decdec_core.config import PROJECTION_KINDS
from decdec_core.files import whole_file
from decdec_core.latency import GPUS, Gpu, knee
from decdec_core.profiles import Profile
from decdec_core.tuner import TimingTable

_COLOURS = ("#56B4E9", "#0072B2", "#009E73", "#E69F00", "#CC79A7", "#D55E00")  # told apart by all eyes
_MARKERS = "os^Dv*"
_BESIDE = 1.5  # of the largest k_chunk that is marked: how far a panel reaches


def draw(profile: Profile, path: Path, gpu: Gpu | None = None) -> None:
    """Draw microseconds against k_chunk, a panel for each projection kind and a line for each n_tb.

    Marked are the product alone, the knee of two bandwidths (of `gpu`; by default of the profile's key, where
    that is known) and what was chosen for each target, on the line of its n_tb.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    table = profile.table()
    gpu = gpu or GPUS.get(profile.gpu_key)
    bend = knee(gpu, profile.bits) if gpu else None
    figure, axes = plt.subplots(1, len(PROJECTION_KINDS), figsize=(16, 5.6), layout="constrained")
    for number, axis in enumerate(axes):
        _panel(axis, profile, table, number, bend)
    made = "predicted by the analytic model, not measured" if profile.predicted else "measured"
    figure.suptitle(
        f"{profile.gpu}: {profile.model}, {profile.bits} bits {profile.format}, "
        f"selection {profile.selection}; times {made}"
    )
    with whole_file(path) as temporary:
        figure.savefig(temporary, dpi=130, format=path.suffix[1:] or "png")
    plt.close(figure)


def _panel(axis: Any, profile: Profile, table: TimingTable, number: int, bend: float | None) -> None:
    base = float(table.base_us[number])
    chosen = [choice for choice in profile.choices if choice.k_chunk[number]]
    marked = [choice.k_chunk[number] for choice in chosen] + ([bend] if bend else [])
    # with nothing to mark, all of it
    right = _BESIDE * max(marked, default=max(len(curves[number]) for curves in table.curves.values()))
    axis.axhline(base, color="#666666", linestyle="--", linewidth=1, label=f"product alone: {base:.1f} us")
    tops = [base]
    for index, (n_tb, curves) in enumerate(sorted(table.curves.items())):
        curve = curves[number][1 : int(right) + 2]
        colour = _COLOURS[index % len(_COLOURS)]
        axis.plot(np.arange(1, len(curve) + 1), curve, color=colour, label=f"n_tb {n_tb}")
        tops.append(float(curve[-1]))
    if bend:
        axis.axvline(bend, color="#333333", linestyle=":", label=f"knee of the bandwidths: {bend:.1f}")
    for choice in chosen:
        k_chunk = choice.k_chunk[number]
        index = profile.choices.index(choice)  # a target has one marker in all panels
        axis.plot(
            k_chunk,
            table.curves[choice.n_tb][number][k_chunk],
            _MARKERS[index % len(_MARKERS)],
            color="white",
            markeredgecolor="black",
            linestyle="none",
            zorder=3,
            label=f"{choice.target_percent:g} % {choice.objective}: k_chunk {k_chunk}, n_tb {choice.n_tb}",
        )
    # few blocks reach far above what any budget allows
    axis.set_ylim(0.95 * base, max(1.05 * base, min(max(tops), max(2 * base, 1.2 * sorted(tops)[1]))))
    axis.set_xlim(0, right)
    axis.set_title(PROJECTION_KINDS[number])
    axis.set_xlabel("k_chunk")
    axis.set_ylabel("microseconds")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.13), frameon=False)
