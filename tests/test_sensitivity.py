from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import CALIBRATION, save_tiny
from transformers import AutoModelForCausalLM

from decdec_core import build as building
from decdec_core.build import build_artifact
from decdec_core.config import Compensation, ResidualQuant, WeightQuant
from decdec_core.dense import write_dense
from decdec_core.model import dec_layers, set_compensation
from decdec_core.sensitivity import choose_bits


def test_the_more_sensitive_half_gets_the_higher_width() -> None:
    assert choose_bits([5, 1, 9, 2], [1, 0.5, 1, 0], (3, 4)) == [4, 3, 4, 3]
    assert choose_bits([5, 1, 9], [1, 0.5, 1], (2, 3)) == [2, 2, 3]  # odd: never more bits than asked for
    assert choose_bits([1, 1, 1, 1], [0, 0, 0, 0], (4, 5)) == [5, 5, 4, 4]  # equal: the earlier ones
    assert choose_bits([1, 4], [0.9, 3.95], (3, 4)) == [4, 3]  # what the wider one gains, not what is lost


@pytest.mark.parametrize(("method", "bits"), [("awq", 3.5), ("squeezellm", 2.5), ("rtn", 4.5)])
@torch.no_grad()
def test_divergences_are_those_of_models_with_one_quantized_block(
    method: str, bits: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = save_tiny("llama-grouped-tied", tmp_path / "m")
    seen = {}
    measure = building.block_divergences

    def watched(model, work, ids, config):  # type: ignore[no-untyped-def]
        seen["ids"], seen["found"] = ids, measure(model, work, ids, config)
        return seen["found"]

    monkeypatch.setattr(building, "block_divergences", watched)
    quant = WeightQuant(method, bits)
    mixed = build_artifact(str(plain), tmp_path / "mixed", quant, ResidualQuant(4), CALIBRATION)
    full = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32)
    wanted = F.log_softmax(full(seen["ids"]).logits, -1)
    for width in quant.widths:
        whole = build_artifact(
            str(plain), tmp_path / f"{width}", quant.at(width), ResidualQuant(4), CALIBRATION
        )
        dense = AutoModelForCausalLM.from_pretrained(
            write_dense(whole, tmp_path / f"{width}-dense"), dtype=torch.float32
        )
        for index in range(2):
            one = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32)
            one.model.layers[index] = dense.model.layers[index]
            got = F.log_softmax(one(seen["ids"]).logits, -1)
            divergence = (wanted.exp() * (wanted - got)).sum(-1).mean().item()
            # float32 rounding of sums over 259 tokens, in differences of log-probabilities
            assert seen["found"][width][index] == pytest.approx(divergence, rel=1e-2, abs=1e-6)
    low, high = (seen["found"][width] for width in quant.widths)
    chosen = choose_bits(low, high, quant.widths)
    model = AutoModelForCausalLM.from_pretrained(mixed, dtype=torch.float32)
    assert list(model.hf_quantizer.quantization.block_bits) == chosen
    assert sorted(chosen) == list(quant.widths)
    for name, layer in dec_layers(model).items():
        assert layer.config.bits == chosen[int(name.split(".")[2])]
    # and it is the model made of those blocks
    set_compensation(model, Compensation("none"))
    for index, width in enumerate(chosen):
        dense = AutoModelForCausalLM.from_pretrained(tmp_path / f"{width}-dense", dtype=torch.float32)
        full.model.layers[index] = dense.model.layers[index]
    assert torch.allclose(model(seen["ids"]).logits, full(seen["ids"]).logits, atol=1e-4)
