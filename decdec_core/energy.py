"""How much of the output's error compensation removes, by k_chunk and projection kind: what quality costs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from decdec_core.architectures import kind_of
from decdec_core.channels import make_selection
from decdec_core.config import CHUNK, PROJECTION_KINDS, Compensation, DecDECError
from decdec_core.linear import DecLinear
from decdec_core.model import dec_layers, set_compensation, state_of
from decdec_core.prefill import masked
from decdec_core.residuals import dequantize_residual

GRID = (4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
_SKIPPED = 4  # tokens at the beginning of a sequence, whose activations are unlike all others'


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
    if ids.dim() != 2 or ids.shape[1] <= _SKIPPED:
        raise DecDECError(f"ids must be (sequences, more than {_SKIPPED} tokens), got {tuple(ids.shape)}")
    known = sorted({0, *grid, CHUNK})
    layers = dec_layers(model)
    removed = {name: np.zeros(len(known)) for name in layers}
    whole = dict.fromkeys(layers, 0.0)
    before = state_of(model).compensation
    set_compensation(model, Compensation("none"))

    def look(name: str) -> Any:
        def hook(layer: DecLinear, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            x = layer.seen(inputs[0])[:, _SKIPPED:].reshape(-1, layer.in_features)
            y = output[:, _SKIPPED:].reshape(-1, layer.out_features).float()
            energies = _energies(layer, x, y, selection, known)
            removed[name] += energies[0]
            whole[name] += energies[1]

        return hook

    hooks = [layer.register_forward_hook(look(name)) for name, layer in layers.items()]
    try:
        for sequence in ids:
            model(sequence[None].to(model.device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
        set_compensation(model, before)
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
        rest = error if how is None else error - masked(x, how(x.contiguous())).float() @ residual.T
        removed.append(energy - float(rest.square().sum()))
    return np.array(removed), float((y + error).square().sum())
