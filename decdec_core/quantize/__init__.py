"""Weight -> QuantizedWeight and back."""

from decdec_core.quantize.uniform import QuantizedWeight, dequantize, quantize

__all__ = ["QuantizedWeight", "dequantize", "quantize"]
