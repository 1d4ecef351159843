"""Texts -> per-layer activation statistics (method.md section 3), one decoder block at a time.

texts --tokenize--> sequences --embedding--> hidden states --block 0--> ... --block n-1-->
                                                 |  hooks on the linear layers of each input group
                                                 v
                                        ActivationStatistics (streaming) and a small token sample
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

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

    def reordered(self, order: Tensor) -> ActivationStatistics:
        """Return the same of x[..., order]; ranks have no order of channels."""
        chosen = order.long()
        return ActivationStatistics(self.rank_max, self.mean_square[chosen], self.mean[chosen])


class StatisticsAccumulator:
    """Adds up ActivationStatistics over batches of inputs (sequences, tokens, in)."""

    def __init__(self, in_features: int) -> None:
        self._rank_max = np.zeros(in_features, dtype=np.float32)
        self._square_sum = torch.zeros(in_features, dtype=torch.float64)
        self._sum = torch.zeros(in_features, dtype=torch.float64)
        self._tokens = 0

    def add(self, x: Tensor) -> None:
        magnitudes = x.abs().float().reshape(-1, x.shape[-1])
        if x.is_cuda:
            highest = magnitudes.sort(dim=1).values.amax(0).cpu().numpy()
        else:
            # numpy sorts float32 rows with SIMD, some ten times faster than torch on a CPU
            highest = np.sort(magnitudes.numpy(), axis=1).max(axis=0)
        self._rank_max = np.maximum(self._rank_max, highest[::-1])
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
