"""Prompts, ratings and verdicts: fschat's own functions give the same; refused prompts."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import pytest
from mtbench_files import Capture, Judging, prompt_rows, refusal, write_jsonl

from decdec_eval.mtbench import client
from decdec_eval.mtbench.data import load_prompts, load_questions, load_references
from decdec_eval.mtbench.judge import matches_of
from decdec_eval.mtbench.prompts import NO_RATING, OUTSIDE, rating_of, verdict_of

pytest_plugins = ["judge_fixtures"]


@pytest.fixture
def fastchat(monkeypatch: pytest.MonkeyPatch) -> Any:
    """fschat's own judge, without the packages that it imports and does not use here."""
    monkeypatch.setitem(sys.modules, "anthropic", types.ModuleType("anthropic"))
    import fastchat.llm_judge.common as common

    monkeypatch.setitem(common.__dict__, "OPENAI_MODEL_LIST", ("gpt-4",))
    return common


@pytest.mark.parametrize("mode", ["single", "pair"])
def test_every_prompt_is_fastchats(
    mode: str, data_dir: Path, fastchat: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = data_dir / "mt_bench"
    asked: list[list[dict[str, str]]] = []

    def completion(model: str, conversation: Any, temperature: float, max_tokens: int) -> str:
        assert (temperature, max_tokens) == (client.TEMPERATURE, client.MAX_TOKENS)
        asked.append(conversation.to_openai_api_messages())
        return "Rating: [[3]]" if mode == "single" else "[[B]]"

    monkeypatch.setattr(fastchat, "chat_completion_openai", completion)
    questions = load_questions(folder)
    given = {
        model: {q.question_id: (f"{model} {q.question_id} {{x}}", f"{model}\n2") for q in questions}
        for model in ("dynamic", "none")
    }
    matches = matches_of(
        mode,
        questions,
        load_references(folder),
        load_prompts(folder),
        given,
        "none" if mode == "pair" else None,
    )
    assert len(matches) == {"single": 320, "pair": 160}[mode]
    rows = {row["question_id"]: row for row in fastchat.load_questions(folder / "question.jsonl", None, None)}
    theirs = fastchat.load_model_answers(str(folder / "reference_answer"))["gpt-4"]
    prompts = fastchat.load_judge_prompts(folder / "judge_prompts.jsonl")
    for match in matches:
        row = rows[match.question_id]
        needs = row["category"] in fastchat.NEED_REF_CATS
        name = {
            ("single", False): "single-v1",
            ("single", True): "single-math-v1",
            ("pair", False): "pair-v2",
            ("pair", True): "pair-math-v1",
        }[mode, needs] + ("-multi-turn" if match.turn == 2 else "")
        judge = fastchat.Judge("gpt-4", prompts[name], ref_based=needs, multi_turn=match.turn == 2)
        reference = theirs[match.question_id] if needs else None
        turns = [{"choices": [{"turns": given[model][match.question_id]}]} for model in match.models]
        asked.clear()
        if mode == "single":
            wanted = fastchat.play_a_match_single(
                fastchat.MatchSingle(row, match.models[0], turns[0], judge, reference, match.turn == 2), None
            )
        else:
            wanted = fastchat.play_a_match_pair(
                fastchat.MatchPair(row, *match.models, *turns, judge, reference, match.turn == 2), None
            )
        ours = [
            [{"role": "system", "content": match.prompt.system}, {"role": "user", "content": user}]
            for user in match.users
        ]
        assert ours == asked
        got = match.record("gpt-4", ["Rating: [[3]]" if mode == "single" else "[[B]]"] * len(match.users))
        got.pop("unrated", None)
        assert {**got, "tstamp": 0, "judge": tuple(got["judge"])} == {**wanted, "tstamp": 0}
        assert list(got) == list(wanted)


JUDGMENTS = [
    "Rating: [[5]]",
    "[[7.5]] and later [[2]]",
    "[3] first, then [[9]]",
    "only [4]",
    "[[8.]]",
    "[[10]]",
    "no number",
    "[[7/10]]",
    "[[rating]]",
    "",
    "[[ 5 ]]",
]


@pytest.mark.parametrize("judgment", JUDGMENTS)
def test_ratings_are_fastchats(judgment: str, fastchat: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fastchat, "chat_completion_openai", lambda *_args, **_named: judgment)
    prompt = {"prompt_template": "{question}{answer}", "system_prompt": "", "output_format": "[[rating]]"}
    answer = {"choices": [{"turns": ["a", "b"]}]}
    wanted, _, _ = fastchat.run_judge_single(
        {"turns": ["q", "r"]}, answer, fastchat.Judge("gpt-4", prompt), None
    )
    rating = rating_of(judgment)
    assert rating.score == wanted
    assert rating.unrated == (NO_RATING if wanted == -1 else None)


@pytest.mark.parametrize(
    "judgment",
    ["[[11]]", "[[0]]", "[[0.5]]", "[[10.01]]", "[[100]] or rather [[10]]", "[0]", "[[" + "1" * 5000 + "]]"],
)
def test_a_rating_outside_1_to_10_is_none(judgment: str) -> None:
    assert rating_of(judgment).score == -1
    assert rating_of(judgment).unrated == OUTSIDE


@pytest.mark.parametrize(
    ("judgment", "wanted"),
    [
        ("[[A]]", "A"),
        ("so [[B]]", "B"),
        ("[[C]]", "tie"),
        ("[A]", "error"),
        ("", "error"),
        ("[[B]] [[A]]", "A"),
    ],
)
def test_verdicts(judgment: str, wanted: str) -> None:
    assert verdict_of(judgment) == wanted


def test_a_missing_prompt_is_refused(judge: Judging, tmp_path: Path, capsys: Capture) -> None:
    write_jsonl(tmp_path / "data" / "judge_prompts.jsonl", prompt_rows()[:1])
    assert judge() == 2
    assert refusal(capsys) == "the judge prompts must have single-v1-multi-turn of type single, got single-v1"


def test_a_prompt_that_wants_a_reference_where_there_is_none_is_refused(
    judge: Judging, tmp_path: Path, capsys: Capture
) -> None:
    rows = prompt_rows()
    rows[0]["prompt_template"] = "{ref_answer_1}"
    write_jsonl(tmp_path / "data" / "judge_prompts.jsonl", rows)
    assert judge() == 2
    assert refusal(capsys).startswith("prompt single-v1 must name answer, question, ")
