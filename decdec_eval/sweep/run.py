"""Cells of one loaded model -> their files, each written when it is done."""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from decdec_core.build import cached_artifact
from decdec_core.config import DecDECError
from decdec_core.files import write_json
from decdec_core.model import compensation_ledger
from decdec_core.provenance import environment
from decdec_eval.lm_model import FULL as FULL_METHOD
from decdec_eval.lm_model import DecDECLM
from decdec_eval.reference import Reference, reference_path
from decdec_eval.runs import FORMAT_VERSION, key_of, path_of
from decdec_eval.sweep import lm_tasks, measure
from decdec_eval.sweep.cells import Inputs, computation_of
from decdec_eval.sweep.grid import FULL, Base, Cell, Model
from decdec_eval.sweep.measure import Measured
from decdec_eval.sweep.tasks import Fidelity, LmEval, MtBench, Perplexity


@dataclass(frozen=True)
class Outcome:
    """What became of a cell. error: None where its file is there, as it was before (kept) or since now."""

    cell: Cell
    error: str | None = None
    kept: bool = False


def groups_of(cells: Sequence[Cell]) -> list[list[Cell]]:
    """Return the cells that share a loaded model together, of each model full precision first."""
    groups: dict[tuple[Model, Base | None], list[Cell]] = {}
    for cell in cells:
        groups.setdefault((cell.model, cell.base), []).append(cell)
    return list(groups.values())


def in_order(cells: Sequence[Cell]) -> list[Cell]:
    """Return cells of one group as they are run: last the tasks that fuse the model's layers, which take a
    model of their own."""
    return sorted(cells, key=lambda cell: isinstance(cell.task, MtBench))


class Runner:
    """Runs groups of cells into the folder `out`. command: what each file says made it."""

    def __init__(self, inputs: Inputs, out: Path, command: str) -> None:
        self.inputs, self.out, self.command = inputs, out, command
        self._loaded: tuple[tuple[Model, Base | None, bool], DecDECLM] | None = None
        self._reference: tuple[Path, Reference] | None = None

    def run(self, cells: Sequence[Cell]) -> Iterator[Outcome]:
        """Yield the outcome of each cell of a group when its file is there. A cell that is refused leaves the
        others alone."""
        done: dict[str, Path] = {}
        waiting = []
        for cell in cells:
            try:
                path = self._path(cell)
            except DecDECError as error:
                yield Outcome(cell, str(error))
                continue
            if path is not None and path.is_file():
                done[computation_of(read_configuration(path))] = path
                yield Outcome(cell, kept=True)
            else:
                waiting.append(cell)
        for cell in in_order(waiting):
            try:
                self._build(cell)
                self._complete(cell, done)
            except (DecDECError, torch.OutOfMemoryError) as error:
                yield Outcome(cell, " ".join(str(error).split()))
            else:
                yield Outcome(cell)
        self._let_go()

    def _path(self, cell: Cell) -> Path | None:
        configuration = self.inputs.configuration(cell)
        return None if configuration is None else path_of(self.out, configuration)

    def _build(self, cell: Cell) -> None:
        if cell.base is None or self.inputs.artifact(cell.model, cell.base).is_dir():
            return
        base = cell.base
        self._let_go()  # building needs the memory
        cached_artifact(cell.model.source, base.weight, base.residual, base.calibration, self.inputs.device)

    def _complete(self, cell: Cell, done: dict[str, Path]) -> None:
        """Write the cell's file: measured, or as an equal computation in `done` was."""
        configuration = self.inputs.configuration(cell)
        assert configuration is not None
        path, computation = path_of(self.out, configuration), computation_of(configuration)
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_file():
            return
        reference_path = self._require_reference(cell)
        lm = self._model(cell, fused=isinstance(cell.task, MtBench))
        if cell.base is not None:
            lm.switch(*self.inputs.compensation(cell))
        if computation in done:
            write_json(path, self._equal(cell, configuration, lm, done[computation]))
            return
        start = time.perf_counter()
        measured = self._measure(cell, lm, key_of(configuration), reference_path)
        record = {
            **self._about(cell, configuration, lm),
            "metrics": measured.metrics,
            "items": measured.items,
            "measured": True,
            "time_s": round(time.perf_counter() - start, 3),
            "command": self.command,
            "environment": environment(lm.model.device, "lm_eval"),
        }
        write_json(path, record)
        done[computation] = path

    def _equal(self, cell: Cell, configuration: dict[str, Any], lm: DecDECLM, path: Path) -> dict[str, Any]:
        """Return the record of a cell that computes what the one in `path` did."""
        return {
            **json.loads(path.read_bytes()),
            **self._about(cell, configuration, lm),
            "equal_to": path.stem,
        }

    def _about(self, cell: Cell, configuration: dict[str, Any], lm: DecDECLM) -> dict[str, Any]:
        folder = self._folder(cell)
        about = {"format_version": FORMAT_VERSION, "configuration": configuration}
        size = sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
        quantization = None
        if cell.base is not None:
            quantization = json.loads((folder / "config.json").read_bytes())["quantization_config"]
            source = quantization["provenance"]["source"]
            if source == cell.model.source:  # it may be a folder of this machine
                quantization["provenance"]["source"] = cell.model.name
        ledger = None if cell.base is None else compensation_ledger(lm.model)
        return {**about, "quantization": quantization, "ledger": ledger, "disk_bytes": size}

    def _folder(self, cell: Cell) -> Path:
        if cell.base is None:
            return self.inputs.source_folder(cell.model)
        return self.inputs.artifact(cell.model, cell.base)

    def _model(self, cell: Cell, fused: bool) -> DecDECLM:
        """Return the cell's model; one is in memory at a time. fused: one whose layers may be fused."""
        wanted = (cell.model, cell.base, fused)
        if self._loaded is None or self._loaded[0] != wanted:
            self._let_go()
            recipe = {"method": FULL_METHOD} if cell.base is None else {"selection": "none"}
            lm = DecDECLM(
                str(self._folder(cell)), device=self.inputs.device, dtype=self.inputs.dtype, **recipe
            )
            self._loaded = (wanted, lm)
        return self._loaded[1]

    def _let_go(self) -> None:
        self._loaded = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _measure(self, cell: Cell, lm: DecDECLM, key: str, reference_path: Path | None) -> Measured:
        source, full = self.inputs.source_folder(cell.model), cell.base is None
        task = cell.task
        if isinstance(task, LmEval):
            return Measured(*lm_tasks.run(task, lm, str(source)))
        if isinstance(task, MtBench):
            speaker = measure.opened(lm, source, self.inputs.dtype, self.inputs.device)
            return measure.mt_bench(speaker, task, self.out / "mt_bench" / key)
        assert reference_path is not None
        reference = self._open_reference(reference_path, lm)
        if isinstance(task, Perplexity):
            return measure.perplexity(lm, measure.token_windows(task, source), reference, full)
        return measure.fidelity(lm, self._turns(cell, task), reference, full)

    def _reference_key(self, cell: Cell) -> str:
        """Return the key of the full-precision cell of the same task."""
        configuration = self.inputs.configuration(Cell(cell.model, None, FULL, None, 0, cell.task))
        assert configuration is not None
        return key_of(configuration)

    def _open_reference(self, path: Path, lm: DecDECLM) -> Reference:
        if self._reference is None or self._reference[0] != path:
            self._reference = path, Reference(path, lm.model.get_output_embeddings().weight.device)
        return self._reference[1]

    def _answers(self, cell: Cell) -> Path:
        return self.out / "answers" / self._reference_key(cell)

    def _turns(self, cell: Cell, task: Fidelity) -> list[measure.Turn]:
        return measure.turns(task, self.inputs.source_folder(cell.model), self._answers(cell))

    def _require_reference(self, cell: Cell) -> Path | None:
        """Return the file of what the cell's model is compared with, None where it is with nothing. Where the
        file is not there, the full model is loaded for it and let go."""
        task, full = cell.task, Cell(cell.model, None, FULL, None, 0, cell.task)
        source = self.inputs.source_folder(cell.model)
        if isinstance(task, Perplexity):
            path = reference_path(self._reference_key(cell))
            if not path.is_file():
                scored = measure.token_windows(task, source)
                measure.keep_windows(self._model(full, fused=False), scored, path)
            return path
        if not isinstance(task, Fidelity):
            return None
        answers = self._answers(cell)
        if not measure.answered(task, answers):
            speaker = measure.opened(
                self._model(full, fused=True), source, self.inputs.dtype, self.inputs.device
            )
            measure.full_answers(speaker, task, answers)
        turns = self._turns(cell, task)
        # answers that were drawn elsewhere may be others
        path = reference_path(f"{self._reference_key(cell)}-{measure.digest_of(turns)}")
        if not path.is_file():
            measure.keep_turns(self._model(full, fused=False), turns, path)
        return path


def read_configuration(path: Path) -> dict[str, Any]:
    """Return the configuration of a run file; another file raises DecDECError."""
    try:
        configuration = json.loads(path.read_bytes())["configuration"]
        _ = configuration["compensation"], configuration["base"]
        return configuration
    except (ValueError, LookupError, TypeError) as error:
        raise DecDECError(f"{path} must be a run's JSON file, got {type(error).__name__}: {error}") from None
