"""A decoding step's settings in tensors: what ops.linear gives, compiled once for all of them."""

from __future__ import annotations

import pytest
import torch
from conftest import make_layer, selection_of

from decdec_core.linear import DecLinear
from decdec_core.step import StepSettings, step_linear

KINDS = ("static", "random", "dynamic", "exact")


def tiled_layer(method: str, device: str) -> DecLinear:
    layer = make_layer(576, 192, method=method).to(device)
    layer._tile(torch.float16)
    if device == "cuda":
        layer.prepare_for_gpu(torch.float16)
    return layer


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
@pytest.mark.parametrize("method", ["rtn", "squeezellm"])
def test_one_trace_serves_every_setting(method: str, device: str) -> None:
    """The layer's own result is the reference: bit for bit the same op behind both."""
    torch._dynamo.reset()
    layer, traces = tiled_layer(method, device), 0
    x = torch.randn(1, 576, device=device).half()

    def counted(graph: torch.fx.GraphModule, _inputs: object) -> object:
        nonlocal traces
        traces += 1
        return graph.forward

    compiled = torch.compile(layer, fullgraph=True, backend=counted)
    chosen = [None, *(selection_of(kind, k, x) for kind in KINDS for k in (8, 64, 1024))]
    for selection in chosen:
        layer.selection, layer.n_tb, layer.step = selection, 8, None
        wanted = layer(x) if device == "cuda" else layer._on_gpu(x, selection)
        layer.hold_step()
        assert torch.equal(compiled(x), wanted)
    assert traces == 1


def test_another_dtype_than_the_codebooks_does_not_take_the_step() -> None:
    layer = tiled_layer("squeezellm", "cpu")
    layer.hold_step()
    assert layer.steps_as_one(torch.float16)
    assert not layer.steps_as_one(torch.bfloat16)
    assert not layer.steps_as_one(torch.float32)
    assert tiled_layer("rtn", "cpu").step is None


def test_settings_are_read_at_the_call() -> None:
    layer = tiled_layer("rtn", "cpu")
    x = torch.randn(2, 576).half()
    settings, tiled, residual = StepSettings(576, torch.device("cpu")), layer.tiled, layer.residual
    assert tiled is not None
    assert residual is not None
    found = []
    for k_chunk in (0, 64, 1024, 64):
        selection = selection_of("exact", k_chunk, x) if k_chunk else None
        settings.set(selection, 16)
        found.append(step_linear(x, tiled, residual.codes, residual.scale, settings))
    assert torch.equal(found[1], found[3])
    assert not torch.equal(found[0], found[1])
    assert not torch.equal(found[1], found[2])


def test_the_op_is_well_formed() -> None:
    layer = tiled_layer("squeezellm", "cpu")
    assert layer.tiled is not None
    assert layer.residual is not None
    settings = StepSettings(576, torch.device("cpu"))
    settings.set(selection_of("dynamic", 64, torch.randn(1, 576)), 16)
    tiled, residual = layer.tiled, layer.residual
    arguments = (torch.randn(1, 576).half(), tiled.tiles, tiled.table, tiled.bias, tiled.bits)
    settled = (settings.numbers, settings.floors, settings.indices)
    torch.library.opcheck(
        torch.ops.decdec_core.step_linear.default,
        (*arguments, tiled.out_features, residual.codes, residual.scale, *settled),
    )
