"""Selection, compensation and the low-bit product: compiled ops and their plain-torch twins.

Each op stands beside its twin `<name>_ref`, which is its oracle and, on a CPU where nothing can be compiled,
its stand-in. A CUDA tensor takes the kernel or raises. kernels.py compiles them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from decdec_core import kernels
from decdec_core.config import (
    CHUNK,
    DEFAULT_N_TB,
    RESIDUAL_BITS,
    DecDECError,
    channels_per_chunk,
    require_int,
    require_one_of,
    total_channels,
)
from decdec_core.packing import (
    DEPTH,
    channel_bytes,
    unpack_channels,
    unpack_table,
    unpack_tiles,
)

BUCKETS = 32
MOST_TOKENS = 8  # of one launch of `linear`
MAX_SEED = 2**63 - 1

_ACTIVATION_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_WORD = 0xFFFFFFFF


def bucket_floors(a: float, b: float) -> Tensor:
    """Return the lower bounds (32,) float32 of the buckets of |x|, descending, the last one 0.

    a: boundary at rank 1; b: boundary at rank K (method.md section 4). The first 16 run linearly from a to
    b, the last 16 from b to 0. Raises DecDECError unless a >= b >= 0 and both are finite.
    """
    if not (math.isfinite(a) and a >= b >= 0):
        raise DecDECError(f"bucket boundaries must be finite with a >= b >= 0, got a={a}, b={b}")
    upper = [a - i * (a - b) / 15 for i in range(16)]
    lower = [b - j * b / 16 for j in range(1, 17)]
    return torch.tensor(upper + lower, dtype=torch.float32)


def select_topk(x: Tensor, k_chunk: int) -> Tensor:
    """Return, per token and chunk, the channels with the largest |x|: `exact` selection.

    x: (tokens, in) float32, float16 or bfloat16, contiguous. k_chunk: 0..1024.
    Returns (tokens, K) int32, K = total_channels(in, k_chunk), ascending within a chunk. NaN counts as
    larger than infinity; of equals the lowest channels are taken. Refused input raises DecDECError.
    """
    _check_selection(x, k_chunk)
    if not _compiled_for(x):
        return select_topk_ref(x, k_chunk)
    indices = _new_indices(x, k_chunk)
    torch.ops.decdec.select_topk.default(x, k_chunk, indices)
    return indices


def select_topk_ref(x: Tensor, k_chunk: int) -> Tensor:
    """Return, per token and chunk, the channels with the largest |x|: the twin of select_topk.

    x: (tokens, in) float32, float16 or bfloat16, contiguous. k_chunk: 0..1024.
    Returns (tokens, K) int32, K = total_channels(in, k_chunk), ascending within a chunk. NaN counts as
    larger than infinity; of equals the lowest channels are taken. Refused input raises DecDECError.
    """
    _check_selection(x, k_chunk)
    return _largest_per_chunk(_magnitude_bits(x), k_chunk)


def select_buckets(x: Tensor, floors: Tensor, k_chunk: int) -> Tensor:
    """Return, per token and chunk, the channels of the topmost buckets of |x|: `dynamic` selection.

    x: (tokens, in) float32, float16 or bfloat16, contiguous. floors: (32,) float32 from bucket_floors.
    k_chunk: 0..1024. Returns (tokens, K) int32, ascending within a chunk: whole buckets from the top, and
    the lowest channels of the bucket that does not fit. NaN and anything above floors[0] are in the first
    bucket. Refused input raises DecDECError.
    """
    _check_selection(x, k_chunk)
    _check_floors(floors)
    if not _compiled_for(x):
        return select_buckets_ref(x, floors, k_chunk)
    indices = _new_indices(x, k_chunk)
    try:
        torch.ops.decdec.select_buckets.default(x, floors, k_chunk, indices)
    except ValueError as error:
        raise DecDECError(str(error)) from None
    return indices


def select_buckets_ref(x: Tensor, floors: Tensor, k_chunk: int) -> Tensor:
    """Return, per token and chunk, the channels of the topmost buckets of |x|: the twin of select_buckets.

    x: (tokens, in) float32, float16 or bfloat16, contiguous. floors: (32,) float32 from bucket_floors.
    k_chunk: 0..1024. Returns (tokens, K) int32, ascending within a chunk: whole buckets from the top, and
    the lowest channels of the bucket that does not fit. NaN and anything above floors[0] are in the first
    bucket. Refused input raises DecDECError.
    """
    _check_selection(x, k_chunk)
    _check_floors(floors)
    bounds = floors.view(torch.int32)
    if bounds[-1] != 0 or (bounds[1:] > bounds[:-1]).any():
        raise DecDECError("floors must be descending to 0, got another order")
    # ascending bounds: a key reaches the floor of its bucket and all below; the more, the sooner taken
    reached = torch.searchsorted(bounds.flip(0), _magnitude_bits(x), right=True)
    return _largest_per_chunk(reached, k_chunk)


def select_random(x: Tensor, seed: int, k_chunk: int) -> Tensor:
    """Return, per token and chunk, channels drawn without replacement: `random` selection.

    x: (tokens, in) float32, float16 or bfloat16, contiguous. seed: 0..2**63 - 1. k_chunk: 0..1024.
    Returns (tokens, K) int32, ascending within a chunk. The draw is a function of the seed and of the signs
    of the token's activations: the same in any batch and after any rounding, another for another token.
    Layers that should draw differently need seeds that differ. Refused input raises DecDECError.
    """
    _check_selection(x, k_chunk)
    require_int("seed", seed, 0, MAX_SEED)
    if not _compiled_for(x):
        return select_random_ref(x, seed, k_chunk)
    indices = _new_indices(x, k_chunk)
    torch.ops.decdec.select_random.default(x, seed, k_chunk, indices)
    return indices


def select_random_ref(x: Tensor, seed: int, k_chunk: int) -> Tensor:
    """Return, per token and chunk, channels drawn without replacement: the twin of select_random.

    x: (tokens, in) float32, float16 or bfloat16, contiguous. seed: 0..2**63 - 1. k_chunk: 0..1024.
    Returns (tokens, K) int32, ascending within a chunk. The draw is a function of the seed and of the signs
    of the token's activations: the same in any batch and after any rounding, another for another token.
    Layers that should draw differently need seeds that differ. Refused input raises DecDECError.
    """
    _check_selection(x, k_chunk)
    require_int("seed", seed, 0, MAX_SEED)
    low, high = torch.tensor([seed & _WORD, seed >> 32], device=x.device)
    channel_hash = _mix32(torch.arange(x.shape[1], device=x.device))
    signs = (x.signbit() * channel_hash).sum(1, keepdim=True)
    fingerprint = _mix32(signs + _mix32(_mix32(low) + high) & _WORD)
    return _largest_per_chunk(_mix32(channel_hash ^ fingerprint) >> 1, k_chunk)


def compensate(x: Tensor, indices: Tensor, codes: Tensor, scale: Tensor, bits: int, y: Tensor) -> None:
    """Add to y what the selected channels contribute: y[t] += sum of x[t, c] * residual row c, in place.

    x: (tokens, in) float32, float16 or bfloat16, contiguous. indices: (tokens, K) int32, or (1, K) for the
    same channels in every token. codes: the residual by channel, (in, ceil(out * bits / 8)) uint8 at 2, 4
    and 8 bits, (in, out) float16 and finite at 16. scale: (out,) float32. y: (tokens, out) float32, which
    is also how the sum is carried. Refused input, an index outside 0..in - 1 among it, raises DecDECError.
    On a GPU indices are not looked at, which would mean to wait for them, and codes and scale may be in
    pinned host memory, to be kept until the stream is done with them.
    """
    if not _compiled_for(x):
        compensate_ref(x, indices, codes, scale, bits, y)
        return
    try:
        torch.ops.decdec.compensate.default(x, indices, codes, scale, bits, y)
    except ValueError as error:
        raise DecDECError(str(error)) from None


def compensate_ref(x: Tensor, indices: Tensor, codes: Tensor, scale: Tensor, bits: int, y: Tensor) -> None:
    """Add to y what the selected channels contribute: the twin of compensate.

    x: (tokens, in) float32, float16 or bfloat16, contiguous. indices: (tokens, K) int32, or (1, K) for the
    same channels in every token. codes: the residual by channel, (in, ceil(out * bits / 8)) uint8 at 2, 4
    and 8 bits, (in, out) float16 and finite at 16. scale: (out,) float32. y: (tokens, out) float32, which
    is also how the sum is carried. Refused input, an index outside 0..in - 1 among it, raises DecDECError.
    """
    _check_compensation(x, indices, codes, scale, bits, y)
    if indices.numel() == 0 or y.numel() == 0:
        return
    channels, position = indices.unique(return_inverse=True)
    if channels[0] < 0 or channels[-1] >= x.shape[1]:
        wrong = channels[0] if channels[0] < 0 else channels[-1]
        raise DecDECError(f"indices must be 0..{x.shape[1] - 1}, got {int(wrong)}")
    shape = (x.shape[0], indices.shape[1])
    values = x.gather(1, indices.long().expand(shape)).float()
    # only channels that some token selected, and 1024 of them decoded at a time: bounded memory
    spread = (
        torch.zeros(x.shape[0], len(channels)).to(x.device).scatter_add_(1, position.expand(shape), values)
    )
    for part, weights in zip(channels.split(CHUNK), spread.split(CHUNK, dim=1), strict=True):
        rows = codes[part]
        decoded = rows.float() if bits == 16 else unpack_channels(rows, bits, y.shape[1]).T.float()
        y.addcmul_(weights @ decoded, scale)


@dataclass(frozen=True)
class Selection:
    """How channels are chosen, as data; called, it chooses: x (tokens, in) -> channels (tokens, K) int32.

    kind: "static" with `indices` (1, K) int32, the same channels for all tokens; "exact" (select_topk);
    "dynamic" with `floors` (32,) float32 on the CPU (select_buckets); "random" with `seed` (select_random).
    """

    kind: str
    k_chunk: int
    seed: int = 0
    floors: Tensor | None = None
    indices: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        if self.kind == "static" and self.indices is not None:
            return self.indices.to(x.device)
        if self.kind == "dynamic" and self.floors is not None:
            return select_buckets(x, self.floors, self.k_chunk)
        if self.kind == "exact":
            return select_topk(x, self.k_chunk)
        if self.kind == "random":
            return select_random(x, self.seed, self.k_chunk)
        raise DecDECError(
            f"selection must be static with indices, dynamic with floors, exact or random, got {self}"
        )


def select_and_compensate(
    x: Tensor, selection: Selection, codes: Tensor, scale: Tensor, bits: int, y: Tensor
) -> None:
    """Add to y what the channels that `selection` chooses contribute, in place.

    One to eight tokens take one launch on a GPU, and one before it for a random selection; more take one for
    the selection and one for the rest. Other arguments and errors are those of compensate.
    """
    if x.device.type != "cuda" or x.shape[0] > MOST_TOKENS:
        compensate(x, selection(x), codes, scale, bits, y)
        return
    kernels.require_cuda(x.device)
    indices = None if selection.indices is None else selection.indices.to(x.device)
    how = (selection.kind, indices, selection.floors, selection.seed, selection.k_chunk)
    try:
        torch.ops.decdec.select_and_compensate.default(x, *how, codes, scale, bits, y)
    except ValueError as error:
        raise DecDECError(str(error)) from None


def select_and_compensate_ref(
    x: Tensor, selection: Selection, codes: Tensor, scale: Tensor, bits: int, y: Tensor
) -> None:
    """Add to y what the channels that `selection` chooses contribute: the twin of select_and_compensate.

    The selection's own op serves; the other arguments and errors are those of compensate_ref.
    """
    compensate_ref(x, selection(x), codes, scale, bits, y)


@dataclass(frozen=True)
class TiledWeight:
    """A low-bit weight in the order of the CUDA kernels (packing.py: pack_tiles, pack_table).

    tiles: (slabs, depth, words) int32. bits: 2 to 4. table: (slabs, 32, 2**bits / 2) int32 of the codebook
    format, whose values are of the activations' dtype; None for the uniform format. bias: (out,) float32 or
    None.
    """

    tiles: Tensor
    bits: int
    out_features: int
    in_features: int
    table: Tensor | None = None
    bias: Tensor | None = None


def linear(
    x: Tensor,
    weight: TiledWeight,
    selection: Selection | None = None,
    codes: Tensor | None = None,
    scale: Tensor | None = None,
    n_tb: int = DEFAULT_N_TB,
) -> Tensor:
    """Return the low-bit product and, where `selection` is given, its compensation, in one launch.

    A random selection takes a launch before; several tokens take more than one on GPUs with 99 KB of shared
    memory for a block. The weight and `scale` must be complete before the chain of overlapping launches
    begins that this one is in (ops of this package launch so, torch's own do not), and pinned tensors be kept
    until the stream is done with them.
    x: (tokens, in) float16 or bfloat16, 1 to 8 tokens, in a multiple of 32. codes (in, out / 2) uint8, 4-bit,
    and scale (out,) float32: the residual as in `compensate`, on x's device or in pinned host memory; out a
    multiple of 32. n_tb: thread blocks that fetch, at most. Returns (tokens, out) of x's dtype; sums are
    carried in float32. On a CPU the twin serves. Refused input raises DecDECError.
    """
    if x.device.type != "cuda":
        return linear_ref(x, weight, selection, codes, scale)
    kernels.require_cuda(x.device)
    if x.dim() != 2 or x.shape[1] != weight.in_features:
        raise DecDECError(f"x must be (tokens, {weight.in_features}), got {tuple(x.shape)}")
    y = x.new_empty((x.shape[0], weight.out_features))
    fetched = (codes, scale) if selection is not None else (None, None)
    how = selection or Selection("exact", 0)
    try:
        torch.ops.decdec.linear.default(
            *(x, weight.tiles, weight.table, weight.bias, weight.bits, *fetched),
            *(how.kind, how.indices, how.floors, how.seed, how.k_chunk, n_tb, y),
        )
    except ValueError as error:
        raise DecDECError(str(error)) from None
    return y


def linear_ref(
    x: Tensor,
    weight: TiledWeight,
    selection: Selection | None = None,
    codes: Tensor | None = None,
    scale: Tensor | None = None,
    n_tb: int = DEFAULT_N_TB,
) -> Tensor:
    """Return the low-bit product and, where `selection` is given, its compensation: the twin of linear.

    x: (tokens, in) float16, bfloat16 or float32, any number of tokens. codes (in, out / 2) uint8, 4-bit,
    and scale (out,) float32: the residual as in `compensate`. n_tb: without meaning here. Returns
    (tokens, out) of x's dtype; sums are carried in float32. Refused input raises DecDECError.
    """
    y = x.float() @ dequantize_ref(weight, x.dtype).float().T
    if selection is not None and codes is not None and scale is not None:
        compensate_ref(x, selection(x), codes, scale, 4, y)
    return (y if weight.bias is None else y + weight.bias).to(x.dtype)


def dequantize(weight: TiledWeight, dtype: torch.dtype) -> Tensor:
    """Return the weight (out, in) of `dtype`: float32 or float16; bfloat16 where a codebook's values are.

    in: a multiple of 32 on a GPU. On a CPU the twin serves. Refused input raises DecDECError.
    """
    if weight.tiles.device.type != "cuda":
        return dequantize_ref(weight, dtype)
    kernels.require_cuda(weight.tiles.device)
    dense = torch.empty((weight.out_features, weight.in_features), dtype=dtype, device=weight.tiles.device)
    try:
        torch.ops.decdec.dequantize.default(weight.tiles, weight.table, weight.bits, dense)
    except ValueError as error:
        raise DecDECError(str(error)) from None
    return dense


def dequantize_ref(weight: TiledWeight, dtype: torch.dtype) -> Tensor:
    """Return the weight (out, in) of `dtype`: the twin of dequantize; any in."""
    shape = (weight.out_features, weight.in_features)
    codes, scales, zeros = unpack_tiles(weight.tiles, weight.bits, *shape, weight.table is not None)
    if weight.table is not None:
        values = torch.float16 if dtype == torch.float32 else dtype
        return unpack_table(weight.table, shape[0], values).gather(1, codes.long()).to(dtype)
    assert scales is not None
    assert zeros is not None
    group = torch.arange(shape[1], device=codes.device) // DEPTH
    return ((codes.float() - zeros.float()[:, group]) * scales.float()[:, group]).to(dtype)


def _magnitude_bits(x: Tensor) -> Tensor:
    # bit patterns order as the magnitudes do, with NaN above infinity
    return x.float().view(torch.int32) & 0x7FFFFFFF


def _largest_per_chunk(keys: Tensor, k_chunk: int) -> Tensor:
    budgets = channels_per_chunk(keys.shape[1], k_chunk)
    chosen = [keys[:, :0]]
    for chunk, (part, k) in enumerate(zip(keys.split(CHUNK, dim=1), budgets, strict=False)):
        # the channel as the low digits makes all keys differ, the lowest channel the largest of equals
        digits = torch.arange(CHUNK, CHUNK - part.shape[1], -1, device=keys.device)
        distinct = part.to(torch.int64) * (CHUNK + 1) + digits
        chosen.append(distinct.topk(k, dim=1, sorted=False).indices.sort(dim=1).values + chunk * CHUNK)
    return torch.cat(chosen, dim=1).to(torch.int32)


def _mix32(word: Tensor) -> Tensor:
    # mix32 of csrc/layout.h in int64, of which the low 32 bits count
    word = (word ^ (word >> 16)) * 0x7FEB352D & _WORD
    word = (word ^ (word >> 15)) * 0x846CA68B & _WORD
    return word ^ (word >> 16)


def _new_indices(x: Tensor, k_chunk: int) -> Tensor:
    return x.new_empty((x.shape[0], total_channels(x.shape[1], k_chunk)), dtype=torch.int32)


def _check_activations(x: Tensor) -> None:
    if x.dim() != 2:
        raise DecDECError(f"x must be (tokens, in), got {tuple(x.shape)}")
    if x.dtype not in _ACTIVATION_DTYPES:
        raise DecDECError(f"x must be float32, float16 or bfloat16, got {x.dtype}")
    if not x.is_contiguous():
        raise DecDECError(f"x must be contiguous, got strides {x.stride()}")


def _check_selection(x: Tensor, k_chunk: int) -> None:
    _check_activations(x)
    require_int("k_chunk", k_chunk, 0, CHUNK)


def _check_tensor(which: str, got: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if tuple(got.shape) != shape:
        raise DecDECError(f"{which} must be {shape}, got {tuple(got.shape)}")
    if got.dtype != dtype:
        raise DecDECError(f"{which} must be {dtype}, got {got.dtype}")
    if not got.is_contiguous():
        raise DecDECError(f"{which} must be contiguous, got strides {got.stride()}")


def _check_floors(floors: Tensor) -> None:
    _check_tensor("floors", floors, (BUCKETS,), torch.float32)


def _check_compensation(
    x: Tensor, indices: Tensor, codes: Tensor, scale: Tensor, bits: int, y: Tensor
) -> None:
    _check_activations(x)
    require_one_of("bits", bits, RESIDUAL_BITS)
    tokens, out = x.shape[0], scale.numel()
    _check_tensor("scale", scale, (out,), torch.float32)
    width, dtype = (out, torch.float16) if bits == 16 else (channel_bytes(out, bits), torch.uint8)
    _check_tensor("codes", codes, (x.shape[1], width), dtype)
    _check_tensor("y", y, (tokens, out), torch.float32)
    if indices.dim() != 2 or indices.shape[0] not in (1, tokens):
        raise DecDECError(f"indices must be (tokens, K) or (1, K), got {tuple(indices.shape)}")
    _check_tensor("indices", indices, tuple(indices.shape), torch.int32)


def _compiled_for(x: Tensor) -> bool:
    if x.device.type == "cuda":
        kernels.require_cuda(x.device)
        return True
    if x.device.type not in ("cpu", "meta"):
        raise DecDECError(f"x must be on a CPU or a CUDA device, got {x.device}")
    return kernels.cpu_loaded()
