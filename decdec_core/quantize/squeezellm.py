"""SqueezeLLM: a codebook per output channel, clustered by Fisher information (arXiv 2306.07629; method.md
section 1).

Of each row of the weight the table minimises Σ importance · (weight − nearest table value)², with the
diagonal Fisher information (mean squared gradient) as the importance.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from decdec_core.config import WEIGHT_BITS, DecDECError, WeightQuant, require_one_of
from decdec_core.packing import pack_codes
from decdec_core.quantize.codebook import CodebookWeight

IMPORTANCE_FLOOR = 1e-6  # of the row's mean; SmolLM2-135M comes out the same with anything from 1e-12 to 1e-3
_LARGEST = torch.finfo(torch.float16).max  # tables are stored in float16
_ROWS_AT_ONCE = 16  # of a thread


def quantize_codebook(weight: Tensor, fisher: Tensor, config: WeightQuant) -> CodebookWeight:
    """Return `weight` (out, in) as codes of one table of 2**bits values per output channel.

    fisher: (out, in), the mean squared gradient, >= 0. config.clustering: "exact" gives the optimal table up
    to its rounding to float16, "flash1d" that of the heuristic in the published code. Codes are of the
    nearest rounded value. The bytes are the same with any number of threads (torch.get_num_threads()).

    Raises DecDECError on NaN, infinity, a negative Fisher information or a magnitude above float16's.
    """
    _check(weight, fisher, config)
    # numba takes most of a second to import, and only here
    from decdec_core.quantize import clustering

    bits = int(config.bits)
    tables_of = clustering.exact_tables if config.clustering == "exact" else clustering.flash1d_tables
    values, squares = _array(weight), _array(fisher)
    table = np.empty((len(values), 2**bits), np.float16)
    codes = np.empty(values.shape, np.uint8)

    def cluster(first: int) -> None:
        rows = slice(first, first + _ROWS_AT_ONCE)
        keys = clustering.sort_keys(values[rows])
        keys.sort(axis=1)
        table[rows] = np.sort(tables_of(values[rows], _importance(squares[rows]), keys, 2**bits), axis=1)
        codes[rows] = clustering.nearest_codes(values[rows], table[rows].astype(np.float64))

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        list(pool.map(cluster, range(0, len(values), _ROWS_AT_ONCE)))
    packed = pack_codes(torch.from_numpy(codes).to(weight.device), bits)
    return CodebookWeight(packed, torch.from_numpy(table).to(weight.device), weight.shape[1], config)


def weighted_error(weight: Tensor, fisher: Tensor, quantized: CodebookWeight) -> Tensor:
    """Return the objective of each row, (out,) float64 on the CPU: Σ importance · (weight − decoded)²."""
    difference = _array(weight) - _array(quantized.dequantize())
    squares = _array(fisher)
    errors = np.empty(len(difference))
    for first in range(0, len(errors), _ROWS_AT_ONCE):
        rows = slice(first, first + _ROWS_AT_ONCE)
        errors[rows] = (_importance(squares[rows]) * np.square(difference[rows], dtype=np.float64)).sum(1)
    return torch.from_numpy(errors)


def _importance(fisher: NDArray) -> NDArray:
    """Return what each weight counts, (rows, in) float64 > 0: its Fisher information or, if that is more, a
    floor; one everywhere in a row of zeros.

    A squared gradient of zero is one that the calibration text did not reach. With the floor such weights
    still choose centres where nothing else does, and every cluster has a mass that prefix sums resolve.
    """
    mean = fisher.mean(axis=1, keepdims=True, dtype=np.float64)
    return np.where(mean > 0, np.maximum(fisher, IMPORTANCE_FLOOR * mean), 1.0)


def _array(tensor: Tensor) -> NDArray:
    return tensor.detach().to("cpu", torch.float32).contiguous().numpy()


def _check(weight: Tensor, fisher: Tensor, config: WeightQuant) -> None:
    require_one_of("method", config.method, ("squeezellm",))
    require_one_of("bits", config.bits, WEIGHT_BITS)
    if weight.ndim != 2 or weight.numel() == 0:
        raise DecDECError(f"weight must be (out, in) and not empty, got {tuple(weight.shape)}")
    if fisher.shape != weight.shape:
        raise DecDECError(
            f"fisher must have the weight's shape {tuple(weight.shape)}, got {tuple(fisher.shape)}"
        )
    largest = weight.abs().max().item()
    if not largest <= _LARGEST:  # not so for NaN either
        raise DecDECError(f"weight must be finite and at most {_LARGEST} in magnitude, got {largest}")
    low, high = (end.item() for end in fisher.aminmax())
    if not 0 <= low <= high < torch.inf:
        raise DecDECError(f"fisher must be finite and not negative, got values from {low} to {high}")
