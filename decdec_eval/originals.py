"""The full-precision weights of an artifact's layers, in the space of what the layers see and put out.

An artifact's layers are those of the original with scales moved between them: AWQ quantizes W·diag(s) and
folds 1/s into what makes the layer's input. Of a norm s is the original's over the artifact's, and an input
scale is stored. Of a linear layer, which is quantized itself, s is estimated by least squares, channel by
channel, from the low-bit weight and its residual together.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from decdec_core.architectures import InputGroup, decoder_blocks, input_groups
from decdec_core.config import DecDECError
from decdec_core.importers.matching import require_near
from decdec_core.linear import DecLinear
from decdec_core.model import dec_layers
from decdec_core.residuals import dequantize_residual
from decdec_core.shards import TensorFiles

_FOLD_NOTHING = ("rtn", "squeezellm")  # methods that leave the scales as they are


class Originals:
    """The weights that the layers of `model`, which was loaded from an artifact, approximate.

    folder: the full-precision model's (sources.model_folder). Weights are read when they are asked for, and
    not kept.
    """

    def __init__(self, folder: Path, model: Any) -> None:
        self._files = TensorFiles.of_folder(folder)
        self._model, self._layers = model, dec_layers(model)
        groups = input_groups(model.config)
        self._groups = {
            f"{block}.{name}": (block, group)
            for block in decoder_blocks(model)
            for group in groups
            for name in group.linears
        }

    def weight(self, name: str) -> Tensor:
        """Return a layer's weight (out, in) float32 on its device, for the input that it sees.

        Raises DecDECError where the layer is no quantization of the full-precision model's.
        """
        layer = self._layers[name]
        weight = self._read(f"{name}.weight").to(layer.device)
        if tuple(weight.shape) != (layer.out_features, layer.in_features):
            raise DecDECError(
                f"layer {name} of the model must be {(layer.out_features, layer.in_features)}, "
                f"got {tuple(weight.shape)}"
            )
        stored = stored_weight(layer)
        block, group = self._groups[name]
        if group.norm is not None:
            weight = weight * self._norm_scale(f"{block}.{group.norm}").to(layer.device)
        if layer.input_order is not None:
            weight = weight[:, layer.input_order.long()]
        if layer.input_scale is not None:
            weight = weight * layer.input_scale
        if layer.config.method not in _FOLD_NOTHING:
            for consumer in self._fed_by(block, name):
                rows = slice(consumer.first_row, consumer.first_row + self._width(block, consumer))
                weight[rows] = _scaled_like(weight[rows], stored[rows], 1)
            if group.producer is not None and layer.input_scale is None:
                weight = _scaled_like(weight, stored, 0)
        require_near(name, weight, stored, int(layer.config.bits))
        return weight

    def _read(self, name: str) -> Tensor:
        return self._files.read(name).float()

    def _norm_scale(self, name: str) -> Tensor:
        """Return the scale that the artifact's norm lost, 1 where there is nothing to divide by."""
        original = self._read(f"{name}.weight")
        stored = self._model.get_submodule(name).weight.detach().cpu().float()
        return torch.where(stored == 0, torch.ones_like(original), original / stored)

    def _fed_by(self, block: str, name: str) -> list[InputGroup]:
        """Return the groups of a block whose input the layer makes, and whose scale it may hold."""
        found = []
        for group in {id(group): group for owner, group in self._groups.values() if owner == block}.values():
            makes_it = group.producer is not None and f"{block}.{group.producer}" == name
            if makes_it and self._layers[f"{block}.{group.linears[0]}"].input_scale is None:
                found.append(group)
        return found

    def _width(self, block: str, group: InputGroup) -> int:
        return self._layers[f"{block}.{group.linears[0]}"].in_features


def stored_weight(layer: DecLinear) -> Tensor:
    """Return the low-bit weight and its residual together, (out, in) float32 on the layer's device."""
    assert layer.residual is not None
    return layer.dequantize() + dequantize_residual(layer.residual).to(layer.device)


def _scaled_like(weight: Tensor, stored: Tensor, dim: int) -> Tensor:
    """Return `weight` scaled to be as near as it can be to `stored`, each vector along `dim` by its own."""
    power = weight.square().sum(dim, keepdim=True)
    slope = (weight * stored).sum(dim, keepdim=True) / power
    return weight * torch.where(power == 0, torch.ones_like(slope), slope)
