"""The searches on tables whose answers are known, and the self-correction on responses that are made up."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest

from decdec_core.config import PROJECTION_KINDS, DecDECError
from decdec_core.tuner import (
    TOLERANCE_POINTS,
    Choice,
    TimingTable,
    best_round,
    correct,
    is_met,
    search,
    search_quality,
)

# qkv, o, gate_up, down: o is the smallest, then qkv, down, gate_up
SHAPES = {"qkv": (1024, 2048), "o": (1024, 1024), "gate_up": (1024, 8192), "down": (4096, 1024)}


def rows_of(base: float, *lines: tuple[int, tuple[list[float], ...]]) -> list[dict[str, object]]:
    """Return rows in which each product takes `base`; lines: n_tb, and of each kind times from k_chunk 1."""
    rows: list[dict[str, object]] = [
        {"kind": kind, "n_tb": 0, "k_chunk": 0, "time_us": base} for kind in PROJECTION_KINDS
    ]
    for n_tb, times in lines:
        for kind, curve in zip(PROJECTION_KINDS, times, strict=True):
            rows += [
                {"kind": kind, "n_tb": n_tb, "k_chunk": k, "time_us": time_us}
                for k, time_us in enumerate(curve, 1)
            ]
    return rows


def table_of(base: float, *lines: tuple[int, tuple[list[float], ...]]) -> TimingTable:
    return TimingTable.from_rows(rows_of(base, *lines), SHAPES)


def risen(base: float, *costs: float) -> list[float]:
    """Return times that rise from `base` by `costs`, one after the other."""
    return [base + total for total in itertools.accumulate(costs)]


def expect(choice: Choice, n_tb: int, k_chunk: tuple[int, ...], percent: float) -> None:
    assert (choice.n_tb, choice.k_chunk) == (n_tb, k_chunk)
    assert choice.predicted_percent == pytest.approx(percent)


def random_table(seed: int, most: int = 5) -> TimingTable:
    draw = np.random.default_rng(seed)
    lines = [
        (n_tb, tuple(risen(10.0, *draw.choice([0.0, 0.25, 0.5, 1.0, 3.0], most)) for _ in PROJECTION_KINDS))
        for n_tb in (4, 8)
    ]
    return table_of(10.0, *lines)


def brute_force(table: TimingTable, percent: float, energy: dict[str, list[float]]) -> float:
    """Return the most energy of all settings within the slowdown."""
    most = 0.0
    for n_tb, curves in table.curves.items():
        for k_chunk in itertools.product(*(range(len(curve)) for curve in curves)):
            if table.time_us(n_tb, k_chunk) <= table.limit_us(percent):
                most = max(most, energy_of(k_chunk, energy))
    return most


def energy_of(k_chunk: tuple[int, ...], energy: dict[str, list[float]]) -> float:
    return sum(energy[kind][k] for kind, k in zip(PROJECTION_KINDS, k_chunk, strict=True))


# ---- the table


def test_times_run_straight_between_rows_and_never_fall() -> None:
    rows = rows_of(10.0, *[(8, ([11.0], [11.0], [11.0], [11.0]))])
    rows += [
        {"kind": "o", "n_tb": 8, "k_chunk": k, "time_us": t} for k, t in ((3, 15.0), (5, 14.0), (6, 9.0))
    ]
    curve = TimingTable.from_rows(rows, SHAPES).curves[8][1]
    # 14 and 9 are noise: a fetch of more is not shorter
    assert curve.tolist() == [10.0, 11.0, 13.0, 15.0, 15.0, 15.0, 15.0]


def test_below_the_first_row_compensating_costs_what_it_costs_there() -> None:
    rows = [row for row in rows_of(10.0, (8, ([12.0] * 4,) * 4)) if row["k_chunk"] in (0, 4)]
    assert TimingTable.from_rows(rows, SHAPES).curves[8][0].tolist() == [10.0, 12.0, 12.0, 12.0, 12.0]


def test_a_k_chunk_that_gives_no_channel_costs_nothing() -> None:
    rows = [row for row in rows_of(10.0, (8, ([12.0] * 4,) * 4)) if row["k_chunk"] in (0, 4)]
    narrow = dict.fromkeys(PROJECTION_KINDS, (512, 512))
    table = TimingTable.from_rows(rows, narrow)
    assert table.curves[8][0].tolist() == [10.0, 10.0, 12.0, 12.0, 12.0]
    # and is no choice
    assert search(table, 0) == Choice(0, (0, 0, 0, 0), 0.0)


def test_a_time_below_the_products_is_the_products() -> None:
    assert table_of(10.0, (8, ([9.0, 10.5],) * 4)).curves[8][2].tolist() == [10.0, 10.0, 10.5]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows[1:], "rows must have n_tb 0 and k_chunk 0 of qkv, got none"),
        (lambda rows: rows[:4], "rows must have an n_tb above 0, got none"),
        (lambda rows: rows[:-1], "rows must have n_tb 8 of down, got none"),
        (lambda rows: [*rows, rows[0]], "rows must be one for each setting, got two of qkv, 0, 0"),
        (lambda rows: [*rows, rows[-1]], "rows must be one for each setting, got two of down, 8, 1"),
        (lambda rows: [{**rows[0], "kind": "up"}], r"kind must be one of qkv, o, gate_up, down, got 'up'"),
        (lambda rows: [{**rows[0], "n_tb": 8}], "n_tb and k_chunk must both be 0 or neither, got 8 and 0"),
        (lambda rows: [{**rows[0], "n_tb": 2.0}], r"n_tb must be 0\.\.1024, got 2\.0"),
        (lambda rows: [{**rows[0], "k_chunk": 1025}], r"k_chunk must be 0\.\.1024, got 1025"),
        (lambda rows: [{**rows[0], "time_us": math.nan}], "time_us must be a finite number, got nan"),
        (lambda rows: [{**rows[0], "time_us": "1"}], "time_us must be a finite number, got '1'"),
        (lambda rows: [{**rows[0], "time_us": 0}], "time_us must be above 0, got 0"),
        (lambda rows: [{"kind": "o"}], "a timing row must have kind, n_tb, k_chunk and time_us, got no n_tb"),
    ],
)
def test_malformed_rows_are_refused(change: Callable[[list[object]], list[object]], message: str) -> None:
    with pytest.raises(DecDECError, match=message):
        TimingTable.from_rows(change(rows_of(10.0, (8, ([11.0],) * 4))), SHAPES)  # type: ignore[arg-type]


def test_shapes_are_of_the_four_kinds() -> None:
    with pytest.raises(DecDECError, match="shapes must be of qkv, o, gate_up, down, got matrix"):
        TimingTable.from_rows([], {"matrix": (1, 1)})


# ---- the paper's search


def test_the_largest_common_k_chunk_then_the_cheapest_increases() -> None:
    # at most 44: k_chunk 2 of all takes 43.2, and what is left pays for one more of o, at 0.6
    costs = ([0.4, 0.4, 5], [0.4, 0.4, 0.6, 5], [0.4, 0.4, 0.7], [0.4, 0.4, 2])
    table = table_of(10.0, (8, tuple(risen(10.0, *c) for c in costs)))
    expect(search(table, 10), 8, (2, 3, 2, 2), 9.5)


def test_equal_increases_go_in_the_order_of_the_kinds() -> None:
    # at most 41.9: k_chunk 1 of all takes 41, which leaves three increases of 0.3
    table = table_of(10.0, (8, tuple(risen(10.0, 0.25, 0.3, 0.4) for _ in range(4))))
    assert search(table, 4.75).k_chunk == (2, 2, 2, 1)
    # a kind that is as cheap again goes again
    table = table_of(10.0, (8, tuple(risen(10.0, 0.25, 0.3, 0.3) for _ in range(4))))
    assert search(table, 4.75).k_chunk == (3, 2, 1, 1)


def test_what_reaches_the_target_exactly_is_within_it() -> None:
    # 10 % of 40 is 4.000000000000001 or 3.9999999999999996, depending on how one adds
    table = table_of(10.0, (8, tuple(risen(10.0, 0.1, 0.9, 0.1) for _ in range(4))))
    expect(search(table, 10), 8, (2, 2, 2, 2), 10.0)


def test_n_tb_is_the_one_with_the_largest_k_chunk_then_the_least_time_then_the_fewest() -> None:
    few, many = risen(10.0, 0.1, 5.0), risen(10.0, 0.5, 0.1, 5.0)
    assert search(table_of(10.0, (4, (few,) * 4), (8, (many,) * 4)), 10).n_tb == 8
    slow, fast = risen(10.0, 0.5, 5.0), risen(10.0, 0.2, 5.0)
    assert search(table_of(10.0, (4, (slow,) * 4), (8, (fast,) * 4)), 10).n_tb == 8
    assert search(table_of(10.0, (16, (fast,) * 4), (8, (fast,) * 4)), 10).n_tb == 8


def test_beyond_the_last_row_nothing_is_on_offer() -> None:
    # o ends at 1, so that 1 is common; the others go on, gate_up to its end
    table = table_of(10.0, (8, ([10.0] * 3, [10.0], [10.0] * 4, [10.0] * 2)))
    assert search(table, 50) == Choice(8, (3, 1, 4, 2), 0.0)


def test_the_smallest_matrix_goes_first_where_nothing_fits() -> None:
    cheap, dear = risen(10.0, 0.5, 1.0), [30.0, 31.0]
    # at most 42. o is too dear; qkv, after o in vain, which leaves 1 for a second of gate_up; all but gate_up
    assert search(table_of(10.0, (8, (cheap, dear, cheap, cheap))), 5).k_chunk == (1, 0, 1, 1)
    assert search(table_of(10.0, (8, (dear, cheap, cheap, cheap))), 5).k_chunk == (0, 0, 2, 1)
    assert search(table_of(10.0, (8, (dear, dear, cheap, dear))), 5).k_chunk == (0, 0, 2, 0)


def test_with_none_left_nothing_is_compensated() -> None:
    nothing = Choice(0, (0, 0, 0, 0), 0.0)
    assert search(table_of(10.0, (8, ([30.0],) * 4)), 20) == nothing
    assert search(table_of(10.0, (8, ([10.1],) * 4)), 0) == nothing


def test_target_0_takes_what_is_free() -> None:
    table = table_of(10.0, (8, ([10.0, 10.0, 11.0], [11.0], [10.0, 10.5], [10.0])))
    assert search(table, 0) == Choice(8, (2, 0, 1, 1), 0.0)


@pytest.mark.parametrize("percent", [-1, math.nan, math.inf, "5", None, True])
def test_a_slowdown_is_a_number_from_0(percent: object) -> None:
    with pytest.raises(DecDECError, match="slowdown_percent must be"):
        search(table_of(10.0, (8, ([11.0],) * 4)), percent)  # type: ignore[arg-type]


@pytest.mark.parametrize("percent", [0, 1.3, 5, 20, 100])
@pytest.mark.parametrize("seed", range(5))
def test_a_choice_is_within_its_target_and_no_step_is_left(seed: int, percent: float) -> None:
    table = random_table(seed)
    choice = search(table, percent)
    assert choice.predicted_percent <= percent + 1e-6
    for kind, k in enumerate(choice.k_chunk):
        raised = list(choice.k_chunk)
        raised[kind] += 1
        if k and k + 1 < len(table.curves[choice.n_tb][kind]):
            assert table.time_us(choice.n_tb, raised) > table.limit_us(percent)


# ---- the search for quality


@pytest.mark.parametrize("percent", [0, 1.3, 2.5, 5, 10, 30, 200])
@pytest.mark.parametrize("seed", range(6))
def test_quality_is_the_best_of_all_settings(seed: int, percent: float) -> None:
    table = random_table(seed)
    draw = np.random.default_rng(100 + seed)
    energy = {kind: [0.0, *np.cumsum(draw.random(5)).tolist()] for kind in PROJECTION_KINDS}
    choice = search_quality(table, percent, energy)
    assert choice.objective == "quality"
    assert choice.predicted_percent <= percent + 1e-6
    found = energy_of(choice.k_chunk, energy)
    assert found == pytest.approx(brute_force(table, percent, energy))
    assert found >= energy_of(search(table, percent).k_chunk, energy) - 1e-12


def test_quality_spends_where_most_is_gained() -> None:
    # one of 0.5 each: 4.5 % of 40 pays for three; o gains nothing
    table = table_of(10.0, (8, ([10.5],) * 4))
    energy = {"qkv": [0, 1], "o": [0, 0.1], "gate_up": [0, 3], "down": [0, 2]}
    expect(search_quality(table, 4.5, energy), 8, (1, 0, 1, 1), 3.75)
    assert search_quality(table, 1.25, energy).k_chunk == (0, 0, 1, 0)
    assert search_quality(table, 1.0, energy) == Choice(0, (0, 0, 0, 0), 0.0, "quality")


def test_of_equal_energy_the_least_time_and_the_fewest_blocks() -> None:
    energy = {kind: [0.0, 1.0, 1.0] for kind in PROJECTION_KINDS}
    table = table_of(10.0, (16, ([10.2, 10.4],) * 4), (8, ([10.1, 10.4],) * 4), (24, ([10.1, 10.1],) * 4))
    expect(search_quality(table, 20, energy), 8, (1, 1, 1, 1), 1.0)


def test_where_energy_ends_nothing_more_is_on_offer() -> None:
    table = table_of(10.0, (8, ([10.0, 10.0, 10.0],) * 4))
    energy = {"qkv": [0], "o": [0, 1], "gate_up": [0, 1, 2], "down": [0, 1, 2, 3, 4]}
    assert search_quality(table, 0, energy).k_chunk == (0, 1, 2, 3)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([0.0, 2.0, 1.0], "energy of o must never fall, got less at k_chunk 2 than before"),
        ([], "energy of o must be finite numbers from k_chunk 0 up"),
        ([0.0, math.inf], "energy of o must be finite numbers from k_chunk 0 up"),
        ([[0.0]], "energy of o must be finite numbers from k_chunk 0 up"),
        (["much"], "energy of o must be finite numbers from k_chunk 0 up"),
    ],
)
def test_energies_that_are_none_are_refused(values: list[float], message: str) -> None:
    energy = {kind: values if kind == "o" else [0.0, 1.0] for kind in PROJECTION_KINDS}
    with pytest.raises(DecDECError, match=message):
        search_quality(table_of(10.0, (8, ([11.0],) * 4)), 5, energy)


def test_a_whole_range_of_k_chunk_is_searched_in_time() -> None:
    # 1025 values each: the fronts of two kinds have up to a million settings
    rows = rows_of(10.0)
    rows += [
        {"kind": kind, "n_tb": 8, "k_chunk": k, "time_us": 10.0 + slope * k}
        for kind, slope in zip(PROJECTION_KINDS, (0.011, 0.007, 0.053, 0.029), strict=True)
        for k in (1, 1024)
    ]
    table = TimingTable.from_rows(rows, SHAPES)
    energy = {kind: np.sqrt(np.arange(1025.0)).tolist() for kind in PROJECTION_KINDS}
    choice = search_quality(table, 100, energy)
    # the last channel gains in proportion to its cost, so that k goes with 1 / slope**2, at most 1024: of
    # 40 us qkv and o take 11.26 and 7.17, the others 0.404 / 0.053 and 0.404 / 0.029
    assert choice.k_chunk == pytest.approx((1024, 1024, 0.404 / 0.053**2, 0.404 / 0.029**2), abs=10)
    assert energy_of(choice.k_chunk, energy) > energy_of(search(table, 100).k_chunk, energy)


# ---- choices


def test_a_choice_travels_as_json() -> None:
    choice = Choice(8, (1, 2, 3, 4), 4.5, "quality")
    assert choice.to_dict() == {
        "n_tb": 8,
        "k_chunk": [1, 2, 3, 4],
        "predicted_percent": 4.5,
        "objective": "quality",
    }
    assert Choice.from_dict(choice.to_dict()) == choice


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Choice(0, (1, 0, 0, 0), 1.0), "n_tb must be 0 exactly where every k_chunk is, got 0"),
        (lambda: Choice(8, (0, 0, 0, 0), 1.0), "n_tb must be 0 exactly where every k_chunk is, got 8"),
        (lambda: Choice(8, (1, 1), 1.0), r"k_chunk must be four numbers, qkv/o/gate_up/down, got \(1, 1\)"),
        (lambda: Choice(8, (1, 1, 1, -1), 1.0), r"k_chunk must be 0\.\.1024, got -1"),
        (lambda: Choice(8, (1, 1, 1, 1), math.nan), "predicted_percent must be a finite number, got nan"),
        (
            lambda: Choice(8, (1, 1, 1, 1), 1.0, "sped"),
            r"objective must be one of speed, quality, got 'sped'",
        ),
        (lambda: Choice.from_dict({"ntb": 8}), r"unknown key 'ntb' \(did you mean 'n_tb'\?\)"),
    ],
)
def test_choices_that_are_none_are_refused(make: Callable[[], Choice], message: str) -> None:
    with pytest.raises(DecDECError, match=message):
        make()


# ---- the self-correction


def rounds(target: float, response: Callable[[float], float], most: int = 8) -> list[tuple[float, float]]:
    """Return the rounds up to the first that is met, as a tuner would do them."""
    history: list[tuple[float, float]] = []
    while len(history) < most and not (history and is_met(target, history[-1][1])):
        internal = correct(target, history)
        history.append((internal, response(internal)))
    return history


@pytest.mark.parametrize("target", [2.5, 5, 10, 20])
@pytest.mark.parametrize(
    "response",
    [
        lambda p: p,
        lambda p: 0.6 * p,  # linear layers are 60 % of a step
        lambda p: 0.3 * p,
        lambda p: 1.5 * p,
        lambda p: 0.02 * p**2,
        lambda p: 3 * math.sqrt(p),
        lambda p: max(0.0, p - 4),
        lambda p: 0.5 * p + 1.2,  # a fixed cost beside the linear layers
    ],
)
def test_smooth_responses_are_met_in_a_few_rounds(response: Callable[[float], float], target: float) -> None:
    history = rounds(target, response)
    assert is_met(target, history[-1][1])
    assert len(history) <= 6
    assert best_round(target, history) == len(history) - 1


@pytest.mark.parametrize("target", [2.5, 5, 10, 20])
@pytest.mark.parametrize("step", [0.5, 1.5])
def test_steps_finer_than_the_tolerance_are_met(step: float, target: float) -> None:
    # k_chunk is whole, so that what is measured rises in steps
    history = rounds(target, lambda p: 0.6 * step * math.floor(p / step))
    assert is_met(target, history[-1][1])


def test_a_step_across_the_target_ends_at_the_best_that_is_not_over() -> None:
    def response(internal: float) -> float:
        return 3.2 if internal < 9 else 7.5

    history = rounds(5, response)
    best = best_round(5, history)
    assert best is not None
    assert history[best][1] == 3.2
    # and the rounds went where the step is, from both sides
    assert max(p for p, m in history if m == 3.2) > 8
    assert min(p for p, m in history if m == 7.5) < 10


def test_noise_does_not_lead_astray() -> None:
    draw = np.random.default_rng(3)
    for target in (2.5, 5, 10, 20):
        history = rounds(target, lambda p: 0.6 * p + float(draw.normal(0, 0.2)))
        assert is_met(target, history[-1][1])


def test_the_first_rounds_are_the_target_and_its_scaling() -> None:
    assert correct(5, []) == 5
    assert correct(5, [(5, 2.5)]) == 10
    assert correct(5, [(5, 10.0)]) == 2.5
    # nothing measured, or next to nothing, says little of how far to go
    assert correct(5, [(5, 0.0)]) == correct(5, [(5, -0.3)]) == 20
    assert correct(0, []) == correct(0, [(5, 3.0)]) == 0


def test_between_two_rounds_a_secant_then_the_middle() -> None:
    assert correct(5, [(4, 3.0), (8, 7.0)]) == 6
    # the last two on one side of the target: a secant would creep
    assert correct(5, [(4, 3.0), (8, 7.0), (7, 6.9)]) == 5.5


def test_the_best_round_is_the_nearest_that_is_not_over_by_more_than_a_point() -> None:
    assert best_round(5, [(5, 3.0), (8, 5.9), (7, 4.2)]) == 2
    assert best_round(5, [(5, 3.0), (8, 5.0 + TOLERANCE_POINTS)]) == 1
    assert best_round(5, [(5, 3.0), (8, 6.1)]) == 0
    assert best_round(5, [(5, 6.1)]) is None
    assert best_round(5, []) is None
