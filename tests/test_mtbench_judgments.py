"""The files of judgments: kills, torn lines, what belongs to them, and one test per refused file."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from conftest import with_checkout_first
from judge_server import HANG, JudgeServer, says
from mtbench_files import (
    EVERY,
    Capture,
    Judging,
    keys,
    prompt_rows,
    records,
    refusal,
    write_answers,
    write_jsonl,
)

from decdec_eval.mtbench.data import load_questions
from decdec_eval.mtbench.judgments import JudgmentFile, judgment_path

pytest_plugins = ["judge_fixtures"]


def test_the_configuration_is_kept(
    judge: Judging, server: JudgeServer, answers: Path, data_dir: Path
) -> None:
    questions = load_questions(data_dir / "mt_bench")
    write_answers(answers, "dynamic", "none", questions=[one.question_id for one in questions])
    assert judge(limit=1, data_dir=data_dir) == 0
    config = json.loads((answers / "model_judgment" / "stub_single.config.json").read_text())
    assert {key: config[key] for key in ("judge", "mode", "temperature", "max_tokens")} == {
        "judge": "stub",
        "mode": "single",
        "temperature": 0,
        "max_tokens": 2048,
    }
    prompts = "fd283293406d024f44c174b094ef48031d0687a4682fd3a56b29b138f80281b6"
    assert config["data_sha256"]["judge_prompts.jsonl"] == prompts
    (run,) = config["runs"]
    assert run["base_url"] == server.url
    assert {"openai", "python", "decdec_eval"} <= set(run["environment"]["versions"])
    with JudgeServer(lambda asked: says("[[7]]")) as moved:
        assert judge(limit=2, data_dir=data_dir, base_url=moved.url) == 0
    config = json.loads((answers / "model_judgment" / "stub_single.config.json").read_text())
    assert [run["base_url"] for run in config["runs"]] == [server.url, moved.url]


def test_a_killed_run_goes_on(server: JudgeServer, judge: Judging, answers: Path, tmp_path: Path) -> None:
    written = answers / "model_judgment" / "stub_single.jsonl"
    server.answer = lambda asked: HANG if len(server.asked) > 5 else says(f"[[{len(server.asked)}]]")
    program = (
        "import argparse; from decdec_eval.mtbench.judge import add_judge; p = argparse.ArgumentParser(); "
        "add_judge(p); o = p.parse_args(); o.run(o)"
    )
    command = [sys.executable, "-c", program, "--answers", str(answers), "--judge-model", "stub"]
    command += ["--base-url", server.url, "--data-dir", str(tmp_path / "data"), "--parallel", "2"]
    environment = {**os.environ, "PYTHONPATH": with_checkout_first()}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while len(server.asked) < 7:  # five answered, and both threads hang in another
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.02)
        while written.read_bytes().count(b"\n") < 5:
            assert time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    before = written.read_bytes()
    assert before.count(b"\n") == 5
    server.released.set()
    server.answer = lambda asked: says("[[7]]")
    assert judge() == 0
    assert written.read_bytes().startswith(before)
    found = records(answers)
    assert keys(found) == EVERY
    asked = Counter(one.user for one in server.asked)
    assert {asked[record["user_prompt"]] for record in found[:5]} == {1}
    assert sum(asked.values()) == 12 + 2  # only what hung at the kill was asked twice


@pytest.mark.parametrize("torn", ["half", "without its line end"])
def test_a_torn_last_line(torn: str, judge: Judging, server: JudgeServer, answers: Path) -> None:
    assert judge() == 0
    path = answers / "model_judgment" / "stub_single.jsonl"
    whole = path.read_bytes()
    last = whole.splitlines(keepends=True)[-1]
    path.write_bytes(whole[: -len(last) // 2] if torn == "half" else whole[:-1])
    assert judge() == 0
    assert keys(records(answers)) == EVERY
    assert len(server.asked) == (13 if torn == "half" else 12)
    if torn != "half":
        assert path.read_bytes() == whole


def test_two_writers_are_refused(judge: Judging, answers: Path, capsys: Capture) -> None:
    with JudgmentFile(judgment_path(answers, "stub", "single"), "single"):
        assert judge() == 2
    assert "must be written by one process at a time, got a second" in capsys.readouterr().err
    assert judge() == 0


def test_judges_with_slashes_have_files(judge: Judging, answers: Path) -> None:
    assert judge(judge_model="org/judge v1", limit=1) == 0
    assert records(answers, "org_judge_v1_single")[0]["judge"][0] == "org/judge v1"


def test_another_judge_under_the_same_name_is_refused(judge: Judging, capsys: Capture) -> None:
    assert judge(judge_model="a/b", limit=1) == 0
    assert judge(judge_model="a_b", limit=1) == 2
    assert refusal(capsys).startswith('judge must be "a/b", as for the judgments in ')


def test_other_prompts_are_refused(judge: Judging, tmp_path: Path, capsys: Capture) -> None:
    assert judge(limit=1) == 0
    rows = [{**row, "system_prompt": "be kind"} for row in prompt_rows()]
    write_jsonl(tmp_path / "data" / "judge_prompts.jsonl", rows)
    assert judge(limit=1) == 2
    assert refusal(capsys).startswith("data_sha256 must be ")


def test_another_temperature_is_refused(judge: Judging, answers: Path, capsys: Capture) -> None:
    assert judge(limit=1) == 0
    path = answers / "model_judgment" / "stub_single.config.json"
    path.write_text(path.read_text().replace('"temperature": 0', '"temperature": 0.7'))
    assert judge() == 2
    assert refusal(capsys).startswith("temperature must be 0.7, as for the judgments in ")


@pytest.mark.parametrize("content", [None, "no JSON", "[]", '{"runs": 1}'])
def test_judgments_without_their_configuration_are_refused(
    content: str | None, judge: Judging, answers: Path, capsys: Capture
) -> None:
    assert judge(limit=1) == 0
    path = answers / "model_judgment" / "stub_single.config.json"
    path.unlink()
    if content is not None:
        path.write_text(content)
    assert judge() == 2
    assert f"{path} must be " in refusal(capsys)


@pytest.mark.parametrize("line", ["no JSON", "[]", '{"question_id": 81}', '{"question_id": []}'])
def test_a_line_that_is_no_judgment_is_refused(
    line: str, judge: Judging, answers: Path, capsys: Capture
) -> None:
    assert judge(limit=1) == 0
    path = answers / "model_judgment" / "stub_single.jsonl"
    path.write_text(line + "\n" + path.read_text())
    assert judge() == 2
    assert f"{path} line 1 must be a judgment of FastChat's, got " in refusal(capsys)


def test_a_judgment_that_is_there_twice_is_refused(judge: Judging, answers: Path, capsys: Capture) -> None:
    assert judge(limit=1) == 0
    path = answers / "model_judgment" / "stub_single.jsonl"
    path.write_text(path.read_text() + path.read_text().splitlines()[0] + "\n")
    assert judge() == 2
    assert "must have each judgment once, got (81, " in refusal(capsys)
