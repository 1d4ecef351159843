"""Compensation of many tokens on a GPU: residual rows decoded in slabs, multiplied on the tensor cores.

    codes (in, bytes) in host memory  --copied once, ahead of time (Stage)-->  codes on the device
    --decoded, a slab of columns at a time-->  y[:, slab] += masked x (tokens, in) @ residual[:, slab]

Where all tokens share their channels only those rows are read, straight from pinned host memory.
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from decdec_core import kernels
from decdec_core.config import RESIDUAL_BITS, DecDECError, require_one_of
from decdec_core.packing import channel_bytes, unpack_channels
from decdec_core.residuals import QuantizedResidual

_DECODED_AT_ONCE = 1 << 25  # elements of a slab: 64 MB in half precision
_MASKED_AT_ONCE = 1 << 26  # activations, and the channels chosen for them
_AHEAD_BYTES = 1 << 27  # of residuals copied before their turn: a block of Llama-3-8B's
_SLAB_COLUMNS = 128  # a slab's columns are a multiple: whole units of 16 bytes at any bits
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def dequantize_residual(
    codes: Tensor, scale: Tensor, bits: int, dtype: torch.dtype, channels: Tensor | None = None
) -> Tensor:
    """Return the residual's rows (rows, out) of `dtype`: of `channels`, in their order, or of all channels.

    codes: the residual by channel, (in, ceil(out * bits / 8) or more) uint8 at 2, 4 and 8 bits, (in, out)
    float16 at 16, the residual itself. scale: (out,) float32. channels: (rows,) int32. dtype: float32,
    float16 or bfloat16. Refused input, a channel outside 0..in - 1 among it, raises DecDECError.
    On a GPU, which is where scale and channels are, out * bits is a multiple of 128, rows of codes begin at
    multiples of 16 bytes, codes may be in pinned host memory, to be kept until the stream is done with them
    and read once, and channels are not looked at. At 16 bits plain torch serves.
    """
    if bits == 16 or scale.device.type != "cuda":
        return dequantize_residual_ref(codes, scale, bits, dtype, channels)
    kernels.require_cuda(scale.device)
    rows = codes.shape[0] if channels is None else channels.shape[0]
    dense = torch.empty((rows, scale.shape[0]), dtype=dtype, device=scale.device)
    try:
        torch.ops.decdec.dequantize_residual.default(codes, scale, bits, channels, dense)
    except ValueError as error:
        raise DecDECError(str(error)) from None
    return dense


def dequantize_residual_ref(
    codes: Tensor, scale: Tensor, bits: int, dtype: torch.dtype, channels: Tensor | None = None
) -> Tensor:
    """Return the residual's rows (rows, out) of `dtype`: the twin of dequantize_residual.

    codes: the residual by channel, (in, ceil(out * bits / 8) or more) uint8 at 2, 4 and 8 bits, (in, out)
    float16 at 16, the residual itself. scale: (out,) float32. channels: (rows,) int32. dtype: float32,
    float16 or bfloat16. Refused input, a channel outside 0..in - 1 among it, raises DecDECError.
    """
    _check_residual(codes, scale, bits, dtype, channels)
    rows = codes if channels is None else codes[channels.to(codes.device)]
    if bits == 16:
        return rows.to(scale.device, dtype)
    return (unpack_channels(rows, bits, scale.shape[0]).T * scale).to(dtype).contiguous()


def _check_residual(
    codes: Tensor, scale: Tensor, bits: int, dtype: torch.dtype, channels: Tensor | None
) -> None:
    require_one_of("bits", bits, RESIDUAL_BITS)
    if scale.dim() != 1 or scale.dtype != torch.float32:
        raise DecDECError(f"scale must be (out,) torch.float32, got {tuple(scale.shape)} {scale.dtype}")
    out, wanted = scale.shape[0], torch.float16 if bits == 16 else torch.uint8
    if codes.dtype != wanted:
        raise DecDECError(f"codes must be {wanted}, got {codes.dtype}")
    width = out if bits == 16 else channel_bytes(out, bits)
    if codes.dim() != 2 or codes.shape[1] < width or (bits == 16 and codes.shape[1] != width):
        raise DecDECError(f"codes must be (in, {width}), got {tuple(codes.shape)}")
    if dtype not in _DTYPES:
        raise DecDECError(f"dtype must be float32, float16 or bfloat16, got {dtype}")
    if channels is None:
        return
    if channels.dim() != 1 or channels.dtype != torch.int32:
        raise DecDECError(
            f"channels must be (rows,) torch.int32, got {tuple(channels.shape)} {channels.dtype}"
        )
    if channels.device.type == "cpu" and channels.numel():
        lowest, highest = int(channels.min()), int(channels.max())
        if lowest < 0 or highest >= codes.shape[0]:
            wrong = lowest if lowest < 0 else highest
            raise DecDECError(f"channels must be 0..{codes.shape[0] - 1}, got {wrong}")


def slabs(rows: int, out_features: int) -> list[tuple[int, int]]:
    """Return the runs of columns [first, end) in which `rows` rows are decoded: few, and nearly equal."""
    most = max(1, _DECODED_AT_ONCE // max(1, rows) // _SLAB_COLUMNS) * _SLAB_COLUMNS
    count = -(-out_features // most)
    width = -(-out_features // max(1, count) // _SLAB_COLUMNS) * _SLAB_COLUMNS
    return [(first, min(first + width, out_features)) for first in range(0, out_features, max(1, width))]


def tokens_at_once(in_features: int, channels: int) -> int:
    """Return for how many tokens of that many channels each `masked` is called together."""
    # a channel is eight bytes where an activation is two
    return max(1, _MASKED_AT_ONCE // max(1, in_features + 4 * channels))


def masked(x: Tensor, chosen: Tensor) -> Tensor:
    """Return x (tokens, in) with zeros in all channels but each token's `chosen` (tokens or 1, K) int32."""
    index = chosen.long().expand(x.shape[0], -1)
    return torch.zeros_like(x).scatter_(1, index, x.gather(1, index))


def add_rows(
    y: Tensor, x: Tensor, codes: Tensor, scale: Tensor, bits: int, channels: Tensor | None = None
) -> None:
    """Add x @ rows to y (tokens, out), in place: rows as in dequantize_residual, of x's dtype.

    x: (tokens, rows) of y's dtype. Sums are carried as torch's matrix products do, and y is rounded once.
    """
    per_element = 8 * codes.element_size() // bits
    for first, end in slabs(x.shape[1], y.shape[1]):
        part = codes[:, first // per_element : -(-end // per_element)]
        y[:, first:end].addmm_(x, dequantize_residual(part, scale[first:end], bits, x.dtype, channels))


def on_device(residual: QuantizedResidual, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return copies of codes and scale on `device`, made by its current stream."""
    return residual.codes.to(device, non_blocking=True), residual.scale.to(device, non_blocking=True)


def may_copy_ahead(device: torch.device) -> bool:
    """Return whether a Stage may serve `device` now: a graph being captured or traced has one stream."""
    if torch.compiler.is_compiling() or device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return not torch.cuda.is_current_stream_capturing()


class Staged(Protocol):
    """A layer whose residual a Stage copies."""

    @property
    def device(self) -> torch.device: ...

    def copied_whole(self, tokens: int, dtype: torch.dtype) -> QuantizedResidual | None:
        """Return the pinned residual if a pass over such tokens copies it whole, else None."""


@dataclass(frozen=True)
class _Copy:
    layer: weakref.ref[Any]
    source: QuantizedResidual
    codes: Tensor
    scale: Tensor
    ready: Any  # torch.cuda.Event


class _Here(threading.local):
    """What one thread's present pass has reached."""

    def __init__(self) -> None:
        self.previous: weakref.ref[Any] | None = None
        self.ahead: deque[_Copy] = deque()


class Stage:
    """Copies layers' residuals to the GPU on a side stream, the next layers' while one computes.

    One object shared by a model's layers. It learns their order from the passes; `reset` begins a pass, so
    that nothing is copied past the end of one. On the device are the residual in use and, ahead of it, one or
    as many as 128 MB hold. Each thread has its own place in its own pass. A copy of a stage starts afresh.
    """

    def __init__(self) -> None:
        self._next: weakref.WeakKeyDictionary[Any, weakref.ref[Any]] = weakref.WeakKeyDictionary()
        self._here = _Here()
        self._sides: dict[torch.device, torch.cuda.Stream] = {}

    def __reduce__(self) -> tuple[type[Stage], tuple[()]]:
        return Stage, ()

    def reset(self) -> None:
        """Begin a pass: drop what was copied ahead and not used."""
        if torch.compiler.is_compiling():
            return
        last = self._here.previous() if self._here.previous is not None else None
        if last is not None:
            self._next.pop(last, None)
        self._here.previous = None
        self._here.ahead.clear()

    def begin(self, layer: Staged, residual: QuantizedResidual) -> None:
        """Start the copy of the layer's residual, unless it is on its way; `resident` is to follow."""
        here = self._here
        previous = here.previous() if here.previous is not None else None
        if previous is not None and previous is not layer:
            self._next[previous] = weakref.ref(layer)
        here.previous = weakref.ref(layer)
        first = here.ahead[0] if here.ahead else None
        if first is None or first.source is not residual or first.codes.device != layer.device:
            # first, so that its memory serves again
            here.ahead.clear()
            here.ahead.append(self._start(layer, residual))

    @contextmanager
    def resident(self, layer: Staged, tokens: int, dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor]]:
        """Give (codes, scale) on the device, for the current stream until the block ends.

        Starts the copies of the next layers' residuals if a pass over so many tokens of `dtype` wants them.
        """
        mine = self._here.ahead.popleft()
        self._wait_for(mine, layer.device)
        self._copy_ahead(layer, tokens, dtype)
        try:
            yield mine.codes, mine.scale
        finally:
            self._release(layer.device)

    def _copy_ahead(self, layer: Staged, tokens: int, dtype: torch.dtype) -> None:
        ahead = self._here.ahead
        size = sum(copy.source.codes.nbytes for copy in ahead)
        last = ahead[-1].layer() if ahead else layer
        while last is not None:
            following = self._next.get(last, lambda: None)()
            if following is not None and following.device.type != layer.device.type:
                return  # it has left the GPU
            residual = following.copied_whole(tokens, dtype) if following is not None else None
            if following is None or residual is None:
                return
            size += residual.codes.nbytes
            if ahead and size > _AHEAD_BYTES:
                return
            try:
                ahead.append(self._start(following, residual))
            except torch.OutOfMemoryError:
                return  # what fits in its turn need not fit ahead of it
            last = following

    def _start(self, layer: Staged, residual: QuantizedResidual) -> _Copy:
        side = self._side(layer.device)
        with torch.cuda.stream(side):
            copies = on_device(residual, layer.device)
            return _Copy(weakref.ref(layer), residual, *copies, side.record_event())

    def _wait_for(self, copy: _Copy, device: torch.device) -> None:
        torch.cuda.current_stream(device).wait_event(copy.ready)

    def _release(self, device: torch.device) -> None:
        # the memory is the side stream's, whose later copies so come after this use of it; record_stream
        # would keep it until the host sees the use ended: the host being far ahead, many residuals at once
        self._side(device).wait_stream(torch.cuda.current_stream(device))

    def _side(self, device: torch.device) -> torch.cuda.Stream:
        if device not in self._sides:
            self._sides.setdefault(device, torch.cuda.Stream(device))
        return self._sides[device]
