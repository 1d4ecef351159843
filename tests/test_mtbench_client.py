"""Faults of the judge's server, each mended by patience or refused in one line, and the key."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path

import pytest
from judge_server import HANG, RESET, Asked, JudgeServer, Reply, fails, says
from mtbench_files import EVERY, KEY, Capture, Judging, keys, records, refusal

from decdec_core.config import DecDECError
from decdec_eval.mtbench import client

pytest_plugins = ["judge_fixtures"]


def first_time(fault: Reply) -> Callable[[Asked], Reply]:
    """Answer every prompt with `fault` when it is asked for the first time, and with a rating afterwards."""
    seen: set[str] = set()

    def reply(asked: Asked) -> Reply:
        if asked.user in seen:
            return says("Rating: [[7]]")
        seen.add(asked.user)
        return fault

    return reply


FAULTS = {
    "429": fails(429, retry_after="0"),
    "429 without Retry-After": fails(429),
    "408": fails(408),
    "500": fails(500),
    "503, no JSON": Reply(b"<html>busy</html>", 503, {"content-type": "text/html"}),
    "hang": HANG,
    "empty body": Reply(b""),
    "empty text": Reply(b"", headers={"content-type": "text/plain"}),
    "invalid JSON": Reply(b'{"choices": [{"mess'),
    "no JSON": Reply(b"<html>ok</html>", headers={"content-type": "text/html"}),
    "JSON too deep": Reply(b"[" * 100_000),
    "null": Reply(b"null"),
    "error with status 200": Reply(b'{"error": {"message": "overloaded"}}'),
    "no choices": Reply(b'{"choices": []}'),
    "content of another type": Reply(b'{"choices": [{"message": {"content": [1]}}]}'),
    "reset": RESET,
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_passing_fault_is_tried_again(
    fault: str, judge: Judging, server: JudgeServer, answers: Path
) -> None:
    server.answer = first_time(FAULTS[fault])
    assert judge(limit=1, timeout=0.5) == 0
    found = records(answers)
    assert [one["score"] for one in found] == [7] * 4
    assert Counter(Counter(asked.user for asked in server.asked).values()) == {2: 4}


@pytest.mark.parametrize("form", ["seconds", "date"])
def test_retry_after_is_honoured(form: str, judge: Judging, server: JudgeServer) -> None:
    # a date has whole seconds: of "in 3 s" at least 2 are left
    date = format_datetime(datetime.now(UTC) + timedelta(seconds=3), usegmt=True)
    server.answer = first_time(fails(429, retry_after="1" if form == "seconds" else date))
    assert judge(limit=1) == 0
    for user in {asked.user for asked in server.asked}:
        first, second = (asked.time_s for asked in server.asked if asked.user == user)
        assert second - first >= (1 if form == "seconds" else 1.5)


def test_a_retry_after_of_hours_ends_the_run(judge: Judging, server: JudgeServer, capsys: Capture) -> None:
    server.answer = lambda asked: fails(429, retry_after="7200")
    assert judge(limit=1, parallel=1) == 2
    assert len(server.asked) == 1
    assert "must be back within 600 s, got Retry-After 7200 s with status 429" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("header", "wanted"),
    [(None, None), ("2.5", 2.5), ("-1", 0), ("soon", None), ("nan", None), ("inf", None)],
)
def test_retry_after_headers(header: str | None, wanted: float | None) -> None:
    assert client.retry_after_s(header) == wanted


def test_waits_grow_and_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "_FIRST_WAIT_S", 1.0)
    asking = client.JudgeClient("stub", "http://127.0.0.1:9/v1", 1, 6)
    for attempt, longest in ((0, 1), (1, 2), (3, 8), (6, 60), (400, 60)):
        waits = [asking._wait_s(attempt, None) for _ in range(50)]
        assert longest / 2 <= min(waits) < max(waits) <= longest
    assert min(asking._wait_s(0, 20.0) for _ in range(50)) >= 20


def test_a_refusal_in_words_is_a_judgment(judge: Judging, server: JudgeServer, answers: Path) -> None:
    server.answer = lambda asked: says(None)
    assert judge(limit=1) == 0
    assert [(one["judgment"], one["score"]) for one in records(answers)] == [("", -1)] * 4


def test_a_question_that_the_judge_cannot_take_leaves_the_others(
    judge: Judging, server: JudgeServer, answers: Path, capsys: Capture
) -> None:
    server.answer = lambda asked: fails(500) if asked.user.endswith("none to 101 first") else says("[[7]]")
    assert judge(retries=1, parallel=1) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "question 101, turn 1, none: judge stub at http://127.0.0.1" in error
    assert "must answer within 2 tries, got at the last of 2: status 500" in error
    assert error.endswith("1 judgments are missing: run it again for them")
    assert EVERY - keys(records(answers)) == Counter([(101, "none", 1)])
    server.answer = lambda asked: says("[[7]]")
    before = len(server.asked)
    assert judge() == 0
    assert keys(records(answers)) == EVERY
    assert len(server.asked) == before + 1


@pytest.mark.parametrize("status", [400, 413, 422])
def test_a_request_that_is_not_taken_is_not_tried_again(
    status: int, judge: Judging, server: JudgeServer, answers: Path, capsys: Capture
) -> None:
    server.answer = lambda asked: fails(status, "too long") if "none to 101" in asked.user else says("[[7]]")
    assert judge() == 2
    assert len(server.asked) == 12
    assert EVERY - keys(records(answers)) == Counter([(101, "none", 1), (101, "none", 2)])
    error = refusal(capsys)
    assert error.startswith("question 101, turn ")
    assert f"must take the request, got status {status}: Error code: {status} - too long; 2 judg" in error


def test_a_judge_that_is_down_ends_the_run(
    judge: Judging, server: JudgeServer, answers: Path, capsys: Capture
) -> None:
    server.answer = lambda asked: fails(503)
    assert judge(retries=1, parallel=1) == 2
    assert len(server.asked) == 16  # eight judgments, twice each
    assert "12 judgments are missing" in capsys.readouterr().err
    assert records(answers) == []


@pytest.mark.parametrize("status", [401, 403, 404])
def test_other_statuses_end_the_run_at_once_without_the_key(
    status: int, judge: Judging, server: JudgeServer, capsys: Capture
) -> None:
    server.answer = lambda asked: fails(status, f"bad\nkey {KEY}")
    assert judge(parallel=1) == 2
    assert len(server.asked) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"got status {status}: " in error
    assert "bad key [key]; 12 judgments are missing" in error
    assert KEY not in error


def test_what_is_under_way_at_a_refusal_is_kept(judge: Judging, server: JudgeServer, answers: Path) -> None:
    def reply(asked: Asked) -> Reply:
        if asked is server.asked[0]:
            while len(server.asked) < 3:
                time.sleep(0.01)
            return fails(403)
        time.sleep(1)
        return says("[[7]]")

    server.answer = reply
    assert judge(parallel=3) == 2
    assert (len(server.asked), len(records(answers))) == (3, 2)


def test_a_judge_that_is_not_there_is_one_line(judge: Judging, capsys: Capture) -> None:
    assert judge(base_url="http://127.0.0.1:9/v1", retries=1, limit=1) == 2
    assert "got at the last of 2: ConnectError: " in capsys.readouterr().err.strip().splitlines()[-1]


def test_the_key_is_sent_and_never_written(
    judge: Judging, server: JudgeServer, answers: Path, capsys: Capture
) -> None:
    url = server.url.replace("http://", "http://user:hidden@") + "?token=hidden"
    assert judge(base_url=server.url, limit=1) == 0
    assert {asked.headers["authorization"] for asked in server.asked} == {f"Bearer {KEY}"}
    server.answer = lambda asked: fails(400, f"{KEY}")
    asked = len(server.asked)
    assert judge(base_url=url) == 2
    assert len(server.asked) > asked
    output = "".join(capsys.readouterr())
    written = [path for path in answers.rglob("*") if path.is_file()]
    assert {"stub_single.jsonl", "stub_single.config.json"} <= {path.name for path in written}
    for text in (output, *(path.read_text() for path in written)):
        assert KEY not in text
        assert "hidden" not in text


def test_openais_server_needs_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(
        DecDECError, match=r"OPENAI_API_KEY must be set for https://api.openai.com/v1, got nothing"
    ):
        client.JudgeClient("gpt-4", None, 1, 1)


def test_another_server_may_need_no_key(
    monkeypatch: pytest.MonkeyPatch, judge: Judging, server: JudgeServer
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY")
    assert judge(limit=1) == 0
    assert len(server.asked) == 4


@pytest.mark.parametrize(
    ("url", "wanted"),
    [
        ("https://user:pw@judge.example:8443/v1?key=x#y", "https://judge.example:8443/v1"),
        ("http://[::1]:8000/v1", "http://[::1]:8000/v1"),
        ("http://localhost/v1", "http://localhost/v1"),
    ],
)
def test_urls_are_shown_without_credentials(url: str, wanted: str) -> None:
    assert client.without_credentials(url) == wanted
