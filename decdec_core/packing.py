"""Integer codes <-> stored words: the only bit layout written in Python.

Two layouts, both in logical order (a kernel that wants another order makes it at load):

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
