"""MT-Bench's files: what they hold, where they are found, fetching them, and one test per refused input."""

from __future__ import annotations

import argparse
import shutil
import threading
from collections import Counter
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from mtbench_files import answer_row, prompt_rows, question_rows, write_jsonl, write_mt_bench

from decdec_core.config import DecDECError
from decdec_eval.mtbench.data import (
    CATEGORIES,
    REFERENCE_CATEGORIES,
    Question,
    add_fetch,
    data_sha256,
    fetch,
    load_answers,
    load_prompts,
    load_questions,
    load_references,
    mt_bench_folder,
)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DECDEC_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache" / "mt_bench"


def test_real_questions(data_dir: Path) -> None:
    questions = load_questions(data_dir / "mt_bench")
    assert [question.question_id for question in questions] == list(range(81, 161))
    assert Counter(question.category for question in questions) == dict.fromkeys(CATEGORIES, 10)
    assert sum(question.reference is not None for question in questions) == 39
    assert questions[0].turns[1] == (
        "Rewrite your previous response. Start every sentence with the letter A."
    )


def test_real_references_are_of_the_categories_that_need_them(data_dir: Path) -> None:
    references = load_references(data_dir / "mt_bench")
    questions = load_questions(data_dir / "mt_bench")
    needed = [one.question_id for one in questions if one.category in REFERENCE_CATEGORIES]
    assert sorted(references) == sorted(needed) == list(range(101, 131))


def test_real_prompts(data_dir: Path) -> None:
    prompts = load_prompts(data_dir / "mt_bench")
    assert len(prompts) == 8
    assert prompts["pair-v2"].system.startswith("Please act as an impartial judge")
    assert "{ref_answer_2}" in prompts["single-math-v1-multi-turn"].template


def test_small_files(tmp_path: Path) -> None:
    folder = write_mt_bench(tmp_path)
    turns = ("q81 {first}", "q81 second")
    assert load_questions(folder)[0] == Question(81, "writing", turns, None)
    assert load_references(folder) == {101: ("gpt-4 to 101 first", "gpt-4 to 101 second")}


def test_an_empty_line_is_no_question(tmp_path: Path) -> None:
    path = write_mt_bench(tmp_path) / "question.jsonl"
    path.write_text(path.read_text() + "\n")
    assert len(load_questions(tmp_path)) == 3


def test_where_it_is_found(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DECDEC_DATA_DIR", raising=False)
    with pytest.raises(DecDECError, match=r"DECDEC_DATA_DIR \(not set\).*got none of them: .*mtbench fetch"):
        mt_bench_folder(None)
    write_mt_bench(cache)
    assert mt_bench_folder(None) == cache
    named = tmp_path / "named"
    named.mkdir()
    monkeypatch.setenv("DECDEC_DATA_DIR", str(named))
    assert mt_bench_folder(None) == cache
    write_mt_bench(named / "mt_bench")
    assert mt_bench_folder(None) == named / "mt_bench"
    own = write_mt_bench(tmp_path / "own" / "mt_bench")
    assert mt_bench_folder(own) == mt_bench_folder(own.parent) == own


def test_a_data_dir_without_questions_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DecDECError, match=r"data-dir must be a folder with question.jsonl, got"):
        mt_bench_folder(tmp_path)


def test_a_named_data_dir_without_mt_bench_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DECDEC_DATA_DIR", str(tmp_path))
    with pytest.raises(DecDECError, match=r"DECDEC_DATA_DIR \(.*mt_bench has no question.jsonl\)"):
        mt_bench_folder(None)


QUESTION, PROMPT = question_rows()[0], prompt_rows()[0]


@pytest.mark.parametrize(
    ("row", "refusal"),
    [
        ({"question_id": 1, "category": "math"}, "must have a key 'turns'"),
        ({**QUESTION, "turns": ["one"]}, "turns that are not two texts"),
        ({**QUESTION, "turns": ["one", 2]}, "turns that are not two texts"),
        ({**QUESTION, "question_id": "81"}, "question_id '81'"),
        ({**QUESTION, "question_id": True}, "question_id True"),
        ({**QUESTION, "category": None}, "category None"),
        ([], "no JSON object"),
    ],
)
def test_a_line_that_is_no_question_is_refused(tmp_path: Path, row: Any, refusal: str) -> None:
    write_jsonl(tmp_path / "question.jsonl", [QUESTION, row])
    with pytest.raises(DecDECError, match=rf"question.jsonl line 2 .*{refusal}"):
        load_questions(tmp_path)


@pytest.mark.parametrize("content", [b'{"question_id": 81, "cat', b"\xff\xfe"])
def test_a_damaged_line_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "question.jsonl").write_bytes(content)
    with pytest.raises(DecDECError, match=r"question.jsonl line 1 must be one of FastChat's, got") as caught:
        load_questions(tmp_path)
    assert "\n" not in str(caught.value)


def test_missing_empty_and_repeating_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DecDECError, match=r"question.jsonl must be a file of JSON Lines, got none"):
        load_questions(tmp_path)
    write_jsonl(tmp_path / "question.jsonl", [])
    with pytest.raises(DecDECError, match=r"must have at least one line"):
        load_questions(tmp_path)
    write_jsonl(tmp_path / "question.jsonl", [QUESTION, QUESTION])
    with pytest.raises(DecDECError, match=r"must have each question_id once, got 81 twice"):
        load_questions(tmp_path)


@pytest.mark.parametrize(
    ("change", "refusal"),
    [
        ({"type": "essay"}, "type 'essay'"),
        ({"output_format": "[[rating_a,rating_b]]"}, "output_format '.*rating_a"),
        ({"prompt_template": "{question} {secret}"}, "unknown field 'secret'"),
        ({"prompt_template": "{question.__class__}"}, "unknown field 'question.__class__'"),
        ({"prompt_template": "{question"}, "expected '}'"),
        ({"system_prompt": None}, "system_prompt None"),
    ],
)
def test_a_line_that_is_no_prompt_is_refused(tmp_path: Path, change: Any, refusal: str) -> None:
    write_jsonl(tmp_path / "judge_prompts.jsonl", [{**PROMPT, **change}])
    with pytest.raises(DecDECError, match=rf"judge_prompts.jsonl line 1 .*{refusal}"):
        load_prompts(tmp_path)


def test_an_answer_without_choices_is_refused(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{**answer_row(81, "a"), "choices": []}])
    with pytest.raises(DecDECError, match=r"line 1 .*no choices"):
        load_answers(path)


@pytest.fixture
def mirror(tmp_path: Path, data_dir: Path) -> Iterator[tuple[Path, str]]:
    """A local server of the published files, as they lie in FastChat's repository; its folder and URL."""
    folder = tmp_path / "mirror"
    shutil.copytree(data_dir / "mt_bench", folder / "mt_bench")
    shutil.move(folder / "mt_bench" / "judge_prompts.jsonl", folder)
    handler = partial(_QuietHandler, directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield folder, f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


class _QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *_words: object) -> None:
        pass


def run_fetch(*arguments: str) -> None:
    parser = argparse.ArgumentParser()
    add_fetch(parser)
    options = parser.parse_args(arguments)
    options.run(options)


def test_fetch_fills_the_cache(
    mirror: tuple[Path, str],
    cache: Path,
    data_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delenv("DECDEC_DATA_DIR")
    run_fetch("--source", mirror[1])
    assert capsys.readouterr().out.strip() == str(cache)
    assert mt_bench_folder(None) == cache
    assert data_sha256(cache) == data_sha256(data_dir / "mt_bench")
    assert load_questions(cache) == load_questions(data_dir / "mt_bench")


def test_what_is_there_is_not_fetched_again(mirror: tuple[Path, str], cache: Path) -> None:
    fetch(source=mirror[1])
    (cache / "question.jsonl").write_text("damaged")
    for name in ("judge_prompts.jsonl", "mt_bench/reference_answer/gpt-4.jsonl"):
        (mirror[0] / name).unlink()
    assert fetch(source=mirror[1]) == cache
    assert len(load_questions(cache)) == 80


def test_other_bytes_are_refused_and_nothing_is_kept(mirror: tuple[Path, str], tmp_path: Path) -> None:
    with (mirror[0] / "judge_prompts.jsonl").open("ab") as file:
        file.write(b" ")
    out = tmp_path / "out"
    with pytest.raises(DecDECError, match=r"judge_prompts.jsonl must have the SHA-256 fd28.* of 10450 bytes"):
        run_fetch("--source", mirror[1], "--out", str(out))
    assert not out.exists()


def test_a_missing_file_is_refused(mirror: tuple[Path, str]) -> None:
    (mirror[0] / "mt_bench" / "question.jsonl").unlink()
    with pytest.raises(DecDECError, match=r"question.jsonl must be there to fetch, got HTTPError: .*404"):
        fetch(source=mirror[1])


@pytest.mark.parametrize("source", ["http://127.0.0.1:9", "no url"])
def test_no_answer_is_one_line(source: str) -> None:
    with pytest.raises(DecDECError, match=rf"{source}/mt_bench/question.jsonl must be there to fetch, got"):
        fetch(source=source)
