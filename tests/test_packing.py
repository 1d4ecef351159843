from __future__ import annotations

import pytest
import torch

from decdec_core.packing import (
    channel_bytes,
    pack_channels,
    pack_codes,
    packed_words,
    unpack_channels,
    unpack_codes,
)

SIZES = [1, 31, 32, 33, 576, 1000, 1032]


@pytest.mark.parametrize("bits", [2, 3, 4, 5])
@pytest.mark.parametrize("in_features", SIZES)
def test_weight_codes_survive_packing_densely(bits: int, in_features: int, draw: torch.Generator) -> None:
    codes = torch.randint(0, 2**bits, (7, in_features), dtype=torch.uint8, generator=draw)
    words = pack_codes(codes, bits)
    assert words.dtype == torch.int32
    assert words.shape == (7, packed_words(in_features, bits))
    assert words.shape[1] * 32 == -(-in_features // 32) * 32 * bits  # 3 bits cost 3 bits
    assert torch.equal(unpack_codes(words, bits, in_features), codes)


def test_weight_code_layout_is_a_little_endian_bit_stream() -> None:
    codes = torch.arange(32, dtype=torch.uint8).remainder(8).unsqueeze(0)
    stream = sum(int(code) << (3 * i) for i, code in enumerate(codes[0]))
    words = [int(w) & 0xFFFFFFFF for w in pack_codes(codes, 3)[0]]
    assert words == [(stream >> (32 * i)) & 0xFFFFFFFF for i in range(3)]


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("out_features", [1, 2, 3, 5, 192, 577])
def test_residual_codes_survive_packing_by_channel(
    bits: int, out_features: int, draw: torch.Generator
) -> None:
    limit = 2 ** (bits - 1) - 1
    codes = torch.randint(-limit, limit + 1, (out_features, 9), generator=draw).to(torch.int8)
    packed = pack_channels(codes, bits)
    assert packed.shape == (9, channel_bytes(out_features, bits))
    assert torch.equal(unpack_channels(packed, bits, out_features), codes)


def test_residual_layout_low_nibble_first_and_padding_decodes_to_zero() -> None:
    packed = pack_channels(torch.tensor([[-7], [7], [1]], dtype=torch.int8), 4)
    assert packed.tolist() == [[1 | 15 << 4, 9 | 8 << 4]]
    assert unpack_channels(packed, 4, 4)[3].item() == 0
