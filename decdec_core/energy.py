"""How much of the output's error compensation removes, by k_chunk and projection kind: what quality costs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from decdec_core.architectures import kind_of
from decdec_core.calibration import FIRST_TOKENS
from decdec_core.channels import make_selection
from decdec_core.config import CHUNK, PROJECTION_KINDS, Compensation, DecDECError
from decdec_core.linear import DecLinear
from decdec_core.model import dec_layers, set_compensation, state_of
from decdec_core.prefill import masked
from decdec_core.residuals import dequantize_residual

GRID = (4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)


@contextmanager
def watching_uncompensated(model: Any, see: Callable[[str, Tensor, Tensor], None]) -> Iterator[None]:
    """Within the block `model` compensates nothing, and see(name, x, y) gets of every call of each layer the
    input (..., in) as it sees it and the output (..., out). What it compensated before comes back after."""

    def hook_of(name: str) -> Callable[..., None]:
        return lambda layer, inputs, output: see(name, layer.seen(inputs[0]), output)

    before = state_of(model).compensation
    set_compensation(model, Compensation("none"))
    hooks = [layer.register_forward_hook(hook_of(name)) for name, layer in dec_layers(model).items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        set_compensation(model, before)


def energy_left(error: Tensor, x: Tensor, residual: Tensor, chosen: Tensor) -> Tensor:
    """Return each token's squared error (tokens,) once the channels `chosen` for it are compensated.

    error: (tokens, out) float32, without compensation. x: (tokens, in). residual: (out, in) float32. chosen:
    (tokens, K) int32, or (1, K) for the same channels in every token.
    """
    return (error - masked(x, chosen).float() @ residual.T).square().sum(1)


@torch.no_grad()
def error_energy(
    model: Any, ids: Tensor, selection: str = "dynamic", grid: Sequence[int] = GRID
) -> dict[str, list[float]]:
    """Return, for each projection kind, the error energy that k_chunk 0, 1, ... 1024 removes.

    ids: (sequences, tokens) of calibration text; the first tokens of each are left out. Of a layer it is the
    squared error of the output without compensation less that with it, summed over tokens, as a share of the
    output's own energy, so that layers of any scale count alike; of a kind the sum over its layers. Measured
    with uncompensated inputs at each k_chunk of `grid`, linear between, never falling. Raises DecDECError for
    sequences that leave no token.
    """
    if ids.dim() != 2 or ids.shape[1] <= FIRST_TOKENS:
        raise DecDECError(f"ids must be (sequences, more than {FIRST_TOKENS} tokens), got {tuple(ids.shape)}")
    known = sorted({0, *grid, CHUNK})
    layers = dec_layers(model)
    removed = {name: np.zeros(len(known)) for name in layers}
    whole = dict.fromkeys(layers, 0.0)

    def see(name: str, x: Tensor, y: Tensor) -> None:
        layer = layers[name]
        x = x[:, FIRST_TOKENS:].reshape(-1, layer.in_features)
        y = y[:, FIRST_TOKENS:].reshape(-1, layer.out_features).float()
        energies = _energies(layer, x, y, selection, known)
        removed[name] += energies[0]
        whole[name] += energies[1]

    with watching_uncompensated(model, see):
        for sequence in ids:
            model(sequence[None].to(model.device), use_cache=False)
    found = {kind: np.zeros(len(known)) for kind in PROJECTION_KINDS}
    for name, sums in removed.items():
        found[kind_of(name)] += sums / whole[name]
    every = np.arange(CHUNK + 1)
    rising = {kind: np.maximum.accumulate(shares) for kind, shares in found.items()}
    return {kind: np.interp(every, known, shares).tolist() for kind, shares in rising.items()}


def _energies(
    layer: DecLinear, x: Tensor, y: Tensor, selection: str, grid: Sequence[int]
) -> tuple[np.ndarray, float]:
    """Return what each k_chunk of `grid` takes from the error's energy, and the full-precision output's."""
    assert layer.residual is not None
    assert layer.statistics is not None
    residual = dequantize_residual(layer.residual).to(x.device)
    error = x.float() @ residual.T
    energy, removed = float(error.square().sum()), []
    for k_chunk in grid:
        how = make_selection(selection, k_chunk, layer.statistics)
        rest = None if how is None else energy_left(error, x, residual, how(x.contiguous()))
        removed.append(0.0 if rest is None else energy - float(rest.sum()))
    return np.array(removed), float((y + error).square().sum())
