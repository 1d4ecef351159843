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

__all__ = ["CodebookWeight", "QuantizedWeight", "UniformWeight", "weight_layout", "weight_of"]


def weight_layout(
    config: WeightQuant, in_features: int, out_features: int
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Return the shape and dtype of each tensor of a layer's weight by its name; whole bits only."""
    return _FORMATS[config.format].layout(config, in_features, out_features)


def weight_of(config: WeightQuant, in_features: int, tensors: Mapping[str, Tensor]) -> QuantizedWeight:
    """Return the weight whose `tensors` have the names and shapes that weight_layout says."""
    return _FORMATS[config.format](**tensors, in_features=in_features, config=config)
