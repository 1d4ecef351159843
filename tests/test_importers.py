from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoint_writers import (
    awq_settings,
    awq_tensors,
    gptq_settings,
    gptq_tensors,
    linear_names,
    rewrite,
    rounded,
    write_checkpoint,
    write_compressed,
)
from conftest import tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedModel

from decdec_core.config import DecDECError, WeightQuant
from decdec_core.importers import CheckpointError, open_quantized
from decdec_core.importers.checkpoint import imported_layer
from decdec_core.importers.layouts import WHOLE_ROW, CompressedLayout, GptqLayout

LAYER = "model.layers.0.self_attn.q_proj"


def write_gptq(
    folder: Path, model: PreTrainedModel, bits: int = 4, group_size: int = 32, **more: Any
) -> Path:
    def tensors(_name: str, weight: Tensor) -> dict[str, Tensor]:
        version = 2 if more.get("checkpoint_format") == "gptq_v2" else 1
        return gptq_tensors(rounded(weight, bits, group_size), bits, version)

    return write_checkpoint(folder, model, gptq_settings(bits, group_size, **more), tensors)


def write_awq(folder: Path, model: PreTrainedModel, group_size: int = 32, **more: Any) -> Path:
    return write_checkpoint(
        folder,
        model,
        awq_settings(group_size, **more),
        lambda _n, w: awq_tensors(rounded(w, 4, group_size)),
    )


def change_settings(folder: Path, **changes: Any) -> Path:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= changes
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def gptq_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gptq(tmp_path_factory.mktemp("gptq") / "c", tiny_model("llama"))


@pytest.fixture
def gptq(gptq_dir: Path, tmp_path: Path) -> Path:
    """A 4-bit GPTQ checkpoint of the tiny Llama that a test may alter."""
    target = tmp_path / "copy"
    target.mkdir()
    for file in gptq_dir.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


@pytest.mark.parametrize(
    ("version", "bits", "group_size"),
    [
        ("gptq", 2, 32),
        ("gptq", 3, 128),
        ("gptq", 3, -1),
        ("gptq", 4, 48),  # ragged: 128 = 48 + 48 + 32
        ("gptq_v2", 3, 32),
        ("gptq_v2", 4, 128),
    ],
)
def test_gptq_decodes_to_its_formula(version: str, bits: int, group_size: int, tmp_path: Path) -> None:
    model = tiny_model("llama-grouped-tied")
    write_gptq(tmp_path / "c", model, bits, group_size, checkpoint_format=version)
    checkpoint = open_quantized(tmp_path / "c")
    size = WHOLE_ROW if group_size == -1 else group_size
    assert checkpoint.format == "gptq"
    assert checkpoint.weight_quant == WeightQuant("gptq", bits, size)
    for name in linear_names(model):
        wanted = rounded(model.get_submodule(name).weight, bits, group_size)
        layer = checkpoint.layer(name)
        # the same float16 scales times small integers: exact in float32
        assert torch.equal(layer.weight.dequantize(), wanted.dense())
        assert layer.input_order is None
        layout = layer.weight.layout(checkpoint.weight_quant, *reversed(wanted.codes.shape))
        assert {k: (tuple(t.shape), t.dtype) for k, t in layer.weight.tensors().items()} == layout


def test_awq_decodes_to_its_formula(tmp_path: Path) -> None:
    model = tiny_model("phi3")
    checkpoint = open_quantized(write_awq(tmp_path / "c", model))
    assert checkpoint.weight_quant == WeightQuant("awq", 4, 32)
    for name in linear_names(model):
        wanted = rounded(model.get_submodule(name).weight, 4, 32)
        assert torch.equal(checkpoint.layer(name).weight.dequantize(), wanted.dense())


@pytest.mark.parametrize(
    ("bits", "more", "group_size"),
    [
        (3, {"strategy": "group", "group_size": 32, "symmetric": False}, 32),
        (3, {"strategy": "channel"}, WHOLE_ROW),
        (4, {"strategy": "group", "group_size": 32}, 32),
        (4, {"strategy": "channel", "symmetric": False}, WHOLE_ROW),
        (4, {"strategy": "group", "group_size": 160, "symmetric": False, "actorder": "static"}, 160),
        (2, {"strategy": "group", "group_size": 32, "symmetric": False}, 32),
        (5, {"strategy": "group", "group_size": 32}, 32),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compressed_tensors_decodes_as_its_library_does(
    bits: int, more: dict[str, Any], group_size: int, dtype: torch.dtype, tmp_path: Path
) -> None:
    model = tiny_model("llama").to(dtype)
    decoded = write_compressed(tmp_path / "c", model, {"num_bits": bits, **more})
    checkpoint = open_quantized(tmp_path / "c")
    assert checkpoint.format == "compressed-tensors"
    assert checkpoint.weight_quant == WeightQuant("compressed-tensors", bits, group_size)
    assert len(decoded) == 14
    for name, wanted in decoded.items():
        got = checkpoint.layer(name).weight.dequantize()
        # float32 scales are rounded to float16 here, bfloat16 products to bfloat16 there; both are one
        # rounding of each value
        step = 2.0**-11 if dtype == torch.float32 else 2.0**-8
        assert ((got - wanted.float()).abs() <= 1.01 * step * wanted.float().abs() + 1e-7).all()


def test_compressed_tensors_of_older_versions_hold_whole_codes_in_a_word(draw: torch.Generator) -> None:
    codes = torch.randint(0, 8, (24, 160), generator=draw)
    zeros = torch.randint(0, 8, (24, 5), generator=draw)

    def words(rows: Tensor) -> Tensor:
        packed = torch.zeros(rows.shape[0], -(-rows.shape[1] // 10), dtype=torch.int32)
        for column in range(rows.shape[1]):
            packed[:, column // 10] |= (rows[:, column] << (3 * (column % 10))).int()
        return packed

    layout = CompressedLayout(WeightQuant("compressed-tensors", 3, 32), symmetric=False)
    tensors = {
        "weight_packed": words(codes),
        "weight_scale": torch.ones(24, 5),
        "weight_shape": torch.tensor([24, 160]),
        "weight_zero_point": words(zeros.T).T,
    }
    assert tensors["weight_packed"].shape in layout.needed(160, 24)["weight_packed"].shapes
    parts = layout.parts(tensors, 160, 24)
    assert torch.equal(parts.codes.long(), codes)
    assert torch.equal(parts.zeros.long(), zeros)


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from([2, 3, 4]),
    st.integers(1, 6),
    st.sampled_from([8, 24, 32, 128]),
    st.integers(0, 2**32 - 1),
    st.booleans(),
)
def test_inputs_in_any_order_come_out_in_theirs(
    bits: int, blocks: int, group_size: int, seed: int, version_2: bool
) -> None:
    generator = np.random.default_rng(seed)
    in_features, out_features = 32 * blocks, 32
    weight = torch.from_numpy(generator.standard_normal((out_features, in_features)))
    wanted = rounded(weight, bits, group_size, order=generator.permutation(in_features))
    config = WeightQuant("gptq", bits, group_size)
    layout = GptqLayout(config, stored_below=0 if version_2 else 1, act_order=True)
    tensors = gptq_tensors(wanted, bits, 2 if version_2 else 1)
    layer = imported_layer(layout.parts(tensors, in_features, out_features), config)
    assert torch.equal(layer.dense(), wanted.dense())
    if layer.input_order is not None:
        inverse = layer.input_order.long().argsort()
        assert torch.equal(layer.input_order[inverse], torch.arange(in_features, dtype=torch.int32))
        assert torch.equal(layer.weight.dequantize()[:, inverse], wanted.dense())
    # the mean squared step of each logical input's group
    steps = torch.from_numpy(wanted.scales[:, wanted.index].astype(np.float32))
    assert torch.allclose(layer.noise(), steps.square().mean(0) / 12)


@pytest.mark.parametrize("stem", ["model", "gptq_model-4bit-32g"])
@pytest.mark.parametrize("shards", [1, 3])
def test_act_order_and_the_first_quantizers_names(stem: str, shards: int, tmp_path: Path) -> None:
    model = tiny_model("llama-grouped-tied")
    orders = {n: torch.randperm(model.get_submodule(n).in_features).numpy() for n in linear_names(model)}

    def layer(name: str, weight: Tensor) -> dict[str, Tensor]:
        return gptq_tensors(rounded(weight, 4, 32, order=orders[name]), 4)

    folder = write_checkpoint(
        tmp_path / "c", model, gptq_settings(4, 32, desc_act=True), layer, shards=shards, stem=stem
    )
    config = json.loads((folder / "config.json").read_text())
    inside = config.pop("quantization_config")
    del inside["quant_method"]
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "quantize_config.json").write_text(json.dumps(inside))
    checkpoint = open_quantized(folder)
    for name, order in orders.items():
        got = checkpoint.layer(name)
        wanted = rounded(model.get_submodule(name).weight, 4, 32, order=order)
        assert torch.equal(got.dense(), wanted.dense())
        assert got.input_order is not None
        assert not torch.equal(got.weight.dequantize(), wanted.dense())
    assert checkpoint.description["quantization_config"]["desc_act"] is True
    json.dumps(checkpoint.description)


def test_negative_and_zero_scales_keep_their_values(draw: torch.Generator) -> None:
    wanted = rounded(torch.randn(32, 96, generator=draw), 3, 32)
    wanted.scales[::3] *= -1
    wanted.scales[1::3, 1] = 0
    config = WeightQuant("gptq", 3, 32)
    layer = imported_layer(GptqLayout(config, 1, False).parts(gptq_tensors(wanted, 3), 96, 32), config)
    assert torch.equal(layer.dense(), wanted.dense() + 0.0)  # -0 is 0
    assert (layer.weight.scales > 0).all()


@pytest.mark.parametrize("bad", [7e4, 1e-9, float("nan")])
def test_scales_that_float16_cannot_hold_are_refused(bad: float, gptq: Path) -> None:
    def change(state: dict[str, Tensor]) -> None:
        state[f"{LAYER}.scales"] = state[f"{LAYER}.scales"].float()
        state[f"{LAYER}.scales"][1, 2] = bad

    checkpoint = open_quantized(rewrite(gptq, change))
    with pytest.raises(CheckpointError, match=f"layer {LAYER}: scales must be ones that float16 can hold"):
        checkpoint.layer(LAYER)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quant_method": "bitsandbytes"}, "quant_method must be one of gptq, awq, compressed-tensors"),
        ({"quant_method": "fp8"}, "quant_method must be one of"),
        ({"checkpoint_format": "marlin"}, "checkpoint_format must be one of gptq, gptq_v2, got 'marlin'"),
        ({"is_marlin_format": True}, "checkpoint_format must be one of gptq, gptq_v2, got 'marlin'"),
        ({"bits": 8}, "bits of a gptq checkpoint must be one of 2, 3, 4, got 8"),
        ({"bits": 3}, r"qweight must be \(15, 160\), got \(20, 160\)"),
        ({"group_size": 64}, r"qzeros must be \(3, 20\), got \(5, 20\)"),
        ({"group_size": "all"}, "group_size must be a number or -1 for a whole row, got 'all'"),
        ({"quant_method": "awq", "version": "gemv"}, "version of an awq checkpoint must be one of gemm"),
        ({"quant_method": "awq", "version": "marlin"}, "version of an awq checkpoint must be one of gemm"),
        ({"quant_method": "awq", "version": "exllama"}, "version of an awq checkpoint must be one of gemm"),
        ({"quant_method": "awq", "version": "gemm", "bits": 3}, "bits of an awq checkpoint must be one of 4"),
        ({"quant_method": "awq", "version": "gemm"}, r"qweight must be \(160, 20\), got \(20, 160\)"),
    ],
)
def test_other_settings_are_refused_by_name(changes: dict[str, Any], message: str, gptq: Path) -> None:
    with pytest.raises(DecDECError, match=message):
        open_quantized(change_settings(gptq, **changes))


COMPRESSED: dict[str, Any] = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "config_groups": {"group_0": {"weights": {"num_bits": 4, "strategy": "group", "group_size": 32}}},
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "float-quantized"}, "format of a compressed-tensors checkpoint must be one of pack-quan"),
        ({"format": "int-quantized"}, "must be one of pack-quantized, got 'int-quantized'"),
        ({"format": "marlin-24"}, "must be one of pack-quantized, got 'marlin-24'"),
        ({"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme must be absent"),
        ({"transform_config": {"config_groups": {}}}, "transform_config must be absent"),
        ({"config_groups": []}, r"config_groups must be an object, got \[\]"),
        ({"config_groups": {}}, "config_groups must quantize weights in one way, got 0"),
        ({"weights": {"num_bits": 8}}, "num_bits of weights must be one of 2, 3, 4, 5, got 8"),
        ({"weights": {"type": "float"}}, "type of weights must be one of int, got 'float'"),
        ({"weights": {"strategy": "tensor"}}, "strategy of weights must be one of group, channel"),
        ({"weights": {"dynamic": True}}, "dynamic of weights must be one of False, got True"),
        ({"input_activations": {"num_bits": 8}}, "input_activations must be absent"),
        ({}, f"layer {LAYER} must have a tensor weight_packed, got none"),
    ],
)
def test_other_compressed_tensors_are_refused_by_name(
    changes: dict[str, Any], message: str, gptq: Path
) -> None:
    values = copy.deepcopy(COMPRESSED)
    group = values["config_groups"]["group_0"]
    group["weights"] |= changes.pop("weights", {})
    if "input_activations" in changes:
        group |= changes
    else:
        values |= changes
    with pytest.raises(DecDECError, match=message):
        open_quantized(change_settings(gptq, **values))


def _pop(state: dict[str, Tensor], name: str) -> None:
    del state[name]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: _pop(s, f"{LAYER}.scales"), f"layer {LAYER} must have a tensor scales, got none"),
        (
            lambda s: s.update({f"{LAYER}.scales": s[f"{LAYER}.scales"][:4].clone()}),
            r"scales must be \(5, 160\), got \(4, 160\)",
        ),
        (
            lambda s: s.update({f"{LAYER}.qweight": s[f"{LAYER}.qweight"].long()}),
            "dtype of tensor model.layers.0.self_attn.q_proj.qweight must be one of I32, got 'I64'",
        ),
        (
            lambda s: s.update({f"{LAYER}.weight": torch.zeros(160, 160)}),
            f"layer {LAYER} must be quantized, got a full-precision weight",
        ),
        (
            lambda s: s.update({"lm_head.qweight": torch.zeros(20, 259, dtype=torch.int32)}),
            "quantized layers must be the decoder blocks' linear layers alone, got lm_head",
        ),
    ],
)
def test_other_tensors_are_refused_by_name(change: Any, message: str, gptq: Path) -> None:
    with pytest.raises(DecDECError, match=message):
        open_quantized(rewrite(gptq, change))


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ([0] * 160, r"inputs from 0, got 1 groups of 160\.\.160, numbered 0\.\.0"),
        ([*range(5)] * 31 + [0] * 5, r"inputs from 0, got 5 groups of 31\.\.36, numbered 0\.\.4"),
        ([*range(1, 6)] * 32, r"inputs from 0, got 5 groups of 32\.\.32, numbered 1\.\.5"),
        ([-1, 2**31 - 1] * 80, r"inputs from 0, got 2 groups of 80\.\.80, numbered -1\.\.2147483647"),
    ],
)
def test_uneven_groups_are_refused(index: list[int], message: str, gptq: Path) -> None:
    wrong = torch.tensor(index, dtype=torch.int32)
    checkpoint = open_quantized(rewrite(gptq, lambda s: s.update({f"{LAYER}.g_idx": wrong})))
    with pytest.raises(CheckpointError, match=message):
        checkpoint.layer(LAYER)


def test_a_decoder_layer_that_was_ignored_is_refused(tmp_path: Path) -> None:
    ignored = "model.layers.1.mlp.down_proj"
    args = {"num_bits": 4, "strategy": "group", "group_size": 32}
    write_compressed(tmp_path / "c", tiny_model("llama"), args, ("lm_head", ignored))
    with pytest.raises(CheckpointError, match=f"layer {ignored} must be quantized, got a full-precision"):
        open_quantized(tmp_path / "c")


def test_what_is_no_checkpoint_is_refused(tmp_path: Path, tiny_model_dir: Path, gptq: Path) -> None:
    with pytest.raises(CheckpointError, match=r"quantized must be a folder with a config\.json"):
        open_quantized(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="must hold a quantized model, got no quantization_config"):
        open_quantized(tiny_model_dir)
    with pytest.raises(
        CheckpointError, match="layer must be a linear layer of a decoder block, got 'lm_head'"
    ):
        open_quantized(gptq).layer("lm_head")
    (gptq / "model.safetensors").rename(gptq / "model.bin")
    with pytest.raises(DecDECError, match=r"must hold model\.safetensors"):
        open_quantized(gptq)
    (gptq / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json must be JSON"):
        open_quantized(gptq)
