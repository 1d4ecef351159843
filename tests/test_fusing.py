"""Fused layers compute what they computed apart."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from conftest import make_layer, tiny_model
from tiny_artifacts import write_tiny
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from decdec_core.config import EXTRAS, Compensation, DecDECError, WeightQuant
from decdec_core.fusing import First, fuse, is_fused
from decdec_core.linear import DecLinear
from decdec_core.model import compensation_ledger, dec_layers, set_compensation

KINDS = {
    "uniform": {},
    "codebook": {"weight": WeightQuant("squeezellm", 3)},
    "biases": {"architecture": "qwen2"},
    "8-bit residual": {"residual_bits": 8},
}


@pytest.fixture
def ids(draw: torch.Generator) -> Tensor:
    return torch.randint(0, 256, (2, 40), generator=draw)


@torch.no_grad()
@pytest.mark.parametrize("selection", ["none", "static", "dynamic", "exact"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_fused_model_is_the_model(kind: str, selection: str, tmp_path: Path, ids: Tensor) -> None:
    model = AutoModelForCausalLM.from_pretrained(
        write_tiny(tmp_path / "a", **KINDS[kind]), dtype=torch.float32
    )
    # one input: the same statistics, as calibration finds them
    for block in model.model.layers:
        for group in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")):
            layers = [layer for name, layer in dec_layers(block).items() if name.endswith(group)]
            for layer in layers:
                layer.statistics = layers[0].statistics
    set_compensation(model, Compensation(selection, (8, 16, 64, 128)))
    wanted, ledger = model(ids).logits, compensation_ledger(model)
    assert not is_fused(model)
    assert fuse(model) == 2 * 5
    assert is_fused(model)
    assert len(dec_layers(model)) == 2 * 4
    # sums in another order
    assert torch.allclose(model(ids).logits, wanted, atol=1e-4)
    set_compensation(model, Compensation(selection, (8, 16, 64, 128)))
    assert torch.allclose(copy.deepcopy(model)(ids).logits, wanted, atol=1e-4)
    assert not any(part is not None for m in model.modules() if isinstance(m, First) for part in m.rest)
    fused = compensation_ledger(model)
    # fetched once for q, k and v: fewer channels, as many bytes
    assert fused["bytes_per_token"] == ledger["bytes_per_token"]
    assert fused["host_bytes"] == ledger["host_bytes"]
    assert (fused["channels_per_token"] < ledger["channels_per_token"]) == (selection != "none")
    assert fuse(model) == 0


@torch.no_grad()
def test_a_plain_model_is_fused_likewise(ids: Tensor) -> None:
    model = tiny_model("qwen2").eval()
    wanted = model(ids).logits
    assert fuse(model) == 2 * 5
    assert torch.allclose(model(ids).logits, wanted, atol=1e-4)


@torch.no_grad()
def test_a_fused_model_is_traced_whole(tiny_artifact_dir: Path, ids: Tensor) -> None:
    torch._dynamo.reset()
    model = AutoModelForCausalLM.from_pretrained(tiny_artifact_dir, dtype=torch.float32)
    fuse(model)
    wanted = model(ids, use_cache=False).logits
    traced = torch.compile(model, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        assert torch.equal(traced(ids, use_cache=False).logits, wanted)


def test_a_part_is_handed_out_once() -> None:
    model = tiny_model("llama")
    fuse(model)
    attention, x = model.model.layers[0].self_attn, torch.randn(1, 3, 160)
    attention.q_proj(x)
    attention.k_proj(x)
    with pytest.raises(AssertionError, match="must be called once, after the first of its input"):
        attention.k_proj(x)


def test_a_model_with_fused_layers_stays_as_it_is() -> None:
    assert fuse(tiny_model("phi3")) == 0


def test_a_fused_model_cannot_be_saved(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(write_tiny(tmp_path / "a"))
    fuse(model)
    with pytest.raises(DecDECError, match="must be saved before its layers are fused, got one after"):
        model.save_pretrained(tmp_path / "b")
    assert not (tmp_path / "b").exists()


def layers_apart() -> dict[str, list[nn.Module]]:
    """Return q, k and v that must stay apart, and why."""
    alike = [make_layer(160, 160) for _ in range(3)]
    other_order = [make_layer(160, 160, extras=EXTRAS) for _ in range(3)]
    for layer in other_order:
        layer.input_scale = other_order[0].input_scale
    other_order[1].input_order = torch.arange(160, dtype=torch.int32).flip(0)
    scaled_once = [make_layer(160, 160), make_layer(160, 160, extras=("input_scale",)), make_layer(160, 160)]
    no_bias = [*alike[:2], DecLinear(160, 160, WeightQuant("rtn", 3))]
    half_bytes = [make_layer(160, 160), make_layer(160, 159), make_layer(160, 160)]
    return {
        "bits": [*alike[:2], make_layer(160, 160, bits=4)],
        "residual bits": [*alike[:2], make_layer(160, 160, residual_bits=8)],
        "order": other_order,
        "scale": scaled_once,
        "bias": no_bias,
        "half bytes": half_bytes,
        "a plain one": [*alike[:2], nn.Linear(160, 160)],
    }


@pytest.mark.parametrize("why", layers_apart())
def test_layers_that_differ_stay_apart(why: str) -> None:
    model = tiny_model("llama")
    attention = model.get_submodule("model.layers.0.self_attn")
    names = ("q_proj", "k_proj", "v_proj")
    for name, layer in zip(names, layers_apart()[why], strict=True):
        setattr(attention, name, layer)
    assert fuse(model) == 2 + 5  # gate and up, and the other block
    assert not any(isinstance(getattr(attention, name), First) for name in names)


def test_extras_that_agree_are_kept() -> None:
    layers = [make_layer(160, out, extras=EXTRAS) for out in (160, 32, 32)]
    for layer in layers[1:]:
        layer.input_order, layer.input_scale = layers[0].input_order, layers[0].input_scale
    x = torch.randn(3, 160)
    whole = DecLinear.join(layers)
    assert torch.allclose(whole(x), torch.cat([layer(x) for layer in layers], -1), atol=1e-5)


@pytest.mark.parametrize("model", [None, nn.Linear(2, 2)])
def test_what_is_no_model_is_refused(model: nn.Module) -> None:
    with pytest.raises(DecDECError, match=r"model_type must be one of llama, .*, got 'none'"):
        fuse(model)
