"""What stands between the matrices of a decoding step: compiled ops for a GPU and their plain-torch twins.

One token of one sequence. The twins round where transformers' modules do; of the kernels norm and gate do so
too, while a rotation and the weighted sum of values are rounded once. A twin serves on a CPU, and on a GPU
for models that the kernels do not take (has_kernels).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from decdec_core import kernels
from decdec_core.config import DecDECError

_VECTOR = 8  # values that a kernel's thread takes at once
_MOST_VALUES = 256  # of a head


@dataclass(frozen=True)
class Heads:
    """What attention is besides its inputs. scaling: of the scores. cosines, sines: (capacity, rotary) of
    each position, rotary up to the values of a head. query_norm, key_norm: weights (d) of a norm of each
    head, and its eps; None for none."""

    scaling: float
    cosines: Tensor
    sines: Tensor
    query_norm: Tensor | None = None
    key_norm: Tensor | None = None
    eps: float = 0.0


def has_kernels(dtype: torch.dtype, sizes: tuple[int, ...], d: int, rotary: int) -> bool:
    """Return whether the kernels take activations of `dtype` and of these `sizes`, and heads of d values of
    which `rotary` turn."""
    whole = all(size % _VECTOR == 0 for size in (*sizes, d))
    halves = dtype in (torch.float16, torch.bfloat16)
    return halves and whole and d <= _MOST_VALUES and rotary % (2 * _VECTOR) == 0 and 0 < rotary <= d


def add_norm(hidden: Tensor, added: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    """Add `added` to `hidden`, in place, and return weight * hidden / sqrt(mean(hidden²) + eps) (1, size).

    hidden, added: (1, size); weight: (size,); of one dtype. On a GPU float16 or bfloat16, contiguous, size a
    multiple of 8. On a CPU the twin serves. Refused input raises DecDECError.
    """
    size = hidden.shape[-1]
    _check("hidden", hidden, (1, size), hidden)
    _check("weight", weight, (size,), hidden)
    if added is not None:
        _check("added", added, (1, size), hidden)
    if hidden.device.type != "cuda":
        return add_norm_ref(hidden, added, weight, eps)
    out = torch.empty_like(hidden)
    _run("add_norm", hidden, added, hidden, weight, eps, out)
    return out


def add_norm_ref(hidden: Tensor, added: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    """Add `added` to `hidden`, in place, and return it normed: the twin of add_norm; any floating dtype."""
    if added is not None:
        hidden.add_(added)
    whole = hidden.float()
    normed = whole * torch.rsqrt(whole.square().mean(-1, keepdim=True) + eps)
    return weight * normed.to(hidden.dtype)


def silu_mul(gate_up: Tensor) -> Tensor:
    """Return silu(gate) * up (1, size) of gate_up (1, 2 size), which has gate, then up.

    On a GPU float16 or bfloat16, contiguous, size a multiple of 8. On a CPU the twin serves. Refused input
    raises DecDECError.
    """
    size = gate_up.shape[-1] // 2
    _check("gate_up", gate_up, (1, 2 * size), gate_up)
    if gate_up.device.type != "cuda":
        return silu_mul_ref(gate_up)
    out = gate_up.new_empty((1, size))
    _run("silu_mul", gate_up, gate_up, out)
    return out


def silu_mul_ref(gate_up: Tensor) -> Tensor:
    """Return silu(gate) * up (1, size): the twin of silu_mul; any floating dtype."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def decode_attention(qkv: Tensor, keys: Tensor, values: Tensor, position: Tensor, heads: Heads) -> Tensor:
    """Return the attention (1, query heads * d) of one token to itself and to what came before it, and put
    its key and value into the cache.

    qkv: (1, (query heads + 2 key heads) * d), queries, keys, values. keys, values: (key heads, capacity, d),
    of which the first `position` tokens count; query heads share them in runs. position: (1,) int64, below
    capacity, on qkv's device. On a GPU float16 or bfloat16, contiguous, sizes as has_kernels says; what the
    cache holds, position and tables must be complete before the decoding step begins; sums are carried in
    float32. On a CPU the twin serves. Refused input raises DecDECError.
    """
    width = _check_attention(qkv, keys, values, position, heads)
    if qkv.device.type != "cuda":
        return decode_attention_ref(qkv, keys, values, position, heads)
    out = qkv.new_empty((1, width))
    tables = (heads.cosines, heads.sines, heads.query_norm, heads.key_norm)
    _run("decode_attention", qkv, qkv, keys, values, position, *tables, heads.eps, heads.scaling, out)
    return out


def decode_attention_ref(qkv: Tensor, keys: Tensor, values: Tensor, position: Tensor, heads: Heads) -> Tensor:
    """Return the attention of one token (1, query heads * d): the twin of decode_attention.

    Any floating dtype, any d. No value in the cache beyond the position may be NaN or infinite, although none
    has weight.
    """
    shared, capacity, d = keys.shape
    query, key, value = qkv.view(-1, d).tensor_split([-2 * shared, -shared])
    cosines, sines = (table.index_select(0, position) for table in (heads.cosines, heads.sines))
    query = _turned(_head_norm(query, heads.query_norm, heads.eps), cosines, sines)
    key = _turned(_head_norm(key, heads.key_norm, heads.eps), cosines, sines)
    keys.index_copy_(1, position, key.unsqueeze(1))
    values.index_copy_(1, position, value.unsqueeze(1))
    scores = heads.scaling * (query.float().view(shared, -1, d) @ keys.float().transpose(1, 2))
    beyond = torch.arange(capacity, device=qkv.device) > position
    weights = scores.masked_fill(beyond, -torch.inf).softmax(-1)
    return (weights @ values.float()).to(qkv.dtype).view(1, -1)


def _check(which: str, got: Tensor, shape: tuple[int, ...], like: Tensor) -> None:
    if tuple(got.shape) != shape or 0 in shape:
        raise DecDECError(f"{which} must be {shape} and not empty, got {tuple(got.shape)}")
    if got.dtype != like.dtype:
        raise DecDECError(f"{which} must be {like.dtype}, got {got.dtype}")
    if got.device != like.device:
        raise DecDECError(f"{which} must be on {like.device}, got {got.device}")


def _check_attention(qkv: Tensor, keys: Tensor, values: Tensor, position: Tensor, heads: Heads) -> int:
    """Return the values of all query heads. The position is not looked at, which on a GPU would mean to wait
    for it: there one outside the cache writes nothing and gives NaN."""
    if keys.dim() != 3:
        raise DecDECError(f"keys must be (key heads, capacity, d), got {tuple(keys.shape)}")
    shared, capacity, d = keys.shape
    _check("qkv", qkv, (1, qkv.shape[-1]), qkv)
    _check("keys", keys, tuple(keys.shape), qkv)
    _check("values", values, tuple(keys.shape), qkv)
    query_heads, rest = divmod(qkv.shape[-1] - 2 * shared * d, d)
    if rest or query_heads <= 0 or query_heads % shared:
        raise DecDECError(
            f"qkv must be a multiple of {shared} query heads and twice {shared} heads of {d}, "
            f"got {qkv.shape[-1]} values"
        )
    rotary = heads.cosines.shape[-1]
    if heads.cosines.dim() != 2 or heads.cosines.shape[0] < capacity or rotary > d or rotary % 2:
        raise DecDECError(
            f"cosines must be ({capacity}, rotary) with an even rotary of at most {d}, "
            f"got {tuple(heads.cosines.shape)}"
        )
    _check("cosines", heads.cosines, tuple(heads.cosines.shape), qkv)
    _check("sines", heads.sines, tuple(heads.cosines.shape), qkv)
    for which in ("query_norm", "key_norm"):
        weight = getattr(heads, which)
        if weight is not None:
            _check(which, weight, (d,), qkv)
    if position.dtype != torch.int64 or tuple(position.shape) != (1,):
        raise DecDECError(f"position must be (1,) int64, got {tuple(position.shape)} {position.dtype}")
    return query_heads * d


def _head_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    return x if weight is None else add_norm_ref(x, None, weight, eps)


def _turned(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Return x (heads, d) with its first values rotated: i with i + rotary / 2."""
    turning, rest = x.tensor_split([cosines.shape[-1]], dim=-1)
    first, second = turning.chunk(2, dim=-1)
    turned = turning * cosines + torch.cat([-second, first], dim=-1) * sines
    return torch.cat([turned, rest], dim=-1)


def _run(name: str, like: Tensor, *arguments: object) -> None:
    kernels.require_cuda(like.device)
    try:
        getattr(torch.ops.decdec, name).default(*arguments)
    except ValueError as error:
        raise DecDECError(str(error)) from None
