"""The layer in both formats: against dense oracles, in the kernels' order on the twins, cast and copied."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from conftest import make_layer, relative_error, selection_of
from torch import Tensor

from decdec_core import linear, residuals, tiles
from decdec_core.config import EXTRAS, DecDECError, WeightQuant
from decdec_core.linear import DecLinear
from decdec_core.packing import unpack_table
from decdec_core.quantize import weight_layout

METHODS = ("rtn", "squeezellm")
KINDS = ("static", "random", "dynamic", "exact")
HALVES = (torch.float16, torch.bfloat16)
# float32 sums in other orders; in half precision weight and y are rounded, a residual's rows and y once more
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def draw_x(tokens: int, in_features: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return activations with channels that stand out."""
    return (torch.randn(tokens, in_features) * torch.randn(in_features).exp()).to(dtype)


def seen(layer: DecLinear, x: Tensor) -> Tensor:
    """Return x as the layer's weight and selection see it."""
    if layer.input_order is not None:
        x = x[..., layer.input_order.long()]
    return x if layer.input_scale is None else x / layer.input_scale


def oracle(layer: DecLinear, x: Tensor, chosen: Tensor | None = None) -> Tensor:
    """Return y (tokens, out) float64 of plain inputs, by a dense weight and a dense residual."""
    assert layer.bias is not None
    y = x.double() @ layer.dense_weight().double().T + layer.bias.double()
    if chosen is not None:
        assert layer.residual is not None
        index, given = chosen.long().expand(x.shape[0], -1), seen(layer, x).double()
        kept = torch.zeros_like(given).scatter_(1, index, given.gather(1, index))
        y += kept @ residuals.dequantize_residual(layer.residual).double().T
    return y


def to_tiles(layer: DecLinear, dtype: torch.dtype) -> DecLinear:
    """Bring a CPU layer into the kernels' order, for the twins."""
    layer._tile(dtype)
    layer._pinned = layer.residual
    assert layer.tiled is not None
    return layer


def table_of(layer: DecLinear, dtype: torch.dtype) -> Tensor:
    """Return the codebook in the kernels' order, read as values of `dtype`."""
    assert layer.tiled is not None
    assert layer.tiled.table is not None
    return unpack_table(layer.tiled.table, layer.out_features, dtype)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("residual_bits", [2, 4, 8, 16])
@pytest.mark.parametrize("bits", [2, 3, 4, 5])
@pytest.mark.parametrize("extras", [(), EXTRAS], ids=str)
def test_a_codebook_layer_is_its_dense_oracle(
    extras: tuple[str, ...], bits: int, residual_bits: int, kind: str
) -> None:
    layer = make_layer(300, 77, bits, residual_bits, "squeezellm", extras=extras)
    x = draw_x(5, 300)
    assert relative_error(layer(x), oracle(layer, x)) < TOLERANCE[torch.float32]
    layer.selection = selection_of(kind, 64, seen(layer, x))
    wanted = oracle(layer, x, layer.selection(seen(layer, x)))
    assert relative_error(layer(x), wanted) < TOLERANCE[torch.float32]
    layer.scope.active = False
    assert relative_error(layer(x), oracle(layer, x)) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("extras", [(), *((name,) for name in EXTRAS), EXTRAS], ids=str)
@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_order_and_scale_of_the_input(method: str, extras: tuple[str, ...]) -> None:
    torch.manual_seed(3)
    plain = torch.randn(24, 130) * 0.05  # what make_layer draws
    torch.manual_seed(3)
    layer = make_layer(130, 24, residual_bits=16, method=method, extras=extras)
    dense = torch.nn.Linear(130, 24)
    dense.weight.copy_(layer.dense_weight())
    dense.bias.copy_(layer.bias)
    x = torch.randn(2, 3, 130)
    assert torch.allclose(layer(x), dense(x), atol=1e-5)
    # 3 bits are near the weight, by 0.2 to 0.33; with columns in other places the error would be 1.4
    assert relative_error(layer.dense_weight(), plain) < 0.5
    # all channels of a 16-bit residual bring the full-precision layer back
    layer.selection = selection_of("exact", 1024, x.view(6, 130))
    dense.weight.copy_(plain)
    assert torch.allclose(layer(x), dense(x), atol=1e-3)


def test_the_order_comes_before_the_scale() -> None:
    layer = DecLinear(8, 1, WeightQuant("rtn", 4), extras=EXTRAS)
    layer.input_order = torch.tensor([1, 0, 2, 3, 4, 5, 6, 7], dtype=torch.int32)
    layer.input_scale = torch.tensor([4.0, 2.0, 1, 1, 1, 1, 1, 1])
    layer.codes = torch.tensor([[0x12, 0, 0, 0]], dtype=torch.int32)  # codes 2 and 1, then zeros
    layer.scales = torch.ones(1, 1).half()
    assert layer.dense_weight().tolist() == [[0.5, 0.5, 0, 0, 0, 0, 0, 0]]
    assert layer(torch.tensor([[1.0, 0, 0, 0, 0, 0, 0, 0]])).item() == 0.5
    assert layer(torch.tensor([[0.0, 3, 0, 0, 0, 0, 0, 0]])).item() == 1.5


@pytest.mark.parametrize("method", METHODS)
def test_buffers_are_the_formats_and_extras_the_layers(method: str) -> None:
    config = WeightQuant(method, 3)
    names = set(weight_layout(config, 300, 77))
    assert set(DecLinear(300, 77, config).state_dict()) == names
    layer = DecLinear(300, 77, config, True, EXTRAS)
    assert set(layer.state_dict()) == names | {"bias", *EXTRAS}
    assert layer.input_order is not None
    assert layer.input_order.dtype == torch.int32
    assert layer.weight_bytes == sum(layer.state_dict()[name].nbytes for name in (*names, *EXTRAS))


@pytest.mark.parametrize(
    ("bits", "extras", "message"),
    [
        (3.5, (), r"bits of a layer must be one of 2, 3, 4, 5, got 3\.5"),
        (
            3,
            ("input_scales",),
            r"extra must be one of .*, got 'input_scales' \(did you mean 'input_scale'\?\)",
        ),
    ],
)
def test_a_layer_refuses(bits: float, extras: tuple[str, ...], message: str) -> None:
    with pytest.raises(DecDECError, match=message):
        DecLinear(64, 32, WeightQuant("awq", bits), extras=extras)


@pytest.mark.parametrize("dtype", [*HALVES, torch.float64], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_casts_keep_what_is_stored(method: str, dtype: torch.dtype) -> None:
    layer = make_layer(method=method, extras=EXTRAS)
    stored = {name: t.clone() for name, t in layer.state_dict().items()}
    layer.to(dtype).float()
    assert all(t.dtype == stored[n].dtype and torch.equal(t, stored[n]) for n, t in layer.named_buffers())


@pytest.mark.parametrize("kind", [None, *KINDS])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("tokens", [1, 3, 8, 40])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_a_tiled_codebook_is_the_oracle_on_the_twins(
    bits: int, tokens: int, dtype: torch.dtype, kind: str | None
) -> None:
    layer, x = make_layer(160, 77, bits, method="squeezellm"), draw_x(tokens, 160, dtype)
    layer.selection = None if kind is None else selection_of(kind, 64, x)
    wanted = oracle(layer, x, layer.selection(x) if layer.selection else None)
    to_tiles(layer, dtype)
    assert layer.codes.numel() == layer.table.numel() == 0
    assert relative_error(layer._on_gpu(x, layer.selection), wanted) < TOLERANCE[dtype]
    assert layer._on_gpu(x[:0], layer.selection).shape == (0, 77)


def test_a_codebook_follows_the_activations_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = make_layer(160, 77, method="squeezellm"), draw_x(3, 160)
    original, weight = layer.table.clone(), layer.dequantize()
    stored = {name: t.clone() for name, t in layer.state_dict().items()}
    tiles = to_tiles(layer, torch.float16).tiled
    assert tiles is not None
    for dtype in (torch.bfloat16, torch.float16, torch.bfloat16, torch.float32):
        layer._tile(dtype)
        assert layer.tiled is not None
        assert layer.tiled.tiles is tiles.tiles
        values = dtype if dtype in HALVES else torch.float16
        assert torch.equal(table_of(layer, values), original.to(values))
        # whatever the kernels have, nothing is lost
        assert torch.equal(layer.dequantize(), weight)
        assert all(torch.equal(t, stored[name]) for name, t in layer.state_dict().items())
        wanted = oracle(layer, x.to(dtype))
        assert relative_error(layer._on_gpu(x.to(dtype), None), wanted) < TOLERANCE[dtype]

    # once it knows, a pass converts nothing and waits for nothing
    def refuse(*_arguments: Any) -> None:
        raise AssertionError("a table was packed again")

    before = layer.tiled
    monkeypatch.setattr(linear, "pack_table", refuse)
    for dtype in (torch.float32, torch.float16, None):
        layer._tile(dtype)
    assert layer.tiled is before


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_a_cast_tells_the_dtype_beforehand(dtype: torch.dtype) -> None:
    layer = make_layer(160, 77, method="squeezellm").bfloat16().to(dtype).cpu()
    original = layer.table.clone()
    layer._tile(None)
    assert torch.equal(table_of(layer, dtype), original.to(dtype))


@pytest.mark.parametrize("method", METHODS)
def test_a_tiled_layer_moves_copies_and_loads(method: str) -> None:
    layer, x = make_layer(160, 77, method=method), draw_x(2, 160, torch.bfloat16)
    stored = {name: t.clone() for name, t in layer.state_dict().items()}
    wanted = to_tiles(layer, torch.bfloat16)._on_gpu(x, None)
    twin = copy.deepcopy(layer)
    assert torch.equal(twin._on_gpu(x, None), wanted)
    other = make_layer(160, 77, method=method)
    layer.load_state_dict(other.state_dict())
    assert layer.tiled is None
    assert torch.equal(layer.dequantize(), other.dequantize())
    assert torch.equal(twin._on_gpu(x, None), wanted)
    twin.half()
    assert twin.tiled is None
    assert all(torch.equal(t, stored[name]) for name, t in twin.named_buffers())
    assert twin.to("meta").dequantize().shape == (77, 160)


@pytest.mark.parametrize(
    ("in_features", "bits", "method", "group_size"),
    [
        *((576, 5, method, None) for method in METHODS),
        *((33, 3, method, None) for method in METHODS),
        (576, 4, "gptq", 65536),
        (576, 4, "gptq", 32),
    ],
)
def test_what_the_kernels_do_not_take_stays_as_it_is(
    in_features: int, bits: int, method: str, group_size: int | None
) -> None:
    layer = make_layer(in_features, 64, bits, method=method, group_size=group_size)
    x = draw_x(4, in_features)
    layer._tile(torch.float16)
    assert layer.tiled is None
    layer.selection = selection_of("exact", 64, x)
    wanted = oracle(layer, x, layer.selection(x))
    assert relative_error(layer(x), wanted) < TOLERANCE[torch.float32]
    assert relative_error(layer._on_gpu(x, layer.selection), wanted) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("method", METHODS)
def test_traced_whole(method: str) -> None:
    torch._dynamo.reset()
    layer, x = make_layer(160, 64, method=method, extras=EXTRAS), draw_x(9, 160)
    layer.selection = selection_of("exact", 64, x)
    wanted = layer(x)
    assert torch.allclose(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), wanted, atol=1e-5)


def test_a_tiled_codebook_is_traced_whole() -> None:
    torch._dynamo.reset()
    layer, x = make_layer(160, 64, method="squeezellm"), draw_x(9, 160, torch.bfloat16)
    layer.selection = selection_of("exact", 64, x)
    to_tiles(layer, torch.bfloat16)

    def run(x: Tensor) -> Tensor:
        layer._tile(x.dtype)
        return layer._on_gpu(x, layer.selection)

    wanted, table = run(x), layer.tiled
    got = torch.compile(run, fullgraph=True, backend="aot_eager")(x)
    assert relative_error(got, wanted) < TOLERANCE[torch.bfloat16]
    assert layer.tiled is table


@pytest.mark.parametrize(("method", "bits"), [("rtn", 3), ("rtn", 4), ("squeezellm", 2), ("squeezellm", 4)])
@pytest.mark.parametrize(("in_features", "out_features"), [(160, 64), (576, 77), (1024, 32)])
def test_the_kernels_bytes_are_those_of_the_tiles(
    method: str, bits: int, in_features: int, out_features: int
) -> None:
    layer = make_layer(in_features, out_features, bits, method=method, extras=EXTRAS)
    tiled = tiles.tile(layer._logical(), torch.float16)
    stored = tiled.tiles.nbytes + (tiled.table.nbytes if tiled.table is not None else 0)
    assert layer.kernel_bytes == stored + 8 * in_features  # an int32 and a float32 an input
    five = make_layer(in_features, out_features, 5, method=method)
    assert five.kernel_bytes == five.weight_bytes  # there are no kernels for 5 bits
