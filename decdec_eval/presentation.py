"""What every report shares: one style per selection, figures that a file decides, and honest digits."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import pandas as pd

from decdec_core.files import whole_file, write_text

matplotlib.use("Agg")
from matplotlib import pyplot as plt

# one colour per selection in every figure, distinct without colour vision too (Okabe and Ito's palette)
STYLE = {
    "full": ("#000000", "full precision"),
    "none": ("#999999", "none: quantized only"),
    "random": ("#E69F00", "random"),
    "static": ("#56B4E9", "static"),
    "dynamic": ("#D55E00", "dynamic (DecDEC)"),
    "exact": ("#009E73", "exact top-k"),
}
MARKER = {"random": "v", "static": "s", "dynamic": "o", "exact": "x"}
_ROUNDING = 1e-9
_NORMAL_95 = 1.96  # standard errors on either side
METHOD_NAMES = {"rtn": "RTN", "awq": "AWQ", "squeezellm": "SqueezeLLM", "gptq": "GPTQ"}


def line(cells: Iterable[str]) -> str:
    """Return one line of a Markdown table."""
    return "| " + " | ".join(cells) + " |"


def with_error(value: float | None, error: float | None) -> str:
    """Return "12.3 ± 0.4": no more digits than two of the error's; without an error, four figures."""
    if value is None or math.isnan(value):
        return ""
    if error is None or math.isnan(error) or error == 0:
        return f"{value:.4g}"
    digits = _digits(error)
    return f"{value:.{digits}f} ± {error:.{digits}f}"


def with_interval(value: float, low: float, high: float) -> str:
    """Return "-0.27 [-0.29, -0.25]", with "holds 0" where the 95 % interval does, and with as many digits as
    with_error gives; without an interval (nan), four figures."""
    if math.isnan(low) or math.isnan(high):
        return f"{value:.4g}"
    if high - low <= _ROUNDING * abs(value):  # all items differ alike
        return f"{value:.4g}" + ("" if value else ", holds 0")
    digits = _digits((high - low) / (2 * _NORMAL_95))
    shown = [f"{each:z.{digits}f}" for each in (value, low, high)]
    holds = ", holds 0" if low <= 0 <= high else ""
    return f"{shown[0]} [{shown[1]}, {shown[2]}]{holds}"


def _digits(error: float) -> int:
    return max(0, 1 - math.floor(math.log10(error)))


def paired(values: Sequence[float], baseline: Sequence[float] | None) -> tuple[float | None, float | None]:
    """Return the mean difference and its standard error over windows (None for one window or no baseline)."""
    if baseline is None:
        return None, None
    differences = [a - b for a, b in zip(values, baseline, strict=True)]
    count = len(differences)
    error = statistics.stdev(differences) / math.sqrt(count) if count > 1 else None
    return statistics.fmean(differences), error


def write_table(out: Path, text: str, rows: pd.DataFrame) -> None:
    """Write table.md, which is `text`, and table.csv to the folder `out`, made where it is not."""
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "table.md", text)
    write_text(out / "table.csv", rows.to_csv(index=False))


def save_figure(figure: Any, path: Path) -> None:
    """Write a figure, whole or not at all and the same bytes each time, and close it."""
    dated = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}
    form = path.suffix[1:]
    with whole_file(path) as temporary, plt.rc_context({"svg.hashsalt": "decdec"}):
        figure.savefig(temporary, dpi=150, format=form, metadata=dated.get(form))
    plt.close(figure)
