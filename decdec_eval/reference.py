"""The full-precision model that others are compared with: its head, and its last hidden states in a file.

What is kept is a token's last hidden state, many times smaller than its logits, which are made of it a few
tokens at a time. The file lies in the cache and is read as it is needed, so that the model itself can be let
go, and a run that was killed, or another process, finds it there.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from decdec_core.config import DecDECError
from decdec_core.files import whole_file
from decdec_core.sources import cache_dir

_ROWS_AT_ONCE = 256  # float32 logits of 256 tokens over a vocabulary of 128k take 131 MB, several times


class Reference:
    """The full model's head, on `device`, and its hidden states (tokens, hidden) of each of the items."""

    def __init__(self, path: Path, device: torch.device) -> None:
        self._file = safe_open(path, framework="pt")
        self.count = sum(name.startswith("states.") for name in self._file.keys())  # noqa: SIM118
        weight = self._file.get_tensor("head.weight")
        bias = self._file.get_tensor("head.bias") if "head.bias" in self._file.keys() else None  # noqa: SIM118
        self.head = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
        state = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
        self.head.load_state_dict(state, assign=True)
        self.head.requires_grad_(False).to(device)

    def states(self, index: int) -> Tensor:
        """Return the hidden states of an item, on the CPU."""
        return self._file.get_tensor(f"states.{index}")

    def compare(self, index: int, states: Tensor, head: Any) -> tuple[float, int]:
        """Return compare's values of an item; another vocabulary raises DecDECError."""
        if head.weight.shape[0] != self.head.weight.shape[0]:
            raise DecDECError(
                f"model must have the full model's {self.head.weight.shape[0]} tokens, "
                f"got {head.weight.shape[0]}"
            )
        return compare(self.states(index), self.head, states, head)


def reference_path(key: str) -> Path:
    """Return where the cache has the reference of a key."""
    return cache_dir() / "references" / f"{key}.safetensors"


def write_reference(path: Path, head: Any, states: Iterable[Tensor]) -> None:
    """Write a reference to `path`. head: the full model's; states: of each item, kept in host memory until
    all are there."""
    tensors = {f"states.{index}": rows.cpu().contiguous() for index, rows in enumerate(states)}
    tensors |= {f"head.{name}": value.detach().cpu().clone() for name, value in head.state_dict().items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as temporary:
        save_file(tensors, temporary)


@torch.inference_mode()
def compare(full: Tensor, full_head: Any, states: Tensor, head: Any) -> tuple[float, int]:
    """Return the sum over tokens of KL(full || other) in nats, and how many tokens have the same argmax.

    full, states: (tokens, hidden), each with the head that makes logits (tokens, vocabulary) of it. Logits
    and the divergence of a token are taken in float32 (those of bfloat16 tie for the top), sums in float64.
    """
    total, same = 0.0, 0
    for mine, theirs in zip(full.split(_ROWS_AT_ONCE), states.split(_ROWS_AT_ONCE), strict=True):
        wanted, got = _logits(full_head, mine.to(full_head.weight.device)), _logits(head, theirs)
        same += int((wanted.argmax(-1) == got.argmax(-1)).sum())
        p, q = wanted.log_softmax(-1), got.log_softmax(-1)
        total += float((p.exp() * (p - q)).sum(-1).double().sum())
    return total, same


def _logits(head: Any, states: Tensor) -> Tensor:
    bias = getattr(head, "bias", None)
    return F.linear(states.float(), head.weight.float(), None if bias is None else bias.float())


def mean_with_error(sums: Sequence[float], counts: Sequence[int]) -> tuple[float, float | None]:
    """Return sum(sums) / sum(counts) and its standard error over items, such as conversations: tokens of
    one are not independent, so the error is a ratio's, of items drawn whole. None for a single one."""
    mean, n = sum(sums) / sum(counts), len(sums)
    if n < 2:
        return mean, None
    squares = sum((s - mean * c) ** 2 for s, c in zip(sums, counts, strict=True))
    return mean, math.sqrt(n / (n - 1) * squares) / sum(counts)
