"""SWEEP.yaml -> the cells of its grid; nothing is loaded, read or asked for."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from decdec_core.config import (
    CLUSTERINGS,
    SELECTIONS,
    WEIGHT_METHODS,
    Compensation,
    Config,
    DecDECError,
    ResidualQuant,
    WeightQuant,
    require_one_of,
)
from decdec_eval.sweep.tasks import Task, task_of

BUNDLED = Path(__file__).resolve().parent.parent / "sweeps"
DTYPES = ("float32", "float16", "bfloat16")
DEVICES = ("auto", "cpu", "cuda")
_LEAST_SEEDS = 3  # of a random selection: its error covers draws as well
FULL = "full"  # in the place of a selection


@dataclass(frozen=True)
class Model(Config):
    """A full-precision model. source: a hub id, a folder, a .gguf file or smollm2; name: what results call
    it."""

    source: str
    name: str = ""

    def __post_init__(self) -> None:
        for which in ("source", "name"):
            if not isinstance(getattr(self, which), str):
                raise DecDECError(f"{which} of a model must be text, got {getattr(self, which)!r}")
        if not self.source:
            raise DecDECError("source of a model must be a hub id, a folder or a file, got none")
        object.__setattr__(self, "name", self.name or self.source)


@dataclass(frozen=True)
class Base:
    """A low-bit base and its residual, built with a calibration text."""

    weight: WeightQuant
    residual: ResidualQuant
    calibration: str

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types."""
        weight, residual = self.weight.to_dict(), self.residual.to_dict()
        return {"weight": weight, "residual": residual, "calibration": self.calibration}

    @property
    def label(self) -> str:
        clustering = self.weight.clustering if self.weight.clustering != CLUSTERINGS[0] else None
        residual = None if self.residual.bits == ResidualQuant().bits else f"residual {self.residual.bits}"
        words = [self.weight.method, clustering, f"{self.weight.bits} bits", residual]
        return " ".join(word for word in words if word)


@dataclass(frozen=True)
class Slowdown:
    """A budget: percent, and whose profile, None for the GPU at hand."""

    percent: float
    gpu: str | None

    @property
    def label(self) -> str:
        return f"{self.percent:g} % of {self.gpu or 'this GPU'}"


@dataclass(frozen=True)
class Cell:
    """One run. base: None for full precision. amount: k_chunk or a budget, None where nothing is selected."""

    model: Model
    base: Base | None
    selection: str
    amount: str | Slowdown | None
    seed: int
    task: Task

    @property
    def label(self) -> str:
        words = [self.model.name, self.base.label if self.base else "full precision"]
        if self.base is not None:
            words.append(self.selection)
        if self.amount is not None:
            words.append(self.amount.label if isinstance(self.amount, Slowdown) else f"k_chunk {self.amount}")
        if self.selection == "random":
            words.append(f"seed {self.seed}")
        return ", ".join([*words, self.task.label])


@dataclass(frozen=True)
class Sweep(Config):
    """What SWEEP.yaml says. models x methods x bits x residual_bits x selections x (k_chunk and slowdowns x
    gpus) x seeds x tasks, and each model in full precision.

    seeds: of random selection, at least three. gpus: whose profiles slowdowns take, by name or file of
    `decdec tune`; without any, the GPU at hand. device: where passes run and artifacts are built, "auto" for
    a GPU where there is one. group_size: of methods that have groups.
    """

    models: Sequence[Model]
    tasks: Sequence[Task]
    methods: Sequence[str] = ("awq",)
    bits: Sequence[int | float] = (3,)
    residual_bits: Sequence[int] = (4,)
    group_size: int | None = None
    clustering: str | None = None
    calibration: str = "auto"
    selections: Sequence[str] = SELECTIONS
    k_chunk: Sequence[int | str] = ()
    slowdowns: Sequence[float] = ()
    gpus: Sequence[str] = ()
    seeds: Sequence[int] = (0, 1, 2)
    dtype: str = "float32"
    device: str = "auto"

    def __post_init__(self) -> None:
        for name in ("models", "tasks", "methods", "bits", "residual_bits", "selections", "seeds"):
            self._require_list(name, at_least=1)
        for name in ("k_chunk", "slowdowns", "gpus"):
            self._require_list(name, at_least=0)
        for selection in self.selections:
            require_one_of("selection", selection, SELECTIONS)
        for method in self.methods:
            require_one_of("method", method, WEIGHT_METHODS)
        require_one_of("dtype", self.dtype, DTYPES)
        require_one_of("device", self.device, DEVICES)
        if not isinstance(self.calibration, str):
            raise DecDECError(
                f"calibration must be wikitext2, pydoc or a text file, got {self.calibration!r}"
            )
        for k_chunk in self.k_chunk:
            Compensation(k_chunk=k_chunk)
        for seed in self.seeds:
            Compensation(seed=seed)
        for percent in self.slowdowns:
            if isinstance(percent, bool) or not isinstance(percent, (int, float)) or not 0 <= percent <= 1000:
                raise DecDECError(f"slowdowns must be 0 to 1000 percent, got {percent!r}")
        for gpu in self.gpus:
            if not isinstance(gpu, str) or not gpu:
                raise DecDECError(f"gpus must be names or files of profiles, got {gpu!r}")
        if self.gpus and not self.slowdowns:
            raise DecDECError(f"gpus must be with slowdowns, got {', '.join(self.gpus)} alone")
        if {*self.selections} - {"none"} and not (self.k_chunk or self.slowdowns):
            raise DecDECError("a selection must have k_chunk or slowdowns, got neither")
        if "random" in self.selections and len(self.seeds) < _LEAST_SEEDS:
            raise DecDECError(
                f"seeds must be at least {_LEAST_SEEDS} for random selection, got {len(self.seeds)}"
            )
        list(self.bases())  # which refuse what cannot be built

    def _require_list(self, name: str, at_least: int) -> None:
        got = getattr(self, name)
        if not isinstance(got, (list, tuple)):
            raise DecDECError(f"{name} must be a list, got {got!r}")
        if len(got) < at_least:
            raise DecDECError(f"{name} must have at least {at_least}, got none")
        if any(value in got[:index] for index, value in enumerate(got)):
            raise DecDECError(f"{name} must have each of its values once, got {got!r}")
        object.__setattr__(self, name, tuple(got))

    def bases(self) -> Iterator[Base]:
        """Yield methods x bits x residual_bits."""
        for method, bits, residual in itertools.product(self.methods, self.bits, self.residual_bits):
            codebook = WeightQuant(method, bits).format == "codebook"
            group_size, clustering = (None, self.clustering) if codebook else (self.group_size, None)
            weight = WeightQuant(method, bits, group_size, clustering)
            yield Base(weight, ResidualQuant(residual), self.calibration)

    def cells(self) -> list[Cell]:
        """Return the grid: of each model full precision, then base after base. Only random selection has
        seeds."""
        found = []
        for model in self.models:
            found += [Cell(model, None, FULL, None, 0, task) for task in self.tasks]
            for base, selection in itertools.product(self.bases(), self.selections):
                seeds = self.seeds if selection == "random" else (0,)
                amounts = (None,) if selection == "none" else self._amounts()
                for amount, seed, task in itertools.product(amounts, seeds, self.tasks):
                    found.append(Cell(model, base, selection, amount, seed, task))
        return found

    def _amounts(self) -> tuple[str | Slowdown, ...]:
        numbers = [Compensation(k_chunk=k_chunk).k_chunk_text() for k_chunk in self.k_chunk]
        budgets = itertools.product(self.gpus or (None,), self.slowdowns)
        return (*numbers, *(Slowdown(float(percent), gpu) for gpu, percent in budgets))


def read_sweep(name: str) -> Sweep:
    """Return the sweep of a YAML file, or of a bundled one by its name; DecDECError for what is refused."""
    path = Path(name)
    if not path.is_file() and path.name == name:
        path = BUNDLED / name
    if not path.is_file():
        there = ", ".join(sorted(file.name for file in BUNDLED.glob("*.yaml")))
        raise DecDECError(f"sweep must be a YAML file or one of {there}, got {name}")
    try:
        values = yaml.safe_load(path.read_text("utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        first = " ".join(str(error).split())
        raise DecDECError(f"{name} must be YAML, got: {first}") from None
    try:
        return sweep_of(values)
    except DecDECError as error:
        raise DecDECError(f"{name}: {error}") from None


def sweep_of(values: object) -> Sweep:
    """Return the sweep of what a YAML file holds."""
    if not isinstance(values, Mapping):
        raise DecDECError(f"a sweep must be a mapping, got {type(values).__name__}")
    given = {str(name): value for name, value in values.items()}
    for name in ("models", "tasks"):
        if name not in given:
            raise DecDECError(f"a sweep must have {name}, got none")
    if isinstance(given["models"], list):
        given["models"] = [_model_of(model) for model in given["models"]]
    if isinstance(given["tasks"], list):
        given["tasks"] = [task_of(task) for task in given["tasks"]]
    return Sweep.from_dict(given)


def _model_of(value: object) -> Model:
    if isinstance(value, Mapping):
        if "source" not in value:
            raise DecDECError(f"a model must have source, got {dict(value)}")
        return Model.from_dict(value)
    return Model(value)  # type: ignore[arg-type]
