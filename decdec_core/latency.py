"""Analytic model of a GPU: time of the product, of the compensation, and of both in one launch (method.md
section 6). It predicts; what it says is marked so wherever it goes.

    product        launch + max(bytes / memory, weights * cycles / (multiprocessors * clock))
    compensation   selection + a link's latency + further chunks and outputs of a block + bytes / link
    both           max(product on the blocks that are left + sharing, compensation)

The constants (FITTED) are of results/h200/kernels.json: 352 rows of one H200, Llama-3-8B shapes, 3 and 4
bits, both formats, n_tb 8, 16 and 24, k_chunk 0 to 256. Relative error of the fit: 2.5 % in the median, 16 %
at most. It is worst where microseconds are few: "o" with 8 blocks at k_chunk 1 to 4, which it has 10 to 16 %
too slow, since there the product loses less than a fixed cost of sharing; and qkv alone at 4 bits uniform,
11 % too fast. From k_chunk 16 on no row is off by more than 8 %. Fitted without one of the matrices, it has
that one's rows wrong by 3 to 5 % in the median and 17 % at most; without n_tb 8, those by 9 and 19 %.

A budget is more sensitive than a time: choices lie at the bend of max(), which in truth is round. What is
predicted for the H200 costs, by its measured rows, up to 4 points more than a target of 5 or 10 % and up to 7
more than one of 20 %. Nothing was compared with another GPU.

What carries over to another GPU, and what may not:
* Cycles for a weight: the instructions are the same, and so is their rate on compute capability 8.x and 9.0.
  On the H200 they bind all but 4 bits uniform; the consumer GPUs below have three to six times as many cycles
  for each byte of memory, so that memory binds them, and blocks that compensate take little from the product.
* Fixed costs (launch, selection, sharing) are taken over in microseconds. Where memory is weak the product
  takes ten times as long, and they weigh little. Before compute capability 9.0 launches do not overlap, which
  costs each up to 2 us more, compensated or not: not modelled.
* Fewer multiprocessors have fewer blocks to give: one each where shared memory is 100 KB (compute capability
  8.6 and 8.9), two on the H200.
* A data sheet's bandwidth is not reached: of the H200's, 95 % of memory's and 80 % of the link's are. The
  same shares are taken of any GPU whose numbers are from a data sheet.
* The link's latency is the H200's unless it is given. A laptop's clock depends on its power limit: the least
  that the data sheet states is taken.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from decdec_core.config import (
    CHUNK,
    FORMATS,
    PROJECTION_KINDS,
    DecDECError,
    WeightQuant,
    require_int,
    require_one_of,
    suggest,
    total_channels,
)
from decdec_core.packing import SLAB, channel_bytes
from decdec_core.tiles import tiled_bytes
from decdec_core.tuner import require_kinds, require_number

SOURCES = ("measured", "data sheet")
MEMORY_REACHED, LINK_REACHED = 0.95, 0.80  # of a data sheet's: the H200's 4558 of 4800 and 51.4 of 64 GB/s
LINK_LATENCY_US = 1.15  # one dependent read over PCIe on the H200
_COLUMN_SLABS = 256  # outputs / 32 that a block sums at a time (csrc/cuda/compensate.cuh, kMaxUnits)

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Gpu:
    """What the model needs to know of a GPU.

    memory_gb_per_s, link_gb_per_s: of device memory, and from host memory. link_latency_us: of one dependent
    read. source: one of SOURCES. multiprocessors, clock_ghz: without them the product is taken
    to be bound by memory, whatever compensates beside it. blocks_each: thread blocks on one multiprocessor.
    """

    name: str
    memory_gb_per_s: float
    link_gb_per_s: float
    link_latency_us: float = LINK_LATENCY_US
    source: str = "data sheet"
    multiprocessors: int | None = None
    clock_ghz: float | None = None
    blocks_each: int = 1

    def __post_init__(self) -> None:
        require_one_of("source", self.source, SOURCES)
        for which in ("memory_gb_per_s", "link_gb_per_s", "link_latency_us"):
            _require_positive(which, getattr(self, which))
        if (self.multiprocessors is None) != (self.clock_ghz is None):
            raise DecDECError(
                f"multiprocessors and clock_ghz must be given together, got {self.multiprocessors} and "
                f"{self.clock_ghz}"
            )
        if self.multiprocessors is not None:
            require_int("multiprocessors", self.multiprocessors, 1, 4096)
            _require_positive("clock_ghz", self.clock_ghz)
        require_int("blocks_each", self.blocks_each, 1, 32)

    @property
    def blocks(self) -> int | None:
        """Thread blocks that run at once, None where that is not known."""
        return None if self.multiprocessors is None else self.multiprocessors * self.blocks_each

    @property
    def memory_reached(self) -> float:
        """GB/s of memory that a kernel can reach."""
        return self.memory_gb_per_s * (MEMORY_REACHED if self.source == "data sheet" else 1)

    @property
    def link_reached(self) -> float:
        """GB/s from host memory that a kernel can reach."""
        return self.link_gb_per_s * (LINK_REACHED if self.source == "data sheet" else 1)


def _require_positive(which: str, got: Any) -> None:
    require_number(which, got)
    if got <= 0:
        raise DecDECError(f"{which} must be above 0, got {got!r}")


# bandwidths as in method.md section 6, multiprocessors and clocks from the same data sheets
GPUS: dict[str, Gpu] = {
    "rtx-4090": Gpu("RTX 4090", 1008, 32, multiprocessors=128, clock_ghz=2.52),
    "rtx-4080s": Gpu("RTX 4080S", 736, 32, multiprocessors=80, clock_ghz=2.55),
    "rtx-4070s": Gpu("RTX 4070S", 504, 32, multiprocessors=56, clock_ghz=2.475),
    "rtx-4070-mobile": Gpu("RTX 4070 Mobile", 256, 16, multiprocessors=36, clock_ghz=1.23),
    "rtx-4050-mobile": Gpu("RTX 4050 Mobile", 192, 16, multiprocessors=20, clock_ghz=1.605),
    "h200": Gpu("H200", 4558, 51.4, LINK_LATENCY_US, "measured", 132, 1.98, 2),
}


def gpu_of(key: str) -> Gpu:
    """Return one of GPUS by its key. Raises DecDECError for another."""
    if key not in GPUS:
        raise DecDECError(
            f"gpu must be one of {', '.join(GPUS)}, or any name with its bandwidths (--memory-gb-s, "
            f"--link-gb-s), got {key!r}{suggest(key, GPUS)}"
        )
    return GPUS[key]


def knee(gpu: Gpu, bits: int) -> float:
    """Return the k_chunk up to which a transfer hides behind the weights, as the paper estimates it from two
    bandwidths alone: 1024 * bits / 4 * link / memory."""
    return CHUNK * bits / 4 * gpu.link_gb_per_s / gpu.memory_gb_per_s


@dataclass(frozen=True)
class Model:
    """The parameters, each above 0. Times in microseconds.

    cycles: of a multiprocessor, for a thousand weights of a format and bits. launch_us: of a launch that does
    nothing. selection_us: of a block that selects from one chunk, from the launch to the last sum, without
    the link's latency. chunk_us: for each further chunk. outputs_us: for a thousand outputs of a block.
    link_share: of the link's bandwidth. kilobytes_in_flight: of one block, which the link's latency turns
    into a bandwidth. sharing_us: what the product takes longer because anything compensates beside it.
    """

    cycles: Mapping[tuple[str, int], float]
    launch_us: float
    selection_us: float
    chunk_us: float
    outputs_us: float
    link_share: float
    kilobytes_in_flight: float
    sharing_us: float

    def times_us(self, gpu: Gpu, rows: Sequence[Mapping[str, Any]]) -> Floats:
        """Return the predicted time of each row: {"in", "out", "bits", "format", "n_tb", "k_chunk"}, of the
        product alone with k_chunk 0."""
        return _times_us(self, gpu, _Work.of(rows))

    def error(self, rows: Iterable[Mapping[str, Any]], gpu: Gpu | None = None) -> list[dict[str, Any]]:
        """Return the relative error against measured rows as in results/h200/kernels.json: of all, then of
        each matrix and range of k_chunk {"matrix", "k_chunk", "rows", "median", "largest"}. The largest has
        a sign, + where the prediction is too long. gpu: which they come from (default h200)."""
        kept = _usable(rows)
        times = np.array([row["time_us"] for row in kept])
        errors = self.times_us(gpu or GPUS["h200"], kept) / times - 1
        names = np.array([row["matrix"] for row in kept])
        k_chunk = np.array([row["k_chunk"] for row in kept])
        found = [_error_row("all", (0, int(k_chunk.max())), errors)]
        for matrix in dict.fromkeys(names.tolist()):
            for first, last in ((0, 0), (1, 8), (9, 32), (33, CHUNK)):
                here = (names == matrix) & (k_chunk >= first) & (k_chunk <= last)
                if here.any():
                    found.append(_error_row(matrix, (first, last), errors[here]))
        return found


def _error_row(matrix: str, k_chunk: tuple[int, int], errors: Floats) -> dict[str, Any]:
    largest = float(errors[np.abs(errors).argmax()])
    about = {"matrix": matrix, "k_chunk": list(k_chunk), "rows": len(errors)}
    return {**about, "median": float(np.median(np.abs(errors))), "largest": largest}


@dataclass(frozen=True)
class _Work:
    """What rows ask for, an array for each quantity."""

    setting: list[tuple[str, int]]  # format and bits
    compensated: NDArray[np.bool_]
    kiloweights: Floats
    kilobytes: Floats
    host_kilobytes: Floats
    blocks: Floats  # that compensate
    further_chunks: Floats  # of one such block
    kilooutputs: Floats

    @classmethod
    def of(cls, rows: Sequence[Mapping[str, Any]]) -> _Work:
        plans, setting = [], []
        for row in rows:
            in_features, out_features = row["in"], row["out"]
            setting.append((row["format"], row["bits"]))
            quant = WeightQuant("squeezellm" if row["format"] == "codebook" else "rtn", row["bits"])
            channels = total_channels(in_features, row["k_chunk"])
            pieces, columns = divided(in_features, out_features, row["n_tb"]) if channels else (0, 1)
            chunks, slabs = -(-in_features // CHUNK), -(-out_features // SLAB)
            plans.append(
                (
                    channels > 0,
                    in_features * out_features / 1e3,
                    tiled_bytes(quant, in_features, out_features) / 1e3,
                    channels * channel_bytes(out_features, 4) / 1e3,
                    pieces * columns,
                    -(-chunks // max(pieces, 1)) - 1,
                    -(-slabs // columns) * SLAB / 1e3,
                )
            )
        compensated, *quantities = np.array(plans, dtype=np.float64).T
        return cls(setting, compensated > 0, *quantities)


def divided(in_features: int, out_features: int, n_tb: int) -> tuple[int, int]:
    """Return how `n_tb` blocks share a layer's compensation, as csrc/cuda/linear.cu divides it: pieces of the
    chunks, and columns of the outputs. Their product is at most n_tb."""
    slabs, chunks = -(-out_features // SLAB), -(-in_features // CHUNK)
    pieces = min(max(n_tb // -(-slabs // _COLUMN_SLABS), 1), chunks)
    return pieces, min(max(n_tb // pieces, 1), slabs)


def _times_us(model: Model, gpu: Gpu, work: _Work) -> Floats:
    memory_us = work.kilobytes / gpu.memory_reached
    product_us = memory_us
    if gpu.multiprocessors is not None and gpu.clock_ghz is not None and gpu.blocks is not None:
        # csrc/cuda/linear.cu leaves the product at least half of them
        left = np.maximum(1 - work.blocks / gpu.blocks, 0.5)
        cycles = work.kiloweights * np.array([model.cycles[setting] for setting in work.setting])
        product_us = np.maximum(memory_us, cycles / (gpu.multiprocessors * gpu.clock_ghz * 1e3 * left))
    product_us = model.launch_us + product_us + model.sharing_us * work.compensated
    link = np.minimum(
        gpu.link_reached * model.link_share,
        np.maximum(work.blocks, 1) * model.kilobytes_in_flight / gpu.link_latency_us,
    )
    compensation_us = (
        model.selection_us
        + gpu.link_latency_us
        + model.chunk_us * work.further_chunks
        + model.outputs_us * work.kilooutputs
        + work.host_kilobytes / link
    )
    return np.where(work.compensated, np.maximum(product_us, compensation_us), product_us)


# calibrate(rows of results/h200/kernels.json), rounded
FITTED = Model(
    cycles={("codebook", 3): 36.1, ("codebook", 4): 61.2, ("uniform", 3): 29.2, ("uniform", 4): 30.1},
    launch_us=2.675,
    selection_us=4.72,
    chunk_us=1.25,
    outputs_us=0.317,
    link_share=0.956,
    kilobytes_in_flight=6.85,
    sharing_us=1.349,
)
_SHARED = [name for name in asdict(FITTED) if name != "cycles"]


def calibrate(rows: Iterable[Mapping[str, Any]], gpu: Gpu | None = None) -> Model:
    """Return the model whose times have the least sum of squared log ratios to measured ones.

    rows: as in results/h200/kernels.json; those of float16, of several tokens and of compensation alone are
    left out. gpu: which they come from (default h200), with its multiprocessors. Deterministic. Raises
    DecDECError unless there are rows of the product alone and compensated ones.
    """
    kept, gpu = _usable(rows), gpu or GPUS["h200"]
    if gpu.multiprocessors is None:
        raise DecDECError(f"multiprocessors of {gpu.name} must be known to calibrate, got none")
    if len({row["k_chunk"] > 0 for row in kept}) < 2:
        raise DecDECError("rows must be of the product alone and of both in one launch, got one kind only")
    settings = sorted({(row["format"], row["bits"]) for row in kept})
    work, measured = _Work.of(kept), np.log([row["time_us"] for row in kept])

    def model_of(logs: Floats) -> Model:
        values = [float(value) for value in np.exp(logs)]
        cycles = dict(zip(settings, values[: len(settings)], strict=True))
        return Model(cycles, *values[len(settings) :])

    start = [FITTED.cycles.get(setting, 40.0) for setting in settings]
    # so few bytes in flight that they bind: from where they do not, nothing would pull at them
    start += [{"link_share": 0.95, "kilobytes_in_flight": 6.0}.get(name, 1.0) for name in _SHARED]
    logs = _least_squares(lambda logs: np.log(_times_us(model_of(logs), gpu, work)) - measured, np.log(start))
    return model_of(logs)


def _usable(rows: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the rows that the model is about."""
    kept = [
        row
        for row in rows
        if row["format"] in FORMATS and row.get("tokens", 1) == 1 and not row.get("compensation_only")
    ]
    if not kept:
        raise DecDECError("rows must have some of one token, uniform or codebook, got none")
    return kept


def _least_squares(residuals: Callable[[Floats], Floats], start: Floats, rounds: int = 100) -> Floats:
    """Return where the sum of squared `residuals` is least, by Levenberg and Marquardt's method."""
    at, damping, step = start, 1e-2, 1e-4
    value = residuals(at)
    for _ in range(rounds):
        slope = np.stack([(residuals(at + step * e) - value) / step for e in np.eye(len(at))], axis=1)
        normal = slope.T @ slope
        while damping < 1e8:
            scaled = normal + damping * np.diag(np.diag(normal) + 1e-9)
            trial = at - np.linalg.solve(scaled, slope.T @ value)
            next_value = residuals(trial)
            if next_value @ next_value < value @ value:
                at, value, damping = trial, next_value, damping / 3
                break
            damping *= 4
        else:
            return at
    return at


def predicted_rows(
    gpu: Gpu,
    shapes: Mapping[str, tuple[int, int]],
    bits: int,
    format: str,
    n_tb: Sequence[int],
    most_k_chunk: int = CHUNK,
    model: Model = FITTED,
) -> list[dict[str, Any]]:
    """Return timing rows {"kind", "n_tb", "k_chunk", "time_us", "predicted": True} for a TimingTable.

    Of each kind and n_tb the values of k_chunk between which time runs straight: the first that gives a
    channel, two at the bend, the largest. An n_tb that does not leave the product half of the GPU's blocks is
    left out; where that leaves none, or where format and bits were not measured, DecDECError.
    """
    require_kinds("shapes", shapes)
    require_one_of("format", format, FORMATS)
    if (format, bits) not in model.cycles:
        known = ", ".join(f"{b} bits {f}" for f, b in model.cycles)
        raise DecDECError(f"a prediction must be of {known}, got {bits} bits {format}")
    require_int("most_k_chunk", most_k_chunk, 1, CHUNK)
    offered = [n for n in n_tb if gpu.blocks is None or 2 * n <= gpu.blocks]
    if not offered:
        raise DecDECError(f"n_tb must be at most half of the {gpu.blocks} blocks, got {list(n_tb)}")
    found = []
    for kind in PROJECTION_KINDS:
        about = {"in": shapes[kind][0], "out": shapes[kind][1], "bits": bits, "format": format}
        for blocks in (0, *offered):
            time_us = partial(_time_us, model, gpu, {**about, "n_tb": blocks})
            found += [
                {
                    "kind": kind,
                    "n_tb": blocks,
                    "k_chunk": k,
                    "time_us": round(time_us(k), 3),
                    "predicted": True,
                }
                for k in (_corners(time_us, shapes[kind][0], most_k_chunk) if blocks else [0])
            ]
    return found


def _time_us(model: Model, gpu: Gpu, setting: Mapping[str, Any], k_chunk: int) -> float:
    return float(model.times_us(gpu, [{**setting, "k_chunk": k_chunk}])[0])


def _corners(time_us: Callable[[int], float], in_features: int, last: int) -> list[int]:
    """Return the values of k_chunk up to `last` between which `time_us` of it runs straight."""
    first = next((k for k in range(1, last) if total_channels(in_features, k)), last)
    # it never falls, and is flat up to the bend
    flat = bisect_right(range(first, last + 1), time_us(first), key=time_us)
    bend = first + flat - 1
    return sorted({first, bend, min(bend + 1, last), last})
