"""Texts -> per-layer activation statistics (method.md section 3), one decoder block at a time.

texts --tokenize--> sequences --embedding--> hidden states --block 0--> ... --block n-1-->
                                                 |  hooks on the linear layers of each input group
                                                 v
                                        ActivationStatistics (streaming) and a small token sample
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from decdec_core.config import DecDECError

# Llama-like models put huge activations on the first tokens: in the boundaries, but not in the means
FIRST_TOKENS = 4


@dataclass(frozen=True)
class ActivationStatistics:
    """What one linear layer's input looked like on the calibration text.

    rank_max: (in,) float32, for each rank j the largest over tokens of the j-th largest |x|.
    mean_square, mean: (in,) float32, of x per channel, the first tokens of a sequence left out.
    """

    rank_max: Tensor
    mean_square: Tensor
    mean: Tensor


class StatisticsAccumulator:
    """Adds up ActivationStatistics over batches of inputs (sequences, tokens, in)."""

    def __init__(self, in_features: int) -> None:
        self._rank_max = np.zeros(in_features, dtype=np.float32)
        self._square_sum = torch.zeros(in_features, dtype=torch.float64)
        self._sum = torch.zeros(in_features, dtype=torch.float64)
        self._tokens = 0

    def add(self, x: Tensor) -> None:
        # numpy sorts float32 rows with SIMD, some ten times faster than torch on a CPU
        ranked = np.sort(x.abs().float().reshape(-1, x.shape[-1]).cpu().numpy(), axis=1)
        self._rank_max = np.maximum(self._rank_max, ranked.max(axis=0)[::-1])
        later = x[:, FIRST_TOKENS:].float()
        self._square_sum += later.square().sum((0, 1), dtype=torch.float64).cpu()
        self._sum += later.sum((0, 1), dtype=torch.float64).cpu()
        self._tokens += later.shape[0] * later.shape[1]

    def result(self) -> ActivationStatistics:
        count = max(1, self._tokens)
        rank_max = torch.from_numpy(self._rank_max.copy())
        return ActivationStatistics(rank_max, (self._square_sum / count).float(), (self._sum / count).float())


def sequences(token_ids: list[int], count: int, length: int) -> Tensor:
    """Return (count, length) int64: `count` sequences spread evenly over the text.

    Raises DecDECError where the text is too short for them.
    """
    available = len(token_ids) // length
    if available < count:
        raise DecDECError(
            f"calibration text must hold {count} sequences of {length} tokens, got {len(token_ids)} tokens"
        )
    windows = torch.tensor(token_ids[: available * length]).view(available, length)
    return windows[torch.arange(count) * available // count]


class BlockInputs:
    """The calibration sequences on their way through the decoder blocks.

    hidden: (sequences, tokens, hidden), the input of the block whose turn it is.
    """

    def __init__(self, model: nn.Module, blocks: dict[str, nn.Module], token_ids: Tensor, batch: int) -> None:
        self._batch = batch
        self._arguments = _block_arguments(model, blocks, token_ids[:1])
        embed = model.get_input_embeddings()  # type: ignore[operator]
        self.hidden = embed(token_ids)

    def run(self, name: str, block: nn.Module, count: int | None = None) -> Tensor:
        """Return the outputs of `block` for the first `count` sequences (all by default)."""
        batches = self.hidden[:count].split(self._batch)
        return torch.cat([_first(block(h, **self._arguments[name])) for h in batches])


class _Reached(Exception):
    """The last block's arguments are known; the rest of the forward pass is not needed."""


def _block_arguments(
    model: nn.Module, blocks: dict[str, nn.Module], one: Tensor
) -> dict[str, dict[str, Any]]:
    """Return the keyword arguments that the model gives to each block (masks, rotary embeddings).

    They depend on the sequence length alone; taken per block, because masks can differ between blocks.
    """
    arguments: dict[str, dict[str, Any]] = {}
    last = next(reversed(blocks))

    def recorder(name: str) -> Callable[..., None]:
        def record(_block: nn.Module, _args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            arguments[name] = {k: v for k, v in kwargs.items() if k != "hidden_states"}
            if name == last:
                raise _Reached

        return record

    handles = [b.register_forward_pre_hook(recorder(n), with_kwargs=True) for n, b in blocks.items()]
    try:
        model(one, use_cache=False)
    except _Reached:
        return arguments
    finally:
        for handle in handles:
            handle.remove()
    raise DecDECError("model must run all its decoder blocks in a forward pass, got one that skips the last")


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output
