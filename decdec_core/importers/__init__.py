"""Somebody else's GPTQ, AWQ or compressed-tensors checkpoint -> UniformWeight, for residuals against it."""

from __future__ import annotations

from decdec_core.importers.checkpoint import ImportedLayer, QuantizedCheckpoint, open_quantized
from decdec_core.importers.layouts import CheckpointError
from decdec_core.importers.matching import require_near, require_same_model, require_same_plain
from decdec_core.importers.scales import recovered_scales

__all__ = [
    "CheckpointError",
    "ImportedLayer",
    "QuantizedCheckpoint",
    "open_quantized",
    "recovered_scales",
    "require_near",
    "require_same_model",
    "require_same_plain",
]
