"""Error energy removed, against a model that computes both outputs itself."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from decdec_core.architectures import kind_of
from decdec_core.config import PROJECTION_KINDS, Compensation, DecDECError
from decdec_core.energy import error_energy
from decdec_core.fusing import fuse
from decdec_core.model import dec_layers, set_compensation, state_of


@pytest.fixture
def ids(draw: torch.Generator) -> Tensor:
    return torch.randint(0, 256, (2, 40), generator=draw)


@torch.no_grad()
def test_it_is_what_the_layers_say_themselves(tiny_artifact_dir: Path, ids: Tensor) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_artifact_dir, dtype=torch.float32)
    kept = Compensation("static", 8)
    set_compensation(model, kept)
    found = error_energy(model, ids, grid=(64, 256))
    assert state_of(model).compensation == kept
    # each layer on the inputs that it has without compensation, its output at 0, at 64 and with everything
    inputs: dict[str, list[Tensor]] = {}
    hooks = [
        layer.register_forward_hook(lambda _m, x, _y, name=name: inputs.setdefault(name, []).append(x[0]))
        for name, layer in dec_layers(model).items()
    ]
    set_compensation(model, Compensation("none"))
    for sequence in ids:
        model(sequence[None], use_cache=False)
    for hook in hooks:
        hook.remove()
    wanted = dict.fromkeys(PROJECTION_KINDS, 0.0)
    outputs = {}
    for k_chunk in (0, 64, 1024):
        set_compensation(model, Compensation("exact" if k_chunk == 1024 else "dynamic", k_chunk))
        outputs[k_chunk] = {
            name: torch.cat([layer(x)[:, 4:] for x in inputs[name]])
            for name, layer in dec_layers(model).items()
        }
    for name in outputs[0]:
        whole = outputs[1024][name]
        before, after = ((whole - outputs[k][name]).square().sum() for k in (0, 64))
        wanted[kind_of(name)] += ((before - after) / whole.square().sum()).item()
    for kind in PROJECTION_KINDS:
        assert len(found[kind]) == 1025
        assert found[kind][0] == 0
        assert found[kind] == sorted(found[kind])
        # both are differences of float32 sums
        assert found[kind][64] == pytest.approx(wanted[kind], rel=1e-3)
        assert found[kind][32] == pytest.approx(found[kind][64] / 2)


@torch.no_grad()
def test_layers_may_be_fused(tiny_artifact_dir: Path, ids: Tensor) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_artifact_dir, dtype=torch.float32)
    fuse(model)
    found = error_energy(model, ids, grid=(64,))
    assert all(found[kind][1024] > found[kind][64] > 0 for kind in PROJECTION_KINDS)


def test_too_short_sequences_are_refused(tiny_artifact_dir: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_artifact_dir)
    with pytest.raises(DecDECError, match=r"ids must be \(sequences, more than 4 tokens\), got \(1, 4\)"):
        error_energy(model, torch.zeros(1, 4, dtype=torch.int64))
