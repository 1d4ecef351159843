"""python -m decdec_eval.report RESULTS: tables, figures and a page of RESULTS/runs/*.json.

Writes RESULTS/tables (Markdown, CSV, LaTeX), RESULTS/figures (SVG, PNG) and RESULTS/index.html, the same
bytes each time for the same runs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pandas as pd

from decdec_core.commandline import OneLineParser, run_command
from decdec_core.config import DecDECError
from decdec_core.files import write_text
from decdec_eval.report.diagnostics import diagnostics_of
from decdec_eval.report.figures import Drawn, figures_of, write_figures
from decdec_eval.report.load import read_runs
from decdec_eval.report.page import Section, page
from decdec_eval.report.statistics import points
from decdec_eval.report.tables import Table, tables_of, titles_of, write_tables

_KIND_ORDER = ("perplexity", "lm_eval", "fidelity", "mt_bench")


def write_report(out: Path) -> list[Path]:
    """Write tables, figures and the page of out/runs/*.json; return what was written.

    A file that is no run, and runs that cannot be compared, raise DecDECError, and nothing is written.
    """
    runs = read_runs(out)
    written: list[Path] = []
    sections = []
    for title, tables, drawn in list(_contents(points(runs))) + _diagnostics(runs):
        written += write_tables(out / "tables", tables)
        pictures = write_figures(out / "figures", drawn)
        written += [
            picture.path.with_name(f"{picture.path.stem}{s}")
            for picture in pictures
            for s in (".svg", ".png")
        ]
        sections.append(Section(title, tables, pictures))
    write_text(out / "index.html", page(sections))
    return [*written, out / "index.html"]


def _contents(found: pd.DataFrame) -> Iterator[tuple[str, list[Table], Iterator[Drawn]]]:
    titles = titles_of(sorted(set(found.setting)))
    for kind in _KIND_ORDER:
        for setting, group in found[found.kind == kind].groupby("setting", sort=True):
            title = titles[str(setting)]
            yield title, tables_of(group, title), figures_of(group, title)


def _diagnostics(runs: pd.DataFrame) -> list[tuple[str, list[Table], list[Drawn]]]:
    return [(tables[0].title, tables, drawn) for tables, drawn in diagnostics_of(runs)]


def left_over(out: Path, written: Sequence[Path]) -> list[Path]:
    """Return the files of out/tables and out/figures that this report did not write."""
    there = [path for folder in ("tables", "figures") for path in (out / folder).glob("*") if path.is_file()]
    return sorted(set(there) - set(written))


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the report; a refused input prints one line to standard error and returns 2."""
    parser = OneLineParser(prog="python -m decdec_eval.report", description=__doc__)
    parser.add_argument("results", type=Path, metavar="RESULTS", help="the folder with runs/*.json")
    options, unknown = parser.parse_known_args(arguments)
    parser.refuse(unknown)
    return run_command(lambda: _report(options), resumes=False)


def _report(options: argparse.Namespace) -> None:
    if not options.results.is_dir():
        raise DecDECError(f"RESULTS must be a folder with runs/*.json, got {options.results}")
    written = write_report(options.results)
    for path in left_over(options.results, written):
        print(f"not of these runs, left from before: {path}", file=sys.stderr)
    print(f"written: {len(written)} files; open {options.results / 'index.html'}")


if __name__ == "__main__":
    sys.exit(main())
