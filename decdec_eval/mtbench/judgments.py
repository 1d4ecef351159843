"""A judge's judgments on disk: FastChat's JSON Lines, appended one by one, and how they came about."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from decdec_core.config import DecDECError
from decdec_core.files import lock, write_json

MODES = ("single", "pair")
# what tells one judgment of a file from another, and what the judge was asked for it
_KEYS = {"single": ("question_id", "model", "turn"), "pair": ("question_id", "model_1", "model_2", "turn")}
_ASKED = {"single": ("user_prompt",), "pair": ("g1_user_prompt", "g2_user_prompt")}

Key = tuple[Any, ...]


def judgment_path(answers: Path, judge_model: str, mode: str) -> Path:
    """Return where the judgments of the answers in `answers` are. A judge's name may be a path or a hub id:
    what is no letter, digit, dot, hyphen or underscore becomes an underscore."""
    stem = re.sub(r"[^A-Za-z0-9._-]", "_", judge_model)
    return answers / "model_judgment" / f"{stem}_{mode}.jsonl"


class JudgmentFile:
    """The judgments in `path`, and the only process that appends to them.

    A last line that a kill tore is dropped; one that lacks its line end only is kept. What is no judgment,
    or is there twice, raises DecDECError, and so does a file that another process is writing. Closed by
    `with`.
    """

    def __init__(self, path: Path, mode: str) -> None:
        self.path, self.mode = path, mode
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a+b")
        try:
            lock(self._file, self.path)
            self._mend_last_line()
            self.records = self._read()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def key_of(self, record: Mapping[str, Any]) -> Key:
        """Return what a judgment is of."""
        return tuple(record[key] for key in _KEYS[self.mode])

    def asked(self) -> dict[Key, tuple[str, ...]]:
        """Return what the judge was asked, for every judgment that is there."""
        return {self.key_of(record): self._asked_of(record) for record in self.records}

    def append(self, record: Mapping[str, Any]) -> None:
        """Write a judgment, whole and at once."""
        self._file.write(json.dumps(record).encode() + b"\n")
        self._file.flush()
        self.records.append(dict(record))

    def pin(self, pinned: Mapping[str, Any], run: Mapping[str, Any]) -> None:
        """Keep beside the file how its judgments come about: `pinned`, the same for all of them, and each
        `run` that differs from the one before. Judgments that came about otherwise raise DecDECError."""
        path = self.path.with_suffix(".config.json")
        if not path.is_file():
            if self.records:
                raise DecDECError(
                    f"{path} must be beside its {len(self.records)} judgments, got no such file"
                )
            write_json(path, {**pinned, "runs": [run]})
            return
        try:
            config = json.loads(path.read_bytes())
            runs = list(config["runs"])
        except (ValueError, TypeError, KeyError) as error:
            raise DecDECError(f"{path} must be a configuration of `judge`, got {error!r}") from None
        for key in sorted({*pinned, *config} - {"runs"}):
            if pinned.get(key) != config.get(key):
                raise DecDECError(
                    f"{key} must be {json.dumps(config.get(key))}, as for the judgments in {self.path}, "
                    f"got {json.dumps(pinned.get(key))}"
                )
        if not runs or runs[-1] != run:
            write_json(path, {**pinned, "runs": [*runs, run]})

    def _mend_last_line(self) -> None:
        self._file.seek(0)
        content = self._file.read()
        whole, tail = content[: content.rfind(b"\n") + 1], content[content.rfind(b"\n") + 1 :]
        if not tail:
            return
        try:
            json.loads(tail)  # no beginning of an object is one
        except ValueError:
            self._file.truncate(len(whole))
        else:
            self._file.write(b"\n")
            self._file.flush()

    def _read(self) -> list[dict[str, Any]]:
        self._file.seek(0)
        records: dict[Key, dict[str, Any]] = {}
        for number, line in enumerate(self._file, 1):
            try:
                record = json.loads(line)
                key = self.key_of(record)
                self._asked_of(record)
                hash(key)
            except (ValueError, TypeError, KeyError) as error:
                raise DecDECError(
                    f"{self.path} line {number} must be a judgment of FastChat's, got {error!r:.200}"
                ) from None
            if key in records:
                raise DecDECError(f"{self.path} must have each judgment once, got {key} twice")
            records[key] = record
        return list(records.values())

    def _asked_of(self, record: Mapping[str, Any]) -> tuple[str, ...]:
        return tuple(record[key] for key in _ASKED[self.mode])
