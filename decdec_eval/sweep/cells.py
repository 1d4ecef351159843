"""A cell -> everything that determines its result, the key of that, and the cell's file."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch

from decdec_core.budget import Found, compensation_of, find_budget, profiles_of, require_timed
from decdec_core.build import cached_folder
from decdec_core.config import Compensation, DecDECError
from decdec_core.manifest import read_manifest
from decdec_core.profiles import Profile
from decdec_core.provenance import versions
from decdec_core.sources import load_config, model_files, model_folder
from decdec_core.texts import available_text, load_text
from decdec_eval.mtbench.answer import questions_sha256
from decdec_eval.mtbench.client import OPENAI_URL, without_credentials
from decdec_eval.mtbench.data import data_sha256, load_questions, mt_bench_folder
from decdec_eval.runs import key_of
from decdec_eval.sweep import lm_tasks
from decdec_eval.sweep.grid import Base, Cell, Model, Slowdown, Sweep
from decdec_eval.sweep.tasks import COMPARED, LmEval, MtBench, Perplexity, Task

_COMPENSATE = "auto"
T = TypeVar("T")


class NoProfileError(DecDECError):
    """A budget that no profile is of: the cell is skipped, in so many words."""


@dataclass(frozen=True)
class Inputs:
    """What determines cells, each looked up once. device: "cpu" or "cuda"."""

    dtype: str
    device: str
    _known: dict[Hashable, Any] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def of(cls, sweep: Sweep) -> Inputs:
        """Return those of a sweep on this machine; a GPU that is not there raises DecDECError."""
        there = torch.cuda.is_available()
        if sweep.device == "cuda" and not there:
            raise DecDECError("device must be one that is there, got cuda on a machine without a GPU")
        return cls(sweep.dtype, sweep.device if sweep.device != "auto" else "cuda" if there else "cpu")

    def _once(self, key: Hashable, make: Callable[[], T]) -> T:
        if key not in self._known:
            self._known[key] = make()
        return self._known[key]

    def source_folder(self, model: Model) -> Path:
        """Return the full-precision model's folder, downloaded first where it is a hub id."""
        return self._once(("folder", model), lambda: model_folder(model.source))

    def artifact(self, model: Model, base: Base) -> Path:
        """Return where the cache has the base's artifact, or will have it."""
        parts = (base.weight, base.residual, base.calibration, self.device)
        return self._once(("artifact", model, base), lambda: cached_folder(model.source, *parts))

    def profiles(self, gpu: str | None) -> list[Profile]:
        """Return the profiles of a GPU, None for the one at hand; where there are none, DecDECError."""
        return self._once(("profiles", gpu), lambda: profiles_of(gpu))

    def compensation(self, cell: Cell) -> tuple[Compensation, Found | None]:
        """Return what the model of a cell with a base compensates, and the budget that says so.

        A budget that no profile is of raises NoProfileError.
        """
        assert cell.base is not None
        others = {"selection": cell.selection, "compensate": _COMPENSATE, "seed": cell.seed}
        if not isinstance(cell.amount, Slowdown):
            return Compensation(**others, k_chunk=cell.amount or 0), None
        budget = cell.amount
        config = self._once(("config", cell.model), lambda: load_config(cell.model.source))
        profiles = self.profiles(budget.gpu)
        weight = cell.base.weight
        try:
            require_timed(weight, cell.base.residual)
        except DecDECError as error:
            raise NoProfileError(str(error)) from None
        try:
            found = find_budget(budget.percent, profiles, config, weight, cell.selection)
        except DecDECError:  # whose message names all profiles that there are
            raise NoProfileError(
                f"no profile of {profiles[0].gpu} is of its shapes at {weight.widths[0]} bits {weight.format}"
            ) from None
        return compensation_of(found.budget, **others), found

    def task(self, cell: Cell) -> dict[str, Any]:
        """Return what a result says of its task: {"kind", "name", "version", "data_sha256", "limit", ...}."""
        return self._once(("task", cell.task, cell.model), lambda: self._task(cell.task, cell.model))

    def _task(self, task: Task, model: Model) -> dict[str, Any]:
        own = {name: value for name, value in task.to_dict().items() if name not in ("text", "windows")}
        if isinstance(task, LmEval):
            folder = self.source_folder(model)
            version, digest = lm_tasks.identity(task.name, str(folder))
            return {"kind": task.kind, **own, "version": version, "data_sha256": digest}
        head = {"kind": task.kind, "name": "mt_bench", "version": task.version}
        if isinstance(task, Perplexity):
            name = available_text("test") if task.text == "auto" else task.text
            digest = load_text(name, "test").sha256
            return {**head, **own, "name": name, "data_sha256": digest, "limit": task.windows}
        folder = mt_bench_folder(None)
        if isinstance(task, MtBench):
            own["base_url"] = without_credentials(task.base_url or OPENAI_URL)
            return {**head, **own, "data_sha256": data_sha256(folder)}
        return {**head, **own, "data_sha256": questions_sha256(load_questions(folder))}

    def configuration(self, cell: Cell) -> dict[str, Any] | None:
        """Return everything that determines the cell's result; None while its artifact is not built.

        `reference`: the full-precision model that a base is compared with, where it is.
        """
        files = self._once(("files", cell.model), lambda: model_files(self.source_folder(cell.model)))
        compensation, budget, artifact_hash = None, None, None
        if cell.base is not None:
            compensation, found = self.compensation(cell)
            budget = None if found is None else budget_of(found)
            folder = self.artifact(cell.model, cell.base)
            if not folder.is_dir():
                return None
            artifact_hash = self._once(("hash", folder), lambda: read_manifest(folder).hash)
        return {
            "model": cell.model.name,
            "base": None if cell.base is None else cell.base.to_dict(),
            "artifact_hash": artifact_hash,
            "model_files": files if cell.base is None else None,
            "reference": files if cell.base is not None and cell.task.kind in COMPARED else None,
            "compensation": None if compensation is None else compensation.to_dict(),
            "budget": budget,
            "dtype": self.dtype,
            "device": self.device,
            "task": self.task(cell),
            "versions": {name: value for name, value in versions("lm_eval").items() if name != "python"},
        }


def budget_of(found: Found) -> dict[str, Any]:
    """Return what a configuration says of a budget. expected_percent: measured, or predicted."""
    stated = found.ledger()
    measured = found.budget.measured_percent
    return {
        **stated,
        "gpu": found.profile.gpu_key,
        "predicted": measured is None,
        "expected_percent": found.budget.predicted_percent if measured is None else measured,
    }


def computation_of(configuration: dict[str, Any]) -> str:
    """Return the key of what is really computed, which budgets of one k_chunk have in common: n_tb is of the
    time only, seeds of random selection, and without any channels a selection is none."""
    same = {**configuration, "budget": None}
    compensation = configuration["compensation"]
    if compensation is not None:
        seed = compensation["seed"] if compensation["selection"] == "random" else 0
        same["compensation"] = {**compensation, "seed": seed, "n_tb": None}
        if not any(compensation["k_chunk"]):
            same["compensation"] = {"selection": "none"}
    return key_of(same)
