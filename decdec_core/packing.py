"""Integer codes <-> stored words: the only bit layouts written in Python.

Two on disk, in logical order, and below them the order that the CUDA kernels make of a weight at load:

weight codes, dense along `in`: 32 codes fill `bits` int32 words, least significant bit first, so a
code may straddle two words; a row is padded with zeros to a multiple of 32 codes.

    code      0    1    2   ...  10           11  ...  31
    3 bits   |000|111|222| ... |AA A|        |BBB| ... |
    word      0 ................ 0 1 ............ 1 .. 2

residual codes, by channel: row c holds the codes of input channel c for all outputs, 8 / bits to a
byte, least significant bits first. The last byte is padded with the offset, which decodes to zero.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 32  # codes that fill `bits` whole words


def packed_words(in_features: int, bits: int) -> int:
    """Return the int32 words of one row of `in_features` codes."""
    return -(-in_features // BLOCK) * bits


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Return (rows, packed_words) int32 from codes (rows, in) uint8, each below 2**bits."""
    rows, in_features = codes.shape
    blocks = -(-in_features // BLOCK)
    padded = torch.nn.functional.pad(codes, (0, blocks * BLOCK - in_features)).view(rows, blocks, BLOCK)
    words = torch.zeros(rows, blocks, bits + 1, dtype=torch.int64, device=codes.device)
    for position in range(BLOCK):
        word, shift = divmod(position * bits, 32)
        spread = padded[:, :, position].to(torch.int64) << shift
        words[:, :, word] |= spread & 0xFFFFFFFF
        words[:, :, word + 1] |= spread >> 32
    # two's complement: words above 2**31 wrap to the int32 of the same bits
    signed = words[:, :, :bits] - ((words[:, :, :bits] >> 31) << 32)
    return signed.to(torch.int32).view(rows, blocks * bits)


def unpack_codes(words: Tensor, bits: int, in_features: int) -> Tensor:
    """Return codes (rows, in) uint8 from words (rows, packed_words) int32."""
    rows = words.shape[0]
    blocks = words.shape[1] // bits
    unsigned = words.view(rows, blocks, bits).to(torch.int64) & 0xFFFFFFFF
    codes = torch.empty(rows, blocks, BLOCK, dtype=torch.uint8, device=words.device)
    for position in range(BLOCK):
        word, shift = divmod(position * bits, 32)
        value = unsigned[:, :, word] >> shift
        if shift + bits > 32:
            value = value | (unsigned[:, :, word + 1] << (32 - shift))
        codes[:, :, position] = (value & (2**bits - 1)).to(torch.uint8)
    return codes.view(rows, blocks * BLOCK)[:, :in_features]


def channel_bytes(out_features: int, bits: int) -> int:
    """Return the stored bytes of one residual channel: what one fetch moves."""
    return -(-out_features * bits // 8)


def pack_channels(codes: Tensor, bits: int) -> Tensor:
    """Return (in, channel_bytes) uint8 from signed codes (out, in) int8; bits 2, 4 or 8."""
    per_byte = 8 // bits
    offset = 2 ** (bits - 1)
    shifted = (codes.to(torch.int16) + offset).to(torch.uint8).T
    padding = -shifted.shape[1] % per_byte
    planes = torch.nn.functional.pad(shifted, (0, padding), value=offset)
    planes = planes.reshape(shifted.shape[0], -1, per_byte)
    packed = torch.zeros(planes.shape[:2], dtype=torch.uint8, device=codes.device)
    for position in range(per_byte):
        packed |= planes[:, :, position] << (position * bits)
    return packed


def unpack_channels(packed: Tensor, bits: int, out_features: int) -> Tensor:
    """Return signed codes (out, in) int8 from packed (in, channel_bytes) uint8."""
    offset = 2 ** (bits - 1)
    planes = [(packed >> (p * bits)) & (2**bits - 1) for p in range(8 // bits)]
    codes = torch.stack(planes, dim=-1).view(packed.shape[0], -1)[:, :out_features]
    return (codes.to(torch.int16) - offset).to(torch.int8).T.contiguous()


# The kernels' order of a weight (csrc/cuda/product.cuh draws it): tiles of SLAB outputs by DEPTH inputs, slab
# after slab; of a tile, 32 lanes hold 32 consecutive inputs of four outputs each, in `bits` words an output.
SLAB, DEPTH = 32, 128
_ROWS, _LANES, _RUN = 4, 32, 32  # outputs of a lane, lanes, inputs of a lane
_CODES_AT_ONCE = 1 << 22  # packed together: 32 MB of int64


def tile_words(bits: int, codebook: bool) -> int:
    """Return the int32 words of a tile: codes, and for the uniform format the group's scales and zeros."""
    return SLAB * DEPTH * bits // 32 + (0 if codebook else SLAB)


def pack_tiles(codes: Tensor, bits: int, scales: Tensor | None = None, zeros: Tensor | None = None) -> Tensor:
    """Return (slabs, depth, tile_words) int32 from codes (out, in) uint8; bits 2, 3 or 4.

    scales (out, groups) float16 and zeros (out, groups) uint8, in groups of DEPTH inputs, for the uniform
    format; neither for the codebook format, whose words hold codes in another order.
    """
    out_features, in_features = codes.shape
    slabs, depth = -(-out_features // SLAB), -(-in_features // DEPTH)
    tiles = codes.new_empty((slabs, depth, tile_words(bits, scales is None)), dtype=torch.int32)
    step = max(1, _CODES_AT_ONCE // (SLAB * depth * DEPTH))
    for first in range(0, slabs, step):
        part = codes[first * SLAB : (first + step) * SLAB]
        count = min(step, slabs - first)
        full = torch.nn.functional.pad(
            part, (0, depth * DEPTH - in_features, 0, count * SLAB - part.shape[0])
        )
        # (slab, row of a lane, g, depth, t, run) -> (slab, depth, g, t, row, run)
        runs = full.view(count, _ROWS, 8, depth, 4, _RUN).permute(0, 3, 2, 4, 1, 5).to(torch.int64)
        words = _merge(runs, _places(bits, scales is None)).reshape(count, depth, _LANES, bits, 4)
        # 16-byte vectors of all lanes side by side
        tiles[first : first + count, :, : SLAB * bits * 4] = words.transpose(2, 3).reshape(count, depth, -1)
    if scales is not None and zeros is not None:
        pairs = torch.stack([_by_lane(scales, slabs), _by_lane(zeros.to(scales.dtype), slabs)], dim=-1)
        tiles[:, :, -SLAB:] = pairs.contiguous().view(torch.int32).view(slabs, depth, SLAB)
    return tiles


def unpack_tiles(
    tiles: Tensor, bits: int, out_features: int, in_features: int, codebook: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return what pack_tiles was given: codes (out, in) uint8, scales and zeros (out, groups) or None."""
    slabs, depth, _ = tiles.shape
    words = tiles[:, :, : SLAB * bits * 4].reshape(slabs, depth, bits, _LANES, 4).transpose(2, 3)
    words = words.reshape(slabs, depth, 8, 4, _ROWS, bits).to(torch.int64)
    runs = torch.zeros(*words.shape[:-1], _RUN, dtype=torch.uint8, device=tiles.device)
    for code, bit, word, position in _places(bits, codebook):
        runs[..., code] |= (((words[..., word] >> position) & 1) << bit).to(torch.uint8)
    codes = runs.permute(0, 4, 2, 1, 3, 5).reshape(slabs * SLAB, depth * DEPTH)[:out_features, :in_features]
    if codebook:
        return codes.contiguous(), None, None
    pairs = tiles[:, :, -SLAB:].contiguous().view(torch.float16).view(slabs, depth, 8, _ROWS, 2)
    scales, zeros = pairs.permute(4, 0, 3, 2, 1).reshape(2, slabs * SLAB, depth)[:, :out_features]
    return codes.contiguous(), scales.contiguous(), zeros.to(torch.uint8)


def pack_table(values: Tensor) -> Tensor:
    """Return (slabs, 32, 2**bits / 2) int32 from a codebook (out, 2**bits) float16 or bfloat16.

    Of each output the values' low bytes, then their high bytes; outputs in the order of lanes.
    """
    out_features, size = values.shape
    slabs = -(-out_features // SLAB)
    full = torch.nn.functional.pad(values, (0, 0, 0, slabs * SLAB - out_features))
    by_lane = full.view(slabs, _ROWS, 8, size).transpose(1, 2).contiguous()
    planes = by_lane.view(torch.uint8).view(slabs, SLAB, size, 2).transpose(2, 3).contiguous()
    return planes.view(torch.int32).view(slabs, SLAB, size // 2)


def unpack_table(table: Tensor, out_features: int, dtype: torch.dtype) -> Tensor:
    """Return the codebook (out, 2**bits) of `dtype` that pack_table was given."""
    slabs, _, words = table.shape
    planes = table.contiguous().view(torch.uint8).view(slabs, SLAB, 2, 2 * words).transpose(2, 3)
    by_lane = planes.contiguous().view(dtype).view(slabs, 8, _ROWS, 2 * words)
    return by_lane.transpose(1, 2).reshape(slabs * SLAB, 2 * words)[:out_features].contiguous()


def _by_lane(values: Tensor, slabs: int) -> Tensor:
    """Return (slabs, depth, 8, rows of a lane) from (out, depth)."""
    full = torch.nn.functional.pad(values, (0, 0, 0, slabs * SLAB - values.shape[0]))
    return full.view(slabs, _ROWS, 8, -1).permute(0, 3, 2, 1)


def _places(bits: int, codebook: bool) -> list[tuple[int, int, int, int]]:
    """Return where each bit of each of a run's 32 codes lies: (code, its bit, word, position)."""
    return [(code, bit, *_place(bits, codebook, code, bit)) for code in range(_RUN) for bit in range(bits)]


def _place(bits: int, codebook: bool, code: int, bit: int) -> tuple[int, int]:
    if codebook:
        # nibbles, which byte permutations take as selectors; at 3 bits the last codes in their spare bits
        if bits == 3:
            return (code // 8, code % 8 * 4 + bit) if code < 24 else (bit, (code - 24) * 4 + 3)
        if bits == 2:
            return code // 16, code % 8 * 4 + code // 8 % 2 * 2 + bit
        return code // 8, code % 8 * 4 + bit
    # neighbours in the two halves of a word; at 3 bits the last two in the words' spare bits
    pair, half = divmod(code, 2)
    per_word = 16 // bits
    if bits == 3 and pair == 15:
        return bit, half * 16 + 15
    return pair // per_word, half * 16 + pair % per_word * bits + bit


def _merge(runs: Tensor, places: list[tuple[int, int, int, int]]) -> Tensor:
    bits = len(places) // _RUN
    words = torch.zeros(*runs.shape[:-1], bits, dtype=torch.int64, device=runs.device)
    for code, bit, word, position in places:
        words[..., word] |= ((runs[..., code] >> bit) & 1) << position
    # two's complement: words above 2**31 wrap to the int32 of the same bits
    return (words - ((words >> 31) << 32)).to(torch.int32)
