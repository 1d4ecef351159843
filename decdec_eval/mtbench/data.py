"""MT-Bench's questions, reference answers and judge prompts: where they are, how they are read and fetched.

They are three JSON Lines files in one folder, as FastChat publishes them: question.jsonl,
reference_answer/gpt-4.jsonl and judge_prompts.jsonl.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import string
import urllib.request
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any, TypeVar

from decdec_core.config import DecDECError
from decdec_core.files import whole_file
from decdec_core.manifest import sha256_of_file
from decdec_core.sources import cache_dir
from decdec_core.texts import data_dir as environment_data_dir

QUESTIONS, REFERENCES, PROMPTS = "question.jsonl", "reference_answer/gpt-4.jsonl", "judge_prompts.jsonl"
CATEGORIES = ("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities")
REFERENCE_CATEGORIES = ("math", "reasoning", "coding")  # whose judge is shown a reference answer

_COMMIT = "0e6d3e4beaab66f4d3f93db72541a4abab8af28d"
SOURCE = f"https://raw.githubusercontent.com/lm-sys/FastChat/{_COMMIT}/fastchat/llm_judge/data"
# where each file lies below SOURCE, and its SHA-256
_PUBLISHED = {
    QUESTIONS: (
        "mt_bench/question.jsonl",
        "119565adbab82227089cefdb44c8d7e2cf04dc0a0ec233634c82e7d4e2a944f7",
    ),
    REFERENCES: (
        "mt_bench/reference_answer/gpt-4.jsonl",
        "f957a5bc977badb66885ec970e6cd08527845780313f0995764260e5777b9b3f",
    ),
    PROMPTS: (
        "judge_prompts.jsonl",
        "fd283293406d024f44c174b094ef48031d0687a4682fd3a56b29b138f80281b6",
    ),
}
_LARGEST_BYTES = 1 << 20  # the largest of the three has 51109
_FETCH_SECONDS = 60.0  # without a byte

# what a template may name; FastChat's numbering: question_1 is the first turn's
PROMPT_FIELDS = frozenset(
    f"{stem}{turn}"
    for stem in ("question", "answer", "answer_a", "answer_b", "ref_answer")
    for turn in ("", "_1", "_2")
) - {"ref_answer"}
OUTPUT_FORMATS = {"single": "[[rating]]", "pairwise": "[[A]]"}

T = TypeVar("T")


@dataclass(frozen=True)
class Question:
    """A question of two turns. reference: question.jsonl's own, which no judge prompt of FastChat's shows."""

    question_id: int
    category: str
    turns: tuple[str, str]
    reference: tuple[str, ...] | None


@dataclass(frozen=True)
class JudgePrompt:
    """How a judge is asked. type: "single" or "pairwise"; template: the user's message, with PROMPT_FIELDS in
    braces."""

    name: str
    type: str
    system: str
    template: str


def mt_bench_folder(data_dir: Path | None) -> Path:
    """Return the folder of MT-Bench's files: `data_dir` or its mt_bench, else $DECDEC_DATA_DIR/mt_bench, else
    the cache that fetch fills. Raises DecDECError where there is none."""
    if data_dir is not None:
        for folder in (data_dir, data_dir / "mt_bench"):
            if (folder / QUESTIONS).is_file():
                return folder
        raise DecDECError(f"data-dir must be a folder with {QUESTIONS}, got {data_dir} without one")
    named = environment_data_dir()
    for folder in ([named / "mt_bench"] if named else []) + [_cache()]:
        if (folder / QUESTIONS).is_file():
            return folder
    tried = f"{named / 'mt_bench'} has no {QUESTIONS}" if named else "not set"
    raise DecDECError(
        f"MT-Bench must be in --data-dir, in DECDEC_DATA_DIR ({tried}) or in {_cache()}, got none of them: "
        "`python -m decdec_eval.mtbench fetch` fetches it"
    )


def load_questions(folder: Path) -> list[Question]:
    """Return the questions of folder/question.jsonl, in the file's order."""
    questions = _parsed(folder / QUESTIONS, _question)
    _require_unique(folder / QUESTIONS, "question_id", [question.question_id for question in questions])
    return questions


def load_references(folder: Path) -> dict[int, tuple[str, str]]:
    """Return gpt-4's answers to both turns by question_id: what judges of REFERENCE_CATEGORIES are shown."""
    return load_answers(folder / REFERENCES)


def load_answers(path: Path) -> dict[int, tuple[str, str]]:
    """Return the answers to both turns of each question_id in a file of FastChat's answer JSON Lines."""
    rows = _parsed(path, _answer)
    _require_unique(path, "question_id", [question_id for question_id, _ in rows])
    return dict(rows)


def load_prompts(folder: Path) -> dict[str, JudgePrompt]:
    """Return the judge prompts of folder/judge_prompts.jsonl by name."""
    prompts = _parsed(folder / PROMPTS, _prompt)
    _require_unique(folder / PROMPTS, "name", [prompt.name for prompt in prompts])
    return {prompt.name: prompt for prompt in prompts}


def data_sha256(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of each of the three files, as results state it."""
    return {name: sha256_of_file(folder / name) for name in _PUBLISHED}


def fetch(folder: Path | None = None, source: str = SOURCE) -> Path:
    """Return `folder` (by default the cache) with the three files in it, downloaded from `source` unless they
    are there. Nothing is written unless the bytes of all of them are the published ones; raises DecDECError
    where they are not, or where there is no answer."""
    folder = folder or _cache()
    wanted = {
        name: place
        for name, place in _PUBLISHED.items()
        if not (folder / name).is_file() or sha256_of_file(folder / name) != place[1]
    }
    loaded = {name: _download(f"{source.rstrip('/')}/{place}", sha) for name, (place, sha) in wanted.items()}
    for name, content in loaded.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        with whole_file(folder / name) as temporary:
            temporary.write_bytes(content)
    return folder


def add_fetch(parser: argparse.ArgumentParser) -> None:
    """Add the options of `fetch`."""
    parser.add_argument("--out", type=Path, metavar="DIR", help=f"default {_cache()}, where it is looked for")
    parser.add_argument("--source", default=SOURCE, metavar="URL", help="a mirror; the hashes stay the same")
    parser.set_defaults(run=_fetch, parser=parser)


def _fetch(options: argparse.Namespace) -> None:
    print(fetch(options.out, options.source))


def _cache() -> Path:
    return cache_dir() / "mt_bench"


def _download(url: str, sha256: str) -> bytes:
    try:
        with urllib.request.urlopen(url, timeout=_FETCH_SECONDS) as response:
            content = response.read(_LARGEST_BYTES + 1)
    except (OSError, HTTPException, ValueError) as error:  # ValueError: a url that is none
        raise DecDECError(
            f"{url} must be there to fetch, got {type(error).__name__}: {' '.join(str(error).split())}"
        ) from None
    got = hashlib.sha256(content).hexdigest()
    if got != sha256:
        raise DecDECError(f"{url} must have the SHA-256 {sha256}, got {got} of {len(content)} bytes")
    return content


def _parsed(path: Path, parse: Callable[[Mapping[str, Any]], T]) -> list[T]:
    """Return `parse` of each line of `path`; what it refuses with KeyError, TypeError or ValueError is one
    line that says where."""
    if not path.is_file():
        raise DecDECError(f"{path} must be a file of JSON Lines, got none")
    found = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise TypeError("no JSON object")
            found.append(parse(row))
        except KeyError as error:
            raise DecDECError(f"{path} line {number} must have a key {error}, got none") from None
        except (TypeError, ValueError) as error:
            raise DecDECError(f"{path} line {number} must be one of FastChat's, got {error}") from None
    if not found:
        raise DecDECError(f"{path} must have at least one line, got none")
    return found


def _question(row: Mapping[str, Any]) -> Question:
    reference = row.get("reference")
    return Question(
        _typed(row, "question_id", int),
        _typed(row, "category", str),
        _two_turns(row["turns"]),
        tuple(map(str, reference)) if reference is not None else None,
    )


def _answer(row: Mapping[str, Any]) -> tuple[int, tuple[str, str]]:
    choices = _typed(row, "choices", list)
    if len(choices) < 1 or not isinstance(choices[0], dict):
        raise ValueError("no choices")
    return _typed(row, "question_id", int), _two_turns(choices[0]["turns"])


def _prompt(row: Mapping[str, Any]) -> JudgePrompt:
    names = ("name", "type", "system_prompt", "prompt_template", "output_format")
    name, kind, system, template, output_format = (_typed(row, key, str) for key in names)
    if OUTPUT_FORMATS.get(kind) != output_format:
        raise ValueError(f"type {kind!r} with output_format {output_format!r}")
    fields = {field for _, field, _, _ in string.Formatter().parse(template) if field is not None}
    if not fields <= PROMPT_FIELDS:
        raise ValueError(f"unknown field {sorted(fields - PROMPT_FIELDS)[0]!r} in prompt_template")
    return JudgePrompt(name, kind, system, template)


def _two_turns(turns: Any) -> tuple[str, str]:
    if not isinstance(turns, list) or len(turns) != 2 or not all(isinstance(turn, str) for turn in turns):
        raise ValueError(f"turns that are not two texts: {str(turns)[:60]!r}")
    return turns[0], turns[1]


def _typed(row: Mapping[str, Any], key: str, kind: type) -> Any:
    value = row[key]
    if not isinstance(value, kind) or isinstance(value, bool):
        raise TypeError(f"{key} {value!r:.60}")
    return value


def _require_unique(path: Path, key: str, values: Collection[object]) -> None:
    seen: set[object] = set()
    for value in values:
        if value in seen:
            raise DecDECError(f"{path} must have each {key} once, got {value!r} twice")
        seen.add(value)
