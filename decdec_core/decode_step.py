"""One decoding step of a supported model: its own modules' weights, in as few launches as they allow.

transformers' forward pass of one token over a static cache takes some twenty small kernels for a block, and
more time in them than in low-bit matrices. Here a block is eight launches, each of which starts while the one
before it ends: norm, qkv, attention, o, norm, gate_up, gate, down.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, StaticLayer

from decdec_core import decode_ops
from decdec_core.architectures import decoder_blocks, head_dim, input_groups, require_supported
from decdec_core.config import DecDECError
from decdec_core.decode_ops import Heads
from decdec_core.fusing import First
from decdec_core.model import ModelState

_BY_LENGTH = ("dynamic", "longrope")  # rotations that change once a sequence is longer than a limit
_GATED = ("silu", "swish")


class PromptLayer(StaticLayer):
    """A layer of the cache, which transformers' pass over a prompt fills from its beginning, and a Step from
    there on. Such a pass attends to the prompt itself, as one without a cache does."""

    is_compileable = False  # so that no mask is made for a prompt

    def update(
        self, key_states: Tensor, value_states: Tensor, *_args: Any, **_options: Any
    ) -> tuple[Tensor, Tensor]:
        for kept, states in ((self.keys, key_states), (self.values, value_states)):
            assert kept is not None
            kept[:, :, : states.shape[2]] = states
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0

    def get_seq_length(self) -> int:
        return 0


@dataclass(frozen=True)
class _Block:
    """A decoder block's modules; of several layers with one input the outputs stand side by side."""

    norms: tuple[Any, Any]
    qkv: Sequence[nn.Module]
    cache: tuple[Tensor, Tensor]  # (key heads, max_length, d)
    heads: Heads
    o: nn.Module
    gate_up: Sequence[nn.Module]
    gate: Callable[[Tensor], Tensor]
    down: nn.Module


class Step:
    """Called with a token (1, 1) and its position (1,), returns the logits (1, vocabulary) after it.

    model: of a supported architecture, on one device. max_length: tokens that the cache holds, at most the
    window of its attention and what its rotation serves unchanged; more raises DecDECError. `cache` is for a
    prompt's pass by the model, with position_ids from 0. Compensation is that of a decoding step. The model's
    modules and their norms' weights are those of the last `look_up`, what layers hold that of each call;
    moved or cast, a model needs a new Step.
    """

    def __init__(self, model: Any, max_length: int) -> None:
        config = model.config
        require_supported(config)
        _require_room(config, max_length)
        devices = sorted({str(parameter.device) for parameter in model.parameters()})
        if len(devices) > 1:
            raise DecDECError(f"a model that decodes must be on one device, got {', '.join(devices)}")
        self.model = model
        shared, d = config.num_key_value_heads, head_dim(config)
        self.cache = Cache(layers=[PromptLayer(max_length) for _ in range(config.num_hidden_layers)])
        self.cache.early_initialization(1, shared, d, model.dtype, model.device)
        self.rotation = _rotation(model, max_length)
        sizes, rotary = (config.hidden_size, config.intermediate_size), self.rotation[0].shape[-1]
        on_gpu = model.device.type == "cuda"
        self.has_kernels = on_gpu and decode_ops.has_kernels(model.dtype, sizes, d, rotary)
        self.state: ModelState | None = None
        self.blocks: list[_Block] = []
        self.look_up()

    def look_up(self) -> list[nn.Module]:
        """Find the model's modules anew, such as after `fuse`; return those that a step calls."""
        self.state = getattr(self.model, "decdec", None)
        kept: list[Any] = self.cache.layers
        same = (self.rotation, self.has_kernels)
        self.blocks = [
            _block(block, self.model.config, (layer.keys[0], layer.values[0]), *same)
            for block, layer in zip(decoder_blocks(self.model).values(), kept, strict=True)
        ]
        return [part for block in self.blocks for part in (*block.qkv, block.o, *block.gate_up, block.down)]

    @torch.no_grad()
    def __call__(self, token: Tensor, position: Tensor) -> Tensor:
        if self.state is not None:
            self.state.scope.active = True
            self.state.stage.reset()
        norm, attend = decode_ops.add_norm_ref, decode_ops.decode_attention_ref
        if self.has_kernels:
            norm, attend = decode_ops.add_norm, decode_ops.decode_attention
        hidden, added = self.model.get_input_embeddings()(token)[0], None
        for block in self.blocks:
            before, after = block.norms
            x = norm(hidden, added, before.weight, before.variance_epsilon)
            added = block.o(attend(_outputs(block.qkv, x), *block.cache, position, block.heads))
            x = norm(hidden, added, after.weight, after.variance_epsilon)
            added = block.down(block.gate(_outputs(block.gate_up, x)))
        last = self.model.base_model.norm
        return self.model.get_output_embeddings()(norm(hidden, added, last.weight, last.variance_epsilon))


def _require_room(config: Any, max_length: int) -> None:
    window = getattr(config, "sliding_window", None)
    if window is not None and max_length > window:
        raise DecDECError(f"max_length must be at most the attention's window of {window}, got {max_length}")
    rotation = getattr(config, "rope_parameters", None) or {}
    kind = rotation.get("rope_type", "default")
    if kind in _BY_LENGTH:
        most = config.max_position_embeddings
        if kind == "longrope":
            most = rotation.get("original_max_position_embeddings") or most
        if max_length > most:
            raise DecDECError(f"max_length must be at most {most} with {kind} rotation, got {max_length}")
    if max_length > config.max_position_embeddings:
        context = config.max_position_embeddings
        raise DecDECError(f"max_length must be at most the model's context of {context}, got {max_length}")


def _rotation(model: Any, max_length: int) -> tuple[Tensor, Tensor]:
    """Return cosines and sines (max_length, rotary) of all positions, as the model has them."""
    places = torch.arange(max_length, device=model.device).unsqueeze(0)
    like = torch.empty(0, dtype=model.dtype, device=model.device)
    with torch.no_grad():
        # a dynamic one that has seen a longer sequence starts anew at a short one
        model.base_model.rotary_emb(like, position_ids=places[:, :1])
        cosines, sines = model.base_model.rotary_emb(like, position_ids=places)
    return cosines[0].contiguous(), sines[0].contiguous()


def _block(
    block: nn.Module,
    config: Any,
    cache: tuple[Tensor, Tensor],
    rotation: tuple[Tensor, Tensor],
    kernels: bool,
) -> _Block:
    qkv, o, gate_up, down = (_linears(block, group.linears) for group in input_groups(config))
    attention: Any = block.get_submodule("self_attn")
    heads = Heads(attention.scaling, *rotation)
    if hasattr(attention, "q_norm"):
        query, key = attention.q_norm, attention.k_norm
        heads = replace(heads, query_norm=query.weight, key_norm=key.weight, eps=query.variance_epsilon)
    before, after = (block.get_submodule(name) for name in ("input_layernorm", "post_attention_layernorm"))
    gate = _gate(block, config, kernels)
    return _Block((before, after), qkv, cache, heads, o[0], gate_up, gate, down[0])


def _gate(block: nn.Module, config: Any, kernels: bool) -> Callable[[Tensor], Tensor]:
    if config.hidden_act in _GATED:
        return decode_ops.silu_mul if kernels else decode_ops.silu_mul_ref
    mlp: Any = block.get_submodule("mlp")
    act = mlp.act_fn if hasattr(mlp, "act_fn") else mlp.activation_fn

    def gate(gate_up: Tensor) -> Tensor:
        gated, up = gate_up.chunk(2, dim=-1)
        return act(gated) * up

    return gate


def _linears(block: nn.Module, names: Sequence[str]) -> list[nn.Module]:
    modules = [block.get_submodule(name) for name in names]
    first = modules[0]
    return [first.get_submodule(first.name)] if isinstance(first, First) else modules


def _outputs(layers: Sequence[nn.Module], x: Tensor) -> Tensor:
    parts = [layer(x) for layer in layers]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
