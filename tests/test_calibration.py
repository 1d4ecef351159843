from __future__ import annotations

import pytest
import torch

from decdec_core.calibration import FIRST_TOKENS, StatisticsAccumulator, sequences
from decdec_core.config import DecDECError


def test_statistics_over_batches_follow_the_definitions(draw: torch.Generator) -> None:
    x = torch.randn(6, 20, 33, generator=draw)
    x[:, 0] *= 50  # the huge first token
    sums = StatisticsAccumulator(33)
    for batch in x.split(2):
        sums.add(batch)
    found = sums.result()
    ranked = x.abs().reshape(-1, 33).sort(dim=1, descending=True).values
    assert torch.equal(found.rank_max, ranked.amax(0))
    later = x[:, FIRST_TOKENS:].reshape(-1, 33)
    assert torch.allclose(found.mean_square, later.square().mean(0), rtol=1e-5)
    assert torch.allclose(found.mean, later.mean(0), atol=1e-6)
    assert found.mean_square.max() < 5  # the first token stayed out of it


def test_sequences_are_spread_over_the_text() -> None:
    found = sequences(list(range(1000)), 4, 100)
    assert found[:, 0].tolist() == [0, 200, 500, 700]
    assert torch.equal(found[1], torch.arange(200, 300))


def test_a_text_that_is_too_short_is_refused() -> None:
    with pytest.raises(DecDECError, match="must hold 4 sequences of 100 tokens, got 399 tokens"):
        sequences(list(range(399)), 4, 100)
