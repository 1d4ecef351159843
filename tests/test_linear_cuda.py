"""The layer on a GPU against oracles in float64: formats, extras, dtypes, copies, captures."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import make_layer, relative_error, selection_of
from test_cuda import KINDS, TOLERANCE, compensation, draw_x
from torch import Tensor

from decdec_core import kernels, residuals
from decdec_core.linear import EXTRAS, DecLinear
from decdec_core.ops import Selection
from decdec_core.packing import unpack_table
from decdec_core.residuals import QuantizedResidual

pytestmark = pytest.mark.cuda
METHODS = ("rtn", "squeezellm")
# float32 sums in other orders; in half precision weight and y are rounded, a residual's rows and y once more
OF_A_LAYER = {torch.float32: 1e-5, **TOLERANCE}


def oracle(layer: DecLinear, x: Tensor, chosen: Tensor | None) -> Tensor:
    """Return y (tokens, out) float64 on the CPU, of a CPU layer without extras."""
    assert layer.bias is not None
    y = x.double() @ layer.dense_weight().double().T + layer.bias.double()
    if chosen is not None:
        assert layer.residual is not None
        y += compensation(x, chosen, residuals.dequantize_residual(layer.residual).double().T)
    return y


def stored_in(layer: DecLinear) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in layer.state_dict().items()}


@pytest.mark.parametrize("kind", [None, *KINDS])
@pytest.mark.parametrize("dtype", OF_A_LAYER, ids=str)
@pytest.mark.parametrize("tokens", [1, 3, 8, 40])
@pytest.mark.parametrize("bits", [2, 3, 4, 5])
@pytest.mark.parametrize("method", METHODS)
def test_the_layer_is_the_oracle(
    method: str, bits: int, tokens: int, dtype: torch.dtype, kind: str | None
) -> None:
    layer, x = make_layer(1056, 96, bits, method=method), draw_x(tokens, 1056, dtype).cpu()
    layer.selection = None if kind is None else selection_of(kind, 16, x)
    wanted = oracle(layer, x, None if layer.selection is None else layer.selection(x))
    stored = stored_in(layer)
    there = layer.cuda()
    assert relative_error(there(x.cuda()).cpu(), wanted) < OF_A_LAYER[dtype]
    assert (there.tiled is None) == (bits == 5)
    assert isinstance(there.residual, QuantizedResidual)
    assert there.residual.codes.is_pinned()
    assert there.residual.codes.device.type == "cpu"
    back = there.cpu()
    assert all(torch.equal(t, stored[name]) for name, t in back.state_dict().items())


@pytest.mark.parametrize("dtype", OF_A_LAYER, ids=str)
@pytest.mark.parametrize("residual_bits", [2, 8, 16])
@pytest.mark.parametrize("tokens", [1, 8, 40])
def test_a_codebook_with_other_residuals(tokens: int, residual_bits: int, dtype: torch.dtype) -> None:
    layer = make_layer(576, 192, 4, residual_bits, "squeezellm")
    x = draw_x(tokens, 576, dtype).cpu()
    layer.selection = Selection("exact", 64)
    wanted = oracle(layer, x, layer.selection(x))
    assert relative_error(layer.cuda()(x.cuda()).cpu(), wanted) < OF_A_LAYER[dtype]


@pytest.mark.parametrize("dtype", OF_A_LAYER, ids=str)
@pytest.mark.parametrize("tokens", [1, 40])
@pytest.mark.parametrize(
    ("in_features", "bits", "method", "group_size"),
    [(33, 3, "squeezellm", None), (1000, 4, "rtn", None), (576, 4, "gptq", 65536), (576, 4, "gptq", 32)],
)
def test_weights_that_the_kernels_do_not_take(
    in_features: int, bits: int, method: str, group_size: int | None, tokens: int, dtype: torch.dtype
) -> None:
    layer = make_layer(in_features, 64, bits, method=method, group_size=group_size)
    x = draw_x(tokens, in_features, dtype).cpu()
    layer.selection = selection_of("dynamic", 64, x)
    wanted = oracle(layer, x, layer.selection(x))
    assert relative_error(layer.cuda()(x.cuda()).cpu(), wanted) < OF_A_LAYER[dtype]
    assert layer.tiled is None


@pytest.mark.parametrize("dtype", OF_A_LAYER, ids=str)
@pytest.mark.parametrize("tokens", [1, 40])
@pytest.mark.parametrize("extras", [*((name,) for name in EXTRAS), EXTRAS], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_order_and_scale_of_the_input(
    method: str, extras: tuple[str, ...], tokens: int, dtype: torch.dtype
) -> None:
    layer, x = make_layer(method=method, extras=extras), draw_x(tokens, 576, dtype).cpu()
    bare = oracle(layer, x, None)
    # every channel, so that a quotient rounded in half precision chooses no other
    layer.selection = Selection("exact", 1024)
    wanted = layer(x.float())
    layer.cuda()
    assert relative_error(layer(x.cuda()).cpu(), wanted) < 2 * OF_A_LAYER[dtype]  # x / scale is rounded too
    layer.scope.active = False
    assert relative_error(layer(x.cuda()).cpu(), bare) < 2 * OF_A_LAYER[dtype]


def test_a_codebook_follows_the_activations_dtype() -> None:
    layer = make_layer(method="squeezellm")
    original, stored = layer.table.clone(), stored_in(layer)
    x, weight = draw_x(3, 576, torch.float32).cpu(), layer.dequantize()
    wanted = oracle(layer, x, None)
    layer.cuda()
    used = []
    for dtype in (torch.bfloat16, torch.float32, torch.bfloat16, torch.float16) * 2:
        assert (
            relative_error(layer(x.to("cuda", dtype)).cpu(), wanted) < 2 * OF_A_LAYER[dtype]
        )  # x is rounded
        assert layer.tiled is not None
        assert layer.tiled.table is not None
        values = torch.float16 if dtype == torch.float32 else dtype
        assert torch.equal(unpack_table(layer.tiled.table, 192, values).cpu(), original.to(values))
        assert torch.equal(layer.dequantize().cpu(), weight)
        assert all(torch.equal(t.cpu(), stored[name]) for name, t in layer.state_dict().items())
        used.append(torch.cuda.memory_allocated())
    assert len(set(used[4:])) == 1  # one table at a time; what a dtype's first pass keeps is torch's
    assert torch.equal(layer.bfloat16().cpu().table, original)


@pytest.mark.parametrize("way", ["cast on the CPU", "cast on the GPU", "first pass"])
def test_a_codebook_is_ready_to_be_captured(way: str) -> None:
    layer, dtype = make_layer(method="squeezellm"), torch.bfloat16
    x = draw_x(1, 576, dtype)
    layer.selection = selection_of("dynamic", 16, x.cpu())
    if way == "cast on the CPU":
        layer.to(dtype).cuda()
    elif way == "cast on the GPU":
        layer.cuda().to(dtype)
    else:
        layer.cuda()(x)
    before = layer.tiled
    kernels.require_cuda(x.device)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layer(x)
    assert layer.tiled is before
    for _ in range(20):
        x.copy_(draw_x(1, 576, dtype))
        y.fill_(torch.nan)
        graph.replay()
        assert torch.equal(y, layer(x))


@pytest.mark.parametrize("method", METHODS)
def test_copies_and_reading_the_state_leave_the_layer_as_it_is(method: str) -> None:
    layer = make_layer(method=method).cuda()
    layer.selection = Selection("static", 16, indices=torch.arange(9, dtype=torch.int32)[None])
    x = draw_x(2, 576, torch.float16)
    wanted, tiles = layer(x), layer.tiled
    assert layer.state_dict()["codes"].numel() == 192 * 18 * 3
    assert layer.tiled is tiles
    twin = copy.deepcopy(layer)
    assert torch.equal(twin(x), wanted)
    assert twin.residual is not None
    assert twin.residual.codes.is_pinned()
    assert layer(x[:0]).shape == (0, 192)
    assert torch.equal(layer.half()(x), wanted)
    other = make_layer(method=method)
    layer.load_state_dict(other.state_dict())
    other.residual, other.selection = layer.residual, layer.selection
    assert torch.equal(layer(x), other.cuda()(x))
    assert torch.equal(twin(x), wanted)


@pytest.mark.parametrize("tokens", [1, 40])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_compiled_whole(method: str, dtype: torch.dtype, tokens: int) -> None:
    torch._dynamo.reset()
    layer = make_layer(method=method, extras=["input_order"]).to(dtype).cuda()
    layer.selection = Selection("exact", 16)
    x = draw_x(tokens, 576, dtype)
    wanted = layer(x)
    assert relative_error(torch.compile(layer, fullgraph=True)(x), wanted) < TOLERANCE[dtype]
