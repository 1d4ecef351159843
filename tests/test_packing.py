from __future__ import annotations

import pytest
import torch

from decdec_core.packing import (
    DEPTH,
    SLAB,
    channel_bytes,
    pack_channels,
    pack_codes,
    pack_table,
    pack_tiles,
    packed_words,
    tile_words,
    unpack_channels,
    unpack_codes,
    unpack_table,
    unpack_tiles,
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


@pytest.mark.parametrize("codebook", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("shape", [(1, 1), (32, 128), (70, 300)])
def test_tiles_give_back_what_they_hold(
    shape: tuple[int, int], bits: int, codebook: bool, draw: torch.Generator
) -> None:
    codes = torch.randint(0, 2**bits, shape, dtype=torch.uint8, generator=draw)
    groups = (shape[0], -(-shape[1] // DEPTH))
    scales = torch.rand(groups, generator=draw).half()
    zeros = torch.randint(0, 2**bits, groups, dtype=torch.uint8, generator=draw)
    tiles = pack_tiles(codes, bits) if codebook else pack_tiles(codes, bits, scales, zeros)
    assert tiles.shape == (-(-shape[0] // SLAB), groups[1], tile_words(bits, codebook))
    unpacked, unpacked_scales, unpacked_zeros = unpack_tiles(tiles, bits, *shape, codebook)
    assert torch.equal(unpacked, codes)
    if not codebook:
        assert unpacked_scales is not None
        assert unpacked_zeros is not None
        assert torch.equal(unpacked_scales, scales)
        assert torch.equal(unpacked_zeros, zeros)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_tables_give_back_what_they_hold(bits: int, dtype: torch.dtype, draw: torch.Generator) -> None:
    values = torch.randn(70, 2**bits, generator=draw).to(dtype)
    assert torch.equal(unpack_table(pack_table(values), 70, dtype), values)
