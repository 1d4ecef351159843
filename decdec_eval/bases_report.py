"""Run files of several bases -> one table, one figure, and where 3 bits compensated pass 3.5 without."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib import pyplot as plt

from decdec_core.config import Compensation, DecDECError
from decdec_eval.report import line, paired, read_run, save_figure, with_error

_BASE = ["method", "clustering", "bits", "residual_bits"]
_NAMES = {"rtn": "RTN", "awq": "AWQ", "squeezellm": "SqueezeLLM"}
_COLOURS = {
    "none": "#999999",
    "static": "#56B4E9",
    "dynamic": "#D55E00",
    "exact": "#009E73",
    "random": "#E69F00",
}


def write_bases(out: Path, paths: Iterable[Path]) -> str:
    """Write table.md, table.csv and figure.png of the runs in `paths` to the folder `out`; return the table.

    Runs of different models or texts in one table raise DecDECError.
    """
    runs = [read_run(path) for path in paths]
    _require_comparable(runs)
    rows = table(runs)
    text = f"{describe(runs)}\n\n{markdown(rows)}\n\n{crossings(runs)}\n"
    out.mkdir(parents=True, exist_ok=True)
    (out / "table.md").write_text(text, "utf-8")
    rows.drop(columns="window_nll").to_csv(out / "table.csv", index=False)
    draw(rows, out / "figure.png")
    return (
        f"\n{text}\nwritten: {', '.join(str(out / name) for name in ('table.md', 'table.csv', 'figure.png'))}"
    )


def _require_comparable(runs: Sequence[dict[str, Any]]) -> None:
    if not runs:
        raise DecDECError("report must have at least one run, got none")
    for key in ("model", "task"):
        found = {str(run["configuration"][key]) for run in runs}
        if len(found) > 1:
            raise DecDECError(f"runs of one table must share {key}, got {' and '.join(sorted(found))}")


def table(runs: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """Return one row per run: its base, what it costs in memory and on disk, its compensation, its loss."""
    rows = pd.DataFrame([_row(run) for run in runs])
    return rows.sort_values([*_BASE, "selection", "k_chunk"], kind="stable", ignore_index=True)


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
        "gpu_bytes": ledger["gpu_bytes"],
        "host_bytes": ledger["host_bytes"],
        "disk_bytes": run["disk_bytes"],
        "bytes_per_token": ledger["bytes_per_token"],
    }


def describe(runs: Sequence[dict[str, Any]]) -> str:
    """Return the sentence that says what the table is of."""
    task = runs[0]["configuration"]["task"]
    hardware = " and ".join(sorted({run["environment"]["hardware"] for run in runs}))
    full = [
        run["metrics"]["token_perplexity"] for run in runs if run["configuration"]["compensation"] is None
    ]
    return (
        f"{runs[0]['configuration']['model']}: token perplexity on {task['text']}, {task['windows']} windows "
        f"of {task['window_length']} tokens; full precision {full[0]:.2f}; measured on {hardware}, float32. "
        "Bits per weight count everything that the quantized layers keep on the GPU; GPU MB the whole model "
        "there, residual MB host memory, disk MB the artifact's folder. The standard error of a difference "
        "between two columns is in table.csv's windows, paired, and far below that of a perplexity."
    )


def markdown(rows: pd.DataFrame) -> str:
    """Return the table for people: a line per base, a column per selection and k_chunk."""
    quantized = rows[rows.method != "full"]
    columns = quantized[["selection", "k_chunk"]].drop_duplicates()
    columns = columns.sort_values(["selection", "k_chunk"], key=_column_order)
    head = ["base", "bits", "bits per weight", "GPU MB", "residual MB", "disk MB"]
    head += [s if s == "none" else f"{s} {k}" for s, k in columns.itertuples(index=False)]
    lines = [line(head), line(["---"] * len(head))]
    for key, group in quantized.groupby(_BASE, sort=False):
        first = group.iloc[0]
        cells = [_base_name(key), f"{key[2]:g}", f"{first.bits_per_weight:.2f}"]
        cells += [f"{first[name] / 1e6:.1f}" for name in ("gpu_bytes", "host_bytes", "disk_bytes")]
        for selection, k_chunk in columns.itertuples(index=False):
            found = group[(group.selection == selection) & (group.k_chunk == k_chunk)]
            cells.append(f"{found.perplexity.iloc[0]:.2f}" if len(found) else "")
        lines.append(line(cells))
    return "\n".join(lines)


def _column_order(column: pd.Series) -> pd.Series:
    order = ("none", "random", "static", "dynamic", "exact")
    return column.map(order.index) if column.name == "selection" else column


def _base_name(key: Sequence[Any]) -> str:
    method, clustering, _bits, residual_bits = key
    words = [_NAMES.get(method, method), "flash1d" if clustering == "flash1d" else ""]
    return " ".join([word for word in words if word] + ([f"r{residual_bits}"] if residual_bits != 4 else []))


def crossings(runs: Sequence[dict[str, Any]]) -> str:
    """Return, for each base of whole bits, how each k_chunk compares with half a bit more and none: the
    change of mean loss in nats, paired over windows, negative where compensation is better."""
    rows = table(runs)
    lines = []
    for (method, bits), group in rows[rows.method != "full"].groupby(["method", "bits"], sort=False):
        plain = rows[(rows.method == method) & (rows.bits == bits + 0.5) & (rows.selection == "none")]
        dynamic = group[group.selection == "dynamic"]
        if plain.empty or dynamic.empty:
            continue
        against = plain.iloc[0].window_nll
        changes = [
            f"k_chunk {row.k_chunk}: {with_error(*paired(row.window_nll, against))}"
            for row in dynamic.itertuples()
        ]
        lines.append(
            f"{_NAMES.get(method, method)} {bits:g} bits with dynamic compensation against {bits + 0.5:g} "
            f"without, nats: {'; '.join(changes)}."
        )
    return "\n\n".join(lines)


def draw(rows: pd.DataFrame, path: Path) -> None:
    """Write perplexity against bits per weight, a panel per method, a line per k_chunk."""
    quantized = rows[
        (rows.method != "full") & (rows.residual_bits == rows.residual_bits.where(rows.bits > 0).mode()[0])
    ]
    methods = list(dict.fromkeys(quantized.method))
    figure, panels = plt.subplots(
        1, len(methods), figsize=(4.2 * len(methods), 4.2), sharey=True, squeeze=False, layout="constrained"
    )
    for axes, method in zip(panels[0], methods, strict=True):
        part = quantized[quantized.method == method]
        for (selection, k_chunk), group in part.groupby(["selection", "k_chunk"]):
            ordered = group.sort_values("bits_per_weight")
            shade = 1.0 if selection == "none" else 0.35 + 0.65 * min(1.0, k_chunk / 128) ** 0.4
            axes.plot(
                ordered.bits_per_weight,
                ordered.perplexity,
                marker="o" if selection != "static" else "s",
                linestyle="--" if selection == "none" else "-",
                markersize=4,
                color=_COLOURS[str(selection)],
                alpha=shade,
                label="none" if selection == "none" else f"{selection} {k_chunk}",
            )
        for level in rows[rows.method == "full"].perplexity:
            axes.axhline(
                level, color="black", linewidth=1, linestyle=":", label=f"full precision ({level:.1f})"
            )
        axes.set_title(_NAMES.get(method, method))
        axes.set_xlabel("bits per weight on the GPU")
        axes.set_yscale("log")
        axes.set_yticks([20, 25, 30, 35, 40, 50, 60, 80, 100, 150, 200, 300])
        axes.get_yaxis().set_major_formatter("{x:g}")
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    panels[0][0].set_ylabel("token perplexity (lower is better)")
    panels[0][-1].legend(fontsize=7)
    save_figure(figure, path)
