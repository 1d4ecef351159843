"""Answers to MT-Bench: what is written, what a killed run leaves, and what is refused."""

from __future__ import annotations

import argparse
import ast
import fcntl
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import with_checkout_first
from mtbench_models import CATEGORIES, EOS, save_chat, single_threaded

from decdec_core.commandline import OneLineParser, run_command
from decdec_core.config import DecDECError
from decdec_core.decode import Decoder, Sampling
from decdec_core.fusing import fuse
from decdec_eval.mtbench import answer as module
from decdec_eval.mtbench.adapter import open_model
from decdec_eval.mtbench.answer import (
    TEMPERATURES,
    Settings,
    Speaker,
    add_answer,
    answer,
    answer_question,
    default_model_id,
    read_answers,
    room_for,
    turn_seed,
)
from decdec_eval.mtbench.data import Question, load_questions

TOKENS = 6
one_thread = pytest.fixture(single_threaded, autouse=True, scope="module")


@pytest.fixture(scope="module")
def args(chat_artifact: Path) -> str:
    return f"pretrained={chat_artifact},selection=random,k_chunk=64"


@pytest.fixture(scope="module")
def undisturbed(args: str, chat_questions: list[Question], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The answer file of a run that was left alone. Shared: a test that alters it copies it first."""
    out = tmp_path_factory.mktemp("undisturbed")
    return answer(args, out, chat_questions, "tiny", max_new_tokens=TOKENS)


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def said(path: Path) -> list[Any]:
    """Return what must not depend on when and in how many runs it was answered."""
    changing = ("time_s", "versions", "hardware", "commit")
    kept = [{k: v for k, v in row["decdec"].items() if k not in changing} for row in rows_of(path)]
    return [
        (row["question_id"], row["answer_id"], row["model_id"], row["choices"], decdec)
        for row, decdec in zip(rows_of(path), kept, strict=True)
    ]


def test_the_file_is_fastchats(
    undisturbed: Path, chat_artifact: Path, chat_questions: list[Question]
) -> None:
    assert undisturbed.parts[-2:] == ("model_answer", "tiny.jsonl")
    rows = rows_of(undisturbed)
    assert [row["question_id"] for row in rows] == [question.question_id for question in chat_questions]
    for row in rows:
        assert set(row) == {"question_id", "answer_id", "model_id", "choices", "tstamp", "decdec"}
        assert row["model_id"] == "tiny"
        assert [choice["index"] for choice in row["choices"]] == [0]
        assert [type(turn) for turn in row["choices"][0]["turns"]] == [str, str]
        decdec = row["decdec"]
        ledger = decdec["configuration"]["ledger"]
        assert (ledger["selection"], ledger["k_chunk"], ledger["compensate"]) == (
            "random",
            [64] * 4,
            "decode",
        )
        assert decdec["configuration"]["way"] == "decoder"
        assert {"transformers", "fschat", "torch"} <= set(decdec["versions"])
        assert decdec["hardware"]
        assert decdec["cut_tokens"] == [0, 0]
        for tokens, finish in zip(decdec["tokens"], decdec["finish"], strict=True):
            assert (tokens[-1] == EOS) == (finish == "stop")
            assert len(tokens) == TOKENS or finish == "stop"
    assert len({row["answer_id"] for row in rows}) == len(rows)
    temperatures = [row["decdec"]["temperature"] for row in rows]
    assert temperatures == [TEMPERATURES[category] for category in CATEGORIES]


def test_turns_are_the_decoders_after_the_conversation(
    undisturbed: Path, args: str, chat_questions: list[Question]
) -> None:
    opened = open_model(args, "cpu")
    fuse(opened.model)
    rows = {row["question_id"]: row for row in rows_of(undisturbed)}
    for question in chat_questions[:2]:  # temperature 0.7, and 0
        turns = rows[question.question_id]["choices"][0]["turns"]
        decdec = rows[question.question_id]["decdec"]
        for turn, messages in enumerate(
            ([question.turns[0]], [question.turns[0], turns[0], question.turns[1]])
        ):
            sampling = Sampling(decdec["temperature"], seed=turn_seed(0, question.question_id, turn))
            decoder = Decoder(opened.model, decdec["configuration"]["settings"]["max_length"], sampling)
            prompt = opened.chat.prompt(messages)
            tokens = decoder.generate(prompt, TOKENS, [EOS]).tokens
            assert tokens == decdec["tokens"][turn]
            assert opened.chat.answer(tokens) == turns[turn]
            assert len(prompt) == decdec["prompt_tokens"][turn]


def test_a_killed_run_resumes_with_the_same_answers(
    undisturbed: Path, args: str, chat_data: Path, chat_questions: list[Question], tmp_path: Path
) -> None:
    script = f"""
import sys, time
from pathlib import Path
from decdec_eval.mtbench import answer as module
from decdec_eval.mtbench.data import load_questions
assert "fastchat.llm_judge.common" not in sys.modules  # which imports a judge's client
append = module.AnswerFile.append
def slow(*arguments):
    append(*arguments)
    time.sleep(0.5)
module.AnswerFile.append = slow
questions = load_questions(Path({str(chat_data)!r}))
module.answer({args!r}, Path({str(tmp_path)!r}), questions, "tiny", max_new_tokens={TOKENS})
"""
    path = tmp_path / "model_answer" / "tiny.jsonl"
    environment = {**os.environ, "PYTHONPATH": with_checkout_first(), "OMP_NUM_THREADS": "1"}
    child = subprocess.Popen([sys.executable, "-c", script], env=environment, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while child.poll() is None and time.monotonic() < deadline:
        if path.is_file() and path.read_bytes().count(b"\n") >= 2:
            break
        time.sleep(0.02)
    child.send_signal(signal.SIGKILL)
    _, errors = child.communicate()
    assert child.returncode == -signal.SIGKILL, errors.decode()
    done = rows_of(path)
    assert 2 <= len(done) < len(chat_questions)
    answer(args, tmp_path, chat_questions, "tiny", max_new_tokens=TOKENS)
    assert said(path) == said(undisturbed)
    assert rows_of(path)[: len(done)] == done  # not answered again


@pytest.mark.parametrize("cut", [1, 300])
def test_a_torn_last_line_is_answered_again(
    cut: int, undisturbed: Path, args: str, chat_questions: list[Question], tmp_path: Path
) -> None:
    whole = undisturbed.read_bytes().splitlines(keepends=True)
    path = tmp_path / "model_answer" / "tiny.jsonl"
    path.parent.mkdir()
    path.write_bytes(b"".join(whole[:2]) + whole[2][: max(1, len(whole[2]) - cut)])
    assert answer(args, tmp_path, chat_questions, "tiny", max_new_tokens=TOKENS) == path
    assert said(path) == said(undisturbed)
    assert path.read_bytes().splitlines(keepends=True)[:2] == whole[:2]


def test_limit_takes_the_first_and_more_may_follow(
    undisturbed: Path, args: str, chat_questions: list[Question], tmp_path: Path
) -> None:
    path = answer(args, tmp_path, chat_questions, "tiny", limit=2, max_new_tokens=TOKENS)
    assert said(path) == said(undisturbed)[:2]
    answer(args, tmp_path, chat_questions, "tiny", limit=3, max_new_tokens=TOKENS)
    assert said(path) == said(undisturbed)[:3]


def test_another_seed_draws_otherwise_where_something_is_drawn(
    undisturbed: Path, args: str, chat_questions: list[Question], tmp_path: Path
) -> None:
    path = answer(args, tmp_path, chat_questions, "tiny", max_new_tokens=TOKENS, seed=1)
    for mine, theirs in zip(rows_of(path), rows_of(undisturbed), strict=True):
        hot = mine["decdec"]["temperature"] == 0.7
        cold = mine["decdec"]["temperature"] == 0
        same = mine["choices"] == theirs["choices"]
        assert (cold and same) or (hot and not same) or not (hot or cold)


def test_seeds_are_of_question_and_turn_alone() -> None:
    seeds = [
        turn_seed(seed, question, turn) for seed in (0, 1) for question in range(81, 161) for turn in (0, 1)
    ]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**31 for seed in seeds)
    assert turn_seed(0, 81, 0) == seeds[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 3}, "must be of this configuration, got another settings: give another --model-id"),
        ({"max_new_tokens": 8}, "got another settings"),
        ({"model_args": ",selection=static"}, "got another ledger"),
        ({"model_args": ",dtype=bfloat16"}, "got another ledger"),
    ],
)
def test_another_configuration_in_the_same_file_is_refused(
    change: dict[str, Any],
    message: str,
    undisturbed: Path,
    args: str,
    chat_questions: list[Question],
    tmp_path: Path,
) -> None:
    path = tmp_path / "model_answer" / "tiny.jsonl"
    path.parent.mkdir()
    shutil.copy(undisturbed, path)
    options = {"max_new_tokens": TOKENS, **change}
    options["model_args"] = args + options.get("model_args", "")
    before = path.read_bytes()
    with pytest.raises(DecDECError, match=message) as refused:
        answer(out=tmp_path, questions=chat_questions, model_id="tiny", **options)
    assert "\n" not in str(refused.value)
    assert path.read_bytes() == before


def test_another_artifact_and_other_questions_are_refused(
    undisturbed: Path, chat_model_dir: Path, args: str, chat_questions: list[Question], tmp_path: Path
) -> None:
    path = tmp_path / "model_answer" / "tiny.jsonl"
    path.parent.mkdir()
    shutil.copy(undisturbed, path)
    fewer = {"out": tmp_path, "questions": chat_questions[:3], "model_id": "tiny", "max_new_tokens": TOKENS}
    with pytest.raises(DecDECError, match=r"got another .*questions_sha256: give another"):
        answer(args, **fewer)
    other = f"pretrained={chat_model_dir},method=full"
    with pytest.raises(DecDECError, match="got another ledger"):
        answer(other, tmp_path, chat_questions, "tiny", max_new_tokens=TOKENS)


def test_fastchats_own_answers_are_refused(args: str, chat_questions: list[Question], tmp_path: Path) -> None:
    path = tmp_path / "model_answer" / "tiny.jsonl"
    path.parent.mkdir()
    path.write_text('{"question_id": 81, "choices": [{"index": 0, "turns": ["a", "b"]}]}\n')
    with pytest.raises(DecDECError, match="must be of this configuration, got another ledger, chat"):
        answer(args, tmp_path, chat_questions, "tiny", max_new_tokens=TOKENS)


@pytest.mark.parametrize("line", ["{", "[]", '{"question_id": 81}', '{"question_id": 81, "choices": []}', ""])
def test_a_line_that_is_no_answer_is_refused(line: str, tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    good = '{"question_id": 81, "choices": [{"turns": ["a", "b"]}]}\n'
    path.write_text(good + line + "\n" + good)
    with pytest.raises(DecDECError, match="line 2 must be an answer in JSON, got"):
        read_answers(path)


def test_a_second_run_on_the_same_file_is_refused(
    args: str, chat_questions: list[Question], tmp_path: Path
) -> None:
    path = tmp_path / "model_answer" / "tiny.jsonl"
    path.parent.mkdir()
    with path.open("ab") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(DecDECError, match="must be written by one process at a time, got a second"):
            answer(args, tmp_path, chat_questions, "tiny", max_new_tokens=TOKENS)
    assert path.read_bytes() == b""


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": -1}, "seed must be 0"),
        ({"limit": 0}, "limit must be 1..4, got 0"),
        ({"limit": 7}, "limit must be 1..4, got 7"),
        ({"model_id": "../x"}, "model-id must be letters, digits"),
        ({"model_id": ""}, "model-id must be letters, digits"),
        ({"max_new_tokens": 0}, "max-new-tokens must be 1..4095, got 0"),
        ({"max_new_tokens": 4096}, "max-new-tokens must be 1..4095, got 4096"),
    ],
)
def test_refused_settings(
    change: dict[str, Any], message: str, args: str, chat_questions: list[Question], tmp_path: Path
) -> None:
    with pytest.raises(DecDECError, match=message):
        answer(args, tmp_path, chat_questions, **change)
    assert list(tmp_path.iterdir()) == []


def test_a_file_in_the_place_of_the_folder_is_refused(
    args: str, chat_questions: list[Question], tmp_path: Path
) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(DecDECError, match=r"out must be a folder, got the file .*out"):
        answer(args, tmp_path / "out", chat_questions)


def test_a_conversation_longer_than_the_context_is_cut_and_marked(
    args: str, chat_questions: list[Question]
) -> None:
    opened = open_model(args, "cpu")
    long = Question(1, "math", ("Count. " * 40, "Go on."), None)
    settings = Settings(0, 16, 128)
    done = answer_question(Speaker(opened, 128), opened.chat, long, settings)
    whole = len(opened.chat.prompt([long.turns[0]]))
    assert done["prompt_tokens"] == [112, 112]
    assert done["cut_tokens"][0] == whole - 112
    assert done["cut_tokens"][1] > done["cut_tokens"][0]
    assert done["turns"][0] == opened.chat.answer(done["tokens"][0])


def test_room_is_the_longest_conversation_within_the_context(
    args: str, chat_questions: list[Question]
) -> None:
    opened = open_model(args, "cpu")
    longest = max(len(opened.chat.prompt([q.turns[0], "", q.turns[1]])) for q in chat_questions)
    config = opened.model.config
    assert room_for(opened.chat, chat_questions, 16, config) == longest + 64
    assert room_for(opened.chat, chat_questions, 2000, config) == config.max_position_embeddings


def test_a_model_that_no_decoder_takes_generates(tmp_path: Path, chat_questions: list[Question]) -> None:
    """A window of attention shorter than the conversation."""
    folder = save_chat(tmp_path / "mistral", architecture="mistral")
    opened = open_model(f"pretrained={folder},method=full", "cpu")
    speaker = Speaker(opened, 200)
    assert speaker.way.startswith("generate: max_length must be at most the attention's window of 64")
    prompt = opened.chat.prompt([chat_questions[0].turns[0]])
    with torch.no_grad():
        logits = opened.model(torch.tensor([prompt])).logits[0, -1]
    cold = speaker.speak(prompt, 5, 0.0, 0)
    assert cold[0] == int(logits.argmax())
    hot = [speaker.speak(prompt, 12, 0.7, seed) for seed in (1, 1, 2)]
    assert hot[0] == hot[1] != hot[2]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("pretrained=/a/smollm2-awq3", "smollm2-awq3-dynamic-k16"),
        ("pretrained=x/,selection=none", "x-none"),
        ("pretrained=smollm2,method=full", "smollm2-full"),
        (
            "pretrained=smollm2,method=awq,selection=static,k_chunk=8/8/16/16",
            "smollm2-awq3-static-k8-8-16-16",
        ),
        ("pretrained=a b,slowdown=2.5,compensate=all", "a-b-dynamic-slowdown2.5-all"),
    ],
)
def test_a_models_name_says_what_it_compensates(text: str, wanted: str) -> None:
    assert default_model_id(text) == wanted


def test_temperatures_are_fastchats() -> None:
    found = importlib.util.find_spec("fastchat")
    assert found is not None
    assert found.origin is not None
    # read, not imported: it imports clients of judges
    source = (Path(found.origin).parent / "llm_judge" / "common.py").read_text()
    (table,) = [
        ast.literal_eval(node.value)
        for node in ast.parse(source).body
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "temperature_config"
    ]
    assert table == {**TEMPERATURES, "arena-hard-200": 0.0}


def test_temperatures_are_for_all_categories_of_the_real_questions(data_dir: Path) -> None:
    real = load_questions(data_dir / "mt_bench")
    assert len(real) == 80
    assert {question.category for question in real} == set(TEMPERATURES)


def test_the_command_line(
    chat_artifact: Path, chat_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parser = OneLineParser()
    add_answer(parser)
    words = [
        "--model-args",
        f"pretrained={chat_artifact},selection=none",
        "--data-dir",
        str(chat_data),
        "--limit",
        "1",
    ]
    words += ["--out", str(tmp_path), "--max-new-tokens", "4", "--device", "cpu"]
    options = parser.parse_args(words)
    assert run_command(lambda: options.run(options)) == 0
    captured = capsys.readouterr()
    path = tmp_path / "model_answer" / "chat-rtn3-none.jsonl"
    assert captured.out.strip() == str(path)
    assert "answers: 100%" in captured.err
    assert len(rows_of(path)) == 1


def test_the_command_line_refuses_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = argparse.Namespace(data_dir=tmp_path)
    assert run_command(lambda: module._answer(options)) == 2
    error = capsys.readouterr().err
    assert error.startswith("decdec: error: ")
    assert error.count("\n") == 1
