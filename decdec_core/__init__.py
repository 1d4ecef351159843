"""DecDEC: low-bit weights on the GPU, their quantization error in CPU memory, fetched where it matters.

Importing this package registers the transformers quantizer "decdec": after it,
AutoModelForCausalLM.from_pretrained(DIR) loads an artifact made by `decdec build`.
"""

from decdec_core import hf as _registers_the_quantizer  # noqa: F401
from decdec_core.config import Compensation, DecDECError, ResidualQuant, WeightQuant
from decdec_core.model import compensation_ledger, set_compensation

__version__ = "0.1.0"
__all__ = [
    "Compensation",
    "DecDECError",
    "ResidualQuant",
    "WeightQuant",
    "compensation_ledger",
    "set_compensation",
]
