"""Layers that read one input as one layer: q, k, v and gate, up of a model that has them apart.

One launch instead of three, and one selection. The model's own code goes on calling three modules: the first
computes for all, the others hand out their parts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from decdec_core.architectures import decoder_blocks, input_groups, require_supported
from decdec_core.config import EXTRAS
from decdec_core.linear import DecLinear

_NAMES = {"qkv": "qkv_proj", "gate_up": "gate_up_proj"}  # of architectures that have them fused


class First(nn.Module):
    """Stands for the first of several layers: computes all of them and gives its own part."""

    def __init__(self, name: str, fused: nn.Module, sizes: Sequence[int]) -> None:
        super().__init__()
        self.name, self.sizes = name, list(sizes)
        self.add_module(name, fused)
        self.rest: list[Tensor | None] = []

    def forward(self, x: Tensor) -> Tensor:
        parts = self.get_submodule(self.name)(x).split(self.sizes, dim=-1)
        self.rest = list(parts[1:])  # a starred assignment is a tuple to the compiler of torch 2.11
        return parts[0]


class Later(nn.Module):
    """Stands for another of them: gives what the first has computed for it."""

    def __init__(self, first: First, index: int) -> None:
        super().__init__()
        self.first = (first,)  # in a tuple, so that it is no submodule here as well
        self.index = index

    def forward(self, _x: Tensor) -> Tensor:
        rest = self.first[0].rest
        part = rest[self.index] if rest else None
        assert part is not None, "a fused layer must be called once, after the first of its input"
        rest[self.index] = None  # nothing is kept for longer than a block needs it
        return part


def fuse(model: nn.Module) -> int:
    """Fuse the layers of each block that read one input, in place; return how many became parts of another.

    model: of a supported architecture, its linear layers DecLinear or plain. Layers stay apart that differ in
    bits, in what they do to the input (input_order, input_scale) or in having a bias. A fused model computes
    what it did before; only a random selection draws anew, once for all of them. It cannot be saved.
    """
    config: Any = getattr(model, "config", None)
    require_supported(config)
    fused = 0
    for block in decoder_blocks(model).values():
        for group in input_groups(config):
            if len(group.linears) == 1:
                continue
            layers = [block.get_submodule(linear) for linear in group.linears]
            whole = _joined(layers)
            if whole is None:
                continue
            first = First(_NAMES[group.kind], whole, [_outputs(layer) for layer in layers])
            parts = [first, *(Later(first, i) for i in range(len(layers) - 1))]
            for linear, part in zip(group.linears, parts, strict=True):
                parent, _, leaf = linear.rpartition(".")
                setattr(block.get_submodule(parent), leaf, part)
            fused += len(layers)
    return fused


def is_fused(model: nn.Module) -> bool:
    """Return whether `fuse` has changed the model."""
    return any(isinstance(module, First) for module in model.modules())


def _outputs(layer: nn.Module) -> int:
    assert isinstance(layer, (DecLinear, nn.Linear))
    return layer.out_features


def _joined(layers: Sequence[nn.Module]) -> nn.Module | None:
    """Return one layer for all of `layers`, or None where they differ too much."""
    low_bit = [layer for layer in layers if isinstance(layer, DecLinear)]
    plain = [layer for layer in layers if type(layer) is nn.Linear]
    if len({layer.bias is None for layer in (*low_bit, *plain)}) > 1:
        return None
    if len(low_bit) == len(layers):
        first, *others = low_bit
        return DecLinear.join(low_bit) if all(_joinable(first, other) for other in others) else None
    return _join_plain(plain) if len(plain) == len(layers) else None


def _joinable(one: DecLinear, other: DecLinear) -> bool:
    if one.config != other.config:
        return False
    for name in EXTRAS:
        mine, theirs = getattr(one, name), getattr(other, name)
        if (mine is None) != (theirs is None) or (mine is not None and not torch.equal(mine, theirs)):
            return False
    if one.residual is None or other.residual is None:
        return one.residual is other.residual
    # the parts of a channel are joined byte by byte
    whole = all(r.out_features * r.config.bits % 8 == 0 for r in (one.residual, other.residual))
    return one.residual.config == other.residual.config and whole


def _join_plain(layers: Sequence[nn.Linear]) -> nn.Linear:
    weight = torch.cat([layer.weight for layer in layers])
    whole = nn.Linear(weight.shape[1], weight.shape[0], layers[0].bias is not None, device="meta")
    whole.weight = nn.Parameter(weight, requires_grad=False)
    if layers[0].bias is not None:
        whole.bias = nn.Parameter(torch.cat([layer.bias for layer in layers]), requires_grad=False)
    return whole
