"""The values of an artifact's tensors: those that a layer cannot have, whatever the manifest says."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from decdec_core.artifact import Quantization
from decdec_core.errors import BadValueError
from decdec_core.manifest import Manifest
from decdec_core.packing import BLOCK, unpack_codes
from decdec_core.shards import FileTensor

# an exponent of all ones is infinity or NaN
_EXPONENTS: dict[str, tuple[Any, int]] = {
    "F64": (np.uint64, 0x7FF << 52),
    "F32": (np.uint32, 0xFF << 23),
    "F16": (np.uint16, 0x1F << 10),
    "BF16": (np.uint16, 0xFF << 7),
}


def require_values(
    folder: Path, tensors: Mapping[str, FileTensor], manifest: Manifest, quantization: Quantization
) -> None:
    """Raise BadValueError for a value that its tensor cannot have.

    Floating-point numbers must be finite; scales positive; zeros within their bits; statistics non-negative
    and in order; an input order a permutation; the padding of codes zero. Shapes and dtypes are right before.
    """
    for name, tensor in tensors.items():
        _require_finite(f"{folder}: tensor {name}", tensor)
    for layer in manifest.layers():
        bits = int(quantization.weight_of(layer).bits)
        for suffix, wanted, holds in _rules(bits):
            name = f"{layer}.{suffix}"
            if name in tensors and not holds(tensors[name].read()):
                raise BadValueError(f"{folder}: tensor {name} must be {wanted}, got other values")
        in_features = tensors[f"{layer}.calibration.mean"].shape[0]
        if in_features % BLOCK and not _is_padded(tensors[f"{layer}.codes"].read(), bits, in_features):
            raise BadValueError(f"{folder}: tensor {layer}.codes must end in zeros, got other padding")


def _rules(bits: int) -> list[tuple[str, str, Callable[[Tensor], bool]]]:
    return [
        ("scales", "positive", _all_positive),
        ("zeros", f"below {2**bits}", lambda zeros: bool((zeros < 2**bits).all())),
        ("input_scale", "positive", _all_positive),
        ("input_order", "a permutation", _is_permutation),
        ("residual.scale", "positive", _all_positive),
        ("calibration.rank_max", "non-negative and non-increasing", _falls_to_zero),
        ("calibration.mean_square", "non-negative", lambda squares: bool((squares >= 0).all())),
    ]


def _all_positive(values: Tensor) -> bool:
    return bool((values > 0).all())


def _is_permutation(order: Tensor) -> bool:
    return torch.equal(order.sort().values, torch.arange(order.numel(), dtype=order.dtype))


def _falls_to_zero(values: Tensor) -> bool:
    return bool((values >= 0).all() and (values[1:] <= values[:-1]).all())


def _is_padded(codes: Tensor, bits: int, in_features: int) -> bool:
    last = unpack_codes(codes[:, -bits:], bits, BLOCK)
    return not last[:, in_features % BLOCK :].any()


def _require_finite(which: str, tensor: FileTensor) -> None:
    if tensor.dtype in _EXPONENTS:
        dtype, exponent = _EXPONENTS[tensor.dtype]
        for piece in tensor.pieces():
            if ((np.frombuffer(piece, dtype) & dtype(exponent)) == exponent).any():
                raise BadValueError(f"{which} must be finite, got NaN or infinity")
