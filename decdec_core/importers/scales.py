"""Scales that a checkpoint folded into its norms and linear layers, found again by the original's weights.

AWQ and SmoothQuant quantize W·diag(s) and put 1/s into whatever makes the layer's input: a norm, which is
stored as it is, so that s = original / stored; or a linear layer, the producer, which is quantized itself,
so that s must be estimated. Two estimates of each log s, by least squares: how much larger the layer's
column j is than the original's, and how much smaller the producer's row j. One shows in both, noise and
rounding only in one; and whatever error is left, the same s divides the producer and multiplies the layer,
so that the two together remain the original's.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from decdec_core.architectures import InputGroup
from decdec_core.importers.checkpoint import QuantizedCheckpoint
from decdec_core.importers.layouts import CheckpointError
from decdec_core.importers.matching import equal_to_rounding
from decdec_core.quantize.awq import linear_of

_MOST_NOISE = 0.25  # standard error of a log scale above which it tells nothing
_LEAST_NOISE = 1e-6  # weights that lie on their quantized grid show none, but float32 has as much
# Squared rounding error over squared weight, above which so many weights round to zero that the ratio of
# the columns is not their scale's: 0.96 of it at this limit for normal weights, 0.78 at twice it.
_MOST_ROUNDING = 0.4
_LEAST_CORRELATION = 0.5
_DEVIATIONS = 5  # of the correlation of as many channels of noise
_LEAST_SCALE = 0.02  # root mean square of log s: a fold of less changes nothing beside the rounding
# The same of a scale that the two sides do not agree on. Rounding alone makes one side's up to 0.33, at 2
# bits with one scale for a row; at more bits require_near is the sharper.
_MOST_UNEXPLAINED = 0.35


class _Estimate(NamedTuple):
    """log s (channels,) and its standard errors, infinite where it could not be had."""

    log: Tensor
    error: Tensor


def recovered_scales(
    block: nn.Module, block_name: str, groups: list[InputGroup], checkpoint: QuantizedCheckpoint
) -> dict[str, Tensor | None]:
    """Return, by the kind of group, the scale s (in,) float32 on the CPU such that the checkpoint's layers
    quantize W·diag(s), or None where that is 1, as where neither norm nor producer could hold it.

    block: the original's, full of its float weights, not scaled yet. Raises CheckpointError for a scale
    that cannot be recovered, with the reason.
    """
    scales: dict[str, Tensor | None] = {}
    for group in groups:
        if group.norm is not None:
            original = _weight(block.get_submodule(group.norm))
            scales[group.kind] = _norm_scale(original, f"{block_name}.{group.norm}.weight", checkpoint)
    feeds = {name: scales.get(group.kind) for group in groups for name in group.linears}
    for group in groups:
        if group.norm is None:
            scale = None
            if group.producer is not None:
                scale = _producer_scale(block, block_name, group, feeds[group.producer], checkpoint)
            scales[group.kind] = scale
    return scales


def _weight(module: nn.Module) -> Tensor:
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.detach().cpu().float()


def _norm_scale(original: Tensor, name: str, checkpoint: QuantizedCheckpoint) -> Tensor | None:
    stored = checkpoint.plain(name)
    if stored is None or stored.shape != original.shape:
        got = "none" if stored is None else tuple(stored.shape)
        raise CheckpointError(f"tensor {name} must be {tuple(original.shape)}, got {got}")
    if equal_to_rounding(stored, original).all():
        return None
    scale = original.float() / stored.float()
    scale = torch.where((original == 0) & (stored == 0), torch.ones_like(scale), scale)
    wrong = ~(torch.isfinite(scale) & (scale > 0))
    if wrong.any():
        raise CheckpointError(
            f"tensor {name} must be the original's over a positive scale, got {stored[wrong][0].item()} "
            f"for {original[wrong][0].item()}"
        )
    return scale


def _producer_scale(
    block: nn.Module,
    block_name: str,
    group: InputGroup,
    producer_scale: Tensor | None,
    checkpoint: QuantizedCheckpoint,
) -> Tensor | None:
    """Return the scale of a group whose input `group.producer` makes; producer_scale: of that one's input."""
    assert group.producer is not None
    consumer = checkpoint.layer(f"{block_name}.{group.linears[0]}")
    weight = _weight(linear_of(block, group.linears[0]))
    seen = _estimate(consumer.dense().T, weight.T, consumer.noise())
    rows = slice(group.first_row, group.first_row + weight.shape[1])
    weight = _weight(linear_of(block, group.producer))[rows]
    if producer_scale is not None:
        weight = weight * producer_scale
    inverse = _estimate(checkpoint.layer(f"{block_name}.{group.producer}").dense()[rows], weight, None)
    made = _Estimate(-inverse.log, inverse.error)
    if _agree(seen, made):
        return _together(seen, made)
    if max(_size(seen), _size(made)) > _MOST_UNEXPLAINED:
        raise CheckpointError(
            f"layer {block_name}.{group.linears[0]} must show the input scale that {group.producer} shows, "
            f"got logs of {_size(seen):.2f} and {_size(made):.2f} (root mean square) that disagree"
        )
    return None


def _estimate(quantized: Tensor, original: Tensor, noise: Tensor | None) -> _Estimate:
    """Return by how much `quantized` (channels, n) is larger than `original`, channel by channel.

    noise: (channels,) the squared rounding error to expect, where channels share their steps with others.
    """
    power = original.square().mean(1)
    slope = (quantized * original).mean(1) / power
    left = (quantized - slope.unsqueeze(1) * original).square().mean(1)
    known = slope > 0
    if noise is not None:
        left = torch.maximum(left, noise)
        known &= noise < _MOST_ROUNDING * slope.square() * power
    error = ((left / power / original.shape[1]).sqrt() / slope).clamp(min=_LEAST_NOISE)
    known &= error < _MOST_NOISE
    log = torch.where(known, slope, torch.ones_like(slope)).log()
    return _Estimate(log, torch.where(known, error, torch.inf))


def _size(estimate: _Estimate) -> float:
    """Return the root mean square of log s beyond its noise."""
    known = torch.isfinite(estimate.error)
    if not known.any():
        return 0.0
    excess = estimate.log[known].square() - estimate.error[known].square()
    return max(0.0, excess.mean().item()) ** 0.5


def _agree(seen: _Estimate, made: _Estimate) -> bool:
    """Return whether the two estimates show one scale other than 1."""
    both = torch.isfinite(seen.error) & torch.isfinite(made.error)
    a, b = seen.log[both].double(), made.log[both].double()
    if len(a) == 0 or a.norm() == 0 or b.norm() == 0:
        return False
    # about zero, not about the means: rounding that shrinks weights shifts the two estimates apart
    covariance = (a @ b / len(a)).item()
    correlation = (a @ b / (a.norm() * b.norm())).item()
    enough = max(_LEAST_CORRELATION, _DEVIATIONS / len(a) ** 0.5)
    alike = 0.5 < (a.norm() / b.norm()).item() < 2
    return correlation >= enough and covariance >= _LEAST_SCALE**2 and alike


def _together(seen: _Estimate, made: _Estimate) -> Tensor:
    """Return s (channels,): the mean of the log estimates, each by its precision, 1 where there is none."""
    precision = [estimate.error.square().reciprocal() for estimate in (seen, made)]
    total = (precision[0] + precision[1]).clamp(min=torch.finfo(torch.float32).tiny)
    return ((precision[0] * seen.log + precision[1] * made.log) / total).exp()
