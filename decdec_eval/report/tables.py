"""Points -> tables for people, as Markdown, CSV and LaTeX; page.py has them as HTML."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from decdec_core.files import write_text
from decdec_eval.presentation import STYLE, line, with_error, with_interval
from decdec_eval.report.load import CELL, FULL
from decdec_eval.report.statistics import AGAINST, Difference

COMMAND = "python -m decdec_eval.report RESULTS"
METRIC_NAMES = {
    "token_perplexity": "perplexity",
    "nll": "mean loss, nats",
    "kl": "KL from full precision, nats",
    "top1": "same top token",
    "score": "score",
    "exact_match": "exact match",
}
_LONGEST = 12  # characters of an argument in a title
LOWER_IS_BETTER = ("token_perplexity", "nll", "kl")
# what a table shows: the metric, and to what it is compared
_SHOWN: dict[str, list[tuple[str, tuple[str, ...]]]] = {
    "perplexity": [("token_perplexity", ()), ("nll", AGAINST), ("kl", ()), ("top1", ())],
    "fidelity": [("kl", ("none",)), ("top1", ("none",))],
}
_FIRST = [*CELL[1:], "seeds", "expected_percent", "bits_per_weight", "gpu_bytes", "host_bytes", "disk_bytes"]


@dataclass(frozen=True)
class Cell:
    """What a table says at one place. value: what it is sorted by, None for nothing; marks: "zero" where an
    interval holds zero, "predicted" where it was not measured."""

    text: str
    value: float | str | None = None
    marks: tuple[str, ...] = ()


@dataclass(frozen=True)
class Table:
    """A table for people. frame: the same with all digits, for CSV; commands: that made its runs."""

    name: str
    title: str
    caption: str
    head: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    frame: pd.DataFrame = field(repr=False, compare=False)
    commands: tuple[str, ...] = ()


def tables_of(points: pd.DataFrame, title: str) -> list[Table]:
    """Return a table of the points of one setting for each axis on which its compensation is stated: k_chunk,
    or the slowdown on a GPU. Each has full precision and the bases without compensation besides."""
    axes = [axis for axis in sorted(set(points.axis)) if axis] or [""]
    return [_table(points[points.axis.isin(["", axis])], title, axis) for axis in axes]


def titles_of(settings: Sequence[str]) -> dict[str, str]:
    """Return what each setting compares, "smollm2, perplexity on wikitext2, float32, cuda", with the
    arguments of the task by which several would otherwise be named alike."""
    titles = {setting: _title(json.loads(setting)) for setting in sorted(settings)}
    found = {}
    for setting, title in titles.items():
        tasks = [json.loads(other)["task"] for other in titles if titles[other] == title]
        task = json.loads(setting)["task"]
        differing = [key for key in sorted(task) if any(other.get(key) != task[key] for other in tasks)]
        words = [f"{key} {str(task[key])[:_LONGEST]}" for key in differing]
        found[setting] = ", ".join([title, *words])
    return found


def _title(setting: Mapping[str, Any]) -> str:
    task = setting["task"]
    name = task.get("name") or task["kind"]
    kinds = {"perplexity": f"perplexity on {name}", "lm_eval": name, "mt_bench": f"{name} scores"}
    words = [setting["model"].rpartition("/")[2], kinds.get(task["kind"], f"{task['kind']} on {name}")]
    if task.get("limit"):
        words.append(f"limit {task['limit']}")
    return ", ".join([*words, *(str(setting[key]) for key in ("dtype", "device") if setting[key])])


def slug(text: str) -> str:
    """Return text as a file's name has it."""
    return re.sub(r"[^a-z0-9._]+", "-", text.lower()).strip("-.")


def axis_title(axis: str) -> str:
    """Return by what points differ: "by k_chunk" or "by slowdown on h200"."""
    return {"": "without compensation", "k_chunk": "by k_chunk"}.get(axis, f"by slowdown on {axis}")


def metric_title(metric: str) -> str:
    """Return a metric's name for people."""
    return METRIC_NAMES.get(metric, metric.replace("_", " ").split(",")[0])


def _table(points: pd.DataFrame, setting: str, axis: str) -> Table:
    kind = points.kind.iloc[0]
    shown = _SHOWN.get(kind) or [(name, AGAINST) for name in points.metric_names.iloc[0]]
    budgeted = axis not in ("", "k_chunk")
    head = ["base", "bits per weight", "selection", "k_chunk"]
    head += [f"slowdown asked, % of {axis}", "slowdown, %"] if budgeted else []
    for metric, against in shown:
        name = metric_title(metric)
        if metric != "nll":
            head.append(name)
        head += [f"{name.split(',')[0]} less {STYLE[other][1].split(':')[0]}'s" for other in against]
    head += ["KB fetched per token", "weights MB"]
    rows = tuple(_row(row, shown, budgeted) for row in points.to_dict("records"))
    title = f"{setting}, {axis_title(axis)}"
    return Table(
        slug(title),
        title,
        _caption(points, budgeted),
        tuple(head),
        rows,
        frame_of(points),
        tuple(sorted({command for commands in points.commands for command in commands})),
    )


def description(points: pd.DataFrame) -> str:
    """Return what points of one setting were measured on: "20 windows, NVIDIA H200, torch 2.11.0, ..."."""
    counts = sorted({int(count) for count in points.item_count if not math.isnan(count)})
    units = sorted(set(points.unit) - {""})
    items = [f"{count} {unit}{'' if count == 1 else 's'}" for count in counts for unit in units]
    versions = {
        f"{name} {version}"
        for text in points.versions
        for name, version in json.loads(text).items()
        if name != "python"
    }
    commits = [f"commit {' and '.join(sorted(set(points.commit) - {'None'}))}"] if any(points.commit) else []
    return ", ".join([*items, *sorted(set(points.hardware) - {"None"}), *sorted(versions), *commits])


def _caption(points: pd.DataFrame, budgeted: bool) -> str:
    words = [
        description(points),
        "± is one standard error over items, and over seeds where there are several",
        "differences are paired, item by item, with 95 % bootstrap intervals; "
        '"holds 0" says that zero is one of the values that an interval holds',
    ]
    if budgeted and points.predicted.any():
        words.append(
            "a slowdown is measured on whole decoding steps, or predicted, of the linear layers alone"
            " by an analytic model of the GPU"
        )
    elif budgeted:
        words.append("slowdowns are measured on whole decoding steps")
    return "; ".join(words) + "."


def _row(
    row: Mapping[str, Any], shown: Sequence[tuple[str, tuple[str, ...]]], budgeted: bool
) -> tuple[Cell, ...]:
    base = "full precision" if row["base"] == FULL else row["base"]
    label = STYLE[row["selection"]][1] if row["base"] != FULL else ""
    if row["seeds"] > 1:
        label += f", {row['seeds']} seeds"
    k_chunk = row["k_chunk"]
    order = None if not k_chunk else sum(map(int, k_chunk.split("/"))) / (k_chunk.count("/") + 1)
    cells = [Cell(base, base), _plain(row["bits_per_weight"], ".2f"), Cell(label, label or None)]
    cells.append(Cell(k_chunk, order))
    if budgeted:
        cells += _slowdown(row)
    for metric, against in shown:
        if metric != "nll":
            value = row[metric]
            text = with_error(value, row[f"{metric}_stderr"])
            cells.append(Cell(text, None if math.isnan(value) else value))
        cells += [_difference(row[f"{metric}_vs_{other}"]) for other in against]
    compensated = row["selection"] not in (FULL, "none")
    fetched = row["bytes_per_token"] / 1e3 if compensated else math.nan
    return (*cells, _plain(fetched, ".1f"), _plain(row["gpu_bytes"] / 1e6, ".1f"))


def _slowdown(row: Mapping[str, Any]) -> list[Cell]:
    if math.isnan(row["level"]):
        return [Cell(""), Cell("")]
    asked, expected = _plain(row["level"], "g"), row["expected_percent"]
    word = "predicted" if row["predicted"] else "measured"
    text = word if math.isnan(expected) else f"{expected:.1f} {word}"
    value = None if math.isnan(expected) else expected
    return [asked, Cell(text, value, ("predicted",) if row["predicted"] else ())]


def _plain(value: float, form: str) -> Cell:
    return Cell("") if math.isnan(value) else Cell(format(value, form), value)


def _difference(found: Difference | None) -> Cell:
    if found is None:
        return Cell("")
    marks = ("zero",) if found.holds_zero else ()
    return Cell(with_interval(found.mean, found.low, found.high), found.mean, marks)


def frame_of(points: pd.DataFrame) -> pd.DataFrame:
    """Return all digits: one row per point, a difference as mean, low and high."""
    rows = []
    for row in points.to_dict("records"):
        flat = {name: row[name] for name in ("model", "task", "dtype", "device", *_FIRST)}
        flat["bytes_per_token"] = row["bytes_per_token"]
        names = [name for name in ("token_perplexity",) if name in row and not math.isnan(row[name])]
        for name in (*names, *row["metric_names"]):
            flat |= {name: row[name], f"{name}_stderr": row[f"{name}_stderr"]}
            for other in AGAINST:
                found = row.get(f"{name}_vs_{other}")
                if name not in names:
                    ends = (found.mean, found.low, found.high) if found else (math.nan,) * 3
                    for end, value in zip(("", "_low", "_high"), ends, strict=True):
                        flat[f"{name}_less_{other}{end}"] = value
        flat["runs"] = " ".join(row["files"])
        rows.append(flat)
    return pd.DataFrame(rows)


def markdown(table: Table) -> str:
    """Return the table, what it says and the command that makes it again, as Markdown."""
    lines = [line(table.head), line(["---"] * len(table.head))]
    lines += [line([cell.text.replace("|", "\\|") for cell in row]) for row in table.rows]
    commands = "\n".join(f"    {command}" for command in (*table.commands, COMMAND))
    return "\n\n".join([f"# {table.title}", table.caption, "\n".join(lines), commands]) + "\n"


def latex(table: Table) -> str:
    """Return the table as a longtable with booktabs' rules."""
    columns = "".join("r" if _is_number(table, place) else "l" for place in range(len(table.head)))
    lines = [f"% {command}" for command in (*table.commands, COMMAND)]
    lines += [r"% needs \usepackage{booktabs,longtable}", rf"\begin{{longtable}}{{{columns}}}"]
    lines.append(rf"\caption{{{_tex(f'{table.title}. {table.caption}')}}}\\")
    lines += [r"\toprule", _tex_row(table.head), r"\midrule", r"\endhead", r"\bottomrule", r"\endfoot"]
    lines += [_tex_row([cell.text for cell in row]) for row in table.rows]
    return "\n".join([*lines, r"\end{longtable}"]) + "\n"


def _is_number(table: Table, place: int) -> bool:
    return not any(isinstance(row[place].value, str) for row in table.rows)


def _tex_row(cells: Iterable[str]) -> str:
    return " & ".join(_tex(cell) for cell in cells) + r" \\"


_TEX = {
    **{character: rf"\{character}" for character in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
}


def _tex(text: str) -> str:
    escaped = "".join(_TEX.get(character, character) for character in text)
    return re.sub(r"(?<![\w-])-(?=[\d.])", "$-$", escaped)


def write_tables(folder: Path, tables: Sequence[Table]) -> list[Path]:
    """Write NAME.md, NAME.csv and NAME.tex of each table to `folder`, made where it is not; return them."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for table in tables:
        texts = {"md": markdown(table), "csv": table.frame.to_csv(index=False), "tex": latex(table)}
        for suffix, text in texts.items():
            # not with_suffix: names have dots
            path = folder / f"{table.name}.{suffix}"
            write_text(path, text)
            written.append(path)
    return written
