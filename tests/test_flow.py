"""The whole line on tiny models: weights -> artifact -> transformers -> compensated logits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import ARCHITECTURES, CALIBRATION, save_tiny
from transformers import AutoModelForCausalLM

from decdec_core import kernels
from decdec_core.artifact import load_host_tensors
from decdec_core.build import build_artifact
from decdec_core.config import Compensation, DecDECError, ResidualQuant, WeightQuant
from decdec_core.dense import write_dense
from decdec_core.model import compensation_ledger, dec_layers, set_compensation
from decdec_core.verify import verify

ALL_16_BIT = Compensation("exact", 1024, "all")


@pytest.fixture
def ids(draw: torch.Generator) -> torch.Tensor:
    return torch.randint(0, 256, (2, 70), generator=draw)


def _load(folder: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@torch.no_grad()
def _logits(model: torch.nn.Module, ids: torch.Tensor, compensation: Compensation) -> torch.Tensor:
    set_compensation(model, compensation)
    return model(ids).logits


@pytest.mark.parametrize("method", ["awq", "rtn"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_identities(architecture: str, method: str, tmp_path: Path, ids: torch.Tensor) -> None:
    plain = save_tiny(architecture, tmp_path / "plain")
    quant = WeightQuant(method, 3)
    folder = build_artifact(str(plain), tmp_path / "artifact", quant, ResidualQuant(16), CALIBRATION)
    model, full = _load(folder), _load(plain)
    dense = _load(write_dense(folder, tmp_path / "dense"))
    with torch.no_grad():
        wanted, base = full(ids).logits, dense(ids).logits
    none = _logits(model, ids, Compensation("none"))
    # the same weights through plain transformers: equal to float32 rounding
    assert torch.allclose(none, base, atol=1e-4)
    assert torch.equal(_logits(model, ids, Compensation("dynamic", 0)), none)
    # every channel of a 16-bit residual is the full-precision model, to float16 rounding of the residual
    everything = _logits(model, ids, ALL_16_BIT)
    assert torch.allclose(everything, wanted, atol=5e-3)
    assert (none - wanted).abs().max() > 20 * (everything - wanted).abs().max()


@torch.no_grad()
def test_more_channels_come_nearer_to_full_precision(
    tiny_artifact_dir: Path, tiny_model_dir: Path, ids: torch.Tensor
) -> None:
    model, full = _load(tiny_artifact_dir), _load(tiny_model_dir)
    wanted = full(ids).logits

    def error(selection: str, k_chunk: int) -> float:
        return (_logits(model, ids, Compensation(selection, k_chunk)) - wanted).square().mean().item()

    none = error("none", 0)
    assert none > error("exact", 64) > error("exact", 256) > error("exact", 1024)
    assert error("exact", 256) <= error("dynamic", 256) * 1.02 < none
    assert error("dynamic", 256) < error("random", 256)


@torch.no_grad()
def test_a_batch_gives_what_its_rows_give(tiny_artifact_dir: Path, ids: torch.Tensor) -> None:
    model = _load(tiny_artifact_dir)
    for selection in ("random", "static", "exact", "dynamic"):
        both = _logits(model, ids, Compensation(selection, 64))
        alone = torch.cat([model(row.unsqueeze(0)).logits for row in ids])
        assert torch.allclose(both, alone, atol=1e-4), selection


@torch.no_grad()
def test_left_padding_changes_nothing(tiny_artifact_dir: Path, ids: torch.Tensor) -> None:
    model = _load(tiny_artifact_dir)
    alone = _logits(model, ids, Compensation("dynamic", 64))
    padded = torch.cat([torch.full((2, 9), 256), ids], dim=1)
    mask = (torch.arange(padded.shape[1]) >= 9).long().expand(2, -1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    found = model(padded, attention_mask=mask, position_ids=positions).logits[:, 9:]
    assert torch.allclose(found, alone, atol=1e-4)


@torch.no_grad()
def test_auto_compensates_all_of_a_plain_pass_and_the_steps_of_generation(
    tiny_artifact_dir: Path, ids: torch.Tensor
) -> None:
    model = _load(tiny_artifact_dir)
    none = _logits(model, ids, Compensation("none"))
    everywhere = _logits(model, ids, Compensation("dynamic", 256, "all"))
    assert torch.equal(_logits(model, ids, Compensation("dynamic", 256, "auto")), everywhere)
    assert torch.equal(_logits(model, ids, Compensation("dynamic", 256, "decode")), none)
    assert not torch.equal(everywhere, none)

    seen: list[bool] = []
    layer = dec_layers(model)["model.layers.1.mlp.down_proj"]
    handle = layer.register_forward_pre_hook(lambda m, args: seen.append(m.scope.active))
    set_compensation(model, Compensation("dynamic", 256, "auto"))
    model.generate(ids, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert seen == [False, True, True, True]  # the prompt, then single tokens
    seen.clear()
    set_compensation(model, Compensation("dynamic", 256, "all"))
    model.generate(ids, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert seen == [True] * 4
    handle.remove()


@torch.no_grad()
@pytest.mark.parametrize("selection", ["random", "static", "exact", "dynamic"])
def test_generation_does_not_depend_on_the_batch(selection: str, tiny_artifact_dir: Path) -> None:
    model = _load(tiny_artifact_dir)
    set_compensation(model, Compensation(selection, 256, "auto"))
    prompts = [[65], list(range(70, 90)), [100, 101, 102]]  # one of a single token: prompt all the same
    longest = max(map(len, prompts))
    padded = torch.tensor([[256] * (longest - len(p)) + p for p in prompts])
    mask = (padded != 256).long()
    how = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    together = model.generate(padded, attention_mask=mask, **how)[:, longest:]
    for prompt, answer in zip(prompts, together, strict=True):
        alone = model.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), **how)
        assert answer.tolist() == alone[0, len(prompt) :].tolist()


@torch.no_grad()
def test_new_weights_are_used_and_any_layout_is_taken(tiny_artifact_dir: Path, ids: torch.Tensor) -> None:
    model = _load(tiny_artifact_dir)
    before = _logits(model, ids, Compensation("dynamic", 64))
    state = {
        name: tensor * 3 if name.endswith(".scales") else tensor
        for name, tensor in model.state_dict().items()
    }
    model.load_state_dict(state)
    assert not torch.allclose(model(ids).logits, before)
    layer = dec_layers(model)["model.layers.0.self_attn.q_proj"]
    wide = torch.randn(2, 3, 2 * layer.in_features)
    part = wide[..., : layer.in_features]
    assert torch.equal(layer(part), layer(part.contiguous()))


def test_the_ledger_counts_what_is_fetched(tiny_artifact_dir: Path) -> None:
    model = _load(tiny_artifact_dir)
    set_compensation(model, Compensation("dynamic", "16/32/64/128", "all", seed=3))
    ledger = compensation_ledger(model)
    # per block: q, k, v of 160 -> 160 at 16, o at 32, gate and up 160 -> 1120 at 64, down 1120 -> 160 at 128
    channels = [(2, 80)] * 3 + [(5, 80)] + [(10, 560)] * 2 + [(128 + 12, 80)]
    assert ledger["channels_per_token"] == 2 * sum(k for k, _ in channels)
    assert ledger["bytes_per_token"] == 2 * sum(k * size for k, size in channels)
    assert ledger["artifact_hash"] == verify(tiny_artifact_dir).hash
    assert (ledger["selection"], ledger["compensate"], ledger["seed"]) == ("dynamic", "all", 3)
    assert ledger["k_chunk"] == [16, 32, 64, 128]
    assert ledger["kernel"] == kernels.in_use()
    set_compensation(model, Compensation("none"))
    assert compensation_ledger(model)["k_chunk"] == [0, 0, 0, 0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision_keeps_the_stored_weights(
    dtype: torch.dtype, tiny_artifact_dir: Path, ids: torch.Tensor
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_artifact_dir, dtype=dtype)
    exact = _load(tiny_artifact_dir)
    for name, layer in dec_layers(model).items():
        assert layer.scales.dtype == torch.float16
        assert torch.equal(layer.scales, dec_layers(exact)[name].scales)
    found = _logits(model, ids, Compensation("dynamic", 256))
    assert found.dtype == dtype
    wanted = _logits(exact, ids, Compensation("dynamic", 256))
    # 8 bits of mantissa through two blocks; selection may differ where two activations round together
    assert (found.float() - wanted).square().mean().sqrt() < 0.05 * wanted.std()
    cast = exact.to(dtype)
    assert dec_layers(cast)["model.layers.0.mlp.down_proj"].scales.dtype == torch.float16


def test_the_residual_is_no_buffer_and_comes_from_the_artifact(tiny_artifact_dir: Path) -> None:
    model = _load(tiny_artifact_dir)
    kept = load_host_tensors(tiny_artifact_dir, verify(tiny_artifact_dir), ResidualQuant(4))
    assert not any("residual" in name for name in model.state_dict())
    assert not any(parameter.requires_grad for parameter in model.parameters())
    for name, layer in dec_layers(model).items():
        assert layer.residual is not None
        assert torch.equal(layer.residual.codes, kept[name][0].codes)


def test_a_plain_model_has_nothing_to_set(tiny_model_dir: Path) -> None:
    with pytest.raises(
        DecDECError, match="must be loaded from a decdec artifact, got a plain LlamaForCausalLM"
    ):
        set_compensation(_load(tiny_model_dir), Compensation())


def test_building_twice_gives_the_same_bytes(
    tiny_model_dir: Path, tiny_artifact_dir: Path, tmp_path: Path
) -> None:
    again = build_artifact(
        str(tiny_model_dir), tmp_path / "again", WeightQuant("awq", 3), ResidualQuant(4), CALIBRATION
    )
    assert verify(again).tensors == verify(tiny_artifact_dir).tensors
