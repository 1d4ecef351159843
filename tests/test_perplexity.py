"""Windows, their losses and the summary, against the definition written out in float64."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from decdec_core.config import DecDECError
from decdec_eval.perplexity import summary, window_nll, windows


@pytest.mark.parametrize(
    ("tokens", "length", "count"), [(2, 2, 1), (7, 3, 2), (2048, 2048, 1), (4097, 2048, 2)]
)
def test_windows_do_not_overlap_and_drop_the_rest(tokens: int, length: int, count: int) -> None:
    cut = windows(range(tokens), length)
    assert [len(window) for window in cut] == [length] * count
    assert [token for window in cut for token in window] == list(range(count * length))


def test_text_shorter_than_a_window_is_refused() -> None:
    with pytest.raises(DecDECError, match="at least one window of 8 tokens, got 7"):
        windows(range(7), 8)


def test_window_without_a_next_token_is_refused() -> None:
    with pytest.raises(DecDECError, match="at least 2 tokens, got 1"):
        windows(range(7), 1)


@pytest.mark.parametrize("length", [2, 256, 257, 300])
def test_window_nll_is_the_mean_next_token_loss(
    tiny_model_dir: Path, draw: torch.Generator, length: int
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32).eval()
    ids = torch.randint(0, 256, (2, length), generator=draw)
    with torch.no_grad():
        log_probabilities = model(ids).logits.double().log_softmax(-1)
    wanted = -log_probabilities[:, :-1].gather(-1, ids[:, 1:, None])[..., 0].mean(-1)
    got = window_nll(model, ids.tolist(), progress=False)
    # the batch of two and two batches of one differ by float32 rounding of the model's own sums
    assert got == pytest.approx(wanted.tolist(), rel=1e-5)


def test_summary() -> None:
    result = summary([2.0, 3.0, 4.0])
    assert result["windows"] == 3
    assert result["mean_nll"] == pytest.approx(3.0)
    assert result["mean_nll_stderr"] == pytest.approx(1 / math.sqrt(3))
    assert result["token_perplexity"] == pytest.approx(math.exp(3))
    assert result["token_perplexity_stderr"] == pytest.approx(math.exp(3) / math.sqrt(3))


def test_one_window_has_no_standard_error() -> None:
    result = summary([2.0])
    assert result["mean_nll_stderr"] is None
    assert result["token_perplexity_stderr"] is None


def test_summary_of_nothing_is_refused() -> None:
    with pytest.raises(DecDECError, match="at least one window, got none"):
        summary([])
