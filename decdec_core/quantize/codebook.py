"""The codebook format: one table of 2**bits values per output channel, an index per weight."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from decdec_core.config import WeightQuant
from decdec_core.packing import packed_words, unpack_codes


@dataclass(frozen=True)
class CodebookWeight:
    """A low-bit weight of the codebook format in logical order, as on disk.

    codes: (out, packed_words) int32. table: (out, 2**bits) float16. value[o, i] = table[o, code[o, i]].
    """

    codes: Tensor
    table: Tensor
    in_features: int
    config: WeightQuant

    @staticmethod
    def layout(
        config: WeightQuant, in_features: int, out_features: int
    ) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Return the shape and dtype of each tensor by its name."""
        bits = int(config.bits)
        return {
            "codes": ((out_features, packed_words(in_features, bits)), torch.int32),
            "table": ((out_features, 2**bits), torch.float16),
        }

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors by their names."""
        return {"codes": self.codes, "table": self.table}

    def dequantize(self) -> Tensor:
        """Return the float32 weight (out, in) that the codes stand for."""
        codes = unpack_codes(self.codes, int(self.config.bits), self.in_features)
        return self.table.float().gather(1, codes.long())
