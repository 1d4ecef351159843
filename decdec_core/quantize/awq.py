"""AWQ: activation-aware scales and clipping (arXiv 2306.00978; method.md section 1).

For each group of layers that read one input: scales s = mean|x|**alpha with alpha on a 20-point grid,
the least squared error of the inspected module's output wins; W·diag(s) is what gets quantized, and the
layer sees x/s. 1/s is folded into the norm or linear layer that makes x, else it stays as an input scale.
Then, per (output channel, group), the largest magnitude is shrunk as far as that lowers the output error.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from decdec_core.architectures import InputGroup
from decdec_core.config import WeightQuant
from decdec_core.hooks import recorded_call, watching
from decdec_core.quantize.uniform import grouped_by, round_trip, round_trip_groups

ALPHA_STEPS = 20
SEARCH_TOKENS = 1024  # at most so many of the sample's tokens, evenly, where a module takes them one by one
CLIP_STEPS = 10  # largest magnitude times 1, 0.95, ... 0.55
CLIP_STEP = 0.05
_CLIP_ELEMENTS = 1 << 22  # of a weight, clipped at once: bounds the memory of the search


class Sample:
    """A few calibration sequences as one decoder block's input groups and inspected modules see them.

    run: a pass of those sequences through the block.
    """

    def __init__(self, block: nn.Module, groups: list[InputGroup], run: Callable[[], object]) -> None:
        self._inputs: dict[str, list[Tensor]] = {group.kind: [] for group in groups}
        # attention mixes tokens, so it is given its own calls again; the other modules take any tokens
        self._calls: dict[str, list[Any]] = {group.kind: [] for group in groups if group.attends}
        watched = {group.kind: block.get_submodule(group.linears[0]) for group in groups}
        with ExitStack() as stack:
            stack.enter_context(watching(watched, self._see))
            for group in groups:
                if group.attends:
                    module = block.get_submodule(group.inspect)
                    stack.enter_context(recorded_call(module, self._calls[group.kind]))
            run()

    def _see(self, kind: str, x: Tensor) -> None:
        # the huge first tokens stay in: without them the search spoils what they need (LOG.md)
        self._inputs[kind].append(x.reshape(-1, x.shape[-1]).float())

    def inputs(self, kind: str) -> Tensor:
        """Return the group's input (tokens, in) float32."""
        return torch.cat(self._inputs[kind])

    def outputs(self, module: nn.Module, kind: str) -> Tensor:
        """Return what the group's inspected `module` makes of the sample, flattened."""
        if kind not in self._calls:
            inputs = self.inputs(kind)
            return module(inputs[:: -(-len(inputs) // SEARCH_TOKENS)]).flatten()
        results = [module(*args, **kwargs) for args, kwargs in self._calls[kind]]
        return torch.cat([(r[0] if isinstance(r, tuple) else r).flatten() for r in results])


def search_scale(block: nn.Module, group: InputGroup, sample: Sample, config: WeightQuant) -> Tensor:
    """Return the group's scale s (in,) float32: the best alpha's. Leaves the block as it was."""
    linears = [linear_of(block, name) for name in group.linears]
    originals = [linear.weight.data for linear in linears]
    inspected = block.get_submodule(group.inspect)
    magnitude = sample.inputs(group.kind).abs().mean(0)
    wanted = sample.outputs(inspected, group.kind)
    best_error, best_scale = torch.inf, torch.ones_like(magnitude)
    try:
        for step in range(ALPHA_STEPS):
            scale = _scale(magnitude, step / ALPHA_STEPS)
            for linear, original in zip(linears, originals, strict=True):
                rounded = round_trip(original.float() * scale, config) / scale
                linear.weight.data = rounded.to(original.dtype)
            error = F.mse_loss(sample.outputs(inspected, group.kind), wanted).item()
            if error < best_error:
                best_error, best_scale = error, scale
    finally:
        for linear, original in zip(linears, originals, strict=True):
            linear.weight.data = original
    return best_scale


def _scale(magnitude: Tensor, alpha: float) -> Tensor:
    """Return magnitude**alpha, centred so that the largest and the least multiply to one."""
    scale = magnitude.pow(alpha).clamp(min=1e-4)
    return scale / (scale.max() * scale.min()).sqrt()


def apply_scale(block: nn.Module, group: InputGroup, scale: Tensor) -> Tensor | None:
    """Scale the group's weights by s and whatever makes its input by 1/s, in place.

    Returns None where 1/s was folded, else s, which the layer must then divide its input by.
    """
    for name in group.linears:
        weight = linear_of(block, name).weight
        weight.data = (weight.data.float() * scale).to(weight.dtype)
    if group.norm is not None:
        _divide_rows(block.get_submodule(group.norm), scale, 0)
    elif group.producer is not None:
        _divide_rows(linear_of(block, group.producer), scale, group.first_row)
    else:
        return scale
    return None


def _divide_rows(module: nn.Module, scale: Tensor, first: int) -> None:
    rows = slice(first, first + scale.shape[0])
    for parameter in (module.weight, getattr(module, "bias", None)):
        if isinstance(parameter, Tensor):
            part = parameter.data[rows].float()
            by = scale.unsqueeze(1) if part.dim() == 2 else scale
            parameter.data[rows] = (part / by).to(parameter.dtype)


def clip(weight: Tensor, inputs: Tensor, config: WeightQuant) -> Tensor:
    """Return `weight` (out, in) clamped per (output channel, group) to the magnitude with the least
    output error on `inputs` (tokens, in): the squared error of the group's own partial product, taken
    from the Gram matrix of its inputs, which holds the same sum without the tokens."""
    out_features, in_features = weight.shape
    by_group = grouped_by(inputs, config)
    gram = torch.einsum("tgi,tgj->gij", by_group, by_group)
    grouped = grouped_by(weight.float(), config)
    rows = max(1, _CLIP_ELEMENTS // max(1, in_features))
    parts = [_clip_rows(part, gram, int(config.bits)) for part in grouped.split(rows)]
    return torch.cat(parts).view(out_features, -1)[:, :in_features]


def _clip_rows(grouped: Tensor, gram: Tensor, bits: int) -> Tensor:
    largest = grouped.abs().amax(-1, keepdim=True)
    best_limit, best_error = largest, torch.full_like(largest, torch.inf)
    for step in range(CLIP_STEPS):
        limit = largest * (1 - CLIP_STEP * step)
        wrong = round_trip_groups(grouped.clamp(-limit, limit), bits) - grouped
        projected = torch.einsum("ogi,gij->ogj", wrong, gram)
        error = (projected * wrong).sum(-1, keepdim=True)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_limit = torch.where(better, limit, best_limit)
    return grouped.clamp(-best_limit, best_limit)


def linear_of(block: nn.Module, name: str) -> nn.Linear:
    """Return the block's linear layer `name`."""
    module = block.get_submodule(name)
    assert isinstance(module, nn.Linear), f"{name} is a {type(module).__name__}"
    return module
