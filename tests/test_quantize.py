from __future__ import annotations

import pytest
import torch
from conftest import ARCHITECTURES, quantize_to, tiny_model

from decdec_core.architectures import decoder_blocks, input_groups
from decdec_core.config import DecDECError, WeightQuant
from decdec_core.packing import pack_codes
from decdec_core.quantize import CodebookWeight, UniformWeight, awq, weight_layout, weight_of
from decdec_core.quantize.uniform import quantize, round_trip


@pytest.mark.parametrize("bits", [2, 3, 4, 5])
@pytest.mark.parametrize("in_features", [1, 100, 128, 576, 1000])
def test_error_is_at_most_half_a_step(bits: int, in_features: int, draw: torch.Generator) -> None:
    weight = torch.randn(16, in_features, generator=draw)
    q = quantize(weight, WeightQuant("rtn", bits))
    decoded = q.dequantize()
    steps = q.scales.float().repeat_interleave(128, 1)[:, :in_features]
    # rounding the zero point and the scale (float16) adds up to another half step at the ends of the range
    assert ((decoded - weight).abs() <= 1.01 * steps).all()
    inside = (decoded - weight).abs() <= 0.501 * steps
    assert inside.float().mean() > 0.9
    assert q.scales.shape == q.zeros.shape == (16, -(-in_features // 128))


def test_scale_and_zero_follow_the_formula() -> None:
    weight = torch.tensor([[-1.0, 0.0, 0.5, 2.5]])
    q = quantize(weight, WeightQuant("rtn", 3))
    assert q.scales.item() == 0.5  # (2.5 + 1) / 7
    assert q.zeros.item() == 2  # round(1 / 0.5)
    assert torch.equal(q.dequantize(), weight)


@pytest.mark.parametrize("value", [0.0, 3.0, -3.0, 1e-6])
def test_constant_groups_are_exact(value: float) -> None:
    weight = torch.full((2, 130), value)
    # 1e-6 / 7 is a subnormal float16, off by up to 3e-8, and the top code is seven of them
    decoded = quantize(weight, WeightQuant("rtn", 3)).dequantize()
    assert torch.allclose(decoded, weight, rtol=1e-3, atol=2.1e-7)


def test_a_group_of_one_sign_is_not_cut_off() -> None:
    weight = torch.linspace(10, 11, 128).unsqueeze(0)
    assert (quantize(weight, WeightQuant("rtn", 3)).dequantize() - weight).abs().max() < 11 / 7


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e9])
def test_weights_that_float16_scales_cannot_hold_are_refused(bad: float) -> None:
    weight = torch.ones(2, 8)
    weight[1, 3] = bad
    with pytest.raises(DecDECError, match="weight must be finite with float16 scales"):
        quantize(weight, WeightQuant("rtn", 3, 8))


def test_round_trip_is_quantize_and_back(draw: torch.Generator) -> None:
    weight = torch.randn(5, 300, generator=draw)
    config = WeightQuant("rtn", 3)
    assert torch.equal(round_trip(weight, config), quantize(weight, config).dequantize())


@pytest.mark.parametrize("in_features", [5, 128, 300])
def test_one_scale_for_a_whole_row(in_features: int, draw: torch.Generator) -> None:
    weight = torch.randn(4, in_features, generator=draw)
    q = quantize(weight, WeightQuant("gptq", 4, 65536))
    assert q.scales.shape == (4, 1)
    assert torch.equal(q.dequantize(), quantize(weight, WeightQuant("gptq", 4, in_features + 8)).dequantize())
    assert ((q.dequantize() - weight).abs() <= 1.01 * q.scales.float()).all()


@pytest.mark.parametrize("bits", [2, 3, 4, 5])
@pytest.mark.parametrize("method", ["rtn", "squeezellm"])
def test_the_layout_is_what_a_weight_holds(method: str, bits: int) -> None:
    weight, config = torch.randn(7, 300), WeightQuant(method, bits)
    q = quantize_to(weight, config)
    tensors = q.tensors()
    layout = weight_layout(config, 300, 7)
    assert {n: (tuple(t.shape), t.dtype) for n, t in tensors.items()} == layout
    again = weight_of(config, 300, tensors)
    assert type(again) is (CodebookWeight if method == "squeezellm" else UniformWeight)
    assert torch.equal(again.dequantize(), q.dequantize())


def test_a_codebook_is_looked_up_by_row() -> None:
    config = WeightQuant("squeezellm", 2)
    codes = torch.tensor([[0, 3, 1], [2, 2, 0]], dtype=torch.uint8)
    table = torch.tensor([[-1.0, 0.0, 0.5, 2.0], [7.0, 8.0, 9.0, 10.0]]).half()
    weight = CodebookWeight(pack_codes(codes, 2), table, 3, config)
    assert weight.dequantize().tolist() == [[-1.0, 2.0, 0.0], [9.0, 9.0, 7.0]]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.no_grad()
def test_awq_scales_leave_the_function_as_it_was(architecture: str, draw: torch.Generator) -> None:
    model = tiny_model(architecture)
    ids = torch.randint(0, 256, (2, 96), generator=draw)
    before = model(ids).logits
    groups = input_groups(model.config)
    blocks = decoder_blocks(model)
    folded = 0
    for block in blocks.values():
        for group in groups:
            linear = awq.linear_of(block, group.linears[0])
            scale = torch.rand(linear.in_features, generator=draw) * 3 + 0.5
            kept = awq.apply_scale(block, group, scale)
            folded += kept is None
            if kept is not None:
                linear.register_forward_pre_hook(lambda _m, args, s=kept: (args[0] / s,))
    grouped_queries = model.config.num_key_value_heads != model.config.num_attention_heads
    assert folded == len(blocks) * (3 if grouped_queries else 4)
    # float32 rounding through two blocks; a scale in the wrong place changes logits by whole units
    assert torch.allclose(model(ids).logits, before, atol=2e-4)


@torch.no_grad()
def test_awq_beats_rounding_on_a_layer_with_outlier_channels(draw: torch.Generator) -> None:
    model = tiny_model("llama")
    ids = torch.randint(0, 256, (4, 64), generator=draw)
    block = next(iter(decoder_blocks(model).values()))
    groups = input_groups(model.config)
    sample = awq.Sample(block, groups, lambda: model(ids))
    config = WeightQuant("awq", 3)
    group = groups[2]
    gate = awq.linear_of(block, "mlp.gate_proj").weight.data.clone()
    scale = awq.search_scale(block, group, sample, config)
    assert torch.equal(awq.linear_of(block, "mlp.gate_proj").weight.data, gate)  # left as it was
    x = sample.inputs(group.kind)
    plain = (x @ (round_trip(gate, config) - gate).T).square().mean()
    scaled = (x @ (round_trip(gate * scale, config) / scale - gate).T).square().mean()
    assert scaled < plain


def test_clipping_never_raises_the_error_on_its_own_sample(draw: torch.Generator) -> None:
    weight = torch.randn(8, 300, generator=draw) ** 3
    inputs = torch.randn(50, 300, generator=draw)
    config = WeightQuant("awq", 3)
    clipped = awq.clip(weight, inputs, config)
    for start in range(0, 300, 128):
        part, x = slice(start, start + 128), inputs[:, start : start + 128]
        one = WeightQuant("awq", 3, 128)
        before = (x @ (round_trip(weight[:, part], one) - weight[:, part]).T).square().sum(0)
        after = (x @ (round_trip(clipped[:, part], one) - weight[:, part]).T).square().sum(0)
        assert (after <= before * (1 + 1e-5)).all()
        assert after.sum() < before.sum()
