"""Run files of several bases -> one table, one figure, and where 3 bits compensated pass 3.5 without."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib import pyplot as plt

from decdec_core.config import Compensation, DecDECError
from decdec_eval.compare_report import read_run
from decdec_eval.presentation import (
    MARKER,
    METHOD_NAMES,
    STYLE,
    line,
    paired,
    save_figure,
    with_error,
    write_table,
)

_BASE = ["method", "clustering", "bits", "residual_bits"]
_ORDER = ("none", "random", "static", "dynamic", "exact")
_TICKS = (20, 25, 30, 40, 50, 70, 100, 150, 200, 300, 500, 1000)
_EXACT = {"clustering": "exact"}
_WIDTH_COLOURS = ("#999999", "#56B4E9", "#D55E00", "#009E73")
_NEAR = 0.1  # of the bytes, where channels come in whole numbers


def write_bases(out: Path, paths: Iterable[Path]) -> str:
    """Write table.md, table.csv and, where there is something to draw, figure.png of the runs in `paths` to
    the folder `out`; return the table.

    Runs of different models or texts in one table raise DecDECError.
    """
    runs = [read_run(path) for path in paths]
    _require_comparable(runs)
    rows = table(runs)
    parts = [describe(runs), markdown(rows), *crossings(rows), *clustering_gains(rows)]
    if rows[rows.method != "full"].residual_bits.nunique() > 1:
        parts.append("\n".join(equal_bytes(rows)).strip())
    text = "\n\n".join(parts) + "\n"
    write_table(out, text, rows.drop(columns="window_nll"))
    names = ["table.md", "table.csv"] + (["figure.png"] if draw(rows, out / "figure.png") else [])
    return f"\n{text}\nwritten: {', '.join(str(out / name) for name in names)}"


def _require_comparable(runs: Sequence[dict[str, Any]]) -> None:
    if not runs:
        raise DecDECError("report must have at least one run, got none")
    for key in ("model", "task"):
        found = {str(run["configuration"][key]) for run in runs}
        if len(found) > 1:
            raise DecDECError(f"runs of one table must share {key}, got {' and '.join(sorted(found))}")


def table(runs: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """Return one row per run: its base, what that costs in memory and on disk, its compensation, its loss,
    and the loss less that of the same base without compensation, paired over windows."""
    rows = pd.DataFrame([_row(run) for run in runs])
    rows = rows.sort_values([*_BASE, "selection", "k_chunk"], kind="stable", ignore_index=True)
    plain = {tuple(row[key] for key in _BASE): row for row in rows.to_dict("records") if not row["k_chunk"]}
    changes = []
    for row in rows.to_dict("records"):
        baseline = plain.get(tuple(row[key] for key in _BASE))
        changes.append(paired(row["window_nll"], baseline["window_nll"] if baseline else None))
    return rows.assign(nll_change=[c for c, _ in changes], nll_change_stderr=[e for _, e in changes])


def _row(run: dict[str, Any]) -> dict[str, Any]:
    compensation, metrics = run["configuration"]["compensation"], run["metrics"]
    loss = {
        "perplexity": metrics["token_perplexity"],
        "perplexity_stderr": metrics["token_perplexity_stderr"],
        "nll": metrics["mean_nll"],
        "window_nll": metrics["window_nll"],
    }
    if compensation is None:
        return {
            "method": "full",
            "clustering": "",
            "bits": 0,
            "residual_bits": 0,
            "selection": "none",
            "k_chunk": 0,
            **loss,
        }
    weight, ledger = run["quantization"]["weight"], run["ledger"]
    return {
        "method": weight["method"],
        "clustering": weight["clustering"] or "",
        "bits": weight["bits"],
        "residual_bits": run["quantization"]["residual"]["bits"],
        "selection": compensation["selection"],
        "k_chunk": Compensation.from_dict(compensation).k_chunk[0],
        **loss,
        "bits_per_weight": ledger["bits_per_weight"],
        "kernel_bits_per_weight": ledger["kernel_bits_per_weight"],
        "gpu_bytes": ledger["gpu_bytes"],
        "host_bytes": ledger["host_bytes"],
        "disk_bytes": run["disk_bytes"],
        "bytes_per_token": ledger["bytes_per_token"],
    }


def describe(runs: Sequence[dict[str, Any]]) -> str:
    """Return the sentence that says what the table is of."""
    task = runs[0]["configuration"]["task"]
    hardware = " and ".join(sorted({run["environment"]["hardware"] for run in runs}))
    whole = [run for run in runs if run["configuration"]["compensation"] is None]
    full = f"; full precision {whole[0]['metrics']['token_perplexity']:.2f}" if whole else ""
    return (
        f"{runs[0]['configuration']['model']}: token perplexity on {task['text']}, {task['windows']} windows "
        f"of {task['window_length']} tokens{full}; measured on {hardware}, float32. Bits per weight count "
        "what the artifact has of the quantized layers for the GPU: codes, scales, zeros or tables, input "
        "scales; in kernels: the same in the CUDA kernels' order (to 4 bits; inputs padded to 128s); "
        "weights MB the whole model with embeddings in float32, residual MB host memory, disk MB the "
        f"folder. One standard error over windows is about {_relative_error(runs):.0%} of a perplexity; "
        "differences between columns, paired over windows, are known much better: table.csv has them with "
        "their errors, and some are below."
    )


def _relative_error(runs: Sequence[dict[str, Any]]) -> float:
    errors = [run["metrics"]["token_perplexity_stderr"] / run["metrics"]["token_perplexity"] for run in runs]
    return sum(errors) / len(errors)


def markdown(rows: pd.DataFrame) -> str:
    """Return the table for people: a line per base, a column per selection and k_chunk."""
    quantized = rows[rows.method != "full"]
    columns = quantized[["selection", "k_chunk"]].drop_duplicates()
    columns = columns.sort_values(["selection", "k_chunk"], key=_column_order)
    head = ["base", "bits", "bits per weight", "in kernels", "weights MB", "residual MB", "disk MB"]
    head += [s if s == "none" else f"{s} {k}" for s, k in columns.itertuples(index=False)]
    lines = [line(head), line(["---"] * len(head))]
    for key, group in quantized.groupby(_BASE, sort=False):
        first = group.iloc[0]
        cells = [_base_name(key), f"{key[2]:g}"]
        cells += [f"{first[name]:.2f}" for name in ("bits_per_weight", "kernel_bits_per_weight")]
        cells += [f"{first[name] / 1e6:.1f}" for name in ("gpu_bytes", "host_bytes", "disk_bytes")]
        for selection, k_chunk in columns.itertuples(index=False):
            found = group[(group.selection == selection) & (group.k_chunk == k_chunk)]
            cells.append(f"{found.perplexity.iloc[0]:.2f}" if len(found) else "")
        lines.append(line(cells))
    return "\n".join(lines)


def _column_order(column: pd.Series) -> pd.Series:
    return column.map(_ORDER.index) if column.name == "selection" else column


def _base_name(key: Sequence[Any]) -> str:
    method, clustering, _bits, residual_bits = key
    words = [METHOD_NAMES.get(method, method), "flash1d" if clustering == "flash1d" else ""]
    return " ".join([word for word in words if word] + ([f"r{residual_bits}"] if residual_bits != 4 else []))


def crossings(rows: pd.DataFrame) -> list[str]:
    """Return, for each base, how each k_chunk of dynamic selection compares with half a bit more of the same
    and none: the change of mean loss in nats, paired over windows, negative where compensation is better."""
    lines = []
    for key, group in rows[rows.method != "full"].groupby(_BASE, sort=False):
        base = dict(zip(_BASE, key, strict=True))
        against = _losses(rows, base | {"bits": base["bits"] + 0.5, "selection": "none"})
        dynamic = group[group.selection == "dynamic"]
        if against is not None and len(dynamic):
            changes = [
                f"k_chunk {row.k_chunk}: {with_error(*paired(row.window_nll, against))}"
                for row in dynamic.itertuples()
            ]
            lines.append(
                f"{_base_name(key)} {base['bits']:g} bits with dynamic compensation against "
                f"{base['bits'] + 0.5:g} without, nats: {'; '.join(changes)}."
            )
    return lines


def clustering_gains(rows: pd.DataFrame) -> list[str]:
    """Return how the optimal clustering compares with the heuristic one under each compensation."""
    lines = []
    heuristic = rows[rows.clustering == "flash1d"]
    for row in heuristic.sort_values(["selection", "k_chunk"], key=_column_order).to_dict("records"):
        other = _losses(rows, {**{key: row[key] for key in (*_BASE, "selection", "k_chunk")}, **_EXACT})
        if other is not None:
            name = row["selection"] if row["selection"] == "none" else f"{row['selection']} {row['k_chunk']}"
            lines.append(
                f"Optimal less heuristic clustering, {row['bits']:g} bits, {name}, nats: "
                f"{with_error(*paired(other, row['window_nll']))}."
            )
    return lines


def equal_bytes(rows: pd.DataFrame) -> list[str]:
    """Return a table of residuals of several widths under dynamic selection: the loss less that of the 4-bit
    residual that fetches as many bytes per token, to 10 %; cells without one stay empty."""
    dynamic = rows[(rows.selection == "dynamic") & (rows.method != "full")]
    widths = sorted(set(dynamic.residual_bits) - {4})
    lines = []
    for key, group in dynamic.groupby(["method", "clustering", "bits"], sort=False):
        lines += [
            "",
            f"{METHOD_NAMES.get(key[0], key[0])} {key[2]:g} bits, loss less that of the 4-bit residual, "
            "nats:",
            "",
        ]
        lines += [line(["KB per token", *(f"{bits}-bit residual" for bits in widths)])]
        lines += [line(["---"] * (len(widths) + 1))]
        for four in group[group.residual_bits == 4].sort_values("bytes_per_token").itertuples():
            cells = [f"{four.bytes_per_token / 1e3:.0f}"]
            for bits in widths:
                near = group[
                    (group.residual_bits == bits)
                    & ((group.bytes_per_token / four.bytes_per_token - 1).abs() <= _NEAR)
                ]
                cells.append(
                    with_error(*paired(near.iloc[0].window_nll, four.window_nll)) if len(near) else ""
                )
            lines.append(line(cells))
    return lines


def _losses(rows: pd.DataFrame, wanted: dict[str, Any]) -> list[float] | None:
    """Return the windows' losses of the run with these values, or None where there is none."""
    found = rows
    for name, value in wanted.items():
        found = found[found[name] == value]
    return found.iloc[0].window_nll if len(found) else None


def draw(rows: pd.DataFrame, path: Path) -> bool:
    """Write the figure that the rows have: perplexity against bytes fetched where residuals of several widths
    are compared, else against bits per weight; return False where there is but one of each."""
    quantized = rows[rows.method != "full"]
    full = rows[rows.method == "full"].perplexity
    if quantized.residual_bits.nunique() > 1:
        _draw_bytes(quantized, full, path)
    elif quantized.bits.nunique() > 1:
        _draw_bits(quantized, full, path)
    else:
        return False
    return True


def _draw_bits(quantized: pd.DataFrame, full: pd.Series, path: Path) -> None:
    methods = list(dict.fromkeys(quantized.method))
    figure, panels = plt.subplots(
        1,
        len(methods),
        figsize=(3.6 * len(methods) + 1.6, 4.2),
        sharex=True,
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for axes, method in zip(panels[0], methods, strict=True):
        part = quantized[quantized.method == method]
        # one clustering: the figure is of bits
        part = part[part.clustering.isin(["", "exact"])]
        curves = part.groupby(["selection", "k_chunk"])
        for selection, k_chunk in sorted(curves.groups, key=lambda key: (_ORDER.index(key[0]), key[1])):
            ordered = curves.get_group((selection, k_chunk)).sort_values("bits_per_weight")
            axes.plot(
                ordered.bits_per_weight,
                ordered.perplexity,
                marker=MARKER.get(selection, "o"),
                linestyle="--" if selection == "none" else "-",
                markersize=4,
                color=STYLE[selection][0],
                alpha=1.0 if selection == "none" else 0.3 + 0.7 * min(1.0, k_chunk / 128) ** 0.5,
                label="none" if selection == "none" else f"{selection} {k_chunk}",
            )
        _finish(axes, full, part.perplexity, METHOD_NAMES.get(method, method), "bits per weight")
    panels[0][0].set_ylabel("token perplexity (lower is better)")
    panels[0][-1].legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.02, 1), borderaxespad=0)
    save_figure(figure, path)


def _draw_bytes(quantized: pd.DataFrame, full: pd.Series, path: Path) -> None:
    figure, axes = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
    compensated = quantized[quantized.selection == "dynamic"]
    for colour, (bits, group) in zip(_WIDTH_COLOURS, compensated.groupby("residual_bits"), strict=False):
        ordered = group.sort_values("bytes_per_token")
        axes.plot(
            ordered.bytes_per_token / 1e3,
            ordered.perplexity,
            marker="o",
            color=colour,
            label=f"{bits}-bit residual",
        )
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    label = "KB fetched per token (dynamic selection)"
    _finish(axes, full, compensated.perplexity, _title(quantized), label)
    axes.set_ylabel("token perplexity (lower is better)")
    axes.legend(fontsize=8)
    save_figure(figure, path)


def _title(quantized: pd.DataFrame) -> str:
    pairs = quantized[["method", "bits"]].drop_duplicates().itertuples(index=False)
    return ", ".join(f"{METHOD_NAMES.get(method, method)} {bits:g} bits" for method, bits in pairs)


def _finish(axes: Any, full: pd.Series, values: pd.Series, title: str, label: str) -> None:
    for level in full:
        axes.axhline(level, color="black", linewidth=1, linestyle=":", label=f"full precision ({level:.1f})")
    axes.set_title(title)
    axes.set_xlabel(label)
    axes.set_yscale("log")
    axes.set_yticks([t for t in _TICKS if t <= max(values.max(), *axes.get_ylim())])
    axes.get_yaxis().set_major_formatter("{x:g}")
    axes.minorticks_off()
    axes.grid(alpha=0.3)
