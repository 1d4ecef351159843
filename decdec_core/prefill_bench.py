"""How long passes over many tokens take on a GPU, compensated and not: random layers, medians, in turns."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from decdec_core import prefill
from decdec_core.calibration import ActivationStatistics
from decdec_core.channels import make_selection
from decdec_core.config import (
    SELECTIONS,
    DecDECError,
    ResidualQuant,
    WeightQuant,
    require_int,
    require_one_of,
)
from decdec_core.kernel_bench import heavy_tailed, markdown, shapes_of
from decdec_core.linear import DecLinear
from decdec_core.ops import Selection
from decdec_core.packing import channel_bytes
from decdec_core.residuals import QuantizedResidual

_TURNS = 15
_RESIDUAL_BITS = 4


@torch.inference_mode()
def prefill_times(
    shapes: str, tokens: int, blocks: int, k_chunk: int, bits: int, selections: Sequence[str]
) -> list[dict[str, Any]]:
    """Return rows: passes over `tokens` tokens of `blocks` blocks in float16.

    shapes: a model's name or IN,OUT. bits: of the weights, 2..4; residuals are in 4 and in pinned memory.
    The selections take turns, `none` always among them, so that whatever else the machine does falls on all
    alike; the first turn is not counted. Rows: shapes, tokens, bits, k_chunk, selection, ms_per_block (the
    median), speed_of_none (1 is as fast), peak_bytes_added (device memory beyond that of none). Raises
    DecDECError without a CUDA device.
    """
    if not torch.cuda.is_available():
        raise DecDECError("bench prefill must have a CUDA device, got none")
    require_int("tokens", tokens, 1, 1 << 20)
    require_int("blocks", blocks, 1, 1024)
    require_int("k_chunk", k_chunk, 1, 1024)
    require_one_of("bits", bits, (2, 3, 4))
    for selection in selections:
        require_one_of("selection", selection, SELECTIONS)
    names = list(dict.fromkeys(["none", *selections]))
    work = Pass(shapes_of(shapes), bits, tokens, blocks)
    hows = {name: work.selections(name, k_chunk) for name in names}
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in tqdm(range(_TURNS + 1), desc="turns", unit="turn"):
        for name, measured in times.items():
            elapsed = work.time_ms(hows[name])
            if turn > 0:
                measured.append(elapsed / blocks)
    peaks = {name: work.peak_bytes(hows[name]) for name in names}
    medians = {name: statistics.median(measured) for name, measured in times.items()}
    return [
        {
            "shapes": shapes,
            "tokens": tokens,
            "bits": bits,
            "k_chunk": 0 if name == "none" else k_chunk,
            "selection": name,
            "ms_per_block": medians[name],
            "speed_of_none": medians["none"] / medians[name],
            "peak_bytes_added": peaks[name] - peaks["none"],
        }
        for name in names
    ]


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the rows for people: a line per selection."""
    head = ["selection", "k_chunk", "ms per block", "speed of none", "MB added"]
    body = [
        [
            *(row["selection"], str(row["k_chunk"]), f"{row['ms_per_block']:.2f}"),
            *(f"{row['speed_of_none']:.2f}", f"{row['peak_bytes_added'] / 1e6:.0f}"),
        ]
        for row in rows
    ]
    return markdown(head, body)


class Pass:
    """Blocks of random layers on the current device, and an input for each of a block's matrices."""

    def __init__(self, shapes: Mapping[str, tuple[int, int]], bits: int, tokens: int, blocks: int) -> None:
        self.stage = prefill.Stage()
        self.inputs = [heavy_tailed(tokens, in_features).half() for in_features, _ in shapes.values()]
        self.measured = [_statistics_of(x) for x in self.inputs]
        self.blocks = [[_layer(shape, bits, self.stage) for shape in shapes.values()] for _ in range(blocks)]

    def selections(self, name: str, k_chunk: int) -> list[Selection | None]:
        """Return how each of a block's matrices chooses its channels."""
        return [make_selection(name, k_chunk, measured) for measured in self.measured]

    def run(self) -> None:
        """Run every layer once, as a model's pass does."""
        self.stage.reset()
        for block in self.blocks:
            for layer, x in zip(block, self.inputs, strict=True):
                layer(x)

    def set(self, selections: Sequence[Selection | None]) -> None:
        """Make every block choose its channels so, and come to rest: a pass has learned the layers' order."""
        for block in self.blocks:
            for layer, selection in zip(block, selections, strict=True):
                layer.selection = selection
        self.run()
        torch.cuda.synchronize()

    def time_ms(self, selections: Sequence[Selection | None]) -> float:
        """Return the milliseconds of one pass."""
        self.set(selections)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        self.run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    def peak_bytes(self, selections: Sequence[Selection | None]) -> int:
        """Return the most device memory in use during a pass."""
        self.set(selections)
        torch.cuda.reset_peak_memory_stats()
        self.run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()


def _layer(shape: tuple[int, int], bits: int, stage: prefill.Stage) -> DecLinear:
    in_features, out_features = shape
    with torch.device("cuda"):
        layer = DecLinear(in_features, out_features, WeightQuant("rtn", bits))
        layer.codes = torch.randint(-(2**31), 2**31, layer.codes.shape, dtype=torch.int32)
        layer.scales = (torch.rand(layer.scales.shape) * 0.01).half()
        layer.zeros = torch.randint(0, 2**bits, layer.zeros.shape, dtype=torch.uint8)
        width = channel_bytes(out_features, _RESIDUAL_BITS)
        codes = torch.randint(0, 256, (in_features, width), dtype=torch.uint8).cpu()
        scale = (torch.rand(out_features) * 1e-3).cpu()
    layer.residual = QuantizedResidual(codes, scale, ResidualQuant(_RESIDUAL_BITS))
    layer.stage = stage
    layer.prepare_for_gpu()
    return layer


def _statistics_of(x: Tensor) -> ActivationStatistics:
    magnitudes = x.float().abs()
    largest = magnitudes.sort(1, descending=True).values.amax(0).cpu()
    return ActivationStatistics(largest, magnitudes.square().mean(0).cpu(), x.float().mean(0).cpu())
