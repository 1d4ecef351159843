"""Input activation -> the channels to compensate (method.md section 4).

random   drawn anew for each token, the same number from every chunk
static   the top channels by mean x**2 on the calibration text, fixed for all tokens
exact    per chunk, the k channels with the largest |x|
dynamic  per chunk, the paper's bucketed approximation of that: the default
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from decdec_core.calibration import ActivationStatistics
from decdec_core.config import DecDECError, require_int, require_one_of, total_channels
from decdec_core.ops import Selection, bucket_floors


def make_selection(
    kind: str, k_chunk: int, statistics: ActivationStatistics, seed: int = 0
) -> Selection | None:
    """Return how a layer's channels are chosen, or None where there are none to choose.

    `seed` is the layer's own. Raises DecDECError for an unknown kind or a k_chunk outside 0..1024.
    """
    require_one_of("selection", kind, ("none", *_MAKERS))
    require_int("k_chunk", k_chunk, 0, 1024)
    if kind == "none" or total_channels(statistics.rank_max.shape[0], k_chunk) == 0:
        return None
    return _MAKERS[kind](k_chunk, statistics, seed)


def _random(k_chunk: int, _statistics: ActivationStatistics, seed: int) -> Selection:
    return Selection("random", k_chunk, seed=seed)


def _static(k_chunk: int, statistics: ActivationStatistics, _seed: int) -> Selection:
    count = total_channels(statistics.mean_square.shape[0], k_chunk)
    ranking = torch.sort(statistics.mean_square, descending=True, stable=True).indices
    channels = ranking[:count].sort().values.to(torch.int32).unsqueeze(0)
    return Selection("static", k_chunk, indices=channels)


def _exact(k_chunk: int, _statistics: ActivationStatistics, _seed: int) -> Selection:
    return Selection("exact", k_chunk)


def _dynamic(k_chunk: int, statistics: ActivationStatistics, _seed: int) -> Selection:
    count = total_channels(statistics.rank_max.shape[0], k_chunk)
    first, last = statistics.rank_max[0].item(), statistics.rank_max[count - 1].item()
    if not first >= last >= 0:
        raise DecDECError(f"calibration boundaries must fall from rank 1 to rank K, got {first} and {last}")
    return Selection("dynamic", k_chunk, floors=bucket_floors(first, last))


_MAKERS: dict[str, Callable[[int, ActivationStatistics, int], Selection]] = {
    "random": _random,
    "static": _static,
    "exact": _exact,
    "dynamic": _dynamic,
}
