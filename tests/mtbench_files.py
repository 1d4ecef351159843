"""A small MT-Bench in FastChat's files: three questions, one of which needs a reference, and answers."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest

KEY = "sk-a-secret-of-the-test"
Judging = Callable[..., int]
Capture = pytest.CaptureFixture[str]

QUESTIONS = {81: "writing", 101: "reasoning", 151: "humanities"}
_TEMPLATES = {
    "single-v1": "Q {question} A {answer}",
    "single-math-v1": "Q {question} R {ref_answer_1} A {answer}",
    "single-v1-multi-turn": "Q {question_1} A {answer_1} Q {question_2} A {answer_2}",
    "single-math-v1-multi-turn": "R {ref_answer_1} {ref_answer_2} A {answer_1} Q {question_2} A {answer_2}",
    "pair-v2": "Q {question} A {answer_a} B {answer_b}",
    "pair-math-v1": "Q {question} R {ref_answer_1} A {answer_a} B {answer_b}",
    "pair-v2-multi-turn": "Q {question_1} A {answer_a_1} {answer_a_2} B {answer_b_1} {answer_b_2}",
    "pair-math-v1-multi-turn": "R {ref_answer_1} {ref_answer_2} A {answer_a_2} B {answer_b_2}",
}


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def question_rows() -> list[dict[str, Any]]:
    return [
        {"question_id": number, "category": category, "turns": [f"q{number} {{first}}", f"q{number} second"]}
        for number, category in QUESTIONS.items()
    ]


def prompt_rows() -> list[dict[str, Any]]:
    return [
        {
            "name": name,
            "type": "single" if name.startswith("single") else "pairwise",
            "system_prompt": f"system of {name}",
            "prompt_template": template,
            "description": "",
            "category": "general",
            "output_format": "[[rating]]" if name.startswith("single") else "[[A]]",
        }
        for name, template in _TEMPLATES.items()
    ]


def answer_row(question_id: int, model: str) -> dict[str, Any]:
    turns = [f"{model} to {question_id} first", f"{model} to {question_id} second"]
    choices = [{"index": 0, "turns": turns}]
    return {
        "question_id": question_id,
        "answer_id": "x",
        "model_id": model,
        "choices": choices,
        "tstamp": 1.0,
    }


def write_mt_bench(folder: Path) -> Path:
    """Write the three files to `folder`."""
    write_jsonl(folder / "question.jsonl", question_rows())
    write_jsonl(folder / "reference_answer" / "gpt-4.jsonl", [answer_row(101, "gpt-4")])
    write_jsonl(folder / "judge_prompts.jsonl", prompt_rows())
    return folder


def write_answers(folder: Path, *models: str, questions: Iterable[int] = QUESTIONS) -> Path:
    """Write model_answer/MODEL.jsonl to `folder` for each model."""
    for model in models:
        rows = [answer_row(question_id, model) for question_id in questions]
        write_jsonl(folder / "model_answer" / f"{model}.jsonl", rows)
    return folder


def records(answers: Path, name: str = "stub_single") -> list[dict[str, Any]]:
    lines = (answers / "model_judgment" / f"{name}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def keys(found: list[dict[str, Any]]) -> Counter[tuple[int, str, int]]:
    return Counter((one["question_id"], one["model"], one["turn"]) for one in found)


EVERY = Counter((q, model, turn) for q in (81, 101, 151) for model in ("dynamic", "none") for turn in (1, 2))


def refusal(capsys: Capture) -> str:
    """Return the one line of standard error, progress bars left out."""
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("decdec: error: ")]
    assert len(lines) == 1
    return lines[0].removeprefix("decdec: error: ")
