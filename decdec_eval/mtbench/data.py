"""MT-Bench's questions and where they are."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

from decdec_core.config import DecDECError


@dataclass(frozen=True)
class Question:
    """One conversation: two turns, and reference answers where the question brings them."""

    question_id: int
    category: str
    turns: tuple[str, str]
    reference: tuple[str, ...] | None


def load_questions(folder: Path) -> list[Question]:
    """Return the questions of folder/question.jsonl, in its order."""
    path = folder / "question.jsonl"
    if not path.is_file():
        raise DecDECError(f"{folder} must hold question.jsonl, got none")
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    return [
        Question(
            row["question_id"],
            row["category"],
            tuple(row["turns"]),
            tuple(row["reference"]) if "reference" in row else None,
        )
        for row in rows
    ]


def mt_bench_folder(data_dir: Path | None) -> Path:
    """Return the folder of MT-Bench's files: in `data_dir`, else in DECDEC_DATA_DIR."""
    given = data_dir or os.environ.get("DECDEC_DATA_DIR")
    if not given:
        raise DecDECError("MT-Bench's questions need --data-dir or DECDEC_DATA_DIR, got neither")
    folder = Path(given) / "mt_bench"
    if not folder.is_dir():
        raise DecDECError(f"{given} must hold mt_bench, got none")
    return folder
