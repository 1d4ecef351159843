"""Weight - dequantized -> QuantizedResidual: what CPU memory keeps (method.md section 2)."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
from torch import Tensor

from decdec_core.config import DecDECError, ResidualQuant
from decdec_core.packing import channel_bytes, pack_channels, unpack_channels

SCALE_STEPS = 32
_ROWS_IN_CACHE = 1 << 18  # elements searched at once: 1 MB of float32 stays in the L2 cache


@dataclass(frozen=True)
class QuantizedResidual:
    """The residual, stored by channel.

    codes: (in, channel_bytes) uint8 at 2, 4 and 8 bits; (in, out) float16 at 16, the residual itself.
    scale: (out,) float32, one per output channel (ones at 16 bits).
    """

    codes: Tensor
    scale: Tensor
    config: ResidualQuant

    @property
    def in_features(self) -> int:
        return self.codes.shape[0]

    @property
    def out_features(self) -> int:
        return self.scale.shape[0]

    @property
    def bytes_per_channel(self) -> int:
        """Bytes that fetching one channel moves."""
        return channel_bytes(self.out_features, self.config.bits)

    def pinned(self) -> QuantizedResidual:
        """Return the same in host memory that a GPU can read, itself if it is there already.

        Raises DecDECError where there is too little.
        """
        wanted = self.codes.nbytes + self.scale.nbytes
        try:
            return QuantizedResidual(self.codes.pin_memory(), self.scale.pin_memory(), self.config)
        except RuntimeError:
            raise DecDECError(
                f"lockable host memory must hold {wanted} bytes more for a residual, got {_free_bytes()} free"
            ) from None


def _free_bytes() -> int:
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def quantize_residual(residual: Tensor, config: ResidualQuant) -> QuantizedResidual:
    """Return `residual` (out, in) float32 in `config.bits`, symmetric, one scale per output channel.

    The scale is the best of 32 steps up to max|row| / (2**(bits-1) - 1) by mean squared error.
    """
    if config.bits == 16:
        scale = torch.ones(residual.shape[0])
        return QuantizedResidual(residual.T.contiguous().half(), scale, config)
    limit = 2 ** (config.bits - 1) - 1
    scale = search_scale(residual, limit)
    codes = _codes(residual, scale, limit).to(torch.int8)
    return QuantizedResidual(pack_channels(codes, config.bits), scale, config)


def dequantize_residual(q: QuantizedResidual) -> Tensor:
    """Return the float32 residual (out, in) that the codes stand for."""
    if q.config.bits == 16:
        return q.codes.T.float()
    return unpack_channels(q.codes, q.config.bits, q.out_features) * q.scale.unsqueeze(1)


def search_scale(residual: Tensor, limit: int) -> Tensor:
    """Return the scale (out,) float32 with the least squared error for codes in -limit..limit."""
    out_features, in_features = residual.shape
    rows = max(1, _ROWS_IN_CACHE // max(1, in_features))
    parts = [_search_rows(residual[r : r + rows].float(), limit) for r in range(0, out_features, rows)]
    return torch.cat(parts) if parts else torch.ones(0)


def _search_rows(rows: Tensor, limit: int) -> Tensor:
    largest = rows.abs().amax(1) / limit
    best_scale = torch.where(largest > 0, largest, torch.ones_like(largest))
    best_error = torch.full_like(largest, torch.inf)
    for step in range(SCALE_STEPS, 0, -1):
        scale = torch.where(largest > 0, largest * (step / SCALE_STEPS), best_scale)
        error = _codes(rows, scale, limit).mul_(scale.unsqueeze(1)).sub_(rows).square_().sum(1)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_scale = torch.where(better, scale, best_scale)
    return best_scale


def _codes(rows: Tensor, scale: Tensor, limit: int) -> Tensor:
    return (rows.float() / scale.unsqueeze(1)).round_().clamp_(-limit, limit)
