from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import with_checkout_first
from torch import Tensor

from decdec_core.config import DecDECError, WeightQuant
from decdec_core.packing import unpack_codes
from decdec_core.quantize import weight_layout
from decdec_core.quantize.squeezellm import IMPORTANCE_FLOOR, quantize_codebook, weighted_error

SHAPES = [1, 31, 576, 1000, 1032]
ROWS = 6


def config(bits: int = 3, clustering: str = "exact") -> WeightQuant:
    return WeightQuant("squeezellm", bits, clustering=clustering)


def drawn(kind: str, rows: int, in_features: int, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return a weight and its Fisher information, which spans about eight decades."""
    weight = torch.randn(rows, in_features, generator=draw)
    if kind == "heavy":
        weight = weight / torch.rand(rows, in_features, generator=draw).clamp(min=1e-3)
    elif kind == "grid":
        weight = (weight * 8).round() / 8
    elif kind == "far":
        weight = weight * 0.01 + 50
    return weight, 10 ** (8 * torch.rand(rows, in_features, generator=draw) - 12)


def table_rounding(weight: Tensor, fisher: Tensor, table: Tensor) -> Tensor:
    """Return what rounding centres by half a float16 step (2**-12 of the value at most) adds to the error."""
    floored = torch.maximum(fisher.double(), IMPORTANCE_FLOOR * fisher.double().mean(1, keepdim=True))
    step = table.double().abs().amax(1).clamp(min=2.0**-14) * 2.0**-11
    return floored.sum(1) * step.square()


def brute_force(row: Tensor, importance: Tensor, size: int) -> float:
    """Return the least weighted error of all partitions of the sorted row into `size` intervals."""
    order = row.argsort()
    x, w = row[order].double().numpy(), importance[order].double().numpy()
    best = np.inf
    for cuts in itertools.combinations(range(1, len(x)), size - 1):
        error = 0.0
        for low, high in itertools.pairwise((0, *cuts, len(x))):
            part, weights = x[low:high], w[low:high]
            error += (weights * (part - np.average(part, weights=weights)) ** 2).sum()
        best = min(best, error)
    return best


@pytest.mark.parametrize("in_features", [5, 8, 12])
@pytest.mark.parametrize("kind", ["normal", "heavy", "grid", "far"])
def test_exact_is_the_optimum_of_all_partitions(kind: str, in_features: int, draw: torch.Generator) -> None:
    weight, fisher = drawn(kind, 20, in_features, draw)
    q = quantize_codebook(weight, fisher, config(2))
    got = weighted_error(weight, fisher, q)
    floored = torch.maximum(fisher, IMPORTANCE_FLOOR * fisher.mean(1, keepdim=True))
    wanted = torch.tensor([brute_force(w, f, 4) for w, f in zip(weight, floored, strict=True)])
    # float64 throughout; only the table is rounded, which moves the error of an optimum either way by no more
    slack = table_rounding(weight, fisher, q.table) + 1e-6 * wanted
    assert (got <= wanted + slack).all()
    assert (got >= wanted - slack).all()


@pytest.mark.parametrize("size", [2, 3, 4, 8])
def test_the_compiled_program_finds_the_optimum_before_rounding(size: int, draw: torch.Generator) -> None:
    from decdec_core.quantize import clustering

    weight, fisher = drawn("normal", 30, 11, draw)
    keys = np.sort(clustering.sort_keys(weight.numpy()), axis=1)
    tables = torch.from_numpy(clustering.exact_tables(weight.numpy(), fisher.double().numpy(), keys, size))
    distances = (weight.double().unsqueeze(-1) - tables.unsqueeze(1)).square().amin(-1)
    wanted = [brute_force(w, f, size) for w, f in zip(weight, fisher, strict=True)]
    # prefix sums over eight decades of importance leave 1e-16 · 1e8 of relative error
    assert torch.allclose(
        (distances * fisher.double()).sum(1), torch.tensor(wanted, dtype=torch.float64), rtol=1e-7, atol=0
    )


@pytest.mark.parametrize("bits", [2, 3, 4, 5])
@pytest.mark.parametrize("kind", ["normal", "heavy", "grid", "far"])
def test_exact_is_never_worse_than_flash1d_and_somewhere_better(
    kind: str, bits: int, draw: torch.Generator
) -> None:
    weight, fisher = drawn(kind, 16, 1000, draw)
    exact, flash = (quantize_codebook(weight, fisher, config(bits, c)) for c in ("exact", "flash1d"))
    ours, theirs = (weighted_error(weight, fisher, q) for q in (exact, flash))
    assert (ours <= theirs + table_rounding(weight, fisher, exact.table)).all()
    if kind != "far":  # where float16 has a dozen values in all
        assert ours.sum() < theirs.sum()


@pytest.mark.parametrize("clustering", ["exact", "flash1d"])
@pytest.mark.parametrize("bits", [2, 3, 4, 5])
@pytest.mark.parametrize("in_features", SHAPES)
def test_layout_order_and_nearest_codes(
    in_features: int, bits: int, clustering: str, draw: torch.Generator
) -> None:
    weight, fisher = drawn("normal", ROWS, in_features, draw)
    q = quantize_codebook(weight, fisher, config(bits, clustering))
    layout = weight_layout(config(bits, clustering), in_features, ROWS)
    assert {name: (tuple(t.shape), t.dtype) for name, t in q.tensors().items()} == layout
    table = q.table.float()
    assert (table.diff(dim=1) >= 0).all()
    decoded = q.dequantize()
    assert torch.equal(decoded, table.gather(1, unpack_codes(q.codes, bits, in_features).long()))
    nearest = (weight.unsqueeze(-1) - table.unsqueeze(1)).abs().amin(-1)
    assert torch.equal((weight - decoded).abs(), nearest)


@pytest.mark.parametrize("kind", ["normal", "heavy"])
def test_error_falls_with_bits(kind: str, draw: torch.Generator) -> None:
    weight, fisher = drawn(kind, ROWS, 1032, draw)
    errors = [
        weighted_error(weight, fisher, quantize_codebook(weight, fisher, config(b))) for b in (2, 3, 4, 5)
    ]
    for more, fewer in itertools.pairwise(errors):
        assert (fewer < more).all()


def test_the_error_is_the_weighted_sum_of_squares(draw: torch.Generator) -> None:
    weight = torch.randn(3, 100, generator=draw)
    fisher = torch.rand(3, 100, generator=draw) + 0.1  # above every floor
    q = quantize_codebook(weight, fisher, config())
    wanted = (fisher.double() * (weight.double() - q.dequantize().double()).square()).sum(1)
    # float32 rounds the differences
    assert torch.allclose(weighted_error(weight, fisher, q), wanted, rtol=1e-5)
    assert weighted_error(weight, fisher, q).dtype == torch.float64


@pytest.mark.parametrize("clustering", ["exact", "flash1d"])
@pytest.mark.parametrize("value", [0.0, -0.0, 3.0, -0.125])
def test_constant_rows_are_exact(value: float, clustering: str) -> None:
    weight = torch.full((2, 130), value)
    q = quantize_codebook(weight, torch.ones(2, 130), config(3, clustering))
    assert torch.equal(q.dequantize(), weight)
    assert (q.table == value).all()


@pytest.mark.parametrize("clustering", ["exact", "flash1d"])
@pytest.mark.parametrize("distinct", [1, 3, 7, 8])
def test_as_many_values_as_fit_are_exact(distinct: int, clustering: str, draw: torch.Generator) -> None:
    values = torch.arange(distinct) * 0.25 - 1
    weight = values[torch.randint(distinct, (4, 200), generator=draw)]
    weight[:, :distinct] = values
    _, fisher = drawn("normal", 4, 200, draw)
    q = quantize_codebook(weight, fisher, config(3, clustering))
    assert torch.equal(q.dequantize(), weight)
    assert torch.equal(q.table[:, :distinct].float(), values.expand(4, -1))
    assert (q.table[:, distinct:] == values[-1]).all()


def test_equal_values_count_together(draw: torch.Generator) -> None:
    weight, fisher = drawn("normal", 4, 300, draw)
    twice = quantize_codebook(weight.repeat(1, 2), fisher.repeat(1, 2), config())
    once = quantize_codebook(weight, fisher, config())
    # the doubled sums are the same but for float64 rounding, which may tip the rounding to float16
    assert torch.allclose(twice.table.float(), once.table.float(), rtol=2.0**-10, atol=1e-6)


@pytest.mark.parametrize("clustering", ["exact", "flash1d"])
def test_a_row_without_gradients_counts_all_weights_alike(clustering: str, draw: torch.Generator) -> None:
    weight = torch.randn(3, 576, generator=draw)
    fisher = torch.rand(3, 576, generator=draw)
    fisher[1] = 0
    q = quantize_codebook(weight, fisher, config(3, clustering))
    alike = quantize_codebook(weight[1:2], torch.full((1, 576), 7e-9), config(3, clustering))
    # the same objective in another unit, up to float64 rounding as above; flash1d draws the same points
    assert torch.allclose(q.table[1:2].float(), alike.table.float(), rtol=2.0**-10)


def test_one_hot_gradient_is_met_and_the_rest_still_clustered(draw: torch.Generator) -> None:
    weight = torch.randn(1, 576, generator=draw).half().float()
    fisher = torch.zeros(1, 576)
    fisher[0, 17] = 1e-3
    q = quantize_codebook(weight, fisher, config())
    assert q.dequantize()[0, 17] == weight[0, 17]
    # eight centres of a normal distribution leave 0.035 of the variance, seven and a fixed one 0.05
    assert (q.dequantize() - weight).square().mean() < 0.06 * weight.square().mean()


def test_the_bytes_depend_on_neither_threads_nor_other_rows(draw: torch.Generator) -> None:
    weight, fisher = drawn("grid", 50, 576, draw)
    before = torch.get_num_threads()
    try:
        for clustering in ("exact", "flash1d"):
            results = []
            for threads in (1, 3):
                torch.set_num_threads(threads)
                results.append(quantize_codebook(weight, fisher, config(4, clustering)))
            alone = quantize_codebook(weight[20:21], fisher[20:21], config(4, clustering))
            assert torch.equal(results[0].codes, results[1].codes)
            assert torch.equal(results[0].table, results[1].table)
            assert torch.equal(alone.codes[0], results[0].codes[20])
    finally:
        torch.set_num_threads(before)


def test_numba_is_imported_late_and_brings_no_second_openmp() -> None:
    if not sys.platform.startswith("linux"):
        pytest.skip("reads /proc/self/maps")
    script = """
import json, sys, torch
from decdec_core.config import WeightQuant
from decdec_core.quantize.squeezellm import quantize_codebook

def runtimes():
    maps = open("/proc/self/maps").read().split()
    return sorted({m for m in maps if any(name in m for name in ("libgomp", "libiomp", "libomp"))})

early, before = "numba" in sys.modules, runtimes()
torch.set_num_threads(2)
quantize_codebook(torch.randn(64, 600), torch.rand(64, 600), WeightQuant("squeezellm", 3))
print(json.dumps([early, before, "numba" in sys.modules, runtimes()]))
"""
    run = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": with_checkout_first()},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    early, before, late, after = json.loads(run.stdout)
    assert late
    assert not early
    assert after == before


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 65536.0])
def test_weights_that_a_float16_table_cannot_hold_are_refused(bad: float) -> None:
    weight = torch.ones(2, 8)
    weight[1, 3] = bad
    with pytest.raises(DecDECError, match=r"weight must be finite and at most 65504\.0 in magnitude, got "):
        quantize_codebook(weight, torch.ones(2, 8), config())


def test_the_largest_float16_is_taken() -> None:
    weight = torch.tensor([[65504.0, -65504.0, 65503.0, 0.0]])
    assert torch.isfinite(quantize_codebook(weight, torch.ones(1, 4), config(2)).dequantize()).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1.0])
def test_bad_fisher_information_is_refused(bad: float) -> None:
    fisher = torch.ones(2, 8)
    fisher[0, 5] = bad
    with pytest.raises(DecDECError, match="fisher must be finite and not negative, got values from"):
        quantize_codebook(torch.ones(2, 8), fisher, config())


@pytest.mark.parametrize("shape", [(8,), (2, 2, 2), (0, 8), (8, 0)])
def test_weights_that_are_no_matrix_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(DecDECError, match=r"weight must be \(out, in\) and not empty, got "):
        quantize_codebook(torch.ones(shape), torch.ones(shape), config())


def test_another_shape_of_fisher_is_refused() -> None:
    with pytest.raises(DecDECError, match=r"fisher must have the weight's shape \(2, 8\), got \(8, 2\)"):
        quantize_codebook(torch.ones(2, 8), torch.ones(8, 2), config())


def test_other_methods_and_half_bits_are_refused() -> None:
    with pytest.raises(DecDECError, match="method must be one of squeezellm, got 'rtn'"):
        quantize_codebook(torch.ones(2, 8), torch.ones(2, 8), WeightQuant("rtn", 3))
    with pytest.raises(DecDECError, match=r"bits must be one of 2, 3, 4, 5, got 3\.5"):
        quantize_codebook(torch.ones(2, 8), torch.ones(2, 8), WeightQuant("squeezellm", 3.5))
