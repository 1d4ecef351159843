"""The command `judge` on small files against a local server."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from judge_server import JudgeServer, says
from mtbench_files import KEY, Judging, write_answers, write_mt_bench

from decdec_core.commandline import OneLineParser, run_command
from decdec_eval.mtbench import client
from decdec_eval.mtbench.judge import add_judge


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "_FIRST_WAIT_S", 0.01)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def server() -> Iterator[JudgeServer]:
    with JudgeServer(lambda asked: says("Rating: [[7]]")) as stub:
        yield stub


@pytest.fixture
def answers(tmp_path: Path) -> Path:
    write_mt_bench(tmp_path / "data")
    return write_answers(tmp_path / "answers", "dynamic", "none")


@pytest.fixture
def judge(quick: None, server: JudgeServer, answers: Path, tmp_path: Path) -> Judging:
    """Runs the command on `answers` against `server`; returns its exit code."""
    given = {"answers": answers, "judge-model": "stub", "base-url": server.url, "data-dir": tmp_path / "data"}

    def run(**options: object) -> int:
        words = {**given, **{name.replace("_", "-"): value for name, value in options.items()}}
        parser = OneLineParser(prog="judge")
        add_judge(parser)
        parsed = parser.parse_args([w for name, value in words.items() for w in (f"--{name}", str(value))])
        return run_command(lambda: parsed.run(parsed))

    return run
