"""Weight -> QuantizedWeight and back: one class per format of method.md section 1."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from decdec_core.config import WeightQuant
from decdec_core.quantize.codebook import CodebookWeight
from decdec_core.quantize.uniform import UniformWeight

QuantizedWeight = UniformWeight | CodebookWeight
_FORMATS: dict[str, type[UniformWeight] | type[CodebookWeight]] = {
    "uniform": UniformWeight,
    "codebook": CodebookWeight,
}

__all__ = [
    "CodebookWeight",
    "QuantizedWeight",
    "UniformWeight",
    "for_plain_inputs",
    "weight_layout",
    "weight_of",
]


def weight_layout(
    config: WeightQuant, in_features: int, out_features: int
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Return the shape and dtype of each tensor of a layer's weight by its name; whole bits only."""
    return _FORMATS[config.format].layout(config, in_features, out_features)


def for_plain_inputs(weight: Tensor, scale: Tensor | None, order: Tensor | None) -> Tensor:
    """Return `weight` (out, in) as it is for x where the layer sees x[..., order] / scale, either absent.

    scale: (in,) of the reordered inputs. order: (in,), a permutation.
    """
    weight = weight if scale is None else weight / scale
    return weight if order is None else weight[:, order.long().argsort()]


def weight_of(config: WeightQuant, in_features: int, tensors: Mapping[str, Tensor]) -> QuantizedWeight:
    """Return the weight whose `tensors` have the names and shapes that weight_layout says."""
    return _FORMATS[config.format](**tensors, in_features=in_features, config=config)
