"""What a cell measures, as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from decdec_core.config import Config, DecDECError, require_int, require_one_of
from decdec_core.texts import NAMES
from decdec_eval.perplexity import WINDOW_LENGTH

_MANY = 1 << 20


@dataclass(frozen=True)
class Perplexity(Config):
    """Token perplexity of `text` ("wikitext2", "pydoc", or "auto" for the first of them that can be had), and
    the divergence from full precision in the same pass. windows: the first so many, None for all."""

    kind: ClassVar[str] = "perplexity"
    version: ClassVar[int] = 1
    text: str = "wikitext2"
    windows: int | None = None
    window_length: int = WINDOW_LENGTH

    def __post_init__(self) -> None:
        require_one_of("text", self.text, ("auto", *NAMES))
        _require_some("windows", self.windows)
        require_int("window_length", self.window_length, 2, _MANY)

    @property
    def label(self) -> str:
        return f"perplexity of {self.text}"


@dataclass(frozen=True)
class LmEval(Config):
    """A task or group of lm-eval. limit: questions of each task. batch_size: of requests, or "auto"; float32
    and greedy answers depend on it by rounding only."""

    kind: ClassVar[str] = "lm_eval"
    name: str
    limit: int | None = None
    num_fewshot: int | None = None
    apply_chat_template: bool = False
    batch_size: int | str = 1

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise DecDECError(f"name must be a task of lm-eval, got {self.name!r}")
        _require_some("limit", self.limit)
        if self.num_fewshot is not None:
            require_int("num_fewshot", self.num_fewshot, 0, 1000)
        require_one_of("apply_chat_template", self.apply_chat_template, (True, False))
        if self.batch_size != "auto":
            require_int("batch_size", self.batch_size, 1, 4096)

    @property
    def label(self) -> str:
        return self.name


@dataclass(frozen=True)
class Fidelity(Config):
    """How near each answer token of MT-Bench stays to full precision: the full model's own answers, read
    again. limit: the first so many questions. seed: of the full model's draws."""

    kind: ClassVar[str] = "fidelity"
    version: ClassVar[int] = 1
    limit: int | None = None
    max_new_tokens: int = 1024
    seed: int = 0

    def __post_init__(self) -> None:
        _require_some("limit", self.limit)
        require_int("max_new_tokens", self.max_new_tokens, 1, _MANY)
        require_int("seed", self.seed, 0, 2**31 - 1)

    @property
    def label(self) -> str:
        return "fidelity"


@dataclass(frozen=True)
class MtBench(Config):
    """MT-Bench, each answer rated by the model `judge` at `base_url`, of the OpenAI chat protocol."""

    kind: ClassVar[str] = "mt_bench"
    version: ClassVar[int] = 1
    judge: str
    base_url: str | None = None
    limit: int | None = None
    max_new_tokens: int = 1024
    seed: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.judge, str) or not self.judge.strip():
            raise DecDECError(f"judge must be a model's name, got {self.judge!r}")
        if self.base_url is not None and not isinstance(self.base_url, str):
            raise DecDECError(f"base_url must be a URL, got {self.base_url!r}")
        _require_some("limit", self.limit)
        require_int("max_new_tokens", self.max_new_tokens, 1, _MANY)
        require_int("seed", self.seed, 0, 2**31 - 1)

    @property
    def label(self) -> str:
        return f"mt_bench by {self.judge}"


Task = Perplexity | LmEval | Fidelity | MtBench
KINDS: dict[str, type[Task]] = {task.kind: task for task in (Perplexity, LmEval, Fidelity, MtBench)}
COMPARED = (Perplexity.kind, Fidelity.kind)  # with the full-precision model's hidden states


def task_of(values: object) -> Task:
    """Return the task of a mapping with its `kind`; what is no task raises DecDECError."""
    if not isinstance(values, Mapping) or "kind" not in values:
        raise DecDECError(f"a task must be a mapping with kind, one of {', '.join(KINDS)}, got {values!r}")
    require_one_of("kind", values["kind"], KINDS)
    kind = KINDS[values["kind"]]
    others: dict[str, Any] = {name: value for name, value in values.items() if name != "kind"}
    missing = {LmEval: "name", MtBench: "judge"}.get(kind)
    if missing is not None and missing not in others:
        raise DecDECError(f"a task of kind {kind.kind} must have {missing}, got none")
    return kind.from_dict(others)


def _require_some(which: str, got: object) -> None:
    if got is not None:
        require_int(which, got, 1, _MANY)
