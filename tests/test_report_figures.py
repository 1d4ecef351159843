from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import matplotlib.colors
import pandas as pd
import pytest
import run_files
from matplotlib import pyplot as plt

from decdec_core.config import DecDECError
from decdec_eval.bootstrap import Bootstrap
from decdec_eval.presentation import STYLE
from decdec_eval.report.diagnostics import diagnostics_of, shares_of
from decdec_eval.report.figures import Drawn, common_point, figures_of, write_figures
from decdec_eval.report.load import read_runs
from decdec_eval.report.statistics import points
from decdec_eval.report.tables import titles_of

BASES = [("awq", 3), ("awq", 4)]
BUDGETS = [run_files.Budget("h200", s, False) for s in (2.5, 5.0, 10.0)]
PREDICTED = [run_files.Budget("rtx-4050-mobile", 5.0, True)]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> pd.DataFrame:
    out = tmp_path_factory.mktemp("figures")
    run_files.write_grid(
        out, BASES, (8, 64), [*BUDGETS, *PREDICTED], tasks=("perplexity", "fidelity"), seeds=2
    )
    return points(read_runs(out), Bootstrap(200))


@pytest.fixture(scope="module")
def drawn(found: pd.DataFrame) -> dict[str, Drawn]:
    titles = titles_of(sorted(set(found.setting)))
    every = [
        one for setting, group in found.groupby("setting") for one in figures_of(group, titles[str(setting)])
    ]
    return {one.name.removeprefix("smollm2-").replace("-float32-cuda", ""): one for one in every}


def test_every_figure_of_the_grid_is_there(drawn: dict[str, Drawn]) -> None:
    assert set(drawn) == {
        "perplexity-on-wikitext2-awq-by-slowdown-on-h200",
        "perplexity-on-wikitext2-awq-by-slowdown-on-rtx-4050-mobile",
        "perplexity-on-wikitext2-awq-by-k_chunk",
        "perplexity-on-wikitext2-awq-by-bits-and-memory",
        "fidelity-on-mt_bench-bars",
    }
    assert all(one.commands == (run_files.COMMAND,) for one in drawn.values())


def test_a_selection_has_one_colour_everywhere(drawn: dict[str, Drawn]) -> None:
    for one in drawn.values():
        legend = one.figure.legends[0]
        for handle, text in zip(legend.legend_handles, legend.get_texts(), strict=True):
            for colour, label in STYLE.values():
                if text.get_text() == label:
                    shown = handle.get_facecolor() if hasattr(handle, "get_facecolor") else handle.get_color()
                    assert matplotlib.colors.same_color(shown, colour)


def test_the_front_is_ringed_and_its_values_are_printed(drawn: dict[str, Drawn]) -> None:
    axes = drawn["perplexity-on-wikitext2-awq-by-slowdown-on-h200"].figure.axes[0]
    rings = next(line for line in axes.get_lines() if line.get_label() == "Pareto front")
    assert list(rings.get_xdata()) == [0, 2.5, 5, 10]
    assert list(rings.get_ydata()) == sorted(rings.get_ydata(), reverse=True)
    printed = {text.get_text() for text in axes.texts}
    assert {f"{value:.1f}" for value in rings.get_ydata()} <= printed


def test_predicted_is_hollow_and_dashed_and_says_so(drawn: dict[str, Drawn]) -> None:
    for gpu, style in (("h200", "-"), ("rtx-4050-mobile", "--")):
        one = drawn[f"perplexity-on-wikitext2-awq-by-slowdown-on-{gpu}"]
        axes = one.figure.axes[0]
        line = next(line for line in axes.get_lines() if line.get_label() == "dynamic (DecDEC)")
        assert line.get_linestyle() == style
        assert (line.get_markerfacecolor() == "white") == (style == "--")
        assert ("predicted" in axes.get_xlabel()) == (style == "--")


def test_bands_are_around_their_curves(drawn: dict[str, Drawn]) -> None:
    axes = drawn["perplexity-on-wikitext2-awq-by-k_chunk"].figure.axes[0]
    line = next(line for line in axes.get_lines() if line.get_label() == "static")
    band = axes.collections[1].get_paths()[0].vertices  # after random's
    for x, y in zip(line.get_xdata(), line.get_ydata(), strict=True):
        heights = band[band[:, 0] == x][:, 1]
        assert heights.min() < y < heights.max()


def test_the_common_point_is_a_measured_slowdown_in_the_middle(found: pd.DataFrame) -> None:
    perplexity = found[found.kind == "perplexity"]
    assert common_point(perplexity) == ("h200", 5.0)
    assert common_point(perplexity[perplexity.axis != "h200"]) == ("rtx-4050-mobile", 5.0)
    assert common_point(perplexity[perplexity.axis == "k_chunk"]) == ("k_chunk", 64)
    assert common_point(perplexity[perplexity.axis == ""]) is None


def test_files_are_svg_and_png_without_a_date(drawn: dict[str, Drawn], tmp_path: Path) -> None:
    pictures = write_figures(tmp_path, [drawn["fidelity-on-mt_bench-bars"]])
    text = pictures[0].path.read_text()
    assert "dc:date" not in text
    assert ElementTree.fromstring(text).tag.endswith("svg")
    assert pictures[0].path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    plt.close("all")


def test_diagnostics_have_a_table_and_two_figures(tmp_path: Path) -> None:
    run_files.write_run(tmp_path, run_files.diagnostics())
    ((table,), drawn) = next(diagnostics_of(read_runs(tmp_path)))
    assert [one.name.rpartition("-")[2] for one in drawn] == ["recall", "outliers"]
    assert len(table.rows) == 4 * 5
    assert table.head[2:] == tuple(
        [f"recall of exact's channels, {s}" for s in ("random", "static", "dynamic")]
        + [f"error energy left, {s}" for s in ("random", "static", "dynamic", "exact")]
    )
    labels = [text.get_text() for text in drawn[1].figure.legends[0].get_texts()]
    assert labels == ["in some steps", "in at least 50 % of the steps"]
    plt.close("all")


def test_none_has_no_curve_and_an_error_may_be_unknown() -> None:
    layers = {"o": {"recall": {"static": {"8": [0.5, None]}}, "energy_left": {"none": 1.0}}}
    rows = shares_of(layers)
    assert len(rows) == 1
    assert rows.stderr.isna().all()


def test_broken_diagnostics_are_refused(tmp_path: Path) -> None:
    made = run_files.diagnostics()
    made["layers"]["o"]["recall"]["static"] = {"8": 0.5}
    run_files.write_run(tmp_path, made)
    with pytest.raises(DecDECError, match="must have layers and outliers, got"):
        next(diagnostics_of(read_runs(tmp_path)))
