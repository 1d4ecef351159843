"""A layer's part of a decoding step with its compensation in tensors: compiled once, whatever is compensated.

A compiler takes k_chunk for a constant and compiles anew for another; what lies in a tensor on the CPU it
takes for data. The op reads it when it is called, which is when a CUDA graph is captured.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from decdec_core import ops
from decdec_core.ops import Selection, TiledWeight

_KINDS = ("none", "static", "exact", "dynamic", "random")


@dataclass
class StepSettings:
    """What a layer compensates, in tensors on the CPU that `set` changes in place.

    numbers: (4,) int64: kind, k_chunk, seed, n_tb. floors: (32,) float32 of a dynamic selection. indices:
    (1, K) int32 of a static one, on the weight's device, else None.
    """

    numbers: Tensor = field(default_factory=lambda: torch.zeros(4, dtype=torch.int64))
    floors: Tensor = field(default_factory=lambda: torch.zeros(ops.BUCKETS))
    indices: Tensor | None = None

    def set(self, selection: Selection | None, n_tb: int) -> None:
        """Take over `selection`; None compensates nothing."""
        kind = "none" if selection is None else selection.kind
        k_chunk, seed = (0, 0) if selection is None else (selection.k_chunk, selection.seed)
        self.numbers.copy_(torch.tensor([_KINDS.index(kind), k_chunk, seed, n_tb]))
        if selection is not None and selection.floors is not None:
            self.floors.copy_(selection.floors)
        self.indices = None if selection is None else selection.indices


def step_linear(
    x: Tensor, weight: TiledWeight, codes: Tensor, scale: Tensor, settings: StepSettings
) -> Tensor:
    """Return what ops.linear returns with the selection and n_tb that `settings` hold when it is called.

    x: (tokens, in) float16 or bfloat16, 1 to 8 tokens. codes, scale: the 4-bit residual. Errors are those of
    ops.linear.
    """
    return _step_linear(
        *(x, weight.tiles, weight.table, weight.bias, weight.bits, weight.out_features, codes, scale),
        *(settings.numbers, settings.floors, settings.indices),
    )


@torch.library.custom_op("decdec_core::step_linear", mutates_args=())
def _step_linear(
    x: Tensor,
    tiles: Tensor,
    table: Tensor | None,
    bias: Tensor | None,
    bits: int,
    out_features: int,
    codes: Tensor,
    scale: Tensor,
    numbers: Tensor,
    floors: Tensor,
    indices: Tensor | None,
) -> Tensor:
    weight = TiledWeight(tiles, bits, out_features, x.shape[1], table, bias)
    number, k_chunk, seed, n_tb = numbers.tolist()
    kind = _KINDS[number]
    if kind == "none":
        return ops.linear(x, weight)
    selection = Selection(kind, k_chunk, seed, floors if kind == "dynamic" else None, indices)
    return ops.linear(x, weight, selection, codes, scale, n_tb)


@_step_linear.register_fake
def _(x: Tensor, *others: object) -> Tensor:
    out_features = others[4]
    assert isinstance(out_features, int)
    return x.new_empty((x.shape[0], out_features))
