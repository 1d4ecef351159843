"""The one linear layer, evaluated and deployed alike: low-bit base product plus compensation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from decdec_core import ops
from decdec_core.calibration import ActivationStatistics
from decdec_core.channels import Selector
from decdec_core.config import WeightQuant, groups_of
from decdec_core.packing import packed_words
from decdec_core.quantize.uniform import QuantizedWeight, dequantize
from decdec_core.residuals import QuantizedResidual


@dataclass
class Scope:
    """Whether the present forward pass is compensated; one object shared by a model's layers."""

    active: bool = True


class DecLinear(nn.Module):
    """y = Ŵ(x/s) + b + sum over the selected channels c of (x/s)_c · residual_c (method.md section 5).

    Buffers, as on disk: codes (out, words) int32, scales (out, groups) float16, zeros (out, groups) uint8,
    input_scale s (in,) float32 where AWQ could not fold it, and bias (out,). The residual and the
    statistics are no buffers: they stay in host memory through `.to()`.

    Inputs (..., tokens, in), outputs (..., tokens, out) in the input's dtype; the compensation is summed
    in float32. `selector` None, or a pass that `scope` leaves out, gives the base layer bit for bit.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    input_scale: Tensor | None
    bias: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        config: WeightQuant,
        bias: bool = False,
        scaled_input: bool = False,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.config = in_features, out_features, config
        groups = groups_of(in_features, config.group_size)
        words = packed_words(in_features, config.bits)
        self.register_buffer("codes", torch.zeros(out_features, words, dtype=torch.int32))
        self.register_buffer("scales", torch.zeros(out_features, groups, dtype=torch.float16))
        self.register_buffer("zeros", torch.zeros(out_features, groups, dtype=torch.uint8))
        self.register_buffer(
            "input_scale", torch.ones(in_features, dtype=torch.float32) if scaled_input else None
        )
        self.register_buffer("bias", torch.zeros(out_features, dtype=torch.float32) if bias else None)
        self.residual: QuantizedResidual | None = None
        self.statistics: ActivationStatistics | None = None
        self.selector: Selector | None = None
        self.scope = Scope()
        self._dense: Tensor | None = None

    def extra_repr(self) -> str:
        kept = self.residual.config.bits if self.residual else None
        return f"in={self.in_features}, out={self.out_features}, {self.config}, residual_bits={kept}"

    def dequantize(self) -> Tensor:
        """Return Ŵ (out, in) float32, in the space of the scaled input."""
        packed = QuantizedWeight(self.codes, self.scales, self.zeros, self.in_features, self.config)
        return dequantize(packed)

    def dense_weight(self) -> Tensor:
        """Return the float32 weight (out, in) for unscaled inputs: what a plain linear layer would hold."""
        weight = self.dequantize()
        return weight if self.input_scale is None else weight / self.input_scale

    def forward(self, x: Tensor) -> Tensor:
        if self.input_scale is not None:
            x = x / self.input_scale.to(x.dtype)
        y = F.linear(x, self._base_weight(x), None if self.bias is None else self.bias.to(x.dtype))
        return self._compensated(x, y) if self.selector is not None and self.scope.active else y

    def _compensated(self, x: Tensor, y: Tensor) -> Tensor:
        assert self.selector is not None
        assert self.residual is not None
        tokens = x.reshape(-1, self.in_features).contiguous()
        total = y.reshape(-1, self.out_features).float()
        residual = self.residual
        ops.compensate(
            tokens, self.selector(tokens), residual.codes, residual.scale, residual.config.bits, total
        )
        return total.to(y.dtype).view(y.shape)

    def _base_weight(self, x: Tensor) -> Tensor:
        # decoded once: on a CPU the method is emulated, and decoding for every token would dominate
        if self._dense is None or self._dense.dtype != x.dtype or self._dense.device != x.device:
            self._dense = self.dequantize().to(x.dtype)
        return self._dense

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._dense = None
        super()._load_from_state_dict(*args, **kwargs)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self._dense = None
        # the codes' scales are float16 by format: a model cast to another dtype keeps them
        scales = self.scales
        super()._apply(fn, recurse)
        if self.scales.dtype != scales.dtype:
            self.scales = scales.to(self.scales.device)
        return self
