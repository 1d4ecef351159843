"""Timing rows of the kernels on the GPU at hand, for a tuner: medians of CUDA-graph replays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from tqdm import tqdm

from decdec_core import kernel_bench
from decdec_core.config import (
    CHUNK,
    FORMATS,
    KERNEL_BITS,
    PROJECTION_KINDS,
    DecDECError,
    require_int,
    require_one_of,
    total_channels,
)
from decdec_core.tuner import require_kinds, require_number

N_TB = (4, 8, 16, 24)
# of the four products' time, by which one kind's compensation may lengthen it: beyond the usual targets,
# since of a whole step the four are a part only
MOST_PERCENT = 50.0
_PER_OCTAVE = 4  # grid points from a power of two to the next


def grid_of(in_features: int) -> list[int]:
    """Return the values of k_chunk to measure of a layer: every one up to 8, then four in each octave up to
    1024. Those that give no channel, or no more than the one before, are left out."""
    steps = range(_PER_OCTAVE, 2 * _PER_OCTAVE)
    octaves = [2**power * step for power in range(CHUNK.bit_length()) for step in steps]
    values = [*range(1, _PER_OCTAVE), *(k for k in octaves if k <= CHUNK)]
    channels = [total_channels(in_features, k) for k in values]
    before = [0, *channels]
    return [k for k, now, last in zip(values, channels, before, strict=False) if now > last]


def measure(
    shapes: Mapping[str, tuple[int, int]],
    bits: int,
    format: str,
    n_tb: Sequence[int] = N_TB,
    most_percent: float = MOST_PERCENT,
    selection: str = "dynamic",
) -> list[dict[str, Any]]:
    """Return timing rows {"kind", "n_tb", "k_chunk", "time_us"} of each projection kind on the current CUDA
    device: the product alone, then both in one launch for each n_tb along grid_of.

    shapes: (in, out) of each of PROJECTION_KINDS, multiples of 32. Of a kind and n_tb the first row whose
    extra time alone exceeds most_percent of the four products' sum is the last. Raises DecDECError without a
    CUDA device.
    """
    require_kinds("shapes", shapes)
    require_one_of("bits", bits, KERNEL_BITS)
    require_one_of("format", format, FORMATS)
    for blocks in n_tb:
        require_int("n_tb", blocks, 1, 1024)
    require_number("most_percent", most_percent)
    if not torch.cuda.is_available():
        raise DecDECError("tune must have a CUDA device to measure, got none")
    cases = {kind: kernel_bench.make_case(kind, shapes[kind], bits, format) for kind in PROJECTION_KINDS}
    base = {kind: kernel_bench.base_row(case)["time_us"] for kind, case in cases.items()}
    most_us = sum(base.values()) * most_percent / 100
    rows = [_row(kind, 0, 0, time_us) for kind, time_us in base.items()]
    with tqdm(total=len(cases) * len(n_tb), desc=f"{bits} bits {format}", unit="curve") as progress:
        for kind, case in cases.items():
            for blocks in n_tb:
                for k_chunk in grid_of(case.in_features):
                    time_us = kernel_bench.fused_row(case, blocks, k_chunk, selection)["time_us"]
                    rows.append(_row(kind, blocks, k_chunk, time_us))
                    if time_us - base[kind] > most_us:
                        break
                progress.update()
    return rows


def _row(kind: str, n_tb: int, k_chunk: int, time_us: float) -> dict[str, Any]:
    # a nanosecond is below what a replay can tell
    return {"kind": kind, "n_tb": n_tb, "k_chunk": k_chunk, "time_us": round(time_us, 3)}
