"""Timing rows -> k_chunk of each projection kind and n_tb, within a stated slowdown (method.md section 6).

Pure: where the rows come from, a measurement (timing.py) or a prediction (latency.py), is not known here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from decdec_core.config import (
    CHUNK,
    PROJECTION_KINDS,
    Config,
    DecDECError,
    require_int,
    require_one_of,
    total_channels,
)

OBJECTIVES = ("speed", "quality")
_FLAT = 1.05
TOLERANCE_POINTS = 1.0  # by which a measured slowdown may miss its target, in points of percent
_ROUNDING = 1e-9  # of a sum: what is within the target but for rounding is within it
_DIGITS = 9  # of a microsecond: times that agree in them are equal
_MOST_GROWTH = 4.0  # of an internal target from one round to the next
_NARROWEST = 0.1  # of a bracket, nearest to its ends that a secant may go

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Choice(Config):
    """What a tuner chose. n_tb: thread blocks that compensate, 0 where none does. k_chunk: of qkv, o, gate_up
    and down. predicted_percent: slowdown of the four's summed time over k_chunk 0, from the timing rows.
    objective: one of OBJECTIVES."""

    n_tb: int
    k_chunk: tuple[int, int, int, int]
    predicted_percent: float
    objective: str = "speed"

    def __post_init__(self) -> None:
        require_int("n_tb", self.n_tb, 0, 1024)
        if not isinstance(self.k_chunk, (tuple, list)) or len(self.k_chunk) != len(PROJECTION_KINDS):
            raise DecDECError(f"k_chunk must be four numbers, qkv/o/gate_up/down, got {self.k_chunk!r}")
        for k_chunk in self.k_chunk:
            require_int("k_chunk", k_chunk, 0, CHUNK)
        object.__setattr__(self, "k_chunk", tuple(self.k_chunk))
        if bool(self.n_tb) != any(self.k_chunk):
            raise DecDECError(f"n_tb must be 0 exactly where every k_chunk is, got {self.n_tb}")
        require_number("predicted_percent", self.predicted_percent)
        require_one_of("objective", self.objective, OBJECTIVES)


@dataclass(frozen=True)
class TimingTable:
    """Times of the four projection kinds. shapes: (in, out) of each. base_us: each product alone. curves: for
    each n_tb and kind the microseconds at k_chunk 0, 1, ... up to the largest on offer, never falling."""

    shapes: tuple[tuple[int, int], ...]
    base_us: Floats
    curves: Mapping[int, tuple[Floats, ...]]

    @classmethod
    def from_rows(
        cls, rows: Iterable[Mapping[str, Any]], shapes: Mapping[str, tuple[int, int]]
    ) -> TimingTable:
        """Return the table of rows {"kind", "n_tb", "k_chunk", "time_us"}; of the product alone, n_tb and
        k_chunk are 0. shapes: (in, out) of each kind.

        Between two rows times run linearly in k_chunk. Below the first row they are its own, since most of it
        is the cost of compensating at all, or the product's where the layer gets no channel. Noise is
        no gain: times are their running maximum, and at least the product's. Beyond the last row of a kind
        and n_tb nothing is on offer. Every kind needs each n_tb. Malformed rows raise DecDECError.
        """
        require_kinds("shapes", shapes)
        base, points = _sorted_rows(rows)
        counts = sorted({n_tb for _, n_tb in points})
        for kind in PROJECTION_KINDS:
            if kind not in base:
                raise DecDECError(f"rows must have n_tb 0 and k_chunk 0 of {kind}, got none")
            for n_tb in counts:
                if (kind, n_tb) not in points:
                    raise DecDECError(f"rows must have n_tb {n_tb} of {kind}, got none")
        if not counts:
            raise DecDECError("rows must have an n_tb above 0, got none")
        curves = {
            n_tb: tuple(_curve(base[k], points[k, n_tb], shapes[k][0]) for k in PROJECTION_KINDS)
            for n_tb in counts
        }
        in_order = tuple(shapes[kind] for kind in PROJECTION_KINDS)
        return cls(in_order, np.array([base[kind] for kind in PROJECTION_KINDS]), curves)

    def limit_us(self, slowdown_percent: float) -> float:
        """Return the most that the four may take together. Raises DecDECError for a slowdown below 0."""
        require_number("slowdown_percent", slowdown_percent)
        if slowdown_percent < 0:
            raise DecDECError(f"slowdown_percent must be 0 or more, got {slowdown_percent!r}")
        return float(self.base_us.sum()) * (1 + slowdown_percent / 100) * (1 + _ROUNDING)

    def time_us(self, n_tb: int, k_chunk: Sequence[int]) -> float:
        """Return the sum of the four at values of k_chunk that are on offer."""
        if not any(k_chunk):
            return float(self.base_us.sum())
        return float(np.sum([curve[k] for curve, k in zip(self.curves[n_tb], k_chunk, strict=True)]))

    def knees(self) -> dict[str, int]:
        """Return, for each kind, up to which k_chunk time stays within 5 % of that of the first channel, at
        the n_tb with the most: from there on the transfer is what takes the time."""
        found = dict.fromkeys(PROJECTION_KINDS, 0)
        for curves in self.curves.values():
            for (kind, known), curve, (inputs, _) in zip(found.items(), curves, self.shapes, strict=True):
                first = next((k for k in range(len(curve)) if total_channels(inputs, k)), 0)
                flat = int(np.searchsorted(curve, _FLAT * curve[first], side="right")) - 1
                found[kind] = max(known, flat if first else 0)
        return found

    def choice(self, n_tb: int, k_chunk: Sequence[int], objective: str) -> Choice:
        """Return a choice, with k_chunk 0 where it gives no channel, and its slowdown as the table has it."""
        percent = 100 * (self.time_us(n_tb, k_chunk) / float(self.base_us.sum()) - 1)
        qkv, o, gate_up, down = (
            0 if self._is_nothing(n_tb, kind, k) else int(k) for kind, k in enumerate(k_chunk)
        )
        return Choice(n_tb if qkv or o or gate_up or down else 0, (qkv, o, gate_up, down), percent, objective)

    def _is_nothing(self, n_tb: int, kind: int, k_chunk: int) -> bool:
        free = k_chunk == 0 or self.curves[n_tb][kind][k_chunk] == self.base_us[kind]
        return bool(free) and total_channels(self.shapes[kind][0], k_chunk) == 0


def require_number(which: str, got: object) -> None:
    """Raise DecDECError unless `got` is a finite int or float."""
    if not isinstance(got, (int, float)) or isinstance(got, bool) or not math.isfinite(got):
        raise DecDECError(f"{which} must be a finite number, got {got!r}")


def require_kinds(which: str, got: Mapping[str, object]) -> None:
    """Raise DecDECError unless `got` has exactly the keys of PROJECTION_KINDS."""
    if set(got) != set(PROJECTION_KINDS):
        raise DecDECError(f"{which} must be of {', '.join(PROJECTION_KINDS)}, got {', '.join(got) or 'none'}")


def _sorted_rows(
    rows: Iterable[Mapping[str, Any]],
) -> tuple[dict[str, float], dict[tuple[str, int], dict[int, float]]]:
    """Return the product's time of each kind, and of each kind and n_tb the times by k_chunk."""
    base: dict[str, float] = {}
    points: dict[tuple[str, int], dict[int, float]] = {}
    for row in rows:
        for key in ("kind", "n_tb", "k_chunk", "time_us"):
            if key not in row:
                raise DecDECError(f"a timing row must have kind, n_tb, k_chunk and time_us, got no {key}")
        kind, n_tb, k_chunk, time_us = (row[key] for key in ("kind", "n_tb", "k_chunk", "time_us"))
        require_one_of("kind", kind, PROJECTION_KINDS)
        require_int("n_tb", n_tb, 0, 1024)
        require_int("k_chunk", k_chunk, 0, CHUNK)
        require_number("time_us", time_us)
        if time_us <= 0:
            raise DecDECError(f"time_us must be above 0, got {time_us!r}")
        if bool(n_tb) != bool(k_chunk):
            raise DecDECError(f"n_tb and k_chunk must both be 0 or neither, got {n_tb} and {k_chunk}")
        same = points.setdefault((kind, n_tb), {}) if n_tb else base
        key = k_chunk if n_tb else kind
        if key in same:
            raise DecDECError(f"rows must be one for each setting, got two of {kind}, {n_tb}, {k_chunk}")
        same[key] = float(time_us)
    return base, points


def _curve(base: float, points: Mapping[int, float], in_features: int) -> Floats:
    known = np.array(sorted(points))
    times = np.maximum.accumulate(np.maximum([points[int(k)] for k in known], base))
    k_chunk = np.arange(known[-1] + 1)
    curve = np.interp(k_chunk, known, times)
    nothing = [k for k in range(int(known[0])) if total_channels(in_features, k) == 0]
    curve[nothing] = base
    return curve


def search(table: TimingTable, slowdown_percent: float) -> Choice:
    """Return the paper's two-phase choice (method.md section 6): first the largest k_chunk common to all
    kinds that fits, over n_tb; then one kind's more by one at a time, the cheapest first.

    Ties of the first phase: the least time, then the smaller n_tb; of the second: the order of
    PROJECTION_KINDS. Where not even k_chunk 1 fits, the smallest matrix (the first of equals) goes without
    compensation, and so on; with none left, and with slowdown 0 where nothing is free, all four are 0.
    """
    limit = table.limit_us(slowdown_percent)
    kinds = sorted(range(len(PROJECTION_KINDS)), key=lambda kind: math.prod(table.shapes[kind]))
    for dropped in range(len(kinds)):
        left = kinds[dropped:]
        k_common, n_tb = _largest_common(table, left, limit)
        if k_common:
            k_chunk = [k_common if kind in left else 0 for kind in range(len(PROJECTION_KINDS))]
            return table.choice(n_tb, _raised(table, n_tb, k_chunk, limit), "speed")
    return table.choice(0, (0, 0, 0, 0), "speed")


def _largest_common(table: TimingTable, kinds: Sequence[int], limit: float) -> tuple[int, int]:
    """Return the largest k_chunk common to `kinds`, the others at 0, and its n_tb; 0, 0 for none."""
    found = []
    for n_tb, curves in table.curves.items():
        most = min(len(curves[kind]) for kind in kinds)
        sums = np.zeros(most)
        for kind, curve in enumerate(curves):
            sums += curve[:most] if kind in kinds else curve[0]
        k_chunk = int(np.flatnonzero(sums <= limit)[-1])
        found.append((k_chunk, -round(float(sums[k_chunk]), _DIGITS), -n_tb))
    k_chunk, _, negative = max(found)
    return (k_chunk, -negative) if k_chunk else (0, 0)


def _raised(table: TimingTable, n_tb: int, k_chunk: list[int], limit: float) -> list[int]:
    """Return `k_chunk` raised where it is not 0, one by one, the cheapest increase first, up to the limit."""
    curves = table.curves[n_tb]
    k_chunk = list(k_chunk)
    while True:
        steps = [
            (round(float(curve[k + 1] - curve[k]), _DIGITS), kind)
            for kind, (curve, k) in enumerate(zip(curves, k_chunk, strict=True))
            if k and k + 1 < len(curve)
        ]
        if not steps:
            return k_chunk
        _, kind = min(steps)
        k_chunk[kind] += 1
        if table.time_us(n_tb, k_chunk) > limit:
            k_chunk[kind] -= 1
            return k_chunk


def search_quality(
    table: TimingTable, slowdown_percent: float, energy: Mapping[str, Sequence[float]]
) -> Choice:
    """Return the choice that removes the most error energy within the same time: an exact knapsack.

    energy: of each kind what k_chunk 0, 1, ... removes, never falling; where it ends, nothing more is on
    offer. Ties: the least time, then the smaller n_tb.
    """
    limit = table.limit_us(slowdown_percent)
    removed = _checked_energy(energy)
    budget = limit - float(table.base_us.sum())
    found: list[tuple[float, float, int, tuple[int, ...]]] = []
    for n_tb, curves in table.curves.items():
        fronts = [
            _front_of_kind(curve - base, values, budget)
            for curve, base, values in zip(curves, table.base_us, removed, strict=True)
        ]
        left, right = _merged(fronts[0], fronts[1], budget), _merged(fronts[2], fronts[3], budget)
        # of the other front, whose energy rises with time, the last that still fits
        partner = np.searchsorted(right.time_us, budget - left.time_us, side="right") - 1
        total = left.energy + right.energy[partner]
        time_us = left.time_us + right.time_us[partner]
        at = np.lexsort((time_us, -total))[0]
        k_chunk = (*left.k_chunk[at].tolist(), *right.k_chunk[partner[at]].tolist())
        found.append((float(total[at]), -round(float(time_us[at]), _DIGITS), -n_tb, k_chunk))
    _, _, negative, best = max(found)
    return table.choice(-negative, best, "quality")


@dataclass(frozen=True)
class _Front:
    """Settings of one or two kinds, none beaten by another: extra time and energy both rise."""

    time_us: Floats
    energy: Floats
    k_chunk: NDArray[np.int64]  # (settings, kinds)


def _checked_energy(energy: Mapping[str, Sequence[float]]) -> list[Floats]:
    require_kinds("energy", energy)
    removed = []
    for kind in PROJECTION_KINDS:
        values = np.asarray(energy[kind])
        if (
            values.ndim != 1
            or not len(values)
            or values.dtype.kind not in "iuf"
            or not np.isfinite(values).all()
        ):
            raise DecDECError(
                f"energy of {kind} must be finite numbers from k_chunk 0 up, got {energy[kind]!r}"
            )
        if (np.diff(values) < 0).any():
            at = int(np.flatnonzero(np.diff(values) < 0)[0]) + 1
            raise DecDECError(f"energy of {kind} must never fall, got less at k_chunk {at} than before")
        removed.append(values.astype(np.float64))
    return removed


def _front_of_kind(extra_us: Floats, energy: Floats, budget: float) -> _Front:
    most = min(len(extra_us), len(energy))
    return _front(extra_us[:most], energy[:most], np.arange(most)[:, None], budget)


def _merged(one: _Front, other: _Front, budget: float) -> _Front:
    """Return the front of two kinds together."""
    i, j = (part.ravel() for part in np.indices((len(one.time_us), len(other.time_us))))
    fits = one.time_us[i] + other.time_us[j] <= budget
    i, j = i[fits], j[fits]
    k_chunk = np.concatenate([one.k_chunk[i], other.k_chunk[j]], axis=1)
    return _front(one.time_us[i] + other.time_us[j], one.energy[i] + other.energy[j], k_chunk, budget)


def _front(time_us: Floats, energy: Floats, k_chunk: NDArray[np.int64], budget: float) -> _Front:
    order = np.lexsort((-energy, time_us))
    order = order[time_us[order] <= budget]
    gains = energy[order]
    # the first of a time is its best; after it only what beats all that take less
    better = np.append(True, gains[1:] > np.maximum.accumulate(gains)[:-1])
    kept = order[better]
    return _Front(time_us[kept], energy[kept], k_chunk[kept])


def correct(target_percent: float, history: Sequence[tuple[float, float]]) -> float:
    """Return the internal target to try next, so that the measured slowdown comes to `target_percent`.

    history: (internal target, measured end-to-end percent) of the rounds so far. Linear layers are a part of
    a step only, so that a slowdown of theirs shows as less. Without history the target itself; then scaled by
    what was measured; and once the target lies between two rounds, between these: by a secant, or in the
    middle where the last two rounds fell on the same side. That internal target 0 measures 0 needs no round.
    """
    if not history or target_percent <= 0:
        return max(0.0, target_percent)
    over = [entry for entry in history if entry[1] > target_percent]
    under = [entry for entry in history if entry[1] <= target_percent]
    high = min(over, default=None)
    low = max([(0.0, 0.0), *(entry for entry in under if high is None or entry[0] < high[0])])
    if high is None:
        growth = target_percent / low[1] if low[1] > 0 else _MOST_GROWTH
        return low[0] * min(growth, _MOST_GROWTH) or target_percent
    if len(history) > 2 and (history[-1] in over) == (history[-2] in over):
        return (low[0] + high[0]) / 2
    share = (target_percent - low[1]) / (high[1] - low[1])
    return low[0] + min(max(share, _NARROWEST), 1 - _NARROWEST) * (high[0] - low[0])


def best_round(target_percent: float, history: Sequence[tuple[float, float]]) -> int | None:
    """Return which round of `history` came nearest to the target of those that are not over it by more than
    TOLERANCE_POINTS (the first of equals); None where all are."""
    misses = [
        (abs(measured - target_percent), index)
        for index, (_, measured) in enumerate(history)
        if measured <= target_percent + TOLERANCE_POINTS
    ]
    return min(misses)[1] if misses else None


def is_met(target_percent: float, measured_percent: float) -> bool:
    """Return whether a measured slowdown is within TOLERANCE_POINTS of its target: no further round."""
    return abs(measured_percent - target_percent) <= TOLERANCE_POINTS
