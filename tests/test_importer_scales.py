from __future__ import annotations

import copy
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
    linear_names,
    rewrite,
    rounded,
    write_checkpoint,
    write_compressed,
)
from conftest import relative_error, tiny_model
from torch import Tensor
from transformers import PreTrainedModel

from decdec_core.architectures import decoder_blocks, input_groups
from decdec_core.config import WeightQuant
from decdec_core.importers import (
    CheckpointError,
    QuantizedCheckpoint,
    open_quantized,
    recovered_scales,
    require_near,
    require_same_model,
)
from decdec_core.quantize.awq import apply_scale
from decdec_core.quantize.uniform import quantize
from decdec_core.shards import TensorFiles


def write_awq(folder: Path, model: PreTrainedModel) -> QuantizedCheckpoint:
    layer = lambda _name, weight: awq_tensors(rounded(weight, 4, 32))  # noqa: E731
    return open_quantized(write_checkpoint(folder, model, awq_settings(32), layer))


def write_gptq(
    folder: Path, model: PreTrainedModel, bits: int, group_size: int = 32, symmetric: bool = False
) -> QuantizedCheckpoint:
    def layer(_name: str, weight: Tensor) -> dict[str, Tensor]:
        return gptq_tensors(rounded(weight, bits, group_size, symmetric), bits)

    return open_quantized(write_checkpoint(folder, model, gptq_settings(bits, group_size), layer))


def all_scales(model: PreTrainedModel, checkpoint: QuantizedCheckpoint) -> dict[str, Tensor | None]:
    """Return the recovered scales by block and kind, after scaling the model's blocks by them and holding
    every layer against its own."""
    found = {}
    groups = input_groups(model.config)
    for block_name, block in decoder_blocks(model).items():
        for kind, scale in recovered_scales(block, block_name, groups, checkpoint).items():
            found[f"{block_name}.{kind}"] = scale
        for group in groups:
            scale = found[f"{block_name}.{group.kind}"]
            if scale is not None:
                assert apply_scale(block, group, scale) is None
    for name in linear_names(model):
        weight = model.get_submodule(name).weight.data
        require_near(name, weight, checkpoint.layer(name).dense(), int(checkpoint.weight_quant.bits))
    return found


def require_found(found: dict[str, Tensor | None], wanted: dict[str, Tensor], rms: float) -> None:
    for key, scale in found.items():
        if key not in wanted:
            assert scale is None
            continue
        assert scale is not None, key
        wrong = (scale / wanted[key]).log()
        if key.endswith(("qkv", "gate_up")):
            # two float16 numbers' rounding: that of the norm over s, and float32's before it
            assert wrong.abs().max() < 2.0**-10
        else:
            # of one of 1120 channels chance makes up to four times the root mean square
            assert wrong.square().mean().sqrt() < rms
            assert wrong.abs().max() < 5 * rms


@pytest.mark.parametrize("architecture", ["llama", "llama-grouped-tied", "qwen2", "qwen3", "phi3"])
@pytest.mark.parametrize("spread", [0.1, 0.7])
def test_scales_that_awq_folded_are_found(architecture: str, spread: float, tmp_path: Path) -> None:
    model = tiny_model(architecture)
    original, scaled = copy.deepcopy(model), copy.deepcopy(model)
    wanted = fold_scales(scaled, spread, fold_output=architecture != "phi3")
    found = all_scales(model, write_awq(tmp_path / "c", scaled))
    # rounding to 4 bits in groups of 32 leaves 0.08 of a weight, and the mean over 160 inputs, or 128, a
    # twelfth of that, from either side
    require_found(found, wanted, rms=0.01)
    tokens = torch.arange(40).view(2, 20)
    with torch.no_grad():
        # whatever the estimates are off by, the scaled model is the original: float32 rounding alone
        assert relative_error(model(tokens).logits, original(tokens).logits) < 1e-5


@pytest.mark.parametrize("bits", [3, 4])
def test_scales_in_a_compressed_tensors_checkpoint_are_found(bits: int, tmp_path: Path) -> None:
    model = tiny_model("llama")
    scaled = copy.deepcopy(model)
    wanted = fold_scales(scaled, 0.4)
    args = {"num_bits": bits, "strategy": "group", "group_size": 32, "symmetric": False}
    write_compressed(tmp_path / "c", scaled, args)
    require_found(all_scales(model, open_quantized(tmp_path / "c")), wanted, rms=0.02)


@pytest.mark.parametrize(
    ("bits", "group_size", "symmetric"),
    [(2, 32, False), (2, 32, True), (3, -1, False), (3, 32, True), (4, 128, False)],
)
def test_rounding_alone_is_no_scale(bits: int, group_size: int, symmetric: bool, tmp_path: Path) -> None:
    model = tiny_model("llama")
    checkpoint = write_gptq(tmp_path / "c", model, bits, group_size, symmetric)
    assert set(all_scales(model, checkpoint).values()) == {None}


@pytest.mark.parametrize("folded", [False, True])
def test_weights_that_rounding_leaves_as_they_are(folded: bool, tmp_path: Path) -> None:
    """Models that were dequantized before, as those from .gguf files, lie on a grid already."""
    model = tiny_model("llama")
    for name in linear_names(model):
        weight = model.get_submodule(name).weight
        # steps of a power of two, each group from code 0 to 15: what the writer finds again
        codes = torch.randint(0, 16, weight.shape)
        codes[:, ::32], codes[:, 1::32] = 0, 15
        weight.data = (codes - 8) * 2.0**-8
    scaled = copy.deepcopy(model)
    layers = [block.mlp for block in decoder_blocks(scaled).values()]
    for mlp in layers if folded else []:
        mlp.down_proj.weight.data *= 2
        mlp.up_proj.weight.data /= 2
    found = all_scales(model, write_awq(tmp_path / "c", scaled))
    for key, scale in found.items():
        if folded and key.endswith("down"):
            assert scale is not None
            assert torch.allclose(scale, torch.full_like(scale, 2), rtol=1e-5)
        else:
            assert scale is None


def test_a_scale_of_one_side_only_is_refused(tmp_path: Path) -> None:
    model = tiny_model("llama")
    scaled = copy.deepcopy(model)
    scaled.model.layers[0].mlp.down_proj.weight.data *= torch.randn(1120).exp()
    checkpoint = write_awq(tmp_path / "c", scaled)
    block = model.model.layers[0]
    with pytest.raises(
        CheckpointError,
        match=r"layer model\.layers\.0\.mlp\.down_proj must show the input scale that mlp\.up_proj",
    ):
        recovered_scales(block, "model.layers.0", input_groups(model.config), checkpoint)


def test_a_scale_where_nothing_can_hold_it_is_refused(tmp_path: Path) -> None:
    """With grouped queries no value channel feeds one input of o alone."""
    model = tiny_model("llama-grouped-tied")
    scaled = copy.deepcopy(model)
    scaled.model.layers[1].self_attn.o_proj.weight.data *= (torch.randn(128) * 0.5).exp()
    checkpoint = write_awq(tmp_path / "c", scaled)
    with pytest.raises(
        CheckpointError,
        match=r"layer model\.layers\.1\.self_attn\.o_proj must be a quantization of the original's weight",
    ):
        all_scales(model, checkpoint)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (0.0, r"must be the original's over a positive scale, got 0\.0 for"),
        (-1.0, r"must be the original's over a positive scale, got -1\.0 for"),
        (float("nan"), "must be the original's over a positive scale, got nan for"),
        (float("inf"), "must be the original's over a positive scale, got inf for"),
    ],
)
def test_norms_without_a_scale_are_refused(value: float, message: str, tmp_path: Path) -> None:
    model = tiny_model("llama")
    name = "model.layers.0.input_layernorm.weight"

    def change(state: dict[str, Tensor]) -> None:
        state[name][3] = value

    write_gptq(tmp_path / "c", model, 4)
    checkpoint = open_quantized(rewrite(tmp_path / "c", change))
    groups = input_groups(model.config)
    with pytest.raises(CheckpointError, match=message):
        recovered_scales(model.model.layers[0], "model.layers.0", groups, checkpoint)


def test_a_channel_that_both_norms_switch_off_has_no_scale(tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.model.layers[0].input_layernorm.weight.data[3] = 0
    scaled = copy.deepcopy(model)
    wanted = fold_scales(scaled, 0.3)
    found = all_scales(model, write_awq(tmp_path / "c", scaled))["model.layers.0.qkv"]
    assert found is not None
    assert found[3] == 1
    wanted["model.layers.0.qkv"][3] = 1
    assert torch.allclose(found, wanted["model.layers.0.qkv"], rtol=2.0**-10)


@pytest.mark.parametrize("bits", [2, 3, 4, 5])
def test_near_is_what_rounding_gives_and_no_more(bits: int, draw: torch.Generator) -> None:
    weight = torch.randn(96, 512, generator=draw)
    rows = quantize(weight, WeightQuant("rtn", bits, 65536)).dequantize()  # the worst: one scale for a row
    require_near("q", weight, rows, bits)
    for other in (torch.randn(96, 512, generator=draw), 2 * rows, rows / 2, rows * float("nan"), -rows):
        with pytest.raises(
            CheckpointError, match=f"layer q must be a quantization .* to {bits} bits, got a rel"
        ):
            require_near("q", weight, other, bits)


def test_a_scaled_weight_is_not_near(draw: torch.Generator) -> None:
    weight = torch.randn(96, 512, generator=draw)
    for scale in (torch.randn(512, generator=draw), torch.randn(96, 1, generator=draw)):
        scaled = weight * (0.5 * scale).exp()
        with pytest.raises(CheckpointError, match="of it in the scale of channels"):
            require_near("q", weight, quantize(scaled, WeightQuant("rtn", 3)).dequantize(), 3)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> QuantizedCheckpoint:
    """Of tiny_model("llama"), in float16."""
    return write_gptq(tmp_path_factory.mktemp("same") / "c", tiny_model("llama"), 4)


def saved(model: PreTrainedModel, folder: Path) -> TensorFiles:
    model.save_pretrained(folder)
    return TensorFiles.of_folder(folder)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_original_in_any_dtype_is_the_same(
    dtype: torch.dtype, checkpoint: QuantizedCheckpoint, tmp_path: Path
) -> None:
    model = tiny_model("llama").to(dtype)
    require_same_model(model.config, saved(model, tmp_path / "m"), checkpoint)


def test_tied_weights_are_the_same_where_a_quantizer_untied_them(tmp_path: Path) -> None:
    model = tiny_model("llama-grouped-tied")
    original = saved(model, tmp_path / "m")
    write_gptq(tmp_path / "c", model, 4)
    require_same_model(model.config, original, open_quantized(tmp_path / "c"))
    embedding = "model.embed_tokens.weight"
    rewrite(tmp_path / "c", lambda state: state.update({"lm_head.weight": state[embedding].clone()}))
    require_same_model(model.config, original, open_quantized(tmp_path / "c"))
    rewrite(tmp_path / "c", lambda state: state["lm_head.weight"].mul_(2))
    with pytest.raises(CheckpointError, match=r"tensor lm_head\.weight must be the original's to rounding"):
        require_same_model(model.config, original, open_quantized(tmp_path / "c"))


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (
            "model.embed_tokens",
            r"tensor model\.embed_tokens\.weight must be the original's to rounding, got 1 ",
        ),
        ("model.norm", r"tensor model\.norm\.weight must be the original's to rounding, got 1 others of 160"),
        ("lm_head", r"tensor lm_head\.weight must be the original's to rounding, got 1 others of"),
    ],
)
def test_another_model_is_refused(
    part: str, message: str, checkpoint: QuantizedCheckpoint, tmp_path: Path
) -> None:
    model = tiny_model("llama")
    model.get_submodule(part).weight.data.view(-1)[7] += 0.01
    with pytest.raises(CheckpointError, match=message):
        require_same_model(model.config, saved(model, tmp_path / "m"), checkpoint)


@pytest.mark.parametrize(
    "change",
    [{"hidden_size": 128}, {"num_hidden_layers": 3}, {"num_key_value_heads": 1}, {"vocab_size": 260}],
)
def test_other_shapes_are_refused(
    change: dict[str, Any], checkpoint: QuantizedCheckpoint, tmp_path: Path
) -> None:
    model = tiny_model("llama")
    config = copy.deepcopy(model.config)
    key, value = next(iter(change.items()))
    setattr(config, key, value)
    with pytest.raises(CheckpointError, match=f"{key} of the checkpoint must be the original's {value}, got"):
        require_same_model(config, saved(model, tmp_path / "m"), checkpoint)


def test_a_checkpoint_without_a_norm_is_refused(tmp_path: Path) -> None:
    model = tiny_model("llama")
    write_gptq(tmp_path / "c", model, 4)
    rewrite(tmp_path / "c", lambda state: state.pop("model.norm.weight"))
    with pytest.raises(
        CheckpointError, match=r"tensor model\.norm\.weight must be in the checkpoint, got none"
    ):
        require_same_model(model.config, saved(model, tmp_path / "m"), open_quantized(tmp_path / "c"))
