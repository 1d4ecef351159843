"""Attention of a decoding step over a static key-value cache, and that cache.

transformers' own attention over a static cache builds a mask, repeats keys and values for grouped queries and
reads the cache to its end; at one token these copies take longer than the attention.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel
from transformers.cache_utils import Cache, StaticLayer

from decdec_core import kernels
from decdec_core.config import DecDECError

_NAME = "decdec_static"  # of `attend` among transformers' attention functions
_MOST_VALUES = 256  # of a head, in the kernel


def decode_attention(query: Tensor, keys: Tensor, values: Tensor, position: Tensor, scaling: float) -> Tensor:
    """Return softmax(scaling q keysᵀ) values (heads, d) of one token over itself and what came before it.

    query: (heads, d). keys, values: (key heads, capacity, d), whose first position + 1 tokens count; heads, a
    multiple of the key heads, share them in runs. position: one int64, below capacity, on query's device. On
    a GPU query, keys and values are float16 or bfloat16 and contiguous, d a multiple of 8 up to 256, and the
    tokens before must be complete before the launch that precedes this one; sums are carried in float32. On a
    CPU the twin serves. Refused input raises DecDECError.
    """
    if query.device.type != "cuda":
        return decode_attention_ref(query, keys, values, position, scaling)
    kernels.require_cuda(query.device)
    out = torch.empty_like(query)
    try:
        torch.ops.decdec.decode_attention.default(query, keys, values, position, scaling, out)
    except ValueError as error:
        raise DecDECError(str(error)) from None
    return out


def decode_attention_ref(
    query: Tensor, keys: Tensor, values: Tensor, position: Tensor, scaling: float
) -> Tensor:
    """Return softmax(scaling q keysᵀ) values (heads, d) of one token: the twin of decode_attention.

    Any floating-point dtype, any d. Of values beyond the position, which have no weight, none may be NaN or
    infinite.
    """
    heads, capacity = keys.shape[:2]
    grouped = query.float().view(heads, -1, query.shape[1])
    scores = scaling * (grouped @ keys.float().transpose(1, 2))
    beyond = torch.arange(capacity, device=query.device) > position.view(())
    weights = scores.masked_fill(beyond, -torch.inf).softmax(-1)
    return (weights @ values.float()).view(query.shape).to(query.dtype)


class _Layer(StaticLayer):
    """A layer of `static_cache`, whose counter is all layers' own and moves between passes, not in them."""

    def __init__(self, max_cache_len: int, length: Tensor) -> None:
        super().__init__(max_cache_len=max_cache_len)
        self.cumulative_length = length

    def update(
        self, key_states: Tensor, value_states: Tensor, *_args: Any, **_options: Any
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        places = self.cumulative_length + torch.arange(key_states.shape[-2], device=self.device)
        keys, values = self.keys, self.values
        assert keys is not None
        assert values is not None
        return keys.index_copy_(2, places, key_states), values.index_copy_(2, places, value_states)


def static_cache(layers: int, max_length: int, length: Tensor) -> Cache:
    """Return a cache of one sequence. length: (1,) int64 on the model's device, how many tokens it holds; who
    runs a pass adds its tokens afterwards."""
    return Cache(layers=[_Layer(max_length, length) for _ in range(layers)])


def attend(
    _module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    _attention_mask: Tensor | None,
    scaling: float,
    position_ids: Tensor,
    **_options: Any,
) -> tuple[Tensor, None]:
    """Return the attention of one sequence's newest tokens (1, tokens, heads, d), as transformers calls it.

    query: (1, heads, tokens, d). key, value: (1, key heads, capacity, d), of a static_cache. position_ids:
    (1, tokens). Several tokens are the sequence's first.
    """
    tokens = query.shape[2]
    if tokens > 1:
        key, value = key[:, :, :tokens], value[:, :, :tokens]
        out = F.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scaling, enable_gqa=query.shape[1] != key.shape[1]
        )
        return out.transpose(1, 2), None
    one = query.reshape(query.shape[1], -1)
    run = decode_attention if _has_kernel(one) else decode_attention_ref
    return run(one, key[0], value[0], position_ids, scaling).view(1, 1, *one.shape), None


def _has_kernel(query: Tensor) -> bool:
    return (
        query.device.type == "cuda"
        and query.dtype in (torch.float16, torch.bfloat16)
        and query.shape[1] % 8 == 0
        and query.shape[1] <= _MOST_VALUES
    )


AttentionInterface.register(_NAME, attend)


@contextmanager
def attending(model: PreTrainedModel) -> Iterator[None]:
    """Let `model` attend by `attend`, over a static_cache, while the context lasts."""
    before = model.config._attn_implementation
    model.set_attn_implementation(_NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
