"""Judging: FastChat's files, read by its own show_result, and one test per refused input."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from judge_server import Asked, JudgeServer, Reply, says
from mtbench_files import (
    EVERY,
    Capture,
    Judging,
    answer_row,
    keys,
    records,
    refusal,
    write_answers,
    write_jsonl,
)

from decdec_eval.mtbench.prompts import NO_RATING, OUTSIDE

pytest_plugins = ["judge_fixtures"]


def test_single_grading_writes_fastchats_lines(
    judge: Judging, server: JudgeServer, answers: Path, capsys: Capture
) -> None:
    assert judge() == 0
    found = records(answers)
    assert keys(found) == EVERY
    one = next(r for r in found if (r["question_id"], r["model"], r["turn"]) == (101, "none", 1))
    assert time.time() - one.pop("tstamp") < 60
    assert one == {
        "question_id": 101,
        "model": "none",
        "judge": ["stub", "single-math-v1"],
        "user_prompt": "Q q101 {first} R gpt-4 to 101 first A none to 101 first",
        "judgment": "Rating: [[7]]",
        "score": 7,
        "unrated": None,
        "turn": 1,
    }
    body = next(asked.body for asked in server.asked if asked.user == one["user_prompt"])
    assert body == {
        "model": "stub",
        "messages": [
            {"role": "system", "content": "system of single-math-v1"},
            {"role": "user", "content": one["user_prompt"]},
        ],
        "temperature": 0,
        "max_tokens": 2048,
    }
    assert {asked.path for asked in server.asked} == {"/v1/chat/completions"}
    path = answers / "model_judgment" / "stub_single.jsonl"
    assert capsys.readouterr().out == f"stub: 12 judgments (12 rated) in {path}\n"


def test_pairs_are_judged_in_both_orders(
    judge: Judging, server: JudgeServer, answers: Path, capsys: Capture
) -> None:
    def verdict(asked: Asked) -> Reply:
        if "q81" in asked.user:  # for the model `dynamic`, wherever it stands
            return says("[[A]]" if asked.user.index("dynamic") < asked.user.index("none") else "[[B]]")
        return says("[[C]]" if "q151" in asked.user else "I cannot say")

    server.answer = verdict
    assert judge(mode="pair", baseline="none") == 0
    found = records(answers, "stub_pair")
    assert {(r["model_1"], r["model_2"]) for r in found} == {("dynamic", "none")}
    winners = {(r["question_id"], r["turn"]): (r["g1_winner"], r["g2_winner"]) for r in found}
    for turn in (1, 2):
        assert winners[81, turn] == ("model_1", "model_1")
        assert winners[101, turn] == ("error", "error")
        assert winners[151, turn] == ("tie", "tie")
    first = next(r for r in found if (r["question_id"], r["turn"]) == (81, 1))
    assert first["g1_user_prompt"] == "Q q81 {first} A dynamic to 81 first B none to 81 first"
    assert first["g2_user_prompt"] == "Q q81 {first} A none to 81 first B dynamic to 81 first"
    assert (first["g1_judgment"], first["g2_judgment"]) == ("[[A]]", "[[B]]")
    assert first["judge"] == ["stub", "pair-v2"]
    assert "6 judgments (4 with both verdicts, 2 without a verdict)" in capsys.readouterr().out


def shown(path: Path, *options: str) -> str:
    """Return what fschat's own reader says of a file."""
    command = [sys.executable, "-m", "fastchat.llm_judge.show_result", "--input-file", str(path), *options]
    done = subprocess.run(command, capture_output=True, text=True, cwd=path.parent)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_fastchats_show_result_reads_the_ratings(judge: Judging, server: JudgeServer, answers: Path) -> None:
    scores = {"q81": "[[9]]", "q101": "[[2.5]]", "q151": "nothing"}

    def rate(asked: Asked) -> Reply:
        name = re.search(r"to (\d+)", asked.user)
        assert name
        if "none to 81" in asked.user:
            return says("[[11]]")
        return says(scores[f"q{name[1]}"])

    server.answer = rate
    assert judge() == 0
    found = records(answers)
    _, *parts = re.split(r"#+ (.+) #+\n", shown(answers / "model_judgment" / "stub_single.jsonl"))
    sections = dict(zip(parts[::2], parts[1::2], strict=True))
    for section, turns in {"First turn": (1,), "Second turn": (2,), "Average": (1, 2)}.items():
        for model in ("dynamic", "none"):
            rated = [
                one["score"]
                for one in found
                if one["model"] == model and one["turn"] in turns and one["unrated"] is None
            ]
            line = next(words for words in sections[section].splitlines() if words.startswith(model))
            assert float(line.split()[-1]) == pytest.approx(sum(rated) / len(rated), abs=1e-6)
    assert Counter(one["unrated"] for one in found) == {None: 6, NO_RATING: 4, OUTSIDE: 2}


def test_fastchats_show_result_reads_the_pairs(judge: Judging, server: JudgeServer, answers: Path) -> None:
    def verdict(asked: Asked) -> Reply:
        first_is_dynamic = asked.user.index("dynamic") < asked.user.index("none")
        if "81" in asked.user:
            return says("[[A]]" if first_is_dynamic else "[[B]]")
        return says("no verdict" if "101" in asked.user else "[[A]]")  # always the first: a tie

    server.answer = verdict
    assert judge(mode="pair", baseline="none") == 0
    path = answers / "model_judgment" / "stub_pair.jsonl"
    text = shown(path, "--mode", "pairwise-baseline", "--baseline-model", "none")
    line = next(words.split() for words in text.splitlines() if words.startswith("dynamic"))
    assert list(map(float, line[1:])) == [2, 0, 2, 0.5, 0, 0.75]  # win loss tie, rates, adjusted


@pytest.mark.parametrize(
    ("judgment", "unrated"), [("I will not rate this.", NO_RATING), ("[[11]]", OUTSIDE), ("", NO_RATING)]
)
def test_a_judgment_without_a_rating_is_kept_and_counted(
    judgment: str,
    unrated: str,
    judge: Judging,
    server: JudgeServer,
    answers: Path,
    capsys: Capture,
) -> None:
    server.answer = lambda asked: says(judgment if asked.user.endswith("none to 81 first") else "[[7]]")
    assert judge() == 0
    (one,) = (record for record in records(answers) if record["unrated"])
    assert (one["model"], one["question_id"], one["turn"]) == ("none", 81, 1)
    assert (one["judgment"], one["score"], one["unrated"]) == (judgment, -1, unrated)
    assert f"12 judgments (11 rated, 1 {unrated})" in capsys.readouterr().out
    assert judge() == 0  # it is not asked again in the hope of another rating
    assert len(server.asked) == 12


def test_requests_go_in_parallel(judge: Judging, server: JudgeServer, answers: Path) -> None:
    def slow(asked: Asked) -> Reply:
        time.sleep(0.2)
        return says("[[7]]")

    server.answer = slow
    assert judge(parallel=3) == 0
    assert server.most_at_once == 3
    assert keys(records(answers)) == EVERY


def test_judgments_of_other_answers_are_refused(judge: Judging, answers: Path, capsys: Capture) -> None:
    assert judge() == 0
    rows = [answer_row(number, "another") for number in (81, 101, 151)]
    write_jsonl(answers / "model_answer" / "none.jsonl", rows)
    assert judge() == 2
    assert refusal(capsys).startswith("question 81, turn 1, none: the judgment must be of the present answer")


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"mode": "pair"}, "baseline must be given with --mode pair, got None"),
        ({"baseline": "none"}, "baseline must be absent without --mode pair, got none"),
        ({"mode": "pair", "baseline": "full"}, "baseline must be one of two or more models, got 'full' of"),
        ({"limit": 0}, "limit must be 1.."),
        ({"parallel": 0}, "parallel must be 1..256, got 0"),
        ({"retries": -1}, "retries must be 0..1000, got -1"),
        ({"timeout": 0}, "timeout must be above 0 "),
        ({"timeout": "nan"}, "timeout must be above 0 "),
        ({"judge_model": " "}, "judge-model must be a name, got ' '"),
        ({"answers": "nowhere"}, "answers must be a folder with model_answer/MODEL.jsonl, got nowhere"),
        ({"data_dir": "nowhere"}, "data-dir must be a folder with question.jsonl, got nowhere"),
        ({"base_url": "ftp://user:hidden@host"}, "base-url must be http:// or https://"),
        ({"base_url": "http://host:port"}, "base-url must be http:// or https://"),
    ],
)
def test_options_are_refused(
    options: dict[str, Any],
    wanted: str,
    judge: Judging,
    server: JudgeServer,
    capsys: Capture,
) -> None:
    assert judge(**options) == 2
    got = refusal(capsys)
    assert got.startswith(wanted)
    assert "hidden" not in got
    assert not server.asked


def test_unanswered_questions_are_refused(judge: Judging, answers: Path, capsys: Capture) -> None:
    write_answers(answers, "none", questions=[81])
    assert judge() == 2
    assert refusal(capsys).startswith(
        "none must have answered all 3 questions, got no answer to 2 of them, 101"
    )
    assert judge(limit=1) == 0


def test_a_missing_reference_is_refused(judge: Judging, tmp_path: Path, capsys: Capture) -> None:
    write_jsonl(tmp_path / "data" / "reference_answer" / "gpt-4.jsonl", [answer_row(102, "gpt-4")])
    assert judge() == 2
    assert refusal(capsys) == "question 101 (reasoning) must have a reference answer, got none"
