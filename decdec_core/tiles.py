"""QuantizedWeight <-> TiledWeight: a low-bit weight in the order of the CUDA kernels, and back."""

from __future__ import annotations

import torch
from torch import Tensor

from decdec_core.config import WeightQuant
from decdec_core.ops import TiledWeight
from decdec_core.packing import (
    BLOCK,
    DEPTH,
    SLAB,
    pack_codes,
    pack_table,
    pack_tiles,
    tile_words,
    unpack_codes,
    unpack_tiles,
)
from decdec_core.quantize import QuantizedWeight, weight_of


def fits(config: WeightQuant, in_features: int) -> bool:
    """Return whether the kernels take such a weight: 2 to 4 bits, groups of 128 or a codebook."""
    return config.bits <= 4 and config.group_size in (None, DEPTH) and in_features % BLOCK == 0


def tiled_bytes(config: WeightQuant, in_features: int, out_features: int) -> int:
    """Return the bytes of such a weight in the kernels' order: inputs padded to DEPTH, outputs to SLAB."""
    bits, codebook = int(config.bits), config.format == "codebook"
    slabs, depth = -(-out_features // SLAB), -(-in_features // DEPTH)
    table_words = SLAB * 2**bits // 2 if codebook else 0
    return 4 * slabs * (depth * tile_words(bits, codebook) + table_words)


def tile(weight: QuantizedWeight, values: torch.dtype, bias: Tensor | None = None) -> TiledWeight:
    """Return `weight`, which `fits`, in the kernels' order.

    values: float16 or bfloat16, what a codebook's values are rounded to: the activations' dtype. bias: (out,)
    float32 or None.
    """
    bits, tensors = int(weight.config.bits), weight.tensors()
    codes = unpack_codes(weight.codes, bits, weight.in_features)
    tiles = pack_tiles(codes, bits, tensors.get("scales"), tensors.get("zeros"))
    table = pack_table(tensors["table"].to(values)) if "table" in tensors else None
    return TiledWeight(tiles, bits, codes.shape[0], weight.in_features, table, bias)


def untile(tiled: TiledWeight, config: WeightQuant, table: Tensor | None = None) -> QuantizedWeight:
    """Return the weight of `config` that `tile` was given. table: (out, 2**bits) float16 of a codebook, whose
    values `tile` may have rounded."""
    shape = (tiled.out_features, tiled.in_features)
    codes, scales, zeros = unpack_tiles(tiled.tiles, tiled.bits, *shape, tiled.table is not None)
    tensors = {"codes": pack_codes(codes, tiled.bits), "scales": scales, "zeros": zeros, "table": table}
    return weight_of(config, tiled.in_features, {n: t for n, t in tensors.items() if t is not None})
