from __future__ import annotations

import pytest
import torch

from decdec_core.config import ResidualQuant
from decdec_core.residuals import dequantize_residual, quantize_residual, search_scale


def _naive_scale(row: torch.Tensor, limit: int) -> float:
    """The definition, one row and one step at a time, in float64."""
    largest = row.double().abs().max() / limit
    errors = {}
    for i in range(1, 33):
        scale = largest * i / 32
        codes = (row.double() / scale).round().clamp(-limit, limit)
        errors[i] = ((codes * scale - row.double()) ** 2).sum().item()
    return (largest * min(errors, key=errors.get) / 32).item()  # type: ignore[arg-type]


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_scale_is_the_best_of_32(bits: int, draw: torch.Generator) -> None:
    residual = torch.randn(12, 333, generator=draw)
    limit = 2 ** (bits - 1) - 1
    found = search_scale(residual, limit)
    wanted = torch.tensor([_naive_scale(row, limit) for row in residual])
    assert torch.allclose(found, wanted, rtol=1e-5)


def test_the_search_does_not_depend_on_how_rows_are_cut(draw: torch.Generator) -> None:
    residual = torch.randn(700, 1000, generator=draw)  # more rows than are searched at once
    assert torch.equal(search_scale(residual, 7)[-3:], search_scale(residual[-3:], 7))


@pytest.mark.parametrize(("bits", "bound"), [(2, 0.8), (4, 0.15), (8, 0.02), (16, 1e-3)])
@pytest.mark.parametrize("out_features", [1, 7, 192])
def test_more_bits_leave_less(bits: int, bound: float, out_features: int, draw: torch.Generator) -> None:
    residual = torch.randn(out_features, 100, generator=draw)
    q = quantize_residual(residual, ResidualQuant(bits))
    assert (q.in_features, q.out_features) == (100, out_features)
    assert q.bytes_per_channel == q.codes[0].nbytes
    decoded = dequantize_residual(q)
    assert decoded.shape == residual.shape
    # bounds: about 1.3 times the error of the best uniform quantizer of a normal variable
    assert (decoded - residual).square().mean().sqrt() < bound


def test_an_all_zero_row_decodes_to_zero() -> None:
    residual = torch.zeros(3, 50)
    residual[1] = torch.linspace(-1, 1, 50)
    decoded = dequantize_residual(quantize_residual(residual, ResidualQuant(4)))
    assert (decoded[0] == 0).all()
    assert (decoded[2] == 0).all()
    assert (decoded[1] != 0).any()
