"""A layer's part of a decoding step with its compensation in tensors: compiled once, whatever is compensated.

A compiler takes k_chunk for a constant and compiles anew for another; what lies in a tensor on the CPU it
takes for data. The op reads it when it is called, which is when a CUDA graph is captured.
"""

from __future__ import annotations

import torch
from torch import Tensor

from decdec_core import ops
from decdec_core.ops import Selection, TiledWeight

_KINDS = ("none", "static", "exact", "dynamic", "random")


class StepSettings:
    """What a layer compensates, in tensors that `set` changes in place.

    numbers: (5,) int64 on the CPU: kind, k_chunk, seed, n_tb, channels of a static selection. floors: (32,)
    float32 on the CPU, of a dynamic one. indices: (1, in) int32 on the weight's device, of which a static
    selection has the first. A captured launch has copies of the first two, and the address of the last.
    """

    def __init__(self, in_features: int, device: torch.device) -> None:
        self.numbers = torch.zeros(5, dtype=torch.int64)
        self.floors = torch.zeros(ops.BUCKETS)
        self.indices = torch.zeros((1, in_features), dtype=torch.int32, device=device)

    def set(self, selection: Selection | None, n_tb: int) -> None:
        """Take over `selection`; None compensates nothing."""
        kind = "none" if selection is None else selection.kind
        k_chunk, seed = (0, 0) if selection is None else (selection.k_chunk, selection.seed)
        static = None if selection is None else selection.indices
        count = 0 if static is None else static.shape[1]
        self.numbers.copy_(torch.tensor([_KINDS.index(kind), k_chunk, seed, n_tb, count]))
        if selection is not None and selection.floors is not None:
            self.floors.copy_(selection.floors)
        if static is not None:
            self.indices[:, :count].copy_(static)


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
    indices: Tensor,
) -> Tensor:
    weight = TiledWeight(tiles, bits, out_features, x.shape[1], table, bias)
    number, k_chunk, seed, n_tb, count = numbers.tolist()
    kind = _KINDS[number]
    if kind == "none":
        return ops.linear(x, weight)
    static = indices[:, :count] if kind == "static" else None
    selection = Selection(kind, k_chunk, seed, floors if kind == "dynamic" else None, static)
    return ops.linear(x, weight, selection, codes, scale, n_tb)


@_step_linear.register_fake
def _(x: Tensor, *others: object) -> Tensor:
    out_features = others[4]
    assert isinstance(out_features, int)
    return x.new_empty((x.shape[0], out_features))
