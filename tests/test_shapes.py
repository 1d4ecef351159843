from __future__ import annotations

import pytest
from conftest import tiny_model

from decdec_core.architectures import kind_of
from decdec_core.config import DecDECError
from decdec_core.fusing import fuse
from decdec_core.shapes import MODELS, config_of, matrices_of


@pytest.mark.parametrize("architecture", ["llama", "llama-grouped-tied", "qwen2", "qwen3", "phi3"])
def test_the_matrices_are_those_of_the_fused_model(architecture: str) -> None:
    model = tiny_model(architecture)
    fuse(model)
    found = {
        kind_of(name): (layer.in_features, layer.out_features)
        for name, layer in model.model.layers[0].named_modules()
        if name.endswith("_proj") and hasattr(layer, "in_features")
    }
    assert matrices_of(model.config) == found


def test_the_models_are_what_their_names_say() -> None:
    # weights of the blocks, and embeddings and head: 8.0, 14.0, 70.6 billion, 0.16 untied
    for name, billions in {"llama-3-8b": 8.03, "phi-3-medium": 13.96, "llama-3-70b": 70.55}.items():
        config = config_of(name)
        block = sum(i * o for i, o in matrices_of(config).values())
        total = block * config.num_hidden_layers + 2 * config.vocab_size * config.hidden_size
        assert total / 1e9 == pytest.approx(billions, abs=0.02)
    assert matrices_of(config_of("smollm2-135m"))["gate_up"] == (576, 3072)
    assert config_of("llama-3-8b", 3).num_hidden_layers == 3


def test_refused_shapes() -> None:
    with pytest.raises(DecDECError, match=f"shapes must be one of {', '.join(MODELS)}, got 'llama-3-8'"):
        config_of("llama-3-8")
    with pytest.raises(DecDECError, match="blocks must be 1"):
        config_of("llama-3-8b", 0)
