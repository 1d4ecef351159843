from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from html import unescape
from pathlib import Path

import pytest
import run_files

from decdec_eval.report.__main__ import main

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]
WIDE = "Math.max(document.documentElement.scrollWidth, document.body.scrollWidth)"
ROOM = "document.documentElement.clientWidth"  # without the scroll bar beside it
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium on the PATH")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("page") / "results"
    budgets = [run_files.Budget("h200", 5.0, False), run_files.Budget("rtx-4050-mobile", 5.0, True)]
    run_files.write_grid(out, [("awq", 3), ("awq", 4)], (8, 16), budgets)
    run_files.write_grid(out, [("awq", 3)], (8,), tasks=("bbh", "mt_bench"))
    run_files.write_run(out, run_files.diagnostics(steps=20))
    assert main([str(out)]) == 0
    return out


def files_of(out: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()
    }


def test_the_same_runs_give_the_same_bytes(results: Path, tmp_path: Path) -> None:
    again = tmp_path / "elsewhere"
    shutil.copytree(results / "runs", again / "runs")
    # another process, with other hashes of strings: no order may come from a set
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    subprocess.run([sys.executable, "-m", "decdec_eval.report", str(again)], check=True, env=environment)
    assert files_of(again) == files_of(results)
    assert {"tables", "figures", "runs", "index.html"} == {path.name for path in again.iterdir()}


def test_the_page_needs_nothing_else(results: Path) -> None:
    text = (results / "index.html").read_text("utf-8")
    # but for pictures, which are in the page, nothing has an address
    assert set(re.findall(r'(?:src|href)="([^"]{5})', text)) <= {"data:"} | set(
        re.findall(r'href="(#[^"]{4})', text)
    )
    outside = re.sub(r'base64,[^"]*', "", text)
    assert "://" not in outside
    assert "@import" not in outside
    assert "url(" not in outside
    assert str(results) not in outside
    assert "prefers-color-scheme: dark" in text
    assert 'name="viewport"' in text


def test_every_table_and_figure_is_on_the_page_with_its_command(results: Path) -> None:
    text = (results / "index.html").read_text("utf-8")
    tables = [path.stem for path in (results / "tables").glob("*.md")]
    figures = list((results / "figures").glob("*.svg"))
    assert len(tables) == text.count("<table ")
    assert all(f'<table id="{name}">' in text for name in tables)
    assert len(figures) == text.count("<img ")
    assert text.count(f"<pre>{run_files.COMMAND}\npython -m decdec_eval.report RESULTS</pre>") == len(
        tables
    ) + len(figures)


def test_predicted_and_zero_are_marked(results: Path) -> None:
    text = (results / "index.html").read_text("utf-8")
    assert re.search(r'<td class="number predicted" data-value="4.65">4\.\d predicted</td>', text)
    assert re.search(r'<td class="number" data-value="4.65">4\.\d measured</td>', text)
    assert re.search(r'<td class="number zero" [^>]*>[^<]*, holds 0</td>', text)


def dumped(page: Path, folder: Path, *flags: str) -> str:
    """Return the page's document as Chromium has it after running its scripts."""
    done = subprocess.run(
        [CHROMIUM, *FLAGS, f"--user-data-dir={folder}", *flags, "--dump-dom", page.as_uri()],
        capture_output=True,
        text=True,
        timeout=180,
        check=True,
    )
    return done.stdout


def with_script(results: Path, script: str, path: Path) -> Path:
    text = (results / "index.html").read_text("utf-8")
    path.write_text(text.replace("</body>", f"<script>{script}</script></body>"), "utf-8")
    return path


@needs_chromium
def test_a_browser_sorts_the_tables(results: Path, tmp_path: Path) -> None:
    name = "smollm2-perplexity-on-wikitext2-float32-cuda-by-k_chunk"
    script = f"""
        const table = document.getElementById("{name}");
        const buttons = [...table.querySelectorAll("th button")];
        const press = head => buttons.find(b => b.textContent === head).click();
        const column = place => [...table.tBodies[0].rows].map(row => row.cells[place].textContent);
        const seen = {{ before: column(4) }};
        press("perplexity"); seen.up = column(4); seen.sort = buttons[4].parentElement.ariaSort;
        press("perplexity"); seen.down = column(4);
        press("k_chunk"); seen.blank = column(3);
        press("selection"); seen.words = column(2);
        seen.images = [...document.images].filter(image => image.naturalWidth > 100).length;
        const pre = document.createElement("pre");
        pre.id = "seen"; pre.textContent = JSON.stringify(seen); document.body.append(pre);
    """
    page = with_script(
        results, f"window.addEventListener('load', () => {{{script}}})", tmp_path / "page.html"
    )
    text = dumped(page, tmp_path / "profile")
    seen = json.loads(unescape(re.search(r'<pre id="seen">(.*?)</pre>', text, re.S)[1]))
    values = [float(cell.split()[0]) for cell in seen["up"]]
    assert values == sorted(values)
    assert len(values) == 1 + 2 * (1 + 4 * 2)
    assert seen["sort"] == "ascending"
    assert [float(cell.split()[0]) for cell in seen["down"]] == sorted(values, reverse=True)
    assert sorted(seen["before"]) == sorted(seen["up"]) != seen["before"]
    assert seen["blank"][-3:] == ["", "", ""]  # full precision and none have no k_chunk
    assert seen["blank"][0] == "8"
    assert seen["words"] == sorted(seen["words"], key=lambda word: (word == "", word))
    assert seen["images"] == len(list((results / "figures").glob("*.svg")))


@needs_chromium
def test_a_phone_needs_no_sideways_scrolling(results: Path, tmp_path: Path) -> None:
    # a frame, because a window cannot be as narrow as a phone
    page = with_script(results, f"document.title = [innerWidth, {WIDE} - {ROOM}]", tmp_path / "page.html")
    outer = tmp_path / "outer.html"
    outer.write_text(
        f'<iframe src="{page.as_uri()}" width="390" height="800" '
        'onload="document.title = contentDocument ? contentDocument.title : 0"></iframe>'
    )
    text = dumped(outer, tmp_path / "profile", "--allow-file-access-from-files")
    assert "<title>390,0</title>" in text


def test_what_was_left_from_before_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_files.write_run(tmp_path, run_files.run("bbh", None, None, None))
    (tmp_path / "tables").mkdir()
    (tmp_path / "tables" / "old.md").write_text("old")
    assert main([str(tmp_path)]) == 0
    captured = capsys.readouterr()
    assert f"left from before: {tmp_path / 'tables' / 'old.md'}" in captured.err
    assert "written: 4 files" in captured.out
    assert (tmp_path / "tables" / "old.md").read_text() == "old"


def test_what_is_refused_costs_one_line_and_writes_nothing(
    results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tmp_path / "absent")]) == 2
    assert "RESULTS must be a folder with runs/*.json, got" in capsys.readouterr().err
    shutil.copytree(results / "runs", tmp_path / "runs")
    (tmp_path / "runs" / "half.json").write_text("{")
    assert main([str(tmp_path)]) == 2
    line = capsys.readouterr().err.strip()
    assert "half.json must be a run's JSON file" in line
    assert "\n" not in line
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]
    with pytest.raises(SystemExit):
        main([str(tmp_path), "--colour"])
