"""Selection and compensation: the compiled ops against their twins, and both against the definitions."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from decdec_core import kernels, ops
from decdec_core.config import CHUNK, DecDECError, channels_per_chunk, total_channels
from decdec_core.packing import channel_bytes, pack_table, pack_tiles, unpack_channels

SIZES = (1, 31, 576, 1000, 1032, 1536, 2100)
K_CHUNKS = (0, 1, 16, 1000, 1024)
TOKENS = (0, 1, 3, 17)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
FLOORS = ops.bucket_floors(4.0, 1.5)

Selection = Callable[[Tensor, int], Tensor]
# name: (compiled, twin)
SELECTIONS: dict[str, tuple[Selection, Selection]] = {
    "topk": (ops.select_topk, ops.select_topk_ref),
    "buckets": (
        lambda x, k: ops.select_buckets(x, FLOORS, k),
        lambda x, k: ops.select_buckets_ref(x, FLOORS, k),
    ),
    "random": (lambda x, k: ops.select_random(x, 7, k), lambda x, k: ops.select_random_ref(x, 7, k)),
}


@pytest.fixture(scope="module", autouse=True)
def compiled() -> None:
    assert kernels.in_use() == "compiled", "these tests compare with the compiled kernels"


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def activations(tokens: int, in_features: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    source = torch.Generator().manual_seed(seed)
    return (torch.randn(tokens, in_features, generator=source) * 2).to(dtype)


def hard_inputs(in_features: int) -> dict[str, Tensor]:
    x = activations(2, in_features)
    mixed = x.clone()
    mixed[:, ::3] = float("nan")
    mixed[:, 1::7] = float("-inf")
    return {
        "zeros": torch.zeros(2, in_features),
        "negative zeros": torch.zeros(2, in_features).neg(),
        "constant": torch.full((2, in_features), -1.5),
        "huge": x * 1e37,
        "subnormal": x * 1e-41,
        "nan": torch.full((2, in_features), float("nan")),
        "inf": torch.full((2, in_features), float("inf")),
        "mixed": mixed,
    }


def assert_well_formed(indices: Tensor, in_features: int, k_chunk: int) -> None:
    """Exactly k distinct channels of each chunk, ascending."""
    budgets = channels_per_chunk(in_features, k_chunk)
    assert indices.dtype == torch.int32
    assert indices.shape[1] == sum(budgets)
    for chunk, part in enumerate(indices.split(budgets, dim=1)):
        assert (part[:, 1:] > part[:, :-1]).all()
        assert ((part >= chunk * CHUNK) & (part < min(in_features, (chunk + 1) * CHUNK))).all()


def residual(in_features: int, out: int, bits: int, seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Return codes and scale as stored, and the (in, out) float64 residual that they stand for."""
    source = torch.Generator().manual_seed(seed)
    scale = torch.rand(out, generator=source) + 0.5
    if bits == 16:
        codes = torch.randn(in_features, out, generator=source).half()
        return codes, torch.ones(out), codes.double()
    width = channel_bytes(out, bits)
    codes = torch.randint(0, 256, (in_features, width), generator=source, dtype=torch.uint8)
    return codes, scale, unpack_channels(codes, bits, out).T.double() * scale.double()


@pytest.mark.parametrize("name", SELECTIONS)
@pytest.mark.parametrize("in_features", SIZES)
def test_selection_is_its_twin(name: str, in_features: int) -> None:
    kernel, twin = SELECTIONS[name]
    for k_chunk, tokens, dtype in itertools.product(K_CHUNKS, TOKENS, DTYPES):
        x = activations(tokens, in_features, dtype)
        chosen = kernel(x, k_chunk)
        assert torch.equal(chosen, twin(x, k_chunk)), (k_chunk, tokens, dtype)
        assert_well_formed(chosen, in_features, k_chunk)


@pytest.mark.parametrize("name", SELECTIONS)
@pytest.mark.parametrize("case", hard_inputs(1))
def test_selection_takes_any_input(name: str, case: str) -> None:
    kernel, twin = SELECTIONS[name]
    for in_features, k_chunk in itertools.product((31, 1000, 2100), K_CHUNKS):
        x = hard_inputs(in_features)[case]
        chosen = kernel(x, k_chunk)
        assert_well_formed(chosen, in_features, k_chunk)
        assert torch.equal(chosen, twin(x, k_chunk))


@pytest.mark.parametrize("name", SELECTIONS)
def test_selection_of_a_batch_is_that_of_its_rows(name: str) -> None:
    kernel, _ = SELECTIONS[name]
    x = activations(50, 1536)
    assert torch.equal(kernel(x, 16), torch.cat([kernel(row, 16) for row in x.split(1)]))


@pytest.mark.parametrize("in_features", [576, 2100])
def test_topk_leaves_nothing_larger(in_features: int) -> None:
    x = activations(17, in_features)
    chosen = torch.zeros_like(x, dtype=torch.bool).scatter_(1, ops.select_topk(x, 16).long(), True)
    for part, taken in zip(x.abs().split(CHUNK, dim=1), chosen.split(CHUNK, dim=1), strict=True):
        smallest_taken = part.masked_fill(~taken, torch.inf).amin(1)
        assert (smallest_taken >= part.masked_fill(taken, 0).amax(1)).all()


def test_topk_puts_nan_above_inf_above_numbers_and_low_channels_first() -> None:
    x = torch.ones(1, 1024)
    x[0, 900] = float("nan")
    x[0, 800] = float("-inf")
    x[0, 700] = -3e38
    assert ops.select_topk(x, 1).tolist() == [[900]]
    assert ops.select_topk(x, 2).tolist() == [[800, 900]]
    assert ops.select_topk(x, 5).tolist() == [[0, 1, 700, 800, 900]]


def test_buckets_by_their_definition() -> None:
    x = activations(17, 1024)
    for row, chosen in zip(x.abs().tolist(), ops.select_buckets(x, FLOORS, 40).tolist(), strict=True):
        bucket = [next(i for i, floor in enumerate(FLOORS.tolist()) if v >= floor) for v in row]
        assert chosen == sorted(sorted(range(1024), key=lambda c: (bucket[c], c))[:40])


def test_bucket_floors_are_linear_and_end_at_zero() -> None:
    floors = ops.bucket_floors(10.0, 4.0)
    assert floors.dtype == torch.float32
    assert floors.shape == (32,)
    assert floors[0] == 10
    assert floors[15] == 4
    assert floors[31] == 0
    # 2e-6: two float32 roundings of numbers up to 10
    torch.testing.assert_close(floors[:16].diff(), torch.full((15,), -6 / 15), rtol=0, atol=2e-6)
    torch.testing.assert_close(floors[15:].diff(), torch.full((16,), -4 / 16), rtol=0, atol=2e-6)
    assert torch.equal(ops.bucket_floors(0.0, 0.0), torch.zeros(32))


def assert_uniform(chosen: Tensor, in_features: int) -> None:
    """Chi-square of how often each channel was drawn, within five standard deviations."""
    draws, k = chosen.shape
    expected = draws * k / in_features
    counts = torch.bincount(chosen.flatten(), minlength=in_features).double()
    # drawing without replacement shrinks the variance of a count by 1 - k / in
    chi_square = ((counts - expected) ** 2).sum().item() / expected / (1 - k / in_features)
    assert abs(chi_square - in_features) < 5 * (2 * in_features) ** 0.5


def assert_independent(left: Tensor, right: Tensor, in_features: int) -> None:
    """The mean overlap of two draws of k is k * k / in, within five standard deviations."""
    draws, k = left.shape
    overlap = (left[:, :, None] == right[:, None, :]).sum((1, 2)).double()
    mean = k * k / in_features
    variance = mean * (1 - k / in_features) ** 2 * in_features / (in_features - 1)  # hypergeometric
    assert abs(overlap.mean().item() - mean) < 5 * (variance / draws) ** 0.5


def test_random_draws_are_uniform_and_independent_over_tokens() -> None:
    chosen = ops.select_random(activations(4000, 1024), 0, 16)
    assert_uniform(chosen, 1024)
    assert_independent(chosen[1:], chosen[:-1], 1024)


def test_random_draws_are_uniform_and_independent_over_seeds() -> None:
    x = activations(1, 1024)
    chosen = torch.cat([ops.select_random(x, seed, 16) for seed in range(2000)])
    assert_uniform(chosen, 1024)
    assert_independent(chosen[1:], chosen[:-1], 1024)
    high = torch.cat([ops.select_random(x, seed << 32, 16) for seed in range(1, 2001)])
    assert_independent(chosen, high, 1024)


def test_random_draws_change_with_a_single_sign() -> None:
    x = activations(1, 1024)
    flipped = torch.where(torch.eye(1024, dtype=torch.bool), -x, x)
    assert_independent(ops.select_random(x, 3, 16).expand(1024, -1), ops.select_random(flipped, 3, 16), 1024)


def test_random_draws_survive_rounding() -> None:
    x = activations(20, 1536)
    assert torch.equal(ops.select_random(x, 3, 16), ops.select_random(x.bfloat16(), 3, 16))


@pytest.mark.parametrize("bits", [2, 4, 8, 16])
@pytest.mark.parametrize("out", [1, 7, 192, 577])
def test_compensation_is_the_masked_product(bits: int, out: int) -> None:
    for in_features, k_chunk, tokens in itertools.product((1, 576, 1032, 2100), (0, 1, 16, 1024), TOKENS):
        x = activations(tokens, in_features)
        codes, scale, exact = residual(in_features, out, bits)
        indices = ops.select_topk(x, k_chunk)
        start = torch.randn(tokens, out)
        masked = torch.zeros_like(x).scatter_(1, indices.long(), x.gather(1, indices.long())).double()
        wanted = start.double() + masked @ exact
        # a float32 sum of n terms is off by at most about n roundings of the sum of magnitudes; one term
        # each for decoding, scaling and the start
        terms = indices.shape[1] + 3
        bound = terms * 2**-24 * (start.abs().double() + masked.abs() @ exact.abs()) + 1e-30
        for compute in (ops.compensate, ops.compensate_ref):
            y = start.clone()
            compute(x, indices, codes, scale, bits, y)
            assert ((y - wanted).abs() <= bound).all(), (compute.__name__, in_features, k_chunk, tokens)


@pytest.mark.parametrize("dtype", DTYPES)
def test_compensation_takes_each_activation_dtype(dtype: torch.dtype) -> None:
    x = activations(5, 576, dtype)
    codes, scale, _ = residual(576, 192, 4)
    indices = ops.select_topk(x, 16)
    y, widened = torch.zeros(2, 5, 192)
    ops.compensate(x, indices, codes, scale, 4, y)
    ops.compensate(x.float(), indices, codes, scale, 4, widened)
    assert torch.equal(y, widened)


def every_half() -> Tensor:
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.float16)


def test_every_half_is_read_exactly() -> None:
    x = every_half().unsqueeze(1)
    y = torch.zeros(len(x), 1)
    indices, one = torch.zeros(1, 1, dtype=torch.int32), torch.full((1, 1), 0x89, dtype=torch.uint8)
    ops.compensate(x, indices, one, torch.ones(1), 4, y)
    torch.testing.assert_close(y, x.float(), rtol=0, atol=0, equal_nan=True)


def test_every_finite_half_is_a_code() -> None:
    codes = every_half()
    codes = codes[codes.isfinite()].unsqueeze(0)
    y = torch.zeros(codes.shape)
    indices = torch.zeros(1, 1, dtype=torch.int32)
    ops.compensate(torch.ones(1, 1), indices, codes, torch.ones(codes.shape[1]), 16, y)
    assert torch.equal(y, codes.float())


def test_compensation_shares_one_row_of_indices() -> None:
    x = activations(17, 1536)
    codes, scale, _ = residual(1536, 577, 4)
    shared = ops.select_topk(x[:1], 16)
    for compute in (ops.compensate, ops.compensate_ref):
        one, each = torch.zeros(2, 17, 577)
        compute(x, shared, codes, scale, 4, one)
        compute(x, shared.expand(17, -1).contiguous(), codes, scale, 4, each)
        assert torch.equal(one, each)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("bits", [2, 4, 8, 16])
def test_compensation_passes_nan_and_inf_on(value: float, bits: int) -> None:
    x = activations(3, 576)
    x[1, 100] = value
    codes, scale, _ = residual(576, 577, bits)
    indices = ops.select_topk(x, 16)
    for compute in (ops.compensate, ops.compensate_ref):
        y = torch.zeros(3, 577)
        compute(x, indices, codes, scale, bits, y)
        assert not y[1].isfinite().any()
        assert y[[0, 2]].isfinite().all()


@pytest.mark.parametrize("tokens", [1, 3, 300])
def test_any_number_of_threads_gives_the_same_bits(tokens: int, threads: Callable[[int], None]) -> None:
    x = activations(tokens, 2100)
    codes, scale, _ = residual(2100, 1999, 4)
    results = []
    for count in (1, 2, 3):
        threads(count)
        indices = [kernel(x, 500) for kernel, _ in SELECTIONS.values()]
        y = torch.zeros(tokens, 1999)
        ops.compensate(x, indices[0], codes, scale, 4, y)
        results.append([*indices, y])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def op_arguments() -> dict[str, tuple[Any, ...]]:
    x = activations(3, 1032)
    codes, scale, _ = residual(1032, 7, 4)
    indices = ops.select_topk(x, 16)
    return {
        "select_topk": (x, 16, indices.clone()),
        "select_buckets": (x, FLOORS, 16, indices.clone()),
        "select_random": (x, 5, 16, indices.clone()),
        "compensate": (x, indices, codes, scale, 4, torch.zeros(3, 7)),
    }


@pytest.mark.parametrize("name", ["select_topk", "select_buckets", "select_random", "compensate"])
def test_op_keeps_the_rules_of_torch(name: str) -> None:
    outcome = torch.library.opcheck(getattr(torch.ops.decdec, name).default, op_arguments()[name])
    assert set(outcome.values()) == {"SUCCESS"}


@pytest.mark.parametrize(
    ("name", "position", "wrong", "message"),
    [
        ("select_topk", 1, 1025, "k_chunk must be 0..1024, got 1025"),
        ("select_topk", 2, torch.zeros(3, 15, dtype=torch.int32), r"indices must be \(3, 16\), got"),
        ("select_topk", 2, torch.zeros(3, 16), "indices must be Int, got Float"),
        ("select_buckets", 1, FLOORS[1:], r"floors must be \(32,\) contiguous"),
        ("select_random", 1, -1, "seed must be 0.."),
        (
            "select_random",
            0,
            torch.zeros(3, 1032).double(),
            "x must be float32, float16 or bfloat16, got Double",
        ),
        ("compensate", 5, torch.zeros(2, 7), r"y must be \(3, 7\), got \(2, 7\)"),
    ],
)
def test_op_called_directly_checks_for_itself(name: str, position: int, wrong: Any, message: str) -> None:
    arguments = [*op_arguments()[name]]
    arguments[position] = wrong
    with pytest.raises(ValueError, match=message):
        getattr(torch.ops.decdec, name)(*arguments)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a CUDA device")
def test_cuda_tensor_is_refused_with_the_reason() -> None:
    with FakeTensorMode():
        x = torch.empty(2, 576, device="cuda")
        with pytest.raises(DecDECError, match="x must be on a device that this torch can use, got cuda"):
            ops.select_topk(x, 16)


@pytest.mark.parametrize("name", SELECTIONS)
@pytest.mark.parametrize("implementation", [0, 1], ids=("compiled", "twin"))
@pytest.mark.parametrize(
    ("x", "k_chunk", "message"),
    [
        (torch.zeros(2, 8), 1025, "k_chunk must be 0..1024, got 1025"),
        (torch.zeros(2, 8), -1, "k_chunk must be 0..1024, got -1"),
        (torch.zeros(2, 8), 1.0, "k_chunk must be 0..1024, got 1.0"),
        (torch.zeros(8), 16, r"x must be \(tokens, in\), got \(8,\)"),
        (torch.zeros(2, 8).double(), 16, "x must be float32, float16 or bfloat16, got torch.float64"),
        (torch.zeros(8, 2).T, 16, r"x must be contiguous, got strides \(1, 2\)"),
    ],
)
def test_selection_refuses(name: str, implementation: int, x: Tensor, k_chunk: int, message: str) -> None:
    with pytest.raises(DecDECError, match=message):
        SELECTIONS[name][implementation](x, k_chunk)


@pytest.mark.parametrize("compute", [ops.select_buckets, ops.select_buckets_ref])
@pytest.mark.parametrize(
    ("floors", "message"),
    [
        (FLOORS[:31], r"floors must be \(32,\), got \(31,\)"),
        (FLOORS.double(), "floors must be torch.float32, got torch.float64"),
        (FLOORS.flip(0), "floors must be descending to 0, got another order"),
        (FLOORS + 1, "floors must be descending to 0, got another order"),
    ],
)
def test_buckets_refuse(compute: Callable[..., Tensor], floors: Tensor, message: str) -> None:
    with pytest.raises(DecDECError, match=message):
        compute(torch.zeros(2, 8), floors, 16)


@pytest.mark.parametrize(("a", "b"), [(1.0, 2.0), (1.0, -1.0), (float("nan"), 0.0), (float("inf"), 1.0)])
def test_bucket_floors_refuse(a: float, b: float) -> None:
    with pytest.raises(DecDECError, match="bucket boundaries must be finite with a >= b >= 0"):
        ops.bucket_floors(a, b)


@pytest.mark.parametrize("compute", [ops.select_random, ops.select_random_ref])
def test_random_refuses_a_negative_seed(compute: Callable[..., Tensor]) -> None:
    with pytest.raises(DecDECError, match=r"seed must be 0\.\."):
        compute(torch.zeros(2, 8), -1, 16)


@pytest.mark.parametrize("compute", [ops.compensate, ops.compensate_ref])
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"bits": 3}, "bits must be"),
        ({"x": torch.zeros(576)}, "x must be"),
        ({"x": torch.zeros(3, 576).double()}, "x must be float32, float16 or bfloat16, got"),
        ({"codes": torch.zeros(576, 3, dtype=torch.uint8)}, "codes must be"),
        ({"codes": torch.zeros(575, 4, dtype=torch.uint8)}, "codes must be"),
        ({"codes": torch.zeros(576, 4, dtype=torch.int8)}, "codes must be"),
        ({"scale": torch.ones(7).half()}, "scale must be"),
        ({"scale": torch.ones(7, 1)}, "scale must be"),
        ({"y": torch.zeros(3, 8)}, "y must be"),
        ({"y": torch.zeros(3, 7).half()}, "y must be"),
        ({"y": torch.zeros(7, 3).T}, "y must be contiguous"),
        ({"indices": torch.zeros(2, 9, dtype=torch.int32)}, r"indices must be \(tokens, K\) or \(1, K\)"),
        ({"indices": torch.zeros(3, 9, dtype=torch.int64)}, "indices must be"),
        ({"indices": torch.full((3, 9), 576, dtype=torch.int32)}, "indices must be 0..575, got 576"),
        ({"indices": torch.full((3, 9), -1, dtype=torch.int32)}, "indices must be 0..575, got -1"),
    ],
)
def test_compensation_refuses(compute: Callable[..., None], changed: dict[str, Any], message: str) -> None:
    codes, scale, _ = residual(576, 7, 4)
    indices = torch.zeros(3, total_channels(576, 16), dtype=torch.int32)
    arguments = {"x": torch.zeros(3, 576), "indices": indices, "codes": codes, "scale": scale, "bits": 4}
    arguments["y"] = torch.zeros(3, 7)
    with pytest.raises(DecDECError, match=message):
        compute(**(arguments | changed))


@pytest.mark.parametrize("kind", ["uniform", "codebook"])
def test_the_twin_of_the_product_adds_bias_and_compensation(kind: str, draw: torch.Generator) -> None:
    codes = torch.randint(0, 8, (96, 160), dtype=torch.uint8, generator=draw)
    scales, zeros = torch.rand(96, 2, generator=draw).half(), torch.full((96, 2), 3, dtype=torch.uint8)
    values, bias = torch.randn(96, 8, generator=draw).half(), torch.randn(96, generator=draw)
    if kind == "uniform":
        weight = ops.TiledWeight(pack_tiles(codes, 3, scales, zeros), 3, 96, 160, bias=bias)
        exact = (codes.double() - 3) * scales.double().repeat_interleave(128, 1)[:, :160]
    else:
        weight = ops.TiledWeight(pack_tiles(codes, 3), 3, 96, 160, pack_table(values), bias)
        exact = values.double().gather(1, codes.long())
    residual, scale = torch.randint(0, 256, (160, 48), dtype=torch.uint8, generator=draw), torch.rand(96)
    x = torch.randn(2, 160, generator=draw).half()
    selection = ops.Selection("exact", 1024)
    wanted = x.double() @ (exact + unpack_channels(residual, 4, 96).double() * scale.double()[:, None]).T
    got = ops.linear(x, weight, selection, residual, scale).double()
    assert (got - wanted - bias.double()).norm() < 1e-3 * wanted.norm()  # y is in float16
