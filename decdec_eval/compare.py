"""python -m decdec_eval.compare: one model's token perplexity under several selections, side by side.

Every run is one JSON file in OUT/runs, written when it is done and named by what determines it; what is
there already is not run again. The table and the figure are made from those files.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from decdec_core.artifact import is_artifact
from decdec_core.build import cached_artifact
from decdec_core.commandline import OneLineParser, add_quantization, quantization_of, run_command
from decdec_core.config import (
    Compensation,
    DecDECError,
    require_int,
    require_one_of,
)
from decdec_core.files import write_json
from decdec_core.manifest import read_manifest
from decdec_core.model import compensation_ledger, set_compensation
from decdec_core.provenance import environment
from decdec_core.sources import load_model, load_tokenizer
from decdec_core.texts import Text, available_text, load_text
from decdec_eval.compare_report import write_report
from decdec_eval.perplexity import summary, window_nll, windows

FULL = "full"
ORDER = (FULL, "none", "random", "static", "dynamic", "exact")


@dataclass(frozen=True)
class Cell:
    """One run: the full-precision model (compensation None) or the artifact under a compensation."""

    compensation: Compensation | None

    def label(self) -> str:
        if self.compensation is None:
            return FULL
        if self.compensation.selection == "none":
            return "none"
        return f"{self.compensation.selection}, k_chunk {self.compensation.k_chunk_text()}"


def cells(selections: Sequence[str], k_chunks: Sequence[str], seed: int) -> list[Cell]:
    """Return the grid: full and none once, every other selection at every k_chunk."""
    for selection in selections:
        require_one_of("selection", selection, ORDER)
    grid: list[Cell] = []
    for selection in sorted(set(selections), key=ORDER.index):
        if selection == FULL:
            grid.append(Cell(None))
        elif selection == "none":
            grid.append(Cell(Compensation("none", 0, seed=seed)))
        else:
            grid += [Cell(Compensation(selection, k, seed=seed)) for k in k_chunks]
    return grid


class Comparison:
    """The runs of one model on one text, in float32. source: a plain model; folder: its artifact; count: of
    windows; device: where passes run."""

    def __init__(
        self, source: str, folder: Path, text: Text, count: int, out: Path, device: str = "cpu"
    ) -> None:
        self.source, self.folder, self.out, self.device = source, folder, out, device
        tokenizer = load_tokenizer(str(folder))
        token_ids = tokenizer(text.text, verbose=False).input_ids
        self.windows = windows(token_ids)[:count]
        self.task = {
            "name": "token_perplexity",
            "text": text.name,
            "text_sha256": text.sha256,
            "windows": len(self.windows),
            "window_length": len(self.windows[0]),
            "starts_with_bos": token_ids[0] == tokenizer.bos_token_id,
        }
        self.artifact_hash = read_manifest(folder).hash
        self._loaded: tuple[bool, Any] | None = None

    def run_all(self, grid: Sequence[Cell]) -> Iterator[Path]:
        """Run every cell that is not there yet; yield each one's file."""
        for number, cell in enumerate(grid, 1):
            path = self._path(cell)
            head = f"[{number}/{len(grid)}] {cell.label()}"
            if path.is_file():
                print(f"{head}: kept from {path}", flush=True)
            else:
                print(head, flush=True)
                path.parent.mkdir(parents=True, exist_ok=True)
                write_json(path, self._run(cell))
            yield path

    def _configuration(self, cell: Cell) -> dict[str, Any]:
        compensation = cell.compensation.to_dict() if cell.compensation else None
        return {
            "model": self.source,
            "artifact_hash": self.artifact_hash,
            "compensation": compensation,
            "task": self.task,
        }

    def _path(self, cell: Cell) -> Path:
        determining = json.dumps(self._configuration(cell), sort_keys=True)
        key = hashlib.sha256(determining.encode()).hexdigest()[:10]
        words = [cell.compensation.selection if cell.compensation else FULL]
        if cell.compensation and cell.compensation.selection != "none":
            words.append(f"k{cell.compensation.k_chunk_text().replace('/', '-')}")
        return self.out / "runs" / f"{'-'.join([*words, key])}.json"

    def _run(self, cell: Cell) -> dict[str, Any]:
        model = self._model(cell.compensation is None)
        ledger: dict[str, Any] | None = None
        if cell.compensation is not None:
            set_compensation(model, cell.compensation)
            ledger = compensation_ledger(model)
        start = time.perf_counter()
        losses = window_nll(model, self.windows)
        return {
            "configuration": self._configuration(cell),
            "quantization": json.loads((self.folder / "config.json").read_text())["quantization_config"],
            "ledger": ledger,
            "disk_bytes": sum(file.stat().st_size for file in self.folder.iterdir()),
            "metrics": {**summary(losses), "window_nll": losses},
            "measured": True,
            "time_s": time.perf_counter() - start,
            "environment": environment(model.device, "lm_eval"),
        }

    def _model(self, full: bool) -> Any:
        """Return the full-precision model or the artifact's; one of them is in memory at a time."""
        if self._loaded is None or self._loaded[0] != full:
            self._loaded = None
            if full:
                model = load_model(self.source)
            else:
                model = AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32)
            self._loaded = full, model.eval().to(self.device)
        return self._loaded[1]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the comparison; a refused input prints one line to standard error and returns 2."""
    parser = _parser()
    options, unknown = parser.parse_known_args(arguments)
    parser.refuse(unknown)
    return run_command(lambda: _compare(options))


def _compare(options: argparse.Namespace) -> None:
    grid = cells(options.selections, options.k_chunk, options.seed)
    require_int("windows", options.windows, 1, 1 << 20)
    if is_artifact(options.model):
        raise DecDECError(f"model must be a full-precision model, got the artifact {options.model}")
    text = load_text(available_text("test") if options.text == "auto" else options.text, "test")
    weight_quant, residual_quant = quantization_of(options)
    folder = cached_artifact(options.model, weight_quant, residual_quant, options.calibration, options.device)
    comparison = Comparison(options.model, folder, text, options.windows, options.out, options.device)
    paths = list(comparison.run_all(grid))
    print(write_report(options.out, paths))


def _parser() -> OneLineParser:
    parser = OneLineParser(prog="python -m decdec_eval.compare", description=__doc__)
    parser.add_argument("--model", required=True, help="a hub id, a folder, a .gguf file, or smollm2")
    add_quantization(parser)
    add_evaluation(parser)
    parser.add_argument("--selections", nargs="+", default=list(ORDER), metavar="SELECTION")
    return parser


def add_evaluation(parser: argparse.ArgumentParser, k_chunk_type: Any = str) -> None:
    """Add the options that say what is measured, and where it is written."""
    parser.add_argument("--text", default="auto", help="the text to score: wikitext2 or pydoc")
    parser.add_argument("--k-chunk", nargs="+", type=k_chunk_type, default=[k_chunk_type(16)], metavar="K")
    parser.add_argument("--windows", type=int, default=20, help="windows of 2048 tokens (default 20)")
    parser.add_argument("--seed", type=int, default=0, help="of random selection")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")


if __name__ == "__main__":
    sys.exit(main())
