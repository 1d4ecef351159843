"""Where the linear layers of a decoder block are, and what AWQ may fold their input scales into.

Llama, Mistral, Qwen2 and Qwen3 share one layout; Phi-3 fuses q, k, v and gate, up. Others are refused.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from torch import nn

from decdec_core.config import DecDECError, suggest

SPLIT_LAYOUT = ("llama", "mistral", "qwen2", "qwen3")
FUSED_LAYOUT = ("phi3",)
SUPPORTED = SPLIT_LAYOUT + FUSED_LAYOUT
_BLOCKS = "model.layers"
_BLOCK = re.compile(re.escape(_BLOCKS) + r"\.(\d{1,6})\.")
_KIND_OF_LEAF = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj", "qkv_proj"), "qkv"),
    "o_proj": "o",
    **dict.fromkeys(("gate_proj", "up_proj", "gate_up_proj"), "gate_up"),
    "down_proj": "down",
}


@dataclass(frozen=True)
class InputGroup:
    """The linear layers of a block that read one input, and so share its activations and its scale.

    All names are relative to the block. `norm` is the norm that makes the input, or `producer` the linear
    layer whose output rows from `first_row` on are the input's channels; with neither, an input scale
    stays in the layer. `inspect` is the module whose output AWQ compares; `attends` says
    that it mixes tokens. `unclipped` are the layers that AWQ does not clip: queries and keys meet in a
    product, where the error of the one layer alone says too little.
    """

    kind: str
    linears: tuple[str, ...]
    inspect: str
    norm: str | None = None
    producer: str | None = None
    first_row: int = 0
    attends: bool = False
    unclipped: tuple[str, ...] = ()


def require_supported(config: Any) -> None:
    """Raise DecDECError, naming the architecture, unless `config` is of one that is supported."""
    kind = getattr(config, "model_type", None) or "none"
    if kind not in SUPPORTED:
        wanted = ", ".join(SUPPORTED)
        raise DecDECError(f"model_type must be one of {wanted}, got {kind!r}{suggest(kind, SUPPORTED)}")


def input_groups(config: Any) -> list[InputGroup]:
    """Return the four input groups of a decoder block of a transformers `config`."""
    require_supported(config)
    fused = config.model_type in FUSED_LAYOUT
    qkv = ("qkv_proj",) if fused else ("q_proj", "k_proj", "v_proj")
    gate_up = ("gate_up_proj",) if fused else ("gate_proj", "up_proj")
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    # with grouped queries one value channel feeds several inputs of o, each with its own scale
    value_feeds_o = heads == kv_heads
    return [
        InputGroup(
            "qkv",
            _in("self_attn", qkv),
            "self_attn",
            norm="input_layernorm",
            attends=True,
            unclipped=_in("self_attn", qkv if fused else qkv[:2]),
        ),
        InputGroup(
            "o",
            ("self_attn.o_proj",),
            "self_attn.o_proj",
            producer=f"self_attn.{qkv[-1]}" if value_feeds_o else None,
            first_row=(heads + kv_heads) * head_dim(config) if fused else 0,
        ),
        InputGroup("gate_up", _in("mlp", gate_up), "mlp", norm="post_attention_layernorm"),
        InputGroup(
            "down",
            ("mlp.down_proj",),
            "mlp.down_proj",
            producer=f"mlp.{gate_up[-1]}",
            first_row=config.intermediate_size if fused else 0,
        ),
    ]


def head_dim(config: Any) -> int:
    """Return the values of an attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _in(parent: str, names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f"{parent}.{name}" for name in names)


def kind_of(module_name: str) -> str:
    """Return the projection kind ("qkv", "o", "gate_up" or "down") of a linear layer's full name."""
    leaf = module_name.rpartition(".")[2]
    if leaf not in _KIND_OF_LEAF:
        raise DecDECError(f"layer must end in one of {', '.join(_KIND_OF_LEAF)}, got {module_name!r}")
    return _KIND_OF_LEAF[leaf]


def block_number(layer: str) -> int:
    """Return the number of the decoder block that a layer's full name says; none raises DecDECError."""
    found = _BLOCK.match(layer)
    if found is None:
        raise DecDECError(f"layer must be in a block {_BLOCKS}.N, got {layer!r}")
    return int(found[1])


def decoder_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """Return the decoder blocks of a causal language model by their full names, in order."""
    return {f"{_BLOCKS}.{i}": block for i, block in enumerate(model.get_submodule(_BLOCKS).children())}
