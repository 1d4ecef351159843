"""MT-Bench's questions: where they are, and how they are read."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

from decdec_core.config import DecDECError

QUESTIONS = "question.jsonl"


@dataclass(frozen=True)
class Question:
    """A question of two turns. reference: question.jsonl's own."""

    question_id: int
    category: str
    turns: tuple[str, str]
    reference: tuple[str, ...] | None


def mt_bench_folder(data_dir: Path | None) -> Path:
    """Return the folder of MT-Bench's files: `data_dir` or its mt_bench, else $DECDEC_DATA_DIR/mt_bench."""
    named = [data_dir, data_dir / "mt_bench"] if data_dir else []
    if not named and os.environ.get("DECDEC_DATA_DIR"):
        named = [Path(os.environ["DECDEC_DATA_DIR"], "mt_bench")]
    for folder in named:
        if (folder / QUESTIONS).is_file():
            return folder
    raise DecDECError(f"MT-Bench must be in --data-dir or in DECDEC_DATA_DIR, got {data_dir}")


def load_questions(folder: Path) -> list[Question]:
    """Return the questions of folder/question.jsonl, in the file's order."""
    rows = map(json.loads, (folder / QUESTIONS).read_text("utf-8").splitlines())
    return [
        Question(
            row["question_id"], row["category"], tuple(row["turns"]), tuple(row.get("reference", ())) or None
        )
        for row in rows
    ]
