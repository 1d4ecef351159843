"""A decoding step from a model's parts, against the model's own forward pass."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_model
from tiny_artifacts import write_tiny
from transformers import AutoModelForCausalLM

from decdec_core import decode_ops
from decdec_core.config import Compensation, DecDECError
from decdec_core.decode_step import Step
from decdec_core.fusing import fuse
from decdec_core.model import attach, set_compensation, state_of

ARCHITECTURES = ["llama", "mistral", "qwen2", "qwen3", "phi3"]
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "original_max_position_embeddings": 16,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}


def logits_of(step: Step, model: Any, ids: torch.Tensor, prompt: int) -> torch.Tensor:
    """Return the logits (1, tokens, vocabulary) of a prompt by the model, then by `step` token by token."""
    cached = {"past_key_values": step.cache, "use_cache": True}
    places = torch.arange(ids.shape[1], device=ids.device)
    got = [model(ids[:, :prompt], position_ids=places[None, :prompt], **cached).logits]
    for at in range(prompt, ids.shape[1]):
        got.append(step(ids[:, at : at + 1], places[at : at + 1]).unsqueeze(0))
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
        {"rope_parameters": LLAMA3},
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
        {"tie_word_embeddings": True},
        {"mlp_bias": True, "attention_bias": True},
    ],
    ids=lambda changes: str(next(iter(changes.values()))),
)
def test_what_a_configuration_may_change(changes: dict[str, Any], draw: torch.Generator) -> None:
    config = tiny_model("llama").config
    model = AutoModelForCausalLM.from_config(type(config)(**{**config.to_dict(), **changes})).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_(std=0.5)
    ids = torch.randint(0, 256, (1, 30), generator=draw)
    assert torch.allclose(
        logits_of(Step(model, 30), model, ids, 7), model(ids, use_cache=False).logits, atol=1e-4
    )


@torch.no_grad()
@pytest.mark.parametrize("share", [0.5, 1.0])
def test_a_head_may_turn_in_part(share: float, draw: torch.Generator) -> None:
    config = tiny_model("phi3").config
    rotation = {**config.rope_parameters, "partial_rotary_factor": share}
    changed = type(config)(**{**config.to_dict(), "rope_parameters": rotation})
    model = AutoModelForCausalLM.from_config(changed).eval()
    step = Step(model, 30)
    d = changed.hidden_size // changed.num_attention_heads
    assert step.rotation[0].shape == (30, int(share * d))
    ids = torch.randint(0, 256, (1, 30), generator=draw)
    assert torch.allclose(logits_of(step, model, ids, 7), model(ids, use_cache=False).logits, atol=1e-4)


@torch.no_grad()
def test_a_rotation_that_has_grown_starts_anew(draw: torch.Generator) -> None:
    config = tiny_model("llama").config
    rotation = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    changed = type(config)(**{**config.to_dict(), "rope_parameters": rotation, "max_position_embeddings": 40})
    model = AutoModelForCausalLM.from_config(changed).eval()
    fresh = Step(model, 40).rotation
    model(torch.randint(0, 256, (1, 70), generator=draw), use_cache=False)
    assert all(torch.equal(a, b) for a, b in zip(Step(model, 40).rotation, fresh, strict=True))


@torch.no_grad()
@pytest.mark.cuda
@pytest.mark.parametrize("fused", [False, True], ids=["apart", "fused"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_it_is_the_models_own_pass_by_the_kernels(
    architecture: str, dtype: torch.dtype, fused: bool, draw: torch.Generator
) -> None:
    """Against the model in float32 with the same weights, as near as the model's own half precision."""
    model = tiny_model(architecture).eval().to(dtype)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data.uniform_(0.5, 2)
    ids = torch.randint(0, 256, (1, 30), generator=draw)
    wanted = copy.deepcopy(model).float()(ids, use_cache=False).logits
    model = model.cuda()
    own = model(ids.cuda(), use_cache=False).logits.cpu().float()
    if fused:
        fuse(model)
    step = Step(model, 40)
    assert step.has_kernels
    got = logits_of(step, model, ids.cuda(), 7).cpu().float()
    assert (got - wanted).norm() <= 1.5 * (own - wanted).norm()


@torch.no_grad()
@pytest.mark.cuda
def test_launches_that_overlap_give_what_they_give_one_by_one(tmp_path: Path) -> None:
    """Every sum has a fixed order: all is equal bit for bit, unless a launch read what was not there yet."""
    folder = write_tiny(tmp_path / "a")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16).cuda()
    fuse(model)
    set_compensation(model, Compensation("dynamic", 256))
    step, token, position = (
        Step(model, 300),
        torch.tensor([[7]], device="cuda"),
        torch.zeros(1, dtype=torch.int64, device="cuda"),
    )
    launch = decode_ops._run

    def alone(name: str, like: torch.Tensor, *arguments: object) -> None:
        torch.cuda.synchronize()
        launch(name, like, *arguments)
        torch.cuda.synchronize()

    wanted = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decode_ops, "_run", alone)
        for at in range(200):
            position.fill_(at)
            torch.cuda.synchronize()
            wanted.append(step(token, position).clone())
    step.cache.reset()
    graph = torch.cuda.CUDAGraph()
    position.fill_(0)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        got = step(token, position)
        position.add_(1)
    position.zero_()
    step.cache.reset()
    for at in range(200):
        graph.replay()
        assert torch.equal(got, wanted[at]), at


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
    with pytest.raises(DecDECError, match="max_length must be at most the model's context of 4096, got 4097"):
        Step(tiny_model("llama"), 4097)
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


@torch.no_grad()
def test_a_rotation_by_length_serves_its_first_length(draw: torch.Generator) -> None:
    config = tiny_model("phi3").config
    pairs = config.hidden_size // config.num_attention_heads // 2
    rotation = {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "original_max_position_embeddings": 32,
        "short_factor": [1.1] * pairs,
        "long_factor": [4.0] * pairs,
    }
    changed = type(config)(
        **{**config.to_dict(), "rope_parameters": rotation, "max_position_embeddings": 128}
    )
    changed.original_max_position_embeddings = 32
    model = AutoModelForCausalLM.from_config(changed).eval()
    ids = torch.randint(0, 256, (1, 32), generator=draw)
    got = logits_of(Step(model, 32), model, ids, 7)
    assert torch.allclose(got, model(ids, use_cache=False).logits, atol=1e-4)
    with pytest.raises(DecDECError, match="max_length must be at most 32 with longrope rotation, got 33"):
        Step(model, 33)


@torch.no_grad()
def test_modules_are_found_anew(tmp_path: Path, draw: torch.Generator) -> None:
    model = AutoModelForCausalLM.from_pretrained(write_tiny(tmp_path / "a"), dtype=torch.float32)
    step, ids = Step(model, 20), torch.randint(0, 256, (1, 20), generator=draw)
    apart = step.look_up()
    fuse(model)
    attach(model, Compensation("exact", 512, "decode"), "another state")
    fused = step.look_up()
    assert len(apart) == 2 * 7
    assert len(fused) == 2 * 4
    assert step.state is state_of(model)
    got = logits_of(step, model, ids, 12)
    assert torch.equal(got, logits_of(Step(model, 20), model, ids, 12))


def test_an_unsupported_architecture_is_refused() -> None:
    model = tiny_model("llama")
    model.config.model_type = "gpt2"
    with pytest.raises(DecDECError, match="model_type must be one of"):
        Step(model, 40)
