"""python -m decdec_eval.bases: one model under several low-bit bases, each compensated or not.

Methods x bits x residual bits, each without compensation and under every selection and k_chunk: the same
windows, one JSON file per run in OUT/runs; what is there already is not run again. Writes table.md, table.csv
and figure.png. With --equal-bytes a k_chunk is meant for 4-bit residuals, and others fetch as many bytes with
more or fewer channels.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from decdec_core.build import cached_artifact
from decdec_core.commandline import OneLineParser, bits_of, run_command
from decdec_core.config import (
    CHUNK,
    CLUSTERINGS,
    RESIDUAL_BITS,
    SELECTIONS,
    WEIGHT_METHODS,
    Compensation,
    DecDECError,
    ResidualQuant,
    WeightQuant,
    require_int,
    require_one_of,
)
from decdec_core.texts import available_text, load_text
from decdec_eval.bases_report import write_bases
from decdec_eval.compare import Cell, Comparison, add_evaluation


@dataclass(frozen=True)
class Base:
    """A low-bit base and its residual."""

    weight: WeightQuant
    residual: ResidualQuant

    def label(self) -> str:
        clustering = self.weight.clustering if self.weight.clustering not in (None, CLUSTERINGS[0]) else None
        words = [self.weight.method, clustering, f"{self.weight.bits} bits", f"residual {self.residual.bits}"]
        return ", ".join(word for word in words if word)


def bases(
    methods: Sequence[str],
    bits: Sequence[int | float],
    residual_bits: Sequence[int],
    clusterings: Sequence[str] = CLUSTERINGS[:1],
) -> list[Base]:
    """Return every combination; only codebooks have a clustering."""
    found = []
    for method, width, residual in itertools.product(methods, bits, residual_bits):
        format_of = WeightQuant(method, width).format
        for clustering in clusterings if format_of == "codebook" else [None]:
            found.append(Base(WeightQuant(method, width, clustering=clustering), ResidualQuant(residual)))
    return found


def cells_of(
    base: Base, selections: Sequence[str], k_chunks: Sequence[int], equal_bytes: bool, seed: int
) -> list[Cell]:
    """Return the runs of one base. equal_bytes: a k_chunk is of 4-bit residuals; where other ones cannot
    fetch as many bytes, DecDECError."""
    grid = []
    for selection in selections:
        require_one_of("selection", selection, SELECTIONS)
        if selection == "none":
            grid.append(Cell(Compensation("none", 0, seed=seed)))
            continue
        for k_chunk in k_chunks:
            require_int("k_chunk", k_chunk, 1, CHUNK)
            scaled = k_chunk * 4 / base.residual.bits if equal_bytes else k_chunk
            if scaled != int(scaled) or scaled > CHUNK:
                raise DecDECError(
                    f"k_chunk must be a whole number up to {CHUNK} of {base.residual.bits}-bit channels for "
                    f"equal bytes, got {scaled:g} for {k_chunk}"
                )
            grid.append(Cell(Compensation(selection, int(scaled), seed=seed)))
    return grid


def run_all(options: argparse.Namespace) -> list[Path]:
    """Build and measure every base; return the run files."""
    text = load_text(available_text("test") if options.text == "auto" else options.text, "test")
    found = bases(options.methods, options.bits, options.residual_bits, options.clusterings)
    grids = [
        cells_of(base, options.selections, options.k_chunk, options.equal_bytes, options.seed)
        for base in found
    ]
    paths: list[Path] = []
    for number, (base, grid) in enumerate(zip(found, grids, strict=True), 1):
        print(f"== base {number} of {len(found)}: {base.label()}", flush=True)
        folder = cached_artifact(
            options.model, base.weight, base.residual, options.calibration, options.device
        )
        comparison = Comparison(options.model, folder, text, options.windows, options.out, options.device)
        paths += comparison.run_all(([Cell(None)] if number == 1 else []) + grid)
    return paths


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the grid; a refused input prints one line to standard error and returns 2."""
    parser = _parser()
    options, unknown = parser.parse_known_args(arguments)
    parser.refuse(unknown)
    return run_command(lambda: _run(options))


def _run(options: argparse.Namespace) -> None:
    if options.only_report:
        paths: Iterable[Path] = sorted((options.out / "runs").glob("*.json"))
        if not paths:
            raise DecDECError(f"out must be a folder with runs/*.json, got {options.out} without any")
    else:
        require_int("windows", options.windows, 1, 1 << 20)
        paths = run_all(options)
    print(write_bases(options.out, paths))


def _parser() -> OneLineParser:
    parser = OneLineParser(prog="python -m decdec_eval.bases", description=__doc__)
    parser.add_argument("--model", default="smollm2", help="a hub id, a folder, a .gguf file, or smollm2")
    parser.add_argument("--methods", nargs="+", default=list(WEIGHT_METHODS), choices=WEIGHT_METHODS)
    parser.add_argument("--bits", nargs="+", type=bits_of, default=[3, 3.5, 4, 5], metavar="BITS")
    parser.add_argument("--residual-bits", nargs="+", type=int, default=[4], choices=RESIDUAL_BITS)
    parser.add_argument("--clusterings", nargs="+", default=[CLUSTERINGS[0]], choices=CLUSTERINGS)
    parser.add_argument("--calibration", default="auto", help="wikitext2, pydoc, or a text file")
    parser.add_argument("--selections", nargs="+", default=["none", "static", "dynamic"], metavar="SELECTION")
    parser.add_argument("--equal-bytes", action="store_true", help="k_chunk is of 4-bit residuals")
    parser.add_argument("--device", default="cpu", help="where blocks are quantized and text is scored")
    parser.add_argument("--only-report", action="store_true", help="make table and figure of OUT/runs again")
    add_evaluation(parser, k_chunk_type=int)
    return parser


if __name__ == "__main__":
    sys.exit(main())
