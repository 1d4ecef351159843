"""A decoding step from a model's parts, against the model's own forward pass."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_model
from tiny_artifacts import write_tiny
from transformers import AutoModelForCausalLM

from decdec_core.config import Compensation, DecDECError
from decdec_core.decode_step import Step
from decdec_core.fusing import fuse
from decdec_core.model import set_compensation, state_of

ARCHITECTURES = ["llama", "mistral", "qwen2", "qwen3", "phi3"]


def logits_of(step: Step, model: Any, ids: torch.Tensor, prompt: int) -> torch.Tensor:
    """Return the logits (1, tokens, vocabulary) of a prompt by the model, then by `step` token by token."""
    cached = {"past_key_values": step.cache, "use_cache": True}
    got = [model(ids[:, :prompt], position_ids=torch.arange(prompt)[None], **cached).logits]
    for at in range(prompt, ids.shape[1]):
        got.append(step(ids[:, at : at + 1], torch.tensor([at])).unsqueeze(0))
    return torch.cat(got, dim=1)


@torch.no_grad()
@pytest.mark.parametrize("fused", [False, True], ids=["apart", "fused"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_it_is_the_models_own_pass(architecture: str, fused: bool, draw: torch.Generator) -> None:
    model = tiny_model(architecture).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data.uniform_(0.5, 2)
    ids = torch.randint(0, 256, (1, 30), generator=draw)
    wanted = model(ids, use_cache=False).logits
    if fused:
        fuse(model)
    for prompt in (1, 20):
        step = Step(model, 40)
        assert torch.allclose(logits_of(step, model, ids, prompt), wanted, atol=1e-4)
        step.cache.reset()
        assert torch.allclose(logits_of(step, model, ids, prompt), wanted, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_act": "gelu"},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}},
        {"tie_word_embeddings": True},
        {"mlp_bias": True, "attention_bias": True},
    ],
    ids=lambda changes: str(next(iter(changes.values()))),
)
def test_what_a_configuration_may_change(changes: dict[str, Any], draw: torch.Generator) -> None:
    config = tiny_model("llama").config
    model = AutoModelForCausalLM.from_config(type(config)(**{**config.to_dict(), **changes})).eval()
    ids = torch.randint(0, 256, (1, 30), generator=draw)
    assert torch.allclose(
        logits_of(Step(model, 30), model, ids, 7), model(ids, use_cache=False).logits, atol=1e-4
    )


@torch.no_grad()
@pytest.mark.parametrize("mode", ["all", "decode"])
def test_it_compensates_as_a_decoding_step(mode: str, tmp_path: Path, draw: torch.Generator) -> None:
    model = AutoModelForCausalLM.from_pretrained(write_tiny(tmp_path / "a"), dtype=torch.float32)
    set_compensation(model, Compensation("exact", 256, mode))
    ids = torch.randint(0, 256, (1, 20), generator=draw)
    cached = model(ids[:, :12], use_cache=True).past_key_values
    wanted = [model(ids[:, at : at + 1], past_key_values=cached).logits[0] for at in range(12, 20)]
    got = logits_of(Step(model, 20), model, ids, 12)[0, 12:]
    assert torch.allclose(got, torch.cat(wanted), atol=1e-4)
    set_compensation(model, Compensation("none"))
    assert not torch.allclose(got, logits_of(Step(model, 20), model, ids, 12)[0, 12:], atol=1e-3)
    assert state_of(model).scope.active


def test_lengths_that_its_cache_or_rotation_cannot_hold_are_refused() -> None:
    model = tiny_model("mistral")
    model.config.sliding_window = 64
    Step(model, 64)
    with pytest.raises(DecDECError, match="max_length must be at most the attention's window of 64, got 65"):
        Step(model, 65)
    config = tiny_model("llama").config
    rotation = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    changed = type(config)(
        **{**config.to_dict(), "rope_parameters": rotation, "max_position_embeddings": 128}
    )
    model = AutoModelForCausalLM.from_config(changed)
    Step(model, 128)
    with pytest.raises(DecDECError, match="max_length must be at most 128 with dynamic rotation, got 129"):
        Step(model, 129)


def test_an_unsupported_architecture_is_refused() -> None:
    model = tiny_model("llama")
    model.config.model_type = "gpt2"
    with pytest.raises(DecDECError, match="model_type must be one of"):
        Step(model, 40)
