"""Input activation -> the channels to compensate (method.md section 4).

random   drawn anew for each token, the same number from every chunk
static   the top channels by mean x**2 on the calibration text, fixed for all tokens
exact    per chunk, the k channels with the largest |x|
dynamic  per chunk, the paper's bucketed approximation of that: the default
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from decdec_core import ops
from decdec_core.calibration import ActivationStatistics
from decdec_core.config import DecDECError, require_int, require_one_of, total_channels

Selector = Callable[[Tensor], Tensor]


def make_selector(
    selection: str, k_chunk: int, statistics: ActivationStatistics, seed: int = 0
) -> Selector | None:
    """Return the function x (tokens, in) -> channels (tokens, K) int32, or None where K is 0.

    `static` returns (1, K): the same channels for all tokens. `seed` is the layer's own.
    Raises DecDECError for an unknown selection or a k_chunk outside 0..1024.
    """
    require_one_of("selection", selection, ("none", *_MAKERS))
    require_int("k_chunk", k_chunk, 0, 1024)
    if selection == "none" or total_channels(statistics.rank_max.shape[0], k_chunk) == 0:
        return None
    return _MAKERS[selection](k_chunk, statistics, seed)


def _random(k_chunk: int, _statistics: ActivationStatistics, seed: int) -> Selector:
    return partial(ops.select_random, seed=seed, k_chunk=k_chunk)


def _static(k_chunk: int, statistics: ActivationStatistics, _seed: int) -> Selector:
    count = total_channels(statistics.mean_square.shape[0], k_chunk)
    ranking = torch.sort(statistics.mean_square, descending=True, stable=True).indices
    channels = ranking[:count].sort().values.to(torch.int32).unsqueeze(0)
    return lambda x: channels.to(x.device)


def _exact(k_chunk: int, _statistics: ActivationStatistics, _seed: int) -> Selector:
    return partial(ops.select_topk, k_chunk=k_chunk)


def _dynamic(k_chunk: int, statistics: ActivationStatistics, _seed: int) -> Selector:
    count = total_channels(statistics.rank_max.shape[0], k_chunk)
    first, last = statistics.rank_max[0].item(), statistics.rank_max[count - 1].item()
    if not first >= last >= 0:
        raise DecDECError(f"calibration boundaries must fall from rank 1 to rank K, got {first} and {last}")
    floors = ops.bucket_floors(first, last)
    return lambda x: ops.select_buckets(x, floors.to(x.device), k_chunk)


_MAKERS: dict[str, Callable[[int, ActivationStatistics, int], Selector]] = {
    "random": _random,
    "static": _static,
    "exact": _exact,
    "dynamic": _dynamic,
}
