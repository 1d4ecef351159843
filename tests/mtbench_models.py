"""A tiny chat model, its artifact, and a few questions: what the tests of MT-Bench share."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from conftest import CALIBRATION, byte_tokenizer, tiny_model

from decdec_core.build import build_artifact
from decdec_core.config import ResidualQuant, WeightQuant
from decdec_eval.mtbench.data import Question, load_questions

TEMPLATE = (
    "{% for message in messages %}<bos>{{ message['role'] }}\n{{ message['content'] }}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}<bos>assistant\n{% endif %}"
)
EOS = 258
CATEGORIES = ("writing", "math", "stem", "humanities")


def save_chat(folder: Path, template: str | None = TEMPLATE, architecture: str = "llama") -> Path:
    """Write a tiny model and a tokenizer with a chat template to `folder`."""
    tiny_model(architecture).save_pretrained(folder)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return folder


def build_chat(model: Path, out: Path) -> Path:
    """Build the 3-bit artifact of a tiny model."""
    return build_artifact(str(model), out, WeightQuant("rtn", 3), ResidualQuant(4), CALIBRATION)


def write_questions(folder: Path) -> list[Question]:
    """Write a question of two turns in each of CATEGORIES to `folder` in FastChat's form; return them."""
    folder.mkdir(parents=True)
    rows = [
        {"question_id": 81 + i, "category": category, "turns": [f"Say {category}.", f"And {i} again?"]}
        for i, category in enumerate(CATEGORIES)
    ]
    (folder / "question.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_questions(folder)


def single_threaded() -> Iterator[None]:
    """Run on one thread meanwhile: threads of so small a model wait for each other more than they compute."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
