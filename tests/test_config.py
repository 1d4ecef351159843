from __future__ import annotations

import pytest

from decdec_core.config import (
    Compensation,
    DecDECError,
    ResidualQuant,
    WeightQuant,
    channels_per_chunk,
    suggest,
    total_channels,
)


@pytest.mark.parametrize(
    ("in_features", "k_chunk", "wanted"),
    [
        (576, 16, [9]),
        (1536, 16, [16, 8]),
        (4096, 8, [8] * 4),
        (1000, 1, [0]),
        (1, 1024, [1]),
        (1032, 1024, [1024, 8]),
    ],
)
def test_a_chunk_contributes_its_share(in_features: int, k_chunk: int, wanted: list[int]) -> None:
    assert channels_per_chunk(in_features, k_chunk) == wanted
    assert total_channels(in_features, k_chunk) == sum(wanted)


@pytest.mark.parametrize("given", [8, "8", (8, 8, 8, 8), [8, 8, 8, 8], "8/8/8/8", [8]])
def test_one_number_means_all_four_kinds(given: object) -> None:
    compensation = Compensation(k_chunk=given)
    assert compensation.k_chunk == (8, 8, 8, 8)
    assert compensation.k_chunk_text() == "8"


def test_four_numbers_are_qkv_o_gate_up_down() -> None:
    compensation = Compensation(k_chunk="1/2/3/4")
    assert [compensation.k_chunk_of(kind) for kind in ("qkv", "o", "gate_up", "down")] == [1, 2, 3, 4]
    assert compensation.k_chunk_text() == "1/2/3/4"
    assert Compensation(selection="none", k_chunk="1/2/3/4").k_chunk == (0, 0, 0, 0)


@pytest.mark.parametrize(
    "given", [-1, 1025, 2.5, True, "x", "²", "8/8", [8, 8], "8/8/8/2000", None, "-1", ""]
)
def test_k_chunk_out_of_range_is_refused(given: object) -> None:
    with pytest.raises(DecDECError, match=r"k_chunk must be .*, got"):
        Compensation(k_chunk=given)


def test_unknown_selection_is_refused_with_a_suggestion() -> None:
    with pytest.raises(
        DecDECError, match=r"selection must be one of none, .*got 'dynamc' \(did you mean 'dynamic'\?\)"
    ):
        Compensation(selection="dynamc")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: Compensation(compensate="prompt"),
            "compensate must be one of all, decode, auto, got 'prompt'",
        ),
        (lambda: Compensation(seed=-1), r"seed must be 0\.\.2147483647, got -1"),
        (
            lambda: WeightQuant("gtpq"),
            "method must be one of rtn, awq, squeezellm, gptq, compressed-tensors, got 'gtpq'",
        ),
        (lambda: WeightQuant(bits=6), "bits must be one of 2, 2.5, 3, 3.5, 4, 4.5, 5, got 6"),
        (lambda: WeightQuant(bits=3.0), "bits must be one of 2, 2.5, 3, 3.5, 4, 4.5, 5, got 3.0"),
        (lambda: WeightQuant("squeezellm", group_size=64), "group_size must be absent with squeezellm"),
        (lambda: WeightQuant("awq", clustering="exact"), "clustering must be absent with awq, got 'exact'"),
        (lambda: WeightQuant("squeezellm", clustering="kmeans"), "clustering must be one of exact, flash1d"),
        (lambda: WeightQuant(group_size=0), r"group_size must be 8\.\.65536, got 0"),
        (lambda: ResidualQuant(3), "residual_bits must be one of 2, 4, 8, 16, got 3"),
    ],
)
def test_refused_values_name_which_wanted_got(make: object, message: str) -> None:
    with pytest.raises(DecDECError, match=message):
        make()  # type: ignore[operator]


@pytest.mark.parametrize(
    "config",
    [
        WeightQuant("rtn", 5, 64),
        WeightQuant("squeezellm", 3.5, clustering="flash1d"),
        ResidualQuant(8),
        Compensation("static", "1/2/3/4", "all", 7),
    ],
)
def test_json_round_trip(config: WeightQuant) -> None:
    assert type(config).from_dict(config.to_dict()) == config


def test_unknown_key_is_refused_with_a_suggestion() -> None:
    with pytest.raises(DecDECError, match=r"unknown key 'k_chnk' \(did you mean 'k_chunk'\?\)"):
        Compensation.from_dict({"k_chnk": 8})


def test_suggest_says_nothing_where_nothing_is_near() -> None:
    assert suggest("zzzz", ["dynamic"]) == ""


def test_a_weights_format_and_widths() -> None:
    assert WeightQuant("awq", 3).group_size == 128
    assert WeightQuant("squeezellm", 3).clustering == "exact"
    assert [WeightQuant(m).format for m in ("rtn", "gptq", "squeezellm")] == [
        "uniform",
        "uniform",
        "codebook",
    ]
    assert WeightQuant("awq", 3).widths == (3,)
    assert WeightQuant("awq", 3.5).widths == (3, 4)
    assert WeightQuant("awq", 3.5).at(4) == WeightQuant("awq", 4)
