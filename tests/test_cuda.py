"""The CUDA kernels against oracles in float64: odd sizes, fresh inputs, poisoned outputs, graphs, streams."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import relative_error, selection_of
from torch import Tensor

from decdec_core import kernels, ops
from decdec_core.config import DecDECError, ResidualQuant, total_channels
from decdec_core.ops import Selection, TiledWeight
from decdec_core.packing import DEPTH, pack_table, pack_tiles, unpack_channels
from decdec_core.residuals import QuantizedResidual, quantize_residual

pytestmark = pytest.mark.cuda
# sums are carried in float32; what is left is the rounding of weights and of y to the activations' dtype
TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 1e-2}
SHAPES = [(32, 32), (576, 1536), (1056, 96), (2080, 4128), (64, 70016)]
KINDS = ("exact", "dynamic", "random", "static")


def draw_weight(
    in_features: int, out_features: int, bits: int, kind: str, dtype: torch.dtype, bias: bool
) -> Any:
    """Return a weight for the kernels and the same in float64."""
    codes = torch.randint(0, 2**bits, (out_features, in_features), dtype=torch.uint8, device="cuda")
    added = torch.randn(out_features, device="cuda") if bias else None
    if kind == "codebook":
        values = torch.randn(out_features, 2**bits, device="cuda").to(dtype)
        tiles, table = pack_tiles(codes, bits), pack_table(values)
        exact = values.double().gather(1, codes.long())
        return TiledWeight(tiles, bits, out_features, in_features, table, added), exact
    groups = (out_features, -(-in_features // DEPTH))
    scales = (torch.rand(groups, device="cuda") * 0.01 + 1e-3).half()
    zeros = torch.randint(0, 2**bits, groups, dtype=torch.uint8, device="cuda")
    group = torch.arange(in_features, device="cuda") // DEPTH
    exact = (codes.double() - zeros.double()[:, group]) * scales.double()[:, group]
    return TiledWeight(
        pack_tiles(codes, bits, scales, zeros), bits, out_features, in_features, bias=added
    ), exact


def draw_x(tokens: int, in_features: int, dtype: torch.dtype) -> Tensor:
    """Return activations with channels that stand out."""
    return (torch.randn(tokens, in_features) * torch.randn(in_features).exp()).to(dtype).cuda()


def draw_residual(in_features: int, out_features: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return pinned codes and scale, and the residual (in, out) in float64 on the GPU."""
    codes = torch.randint(0, 256, (in_features, out_features // 2), dtype=torch.uint8).pin_memory()
    scale = (torch.rand(out_features) * 0.01).pin_memory()
    exact = unpack_channels(codes, 4, out_features).T.double() * scale.double()
    return codes, scale, exact.cuda()


def compensation(x: Tensor, indices: Tensor, residual: Tensor) -> Tensor:
    chosen = indices.long().expand(x.shape[0], -1)
    kept = torch.zeros_like(x, dtype=torch.float64)
    return kept.scatter_(1, chosen, x.double().gather(1, chosen)) @ residual


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("kind", ["uniform", "codebook"])
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize(("shape", "tokens"), [*zip(SHAPES, (1, 3, 8, 5, 2), strict=True)], ids=str)
def test_product(shape: tuple[int, int], tokens: int, bits: int, kind: str, dtype: torch.dtype) -> None:
    weight, exact = draw_weight(*shape, bits, kind, dtype, bias=tokens > 1)
    x = draw_x(tokens, shape[0], dtype)
    wanted = x.double() @ exact.T + (0 if weight.bias is None else weight.bias.double())
    assert relative_error(ops.linear(x, weight), wanted) < TOLERANCE[dtype]
    assert relative_error(ops.linear_ref(x, weight), wanted) < TOLERANCE[dtype]
    assert relative_error(ops.dequantize(weight, dtype), exact) < TOLERANCE[dtype]
    if kind == "uniform" or dtype == torch.float16:
        assert torch.equal(ops.dequantize(weight, torch.float32), ops.dequantize_ref(weight, torch.float32))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("k_chunk", "n_tb"), [(1, 1), (8, 16), (100, 3), (1024, 2)])
@pytest.mark.parametrize(("shape", "tokens"), [*zip(SHAPES, (1, 3, 8, 5, 2), strict=True)], ids=str)
def test_product_and_compensation(
    shape: tuple[int, int], tokens: int, k_chunk: int, n_tb: int, kind: str
) -> None:
    if total_channels(shape[0], k_chunk) == 0:
        pytest.skip("no channel of so few")
    weight, exact = draw_weight(*shape, 3, "uniform", torch.float16, bias=False)
    x = draw_x(tokens, shape[0], torch.float16)
    codes, scale, residual = draw_residual(*shape)
    selection = selection_of(kind, k_chunk, x)
    wanted = x.double() @ exact.T + compensation(x, selection(x), residual)
    got = ops.linear(x, weight, selection, codes, scale, n_tb)
    assert relative_error(got, wanted) < TOLERANCE[torch.float16]
    for _ in range(3):
        assert torch.equal(ops.linear(x, weight, selection, codes, scale, n_tb), got)


@pytest.mark.parametrize("dtype", [torch.float32, *TOLERANCE], ids=str)
@pytest.mark.parametrize("kind", ["exact", "dynamic", "random"])
@pytest.mark.parametrize(
    ("in_features", "k_chunk"), [(1, 1024), (33, 100), (576, 16), (1000, 1), (14336, 64)]
)
def test_selection_is_the_cpus(in_features: int, k_chunk: int, kind: str, dtype: torch.dtype) -> None:
    x = draw_x(5, in_features, dtype)
    x[1] = 0
    x[2] = -1
    x[3, :: max(1, in_features // 40)] = torch.nan
    x[4, :: max(1, in_features // 40)] = torch.inf
    selection = (
        selection_of(kind, k_chunk, draw_x(5, in_features, dtype))
        if kind == "dynamic"
        else (Selection(kind, k_chunk, seed=3))
    )
    assert torch.equal(selection(x).cpu(), selection(x.cpu()))


@pytest.mark.parametrize("place", ["pinned", "device"])
@pytest.mark.parametrize("bits", [2, 4, 8, 16])
@pytest.mark.parametrize(
    ("in_features", "out_features", "tokens"), [(576, 192, 3), (1056, 4160, 40), (32, 64, 1)]
)
def test_compensation(in_features: int, out_features: int, tokens: int, bits: int, place: str) -> None:
    kept = quantize_residual(torch.randn(out_features, in_features) * 0.01, ResidualQuant(bits)).pinned()
    codes, scale = (t.cuda() if place == "device" else t for t in (kept.codes, kept.scale))
    x = draw_x(tokens, in_features, torch.float16)
    indices = ops.select_topk(x, 300)
    y = torch.randn(tokens, out_features, device="cuda")
    wanted = y.clone().cpu()
    ops.compensate_ref(x.cpu(), indices.cpu(), kept.codes, kept.scale, bits, wanted)
    ops.compensate(x, indices, codes, scale, bits, y)
    assert relative_error(y.cpu(), wanted) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [2, 4, 8, 16])
@pytest.mark.parametrize(
    ("in_features", "out_features", "tokens", "k_chunk"),
    [(576, 192, 3, 16), (4160, 4160, 2, 300), (14336, 64, 1, 8), (32, 64, 8, 1024), (2080, 16384, 9, 5)],
)
def test_selection_and_compensation_at_once(
    in_features: int, out_features: int, tokens: int, k_chunk: int, bits: int, kind: str
) -> None:
    size = (in_features, out_features * bits // 8 if bits < 16 else out_features)
    codes = torch.randint(0, 256, size, dtype=torch.uint8) if bits < 16 else torch.randn(size).half()
    kept = QuantizedResidual(codes, torch.rand(out_features), ResidualQuant(bits)).pinned()
    x = draw_x(tokens, in_features, torch.bfloat16)
    selection = selection_of(kind, k_chunk, x)
    y = torch.randn(tokens, out_features, device="cuda")
    wanted = y.clone().cpu()
    indices = selection(x).cpu()
    for _ in range(3):  # the workspace is left as it was found
        ops.compensate_ref(x.cpu(), indices, kept.codes, kept.scale, bits, wanted)
        ops.select_and_compensate(x, selection, kept.codes, kept.scale, bits, y)
    assert relative_error(y.cpu(), wanted) < 1e-5


def test_compensation_of_many_tokens_by_the_residual_itself() -> None:
    kept = quantize_residual(torch.randn(4096, 64) * 0.01, ResidualQuant(16)).pinned()
    x = draw_x(300, 64, torch.float16)
    y, wanted = torch.zeros(300, 4096, device="cuda"), torch.zeros(300, 4096)
    indices = ops.select_topk(x, 300)
    ops.compensate(x, indices, kept.codes, kept.scale, 16, y)
    ops.compensate_ref(x.cpu(), indices.cpu(), kept.codes, kept.scale, 16, wanted)
    assert relative_error(y.cpu(), wanted) < 1e-5


def test_nan_and_infinity_come_out() -> None:
    weight, _ = draw_weight(1056, 96, 3, "uniform", torch.float16, bias=False)
    codes, scale, _ = draw_residual(1056, 96)
    for value in (torch.nan, torch.inf):
        x = draw_x(2, 1056, torch.float16)
        x[1, 17] = value
        y = ops.linear(x, weight, Selection("exact", 16), codes, scale)
        assert y[0].isfinite().all()
        assert not y[1].isfinite().any()
        total = torch.zeros(2, 96, device="cuda")
        ops.select_and_compensate(x, Selection("exact", 16), codes, scale, 4, total)
        assert total[0].isfinite().all()
        wanted = torch.zeros(2, 96)
        ops.compensate_ref(x.cpu(), ops.select_topk(x, 16).cpu(), codes, scale, 4, wanted)
        assert torch.equal(total[1].cpu().isfinite(), wanted[1].isfinite())


@pytest.mark.parametrize("kind", ["exact", "static"])
def test_columns_in_several_runs_and_channels_in_several_turns(kind: str) -> None:
    shape = (2080, 16416)  # 513 units of 32 outputs for two blocks, more channels than a block lists
    weight, exact = draw_weight(*shape, 3, "uniform", torch.float16, bias=False)
    x = draw_x(2, shape[0], torch.float16)
    codes, scale, residual = draw_residual(*shape)
    selection = selection_of(kind, 1024, x)
    wanted = x.double() @ exact.T + compensation(x, selection(x), residual)
    got = ops.linear(x, weight, selection, codes, scale, 2)
    assert relative_error(got, wanted) < TOLERANCE[torch.float16]


def test_bucket_floors_beyond_half_precision() -> None:
    x = draw_x(3, 2080, torch.float16)
    x[1, ::7] = torch.inf
    selection = Selection("dynamic", 16, floors=ops.bucket_floors(1e6, 7e4))
    assert torch.equal(selection(x).cpu(), selection(x.cpu()))


def test_a_graph_replayed_with_other_inputs_is_eager() -> None:
    shape = (576, 1536)
    weight, _ = draw_weight(*shape, 3, "uniform", torch.float16, bias=False)
    codes, scale, _ = draw_residual(*shape)
    x = draw_x(1, shape[0], torch.float16)
    selection = selection_of("dynamic", 16, x)
    graph = torch.cuda.CUDAGraph()
    ops.linear(x, weight, selection, codes, scale)
    with torch.cuda.graph(graph):
        y = ops.linear(x, weight, selection, codes, scale)
    for _ in range(100):
        x.copy_(draw_x(1, shape[0], torch.float16))
        y.fill_(torch.nan)
        graph.replay()
        assert torch.equal(y, ops.linear(x, weight, selection, codes, scale))


def test_two_streams_at_once() -> None:
    shape = (2080, 4128)
    codes, scale, _ = draw_residual(*shape)
    work = []
    for _ in range(2):
        weight, _ = draw_weight(*shape, 3, "uniform", torch.float16, bias=False)
        x = draw_x(2, shape[0], torch.float16)
        work.append((x, weight, selection_of("dynamic", 16, x)))
    wanted = [ops.linear(x, w, s, codes, scale) for x, w, s in work]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in work]
    got: list[list[Tensor]] = [[], []]
    for _ in range(50):
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                x, w, s = work[i]
                got[i].append(ops.linear(x, w, s, codes, scale))
    torch.cuda.synchronize()
    for i in range(2):
        assert all(torch.equal(y, wanted[i]) for y in got[i])


def test_ops_declare_what_they_do() -> None:
    weight, _ = draw_weight(576, 192, 3, "uniform", torch.float16, bias=False)
    codes, scale = (
        t.cuda() for t in draw_residual(576, 192)[:2]
    )  # the checks make copies, which are not pinned
    x = draw_x(2, 576, torch.float16)
    kernels.require_cuda(x.device)
    dense = torch.empty(192, 576, dtype=torch.float16, device="cuda")
    y = torch.empty(2, 192, dtype=torch.float16, device="cuda")
    checks = ("test_schema", "test_faketensor")
    opcheck = torch.library.opcheck
    opcheck(torch.ops.decdec.dequantize.default, (weight.tiles, None, 3, dense), test_utils=checks)
    indices = torch.empty(2, 9, dtype=torch.int32, device="cuda")
    opcheck(torch.ops.decdec.select_topk.default, (x, 16, indices), test_utils=checks)
    opcheck(torch.ops.decdec.select_random.default, (x, 1, 16, indices), test_utils=checks)
    floors = ops.bucket_floors(3.0, 1.0)
    opcheck(torch.ops.decdec.select_buckets.default, (x, floors, 16, indices), test_utils=checks)
    total = torch.zeros(2, 192, device="cuda")
    chosen = ops.select_topk(x, 16)
    opcheck(torch.ops.decdec.compensate.default, (x, chosen, codes, scale, 4, total), test_utils=checks)
    at_once = (x, "exact", None, None, 0, 16, codes, scale, 4, total)
    opcheck(torch.ops.decdec.select_and_compensate.default, at_once, test_utils=checks)
    arguments = (x, weight.tiles, None, None, 3, codes, scale, "exact", None, None, 0, 16, 4, y)
    opcheck(torch.ops.decdec.linear.default, arguments, test_utils=checks)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"x": (9, 576)}, "tokens must be 1..8, got 9"),
        ({"x": (1, 640)}, r"x must be \(tokens, 576\), got \(1, 640\)"),
        ({"codes": "pageable"}, "codes must be on cuda:0 or in pinned host memory, got cpu"),
        ({"n_tb": 0}, "n_tb must be 1..1024, got 0"),
        ({"dtype": torch.float32}, "x must be float16 or bfloat16 on a GPU"),
    ],
)
def test_linear_refuses(changed: dict[str, Any], message: str) -> None:
    weight, _ = draw_weight(576, 192, 3, "uniform", torch.float16, bias=False)
    codes, scale, _ = draw_residual(576, 192)
    x = draw_x(*changed.get("x", (1, 576)), changed.get("dtype", torch.float16))
    if changed.get("codes") == "pageable":
        codes = codes.clone()
    with pytest.raises(DecDECError, match=message):
        ops.linear(x, weight, Selection("exact", 16), codes, scale, changed.get("n_tb", 8))
