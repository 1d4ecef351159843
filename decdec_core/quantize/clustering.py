"""One-dimensional weighted k-means of sorted rows, in numba; import it only where a codebook is made.

What is compiled runs on the rows it is given without the GIL and without numba's own threads, whose default
layer would bring a second OpenMP runtime beside torch's: callers hand rows to as many threads as they like.

The exact optimum: of the ascending points of a row, clusters are intervals, and a cluster's error is its
sum of w·x² less (sum of w·x)² / (sum of w). The first term is the same for every partition, so what is
maximised is the sum of the second over clusters, its `gain`, in `size` layers of a dynamic program:

    gain[m][j] = max over i of gain[m - 1][i] + (moment[j] - moment[i])² / (mass[j] - mass[i])

is the best of the first j points in m + 1 clusters, the last of which begins at i. The best i never falls as
j or m rises (the quadrangle inequality), so a layer is filled coarse to fine: every i is searched between
those of its two computed neighbours, O(size · n log n) in all.
"""

from __future__ import annotations

import numpy as np
from flash1dkmeans import numba_kmeans_1d_k_cluster
from numba import njit
from numpy.typing import NDArray

FLASH_ITERATIONS = 50  # of Lloyd's algorithm at most, as in the published code
FLASH_SEED = 0


@njit(cache=True, nogil=True)
def sort_keys(weight: NDArray) -> NDArray:
    """Return keys (rows, in) uint64 that sort as a row's (value, index) do, from weight (rows, in) float32.

    The index is in the low 32 bits. No two keys are equal, so any sort gives one order, on any machine.
    """
    keys = np.empty(weight.shape, np.uint64)
    for row in range(weight.shape[0]):
        bits = weight[row].view(np.uint32)
        for i in range(weight.shape[1]):
            # floats of one sign order as their bits do; those below zero the other way round
            flipped = ~bits[i] if bits[i] >> 31 else bits[i] | np.uint32(1 << 31)
            keys[row, i] = (np.uint64(flipped) << np.uint64(32)) | np.uint64(i)
    return keys


@njit(cache=True, nogil=True, error_model="numpy")
def exact_tables(weight: NDArray, importance: NDArray, keys: NDArray, size: int) -> NDArray:
    """Return the optimal centres (rows, size) float64, ascending, of each row's weighted k-means.

    weight: (rows, in) float32. importance: (rows, in) float64 > 0. keys: sorted sort_keys of the weight.
    A row of fewer than `size` distinct values gives just these, the largest repeated.
    """
    tables = np.empty((weight.shape[0], size))
    for row in range(weight.shape[0]):
        points, mass, moment, middle = _distinct(weight[row], importance[row], keys[row])
        if len(points) <= size:
            _fill(tables[row], points)
            continue
        borders = _best_borders(mass, moment, size)
        for c in range(size):
            low, high = borders[c], borders[c + 1]
            tables[row, c] = (moment[high] - moment[low]) / (mass[high] - mass[low]) + middle
    return tables


def flash1d_tables(weight: NDArray, importance: NDArray, keys: NDArray, size: int) -> NDArray:
    """Return flash1dkmeans' centres in place of the optimal ones, in any order; otherwise as exact_tables.

    Each row is seeded alike, so its centres depend on nothing but itself. Plain Python around the package's
    own compiled function: compiled in with ours, it would stay as it was when the package changes.
    """
    tables = np.empty((weight.shape[0], size))
    for row in range(weight.shape[0]):
        points, mass, moment, middle = _distinct(weight[row], importance[row], keys[row])
        if len(points) <= size:
            _fill(tables[row], points)
            continue
        centred = points - middle
        spread = np.cumsum((mass[1:] - mass[:-1]) * centred * centred)
        centres, _ = numba_kmeans_1d_k_cluster(
            centred, size, FLASH_ITERATIONS, mass[1:], moment[1:], spread, 0, len(points), FLASH_SEED
        )
        tables[row] = centres + middle
    return tables


@njit(cache=True, nogil=True)
def nearest_codes(weight: NDArray, tables: NDArray) -> NDArray:
    """Return codes (rows, in) uint8 of the nearest of tables (rows, size) float64, ascending."""
    codes = np.zeros(weight.shape, np.uint8)
    for row in range(weight.shape[0]):
        for c in range(tables.shape[1] - 1):
            border = (tables[row, c] + tables[row, c + 1]) / 2
            for i in range(weight.shape[1]):
                codes[row, i] += weight[row, i] > border
    return codes


@njit(cache=True, nogil=True)
def _distinct(values: NDArray, importance: NDArray, keys: NDArray) -> tuple[NDArray, NDArray, NDArray, float]:
    """Return a row's distinct values (d,) ascending, the prefix sums (d + 1,) of their importance and of
    importance · (value − middle), and the middle: their weighted mean, without which the sums of a row far
    from zero would cancel. All float64."""
    points, weights = np.empty(len(keys)), np.empty(len(keys))
    count, total, mean = 0, 0.0, 0.0
    for key in keys:
        i = np.int64(key & np.uint64(0xFFFFFFFF))
        value = np.float64(values[i])
        total += importance[i]
        mean += importance[i] * value
        if count > 0 and value == points[count - 1]:
            weights[count - 1] += importance[i]
        else:
            points[count], weights[count] = value, importance[i]
            count += 1
    middle = mean / total
    mass, moment = np.zeros(count + 1), np.zeros(count + 1)
    for j in range(count):
        mass[j + 1] = mass[j] + weights[j]
        moment[j + 1] = moment[j] + weights[j] * (points[j] - middle)
    return points[:count], mass, moment, middle


@njit(cache=True, nogil=True)
def _fill(table: NDArray, points: NDArray) -> None:
    table[: len(points)] = points
    table[len(points) :] = points[-1]


@njit(cache=True, nogil=True, error_model="numpy")
def _best_borders(mass: NDArray, moment: NDArray, size: int) -> NDArray:
    """Return where the optimal clusters begin and end, (size + 1,) int64; more points than `size`."""
    count = len(mass) - 1
    begins = np.zeros(
        (size, count + 1), np.int32
    )  # [m, j]: where the last of m + 1 clusters of j points begins
    gain, before = np.empty(count + 1), np.empty(count + 1)
    for j in range(1, count + 1):
        gain[j] = moment[j] * moment[j] / mass[j]
    for m in range(1, size):
        gain, before = before, gain
        # every cluster has a point: at least m before the last, and one for each still to come
        last = count - (size - 1 - m)
        first = m + 1 if m < size - 1 else last
        begin, fewer = begins[m], begins[m - 1]
        step = 1
        while 2 * step <= last - first + 1:
            step *= 2
        while step > 0:
            low = m
            for j in range(first - 1 + step, last + 1, 2 * step):
                lowest, highest, above = max(low, fewer[j - 1]), j - 1, j + step
                if above <= last:
                    low = begin[above]
                    highest = min(highest, low)
                lowest = min(lowest, highest)  # ties that rounding broke the other way
                best, where = -1.0, lowest
                for i in range(lowest, highest + 1):
                    across = moment[j] - moment[i]
                    value = before[i] + across * across / (mass[j] - mass[i])
                    if value > best:
                        best, where = value, i
                gain[j], begin[j] = best, where
            step //= 2
    borders = np.empty(size + 1, np.int64)
    borders[size] = count
    for m in range(size - 1, -1, -1):
        borders[m] = begins[m, borders[m + 1]]
    return borders
