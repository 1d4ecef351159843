"""Token perplexity by the paper's protocol (method.md, section 8).

One token sequence -> non-overlapping windows -> mean next-token loss of each -> exp of their mean. The first
token of a window is context only, so a window of 2048 tokens scores 2047.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from decdec_core.config import DecDECError

WINDOW_LENGTH = 2048
_ROWS_AT_ONCE = 256  # float32 logits of 256 tokens over a vocabulary of 128k take 131 MB


def windows(token_ids: Sequence[int], length: int = WINDOW_LENGTH) -> list[list[int]]:
    """Return the consecutive windows of `length` tokens; what is left at the end is dropped.

    Fewer tokens than one window, or a window without a next token, raise DecDECError.
    """
    if length < 2:
        raise DecDECError(f"window length must be at least 2 tokens, got {length}")
    if len(token_ids) < length:
        raise DecDECError(
            f"text must have at least one window of {length} tokens, got {len(token_ids)} tokens"
        )
    starts = range(0, len(token_ids) - length + 1, length)
    return [list(token_ids[start : start + length]) for start in starts]


@torch.inference_mode()
def window_nll(model: Any, windows: Sequence[Sequence[int]], progress: bool = True) -> list[float]:
    """Return each window's mean next-token loss in nats.

    model: a causal language model of transformers. windows: token ids. progress: show a bar. Log-softmax is
    taken in float32, in slices of tokens: beyond the model's own logits it needs 256 rows of them.
    """
    device = model.get_input_embeddings().weight.device
    losses = []
    for window in tqdm(windows, desc="windows", unit="window", disable=not progress):
        ids = torch.tensor([window], dtype=torch.long, device=device)
        logits = model(ids, use_cache=False).logits[0, :-1]
        losses.append(_mean_loss(logits, ids[0, 1:].to(logits.device)))
    return losses


@torch.inference_mode()
def window_states(model: Any, window: Sequence[int]) -> Tensor:
    """Return the last hidden states (tokens - 1, hidden) from which a window's next tokens are predicted."""
    device = model.get_input_embeddings().weight.device
    ids = torch.tensor([list(window)], dtype=torch.long, device=device)
    return model.base_model(ids, use_cache=False).last_hidden_state[0, :-1]


@torch.inference_mode()
def states_nll(head: Any, states: Tensor, window: Sequence[int]) -> float:
    """Return the window's mean next-token loss in nats, of window_states and the head that makes logits."""
    targets = torch.tensor(list(window[1:]), dtype=torch.long, device=states.device)
    total = 0.0
    for rows, ids in zip(states.split(_ROWS_AT_ONCE), targets.split(_ROWS_AT_ONCE), strict=True):
        logits = head(rows).float()
        total += float(F.cross_entropy(logits, ids.to(logits.device), reduction="sum").double())
    return total / len(targets)


def _mean_loss(logits: torch.Tensor, targets: torch.Tensor) -> float:
    """Return the mean cross entropy in nats. logits: (tokens, vocabulary), targets: (tokens,)."""
    slices = zip(logits.split(_ROWS_AT_ONCE), targets.split(_ROWS_AT_ONCE), strict=True)
    total = sum(F.cross_entropy(rows.float(), ids, reduction="sum").double() for rows, ids in slices)
    return float(total) / len(targets)


def summary(nll: Sequence[float]) -> dict[str, float | int | None]:
    """Return token_perplexity and mean_nll with their standard errors over windows.

    nll: mean loss of each window, nats. The perplexity's error is first-order: perplexity times that of the
    mean loss. Both errors are None for a single window.
    """
    if not nll:
        raise DecDECError("nll must have at least one window, got none")
    mean = statistics.fmean(nll)
    error = statistics.stdev(nll) / math.sqrt(len(nll)) if len(nll) > 1 else None
    return {
        "token_perplexity": math.exp(mean),
        "token_perplexity_stderr": None if error is None else math.exp(mean) * error,
        "mean_nll": mean,
        "mean_nll_stderr": error,
        "windows": len(nll),
    }
