"""Somebody else's checkpoint -> an artifact with that base, whose residual leads back to the original."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_writers import (
    awq_settings,
    awq_tensors,
    fold_scales,
    gptq_settings,
    gptq_tensors,
    rewrite,
    rounded,
    write_checkpoint,
    write_compressed,
)
from conftest import CALIBRATION, byte_tokenizer, save_tiny, tiny_model
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from decdec_core.build import build_artifact
from decdec_core.config import Compensation, DecDECError, ResidualQuant, WeightQuant
from decdec_core.importers import CheckpointError, open_quantized
from decdec_core.model import dec_layers, set_compensation
from decdec_core.verify import verify


def gptq(folder: Path, model: PreTrainedModel) -> None:
    def layer(_name: str, weight: Tensor) -> dict[str, Tensor]:
        return gptq_tensors(rounded(weight, 4, 32), 4)

    write_checkpoint(folder, model, gptq_settings(4, 32), layer)


def gptq_act_order(folder: Path, model: PreTrainedModel) -> None:
    def layer(_name: str, weight: Tensor) -> dict[str, Tensor]:
        return gptq_tensors(rounded(weight, 3, 32, order=torch.randperm(weight.shape[1]).numpy()), 3)

    write_checkpoint(folder, model, gptq_settings(3, 32, desc_act=True), layer, shards=2)


def awq(folder: Path, model: PreTrainedModel) -> None:
    write_checkpoint(folder, model, awq_settings(32), lambda _n, w: awq_tensors(rounded(w, 4, 32)))


def awq_folded(folder: Path, model: PreTrainedModel) -> None:
    fold_scales(model, 0.5)
    awq(folder, model)


def compressed(folder: Path, model: PreTrainedModel) -> None:
    args = {"num_bits": 4, "symmetric": False, "strategy": "group", "group_size": 32}
    write_compressed(folder, model, args)


QK_NORM = "model.layers.1.self_attn.q_norm.weight"
WRITERS = {f.__name__: f for f in (gptq, gptq_act_order, awq, awq_folded, compressed)}


def full_of(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.mark.parametrize("architecture", ["llama", "llama-grouped-tied"])
@pytest.mark.parametrize("writer", WRITERS)
@torch.no_grad()
def test_the_base_is_theirs_and_everything_compensated_is_the_original(
    writer: str, architecture: str, tmp_path: Path, draw: torch.Generator
) -> None:
    plain = save_tiny(architecture, tmp_path / "plain")
    theirs = tmp_path / "theirs"
    WRITERS[writer](theirs, tiny_model(architecture))
    out = build_artifact(
        str(plain),
        tmp_path / "out",
        residual_quant=ResidualQuant(16),
        calibration=CALIBRATION,
        quantized=theirs,
    )
    manifest = verify(out)
    settings = json.loads((out / "config.json").read_text())["quantization_config"]
    assert settings["weight"]["method"] in ("gptq", "awq", "compressed-tensors")
    assert settings["provenance"]["quantized"]["format"] == settings["weight"]["method"]
    ordered = all("input_order" in extras for extras in manifest.layers().values())
    assert ordered == (writer == "gptq_act_order")
    model, full = full_of(out), full_of(plain)
    ids = torch.randint(0, 256, (2, 40), generator=draw)
    wanted = full(ids).logits
    set_compensation(model, Compensation("exact", 1024, "all"))
    everything = model(ids).logits
    set_compensation(model, Compensation("none"))
    none = model(ids).logits
    # a residual in float16 of weights that folded scales made up to a few times larger
    assert (everything - wanted).abs().max() < 0.02 * wanted.abs().max()
    assert (none - wanted).square().mean() > 100 * (everything - wanted).square().mean()
    set_compensation(model, Compensation("dynamic", 256, "all"))
    assert (model(ids).logits - wanted).square().mean() < (none - wanted).square().mean()
    # and without compensation it is their model: their weights and norms in a plain one
    dense = tiny_model(architecture)
    checkpoint = open_quantized(theirs)
    for name in dec_layers(model):
        dense.get_submodule(name).weight.data = checkpoint.layer(name).dense()
    for name, parameter in dense.named_parameters():
        if "norm" in name or "bias" in name:
            stored = checkpoint.plain(name)
            assert stored is not None
            parameter.data = stored.float()
    # their norms are in float16, ours in float32
    assert torch.allclose(dense(ids).logits, none, atol=0.02 * none.abs().max().item())


@pytest.mark.parametrize("bits", [2, 8])
def test_residuals_of_few_bits_lead_back_as_far_as_they_can(bits: int, tmp_path: Path) -> None:
    plain = save_tiny("llama", tmp_path / "plain")
    gptq(tmp_path / "theirs", tiny_model("llama"))
    out = build_artifact(
        str(plain), tmp_path / "out", None, ResidualQuant(bits), CALIBRATION, tmp_path / "theirs"
    )
    full = full_of(plain)
    for name, layer in dec_layers(full_of(out)).items():
        left = full.get_submodule(name).weight - layer.dense_weight()
        assert layer.residual is not None
        assert layer.residual.config.bits == bits
        assert layer.residual.scale.max() <= left.abs().max() / (2 ** (bits - 1) - 1) * 1.001


def test_another_models_checkpoint_is_refused(tmp_path: Path) -> None:
    plain = save_tiny("llama", tmp_path / "plain")
    gptq(tmp_path / "theirs", tiny_model("llama", seed=1))
    with pytest.raises(CheckpointError, match=r"embed_tokens\.weight must be the original's to rounding"):
        build_artifact(str(plain), tmp_path / "out", None, None, CALIBRATION, tmp_path / "theirs")
    other = tiny_model("llama")
    other.model.layers[1].mlp.down_proj.weight.data.normal_(0, 0.02)
    gptq(tmp_path / "other", other)
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp"):
        build_artifact(str(plain), tmp_path / "out", None, None, CALIBRATION, tmp_path / "other")
    assert not (tmp_path / "out").exists()
    with pytest.raises(DecDECError, match="weight_quant must be absent with a quantized checkpoint"):
        build_artifact(str(plain), tmp_path / "out", WeightQuant(), None, CALIBRATION, tmp_path / "theirs")


def test_the_tokenizer_is_the_originals(tmp_path: Path) -> None:
    plain = save_tiny("llama", tmp_path / "plain")
    awq(tmp_path / "theirs", tiny_model("llama"))
    assert not (tmp_path / "theirs" / "tokenizer.json").exists()
    out = build_artifact(str(plain), tmp_path / "out", None, None, CALIBRATION, tmp_path / "theirs")
    assert json.loads((out / "tokenizer.json").read_text()) == json.loads(
        byte_tokenizer().backend_tokenizer.to_str()
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t[QK_NORM].mul_(3), r"self_attn\.q_norm\.weight must be the original's to rounding"),
        (lambda t: t.pop(QK_NORM), r"self_attn\.q_norm\.weight must be in the checkpoint, got none"),
    ],
)
def test_what_is_not_quantized_must_be_the_originals(change: Any, message: str, tmp_path: Path) -> None:
    plain = save_tiny("qwen3", tmp_path / "plain")
    gptq(tmp_path / "theirs", tiny_model("qwen3"))
    rewrite(tmp_path / "theirs", change)
    with pytest.raises(CheckpointError, match=message):
        build_artifact(str(plain), tmp_path / "out", None, None, CALIBRATION, tmp_path / "theirs")


@pytest.mark.parametrize("spread", [0.1, 0.15, 0.5])
def test_a_scale_that_cannot_be_recovered_is_refused(spread: float, tmp_path: Path) -> None:
    # under grouped queries one row of the value projection feeds several columns of o
    plain = save_tiny("llama-grouped-tied", tmp_path / "plain")
    model = tiny_model("llama-grouped-tied")
    for block in model.model.layers:
        scale = (torch.randn(2, 32) * spread).exp()
        block.self_attn.v_proj.weight.data /= scale.reshape(-1, 1)
        block.self_attn.o_proj.weight.data *= scale.repeat_interleave(2, 0).reshape(-1)
    gptq(tmp_path / "theirs", model)
    with pytest.raises(CheckpointError, match="must be a quantization of the original's weight to 4 bits"):
        build_artifact(str(plain), tmp_path / "out", None, None, CALIBRATION, tmp_path / "theirs")


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_size": "x"},
        {"num_attention_heads": 0},
        {"hidden_act": "absent"},
        {"num_hidden_layers": 10**12},
        {"num_hidden_layers": None},
    ],
    ids=str,
)
def test_a_config_that_describes_no_model_costs_one_line(change: dict[str, Any], tmp_path: Path) -> None:
    gptq(tmp_path / "theirs", tiny_model("llama"))
    path = tmp_path / "theirs" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(DecDECError) as caught:
        open_quantized(tmp_path / "theirs")
    assert len(str(caught.value).splitlines()) == 1
