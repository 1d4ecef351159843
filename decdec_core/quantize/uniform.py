"""The uniform format: asymmetric codes, one scale and zero per (output channel, group of inputs).

Round-to-nearest (RTN) is `quantize` on the weight itself; AWQ calls it on the scaled and clipped one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from decdec_core.config import DecDECError, WeightQuant, groups_of
from decdec_core.packing import pack_codes, packed_words, unpack_codes

SMALLEST_SCALE = 2.0**-24  # the least positive float16: scales are stored in float16


@dataclass(frozen=True)
class UniformWeight:
    """A low-bit weight of the uniform format in logical order, as on disk.

    codes: (out, packed_words) int32. scales: (out, groups) float16. zeros: (out, groups) uint8.
    value[o, i] = (code[o, i] - zero[o, g]) * scale[o, g] with g = i // group_size.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    in_features: int
    config: WeightQuant

    @staticmethod
    def layout(
        config: WeightQuant, in_features: int, out_features: int
    ) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Return the shape and dtype of each tensor by its name."""
        groups = groups_of(in_features, _group_size(config))
        words = packed_words(in_features, int(config.bits))
        return {
            "codes": ((out_features, words), torch.int32),
            "scales": ((out_features, groups), torch.float16),
            "zeros": ((out_features, groups), torch.uint8),
        }

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors by their names."""
        return {"codes": self.codes, "scales": self.scales, "zeros": self.zeros}

    def dequantize(self) -> Tensor:
        """Return the float32 weight (out, in) that the codes stand for."""
        codes = unpack_codes(self.codes, int(self.config.bits), self.in_features)
        grouped = grouped_by(codes, self.config).float()
        values = (grouped - self.zeros.float().unsqueeze(-1)) * self.scales.float().unsqueeze(-1)
        return values.reshape(codes.shape[0], -1)[:, : self.in_features]


def quantize(weight: Tensor, config: WeightQuant) -> UniformWeight:
    """Return `weight` (out, in) rounded to `config.bits` (method.md section 1, RTN).

    Raises DecDECError on NaN, infinity, or a magnitude whose scale float16 cannot hold.
    """
    bits = int(config.bits)
    scales, zeros = _group_parameters(grouped_by(weight, config), bits)
    if not (torch.isfinite(scales).all() and torch.isfinite(weight).all()):
        largest = weight.abs().max().item()
        raise DecDECError(f"weight must be finite with float16 scales, got a largest magnitude of {largest}")
    codes = _round(grouped_by(weight, config), scales.float(), zeros, bits)
    codes = codes.reshape(weight.shape[0], -1)[:, : weight.shape[1]].to(torch.uint8)
    return UniformWeight(pack_codes(codes, bits), scales, zeros.to(torch.uint8), weight.shape[1], config)


def round_trip(weight: Tensor, config: WeightQuant) -> Tensor:
    """Return quantize(weight).dequantize() in float32 without packing: the inner step of AWQ's searches."""
    rounded = round_trip_groups(grouped_by(weight, config), int(config.bits))
    return rounded.reshape(weight.shape[0], -1)[:, : weight.shape[1]]


def round_trip_groups(grouped: Tensor, bits: int) -> Tensor:
    """Return `grouped` (..., group) rounded to `bits` with one scale and zero per group, float32."""
    scales, zeros = _group_parameters(grouped, bits)
    scale = scales.float()
    return (_round(grouped, scale, zeros, bits) - zeros.unsqueeze(-1)) * scale.unsqueeze(-1)


def grouped_by(weight: Tensor, config: WeightQuant) -> Tensor:
    """Return (out, groups, group_size). The ragged last group is padded with zeros, which every range
    covers anyway (see _group_parameters), so the padding changes no scale."""
    out_features, in_features = weight.shape
    size = min(_group_size(config), in_features)  # one scale for a whole row is a group as long as the row
    groups = groups_of(in_features, size)
    return F.pad(weight, (0, groups * size - in_features)).view(out_features, groups, size)


def _group_size(config: WeightQuant) -> int:
    assert config.group_size is not None, f"{config.method} has no groups"
    return config.group_size


def _group_parameters(grouped: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Return scales float16 and zeros float32, (...,). The range always covers zero: the same as
    method.md's formula for a group of both signs, and exact where it would clamp the zero point away
    (a group of one sign or one value)."""
    high = grouped.amax(-1).float().clamp(min=0)
    low = grouped.amin(-1).float().clamp(max=0)
    levels = 2**bits - 1
    span = (high - low) / levels
    # an all-zero group has no range: any positive scale decodes it exactly
    scales = torch.where(span > 0, span.clamp(min=SMALLEST_SCALE), torch.ones_like(span)).half()
    zeros = (-low / scales.float()).round().clamp(0, levels)
    return scales, zeros


def _round(grouped: Tensor, scale: Tensor, zeros: Tensor, bits: int) -> Tensor:
    codes = (grouped.float() / scale.unsqueeze(-1)).round_().add_(zeros.unsqueeze(-1))
    return codes.clamp_(0, 2**bits - 1)
