"""The sizes of models that benchmarks are made of, without their weights; all built as Llama."""

from __future__ import annotations

from typing import Any

import torch
from transformers import LlamaConfig

from decdec_core.architectures import head_dim
from decdec_core.config import PROJECTION_KINDS, require_int, require_one_of

_FIELDS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
)
MODELS = {
    name: dict(zip(_FIELDS, sizes, strict=True))
    for name, sizes in {
        "llama-3-8b": (4096, 14336, 32, 32, 8, 128256),
        "phi-3-medium": (5120, 17920, 40, 40, 10, 32064),
        "llama-3-70b": (8192, 28672, 80, 64, 8, 128256),
        "smollm2-135m": (576, 1536, 30, 9, 3, 49152),
    }.items()
}


def config_of(name: str, blocks: int | None = None, dtype: torch.dtype = torch.float16) -> LlamaConfig:
    """Return the config of MODELS[name], with `blocks` decoder blocks where that is given."""
    require_one_of("shapes", name, MODELS)
    sizes: dict[str, Any] = dict(MODELS[name])
    if blocks is not None:
        require_int("blocks", blocks, 1, 1000)
        sizes["num_hidden_layers"] = blocks
    return LlamaConfig(**sizes, dtype=dtype)


def matrices_of(config: Any) -> dict[str, tuple[int, int]]:
    """Return inputs and outputs of each projection kind of a block, q, k, v and gate, up fused.

    config: of a supported architecture.
    """
    hidden, inner, heads = config.hidden_size, config.intermediate_size, config.num_attention_heads
    values = head_dim(config)
    sizes = (
        (hidden, (heads + 2 * config.num_key_value_heads) * values),
        (heads * values, hidden),
        (hidden, 2 * inner),
        (inner, hidden),
    )
    return dict(zip(PROJECTION_KINDS, sizes, strict=True))
