"""Run files -> one table and one figure; `python -m decdec_eval.compare_report DIR` makes them again."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib import pyplot as plt

from decdec_core.commandline import run_command
from decdec_core.config import Compensation, DecDECError
from decdec_eval.presentation import MARKER, STYLE, line, paired, save_figure, with_error, write_table


def write_report(out: Path, paths: Iterable[Path]) -> str:
    """Write table.md, table.csv and figure.png of the runs in `paths` to the folder `out`.

    Returns the table as text for a terminal, with the names of what was written. Runs of different models,
    texts or artifacts in one table raise DecDECError.
    """
    runs = [read_run(path) for path in paths]
    _require_comparable(runs)
    rows = table(runs)
    caption = describe(runs)
    write_table(out, f"{caption}\n\n{markdown(rows)}\n", rows)
    draw(rows, caption, out / "figure.png")
    names = ", ".join(str(out / name) for name in ("table.md", "table.csv", "figure.png"))
    return f"\n{caption}\n\n{markdown(rows)}\n\nwritten: {names}"


def read_run(path: Path) -> dict[str, Any]:
    """Return one run; a file that is none raises DecDECError."""
    try:
        run = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise DecDECError(f"{path} must be a run's JSON file, got: {error}") from None
    for key in ("configuration", "metrics", "environment"):
        if not isinstance(run, dict) or key not in run:
            raise DecDECError(f"{path} must be a run with {key}, got none")
    return run


def _require_comparable(runs: Sequence[dict[str, Any]]) -> None:
    if not runs:
        raise DecDECError("report must have at least one run, got none")
    for key in ("model", "artifact_hash", "task"):
        found = {json.dumps(run["configuration"][key], sort_keys=True) for run in runs}
        if len(found) > 1:
            raise DecDECError(f"runs of one table must share {key}, got {' and '.join(sorted(found))}")


def table(runs: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """Return one row per run. `nll_change` is the mean loss less that of `none`, paired over windows."""
    baseline = next((r for r in runs if _selection(r) == "none"), None)
    return pd.DataFrame([_row(run, baseline) for run in runs])


def _row(run: dict[str, Any], baseline: dict[str, Any] | None) -> dict[str, Any]:
    metrics, ledger = run["metrics"], run.get("ledger") or {}
    compensation = run["configuration"]["compensation"]
    change, error = paired(metrics["window_nll"], baseline["metrics"]["window_nll"] if baseline else None)
    selected = compensation is not None and compensation["selection"] != "none"
    return {
        "selection": _selection(run),
        "k_chunk": Compensation.from_dict(compensation).k_chunk_text() if selected else "",
        "perplexity": metrics["token_perplexity"],
        "perplexity_stderr": metrics["token_perplexity_stderr"],
        "nll": metrics["mean_nll"],
        "nll_change": change,
        "nll_change_stderr": error,
        "bytes_per_token": ledger.get("bytes_per_token", 0),
        "time_s": run["time_s"],
    }


def _selection(run: dict[str, Any]) -> str:
    compensation = run["configuration"]["compensation"]
    return "full" if compensation is None else compensation["selection"]


def markdown(rows: pd.DataFrame) -> str:
    """Return the table for people: values with the standard errors that bound their digits."""
    head = ("selection", "k_chunk", "perplexity", "change of mean loss, nats", "KB fetched per token")
    lines = [line(head), line(["---"] * len(head))]
    for row in rows.to_dict("records"):
        lines.append(
            line(
                [
                    STYLE[row["selection"]][1],
                    row["k_chunk"],
                    with_error(row["perplexity"], row["perplexity_stderr"]),
                    ""
                    if row["selection"] == "none"
                    else with_error(row["nll_change"], row["nll_change_stderr"]),
                    f"{row['bytes_per_token'] / 1e3:.1f}" if row["bytes_per_token"] else "0",
                ]
            )
        )
    return "\n".join(lines)


def describe(runs: Sequence[dict[str, Any]]) -> str:
    """Return the sentence that says what a table is of."""
    run = runs[0]
    task, quantization = run["configuration"]["task"], run["quantization"]
    windows = "windows" if task["windows"] > 1 else "window"
    weight, residual = quantization["weight"], quantization["residual"]
    group = "" if weight["group_size"] is None else f" group {weight['group_size']}"
    return (
        f"{run['configuration']['model']}, {weight['method'].upper()} {weight['bits']}-bit{group}, "
        f"{residual['bits']}-bit residual; token perplexity on {task['text']}, "
        f"{task['windows']} {windows} of {task['window_length']} tokens ± standard error over windows; "
        f"measured on {run['environment']['hardware']}; change of mean loss is against none, paired; "
        f"calibrated on {quantization['provenance']['calibration']['text']}"
    )


def draw(rows: pd.DataFrame, caption: str, path: Path) -> None:
    """Write perplexity against k_chunk, one line per selection; full precision and none are levels."""
    figure, axes = plt.subplots(figsize=(7.2, 4.4), layout="constrained")
    curves = rows[rows.k_chunk.str.isdigit()]
    for name in ("none", "full"):
        for level in rows[rows.selection == name].perplexity:
            colour, label = STYLE[name]
            axes.axhline(level, color=colour, linestyle="--", linewidth=1, label=f"{label} ({level:.1f})")
    for name, group in curves.groupby("selection", sort=False):
        colour, label = STYLE[str(name)]
        ordered = group.assign(k=group.k_chunk.astype(int)).sort_values("k")
        values = f" ({ordered.perplexity.iloc[0]:.1f})" if len(ordered) == 1 else ""
        axes.plot(ordered.k, ordered.perplexity, marker=MARKER[str(name)], color=colour, label=label + values)
    if len(curves):
        ticks = sorted(curves.k_chunk.astype(int).unique())
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.minorticks_off()
    axes.set_xlabel("k_chunk: channels compensated per 1024")
    axes.set_ylabel("token perplexity (lower is better)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    axes.set_title("\n".join(caption.split("; ")[:2]), fontsize=8)
    save_figure(figure, path)


def main(arguments: Sequence[str] | None = None) -> int:
    """Make table and figure of the runs in DIR/runs again."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    return run_command(lambda: _report(given))


def _report(given: Sequence[str]) -> None:
    if len(given) != 1:
        raise DecDECError(f"report must be given one folder, got {len(given)} arguments")
    out = Path(given[0])
    runs = {path: read_run(path) for path in (out / "runs").glob("*.json")}
    if not runs:
        raise DecDECError(f"report must be given a folder with runs/*.json, got {out} without any")
    order = list(STYLE)
    paths = sorted(runs, key=lambda p: (order.index(_selection(runs[p])), _k_of(runs[p]), p.name))
    print(write_report(out, paths))


def _k_of(run: dict[str, Any]) -> tuple[int, ...]:
    compensation = run["configuration"]["compensation"]
    return tuple(compensation["k_chunk"]) if compensation else ()


if __name__ == "__main__":
    sys.exit(main())
