from __future__ import annotations

import math
import re
from pathlib import Path

import pandas as pd
import pytest
import run_files

from decdec_eval.bootstrap import Bootstrap
from decdec_eval.presentation import with_interval
from decdec_eval.report.load import read_runs
from decdec_eval.report.statistics import points
from decdec_eval.report.tables import Table, latex, markdown, tables_of, titles_of, write_tables


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tables")
    budgets = [run_files.Budget("h200", 5.0, False), run_files.Budget("rtx-4050-mobile", 5.0, True)]
    run_files.write_grid(out, [("awq", 3)], (8,), budgets, tasks=("perplexity", "fidelity", "bbh"))
    return out


@pytest.fixture(scope="module")
def tables(results: Path) -> dict[str, Table]:
    found = points(read_runs(results), Bootstrap(200))
    titles = titles_of(sorted(set(found.setting)))
    return {
        table.name: table
        for setting, group in found.groupby("setting")
        for table in tables_of(group, titles[str(setting)])
    }


@pytest.mark.parametrize(
    ("value", "low", "high", "wanted"),
    [
        (-0.27234, -0.28, -0.26, "-0.2723 [-0.2800, -0.2600]"),
        (-0.001, -0.021, 0.019, "-0.001 [-0.021, 0.019], holds 0"),
        (1.5, 0.0, 3.0, "1.50 [0.00, 3.00], holds 0"),
        (-12.0, -80.0, 60.0, "-12 [-80, 60], holds 0"),
        (-0.00001, -0.02, 0.02, "0.000 [-0.020, 0.020], holds 0"),
        (0.5, math.nan, math.nan, "0.5"),
        (0.25, 0.25, 0.25, "0.25"),
        (0.25, 0.25 - 1e-16, 0.25 + 1e-16, "0.25"),
        (0.0, 0.0, 0.0, "0, holds 0"),
    ],
)
def test_intervals_have_the_digits_of_their_error(value: float, low: float, high: float, wanted: str) -> None:
    assert with_interval(value, low, high) == wanted


def test_there_is_a_table_for_each_way_to_state_compensation(tables: dict[str, Table]) -> None:
    stem = "smollm2-perplexity-on-wikitext2-float32-cuda-by"
    assert {name for name in tables if name.startswith(stem)} == {
        f"{stem}-k_chunk",
        f"{stem}-slowdown-on-h200",
        f"{stem}-slowdown-on-rtx-4050-mobile",
    }
    assert len(tables) == 9
    for table in tables.values():
        assert len(table.rows) == 6  # full, none, and four selections, random's seeds together
        assert all(len(row) == len(table.head) for row in table.rows)
        assert table.commands == (run_files.COMMAND,)


def test_measured_and_predicted_slowdowns_are_told_apart(tables: dict[str, Table]) -> None:
    for gpu, word in (("h200", "measured"), ("rtx-4050-mobile", "predicted")):
        table = tables[f"smollm2-perplexity-on-wikitext2-float32-cuda-by-slowdown-on-{gpu}"]
        place = table.head.index("slowdown, %")
        said = [row[place] for row in table.rows if row[place].text]
        assert [cell.text for cell in said] == [f"{4.65:.1f} {word}"] * 4
        assert {cell.marks for cell in said} == {("predicted",) if word == "predicted" else ()}
        assert ("predicted, of the linear layers" in table.caption) == (word == "predicted")


def test_markdown_has_values_and_the_command(tables: dict[str, Table]) -> None:
    text = markdown(tables["smollm2-perplexity-on-wikitext2-float32-cuda-by-k_chunk"])
    row = next(line for line in text.splitlines() if "dynamic (DecDEC)" in line)
    assert re.search(r"\| AWQ 3 bits \| 3\.20 \| dynamic \(DecDEC\) \| 8 \| \d\d\.\d ± \d\.\d \|", row)
    assert re.search(r"\| -0\.\d+ \[-0\.\d+, -0\.\d+\] \|", row)
    assert "| random, 3 seeds | 8 |" in text
    assert "20 windows, NVIDIA H200" in text
    assert text.endswith(f"    {run_files.COMMAND}\n    python -m decdec_eval.report RESULTS\n")


def test_latex_is_escaped_and_whole(tables: dict[str, Table]) -> None:
    for table in tables.values():
        lines = latex(table).splitlines()
        body = lines[lines.index(r"\endfoot") + 1 : -1]
        assert len(body) == len(table.rows)
        for row in body:
            assert len(re.findall(r"(?<!\\)&", row)) == len(table.head) - 1
            assert row.endswith(r" \\")
        text = "\n".join(line for line in lines if not line.startswith("%"))
        assert not re.search(r"(?<!\\)[%#]|±", text)
        assert text.count(r"\begin{longtable}") == text.count(r"\end{longtable}") == 1
        assert r"k\_chunk" in text
        assert text.count("{") == text.count("}")


def test_csv_has_all_digits(tables: dict[str, Table], tmp_path: Path) -> None:
    written = write_tables(tmp_path, list(tables.values()))
    assert len(written) == 3 * len(tables)
    name = "smollm2-perplexity-on-wikitext2-float32-cuda-by-k_chunk"
    frame = pd.read_csv(tmp_path / f"{name}.csv").set_index("selection")
    assert frame.nll["dynamic"] - frame.nll["none"] == pytest.approx(frame.nll_less_none["dynamic"])
    assert frame.nll_less_none_low["dynamic"] < frame.nll_less_none["dynamic"]
    assert frame.runs["random"].count(".json") == 3
    assert frame.seeds["random"] == 3


def test_settings_named_alike_are_told_apart(tmp_path: Path) -> None:
    for shots in (0, 3):
        made = run_files.run("bbh", None, None, None)
        made["configuration"]["task"]["num_fewshot"] = shots
        run_files.write_run(tmp_path, made)
    titles = titles_of(sorted(set(read_runs(tmp_path).setting)))
    assert sorted(titles.values()) == [
        f"smollm2, decdec_bbh_mini, float32, cuda, num_fewshot {shots}" for shots in (0, 3)
    ]
