"""The analytic model against the measurements it comes from, its predictions, and how rows are measured."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from decdec_core import kernel_bench, timing
from decdec_core.config import PROJECTION_KINDS, DecDECError, total_channels
from decdec_core.latency import FITTED, GPUS, Gpu, calibrate, divided, gpu_of, knee, predicted_rows
from decdec_core.shapes import config_of, matrices_of
from decdec_core.tuner import TimingTable, search

MEASURED = Path(__file__).resolve().parents[1] / "results" / "h200" / "kernels.json"
LLAMA = matrices_of(config_of("llama-3-8b"))
SMOL = matrices_of(config_of("smollm2-135m"))
PAPER = ("rtx-4090", "rtx-4080s", "rtx-4070s", "rtx-4070-mobile", "rtx-4050-mobile")


@pytest.fixture(scope="module")
def measured() -> list[dict[str, Any]]:
    return json.loads(MEASURED.read_text("utf-8"))["rows"]


def row_of(shape: tuple[int, int], bits: int, format: str, n_tb: int, k_chunk: int) -> dict[str, Any]:
    about = {"in": shape[0], "out": shape[1], "bits": bits, "format": format}
    return {**about, "n_tb": n_tb, "k_chunk": k_chunk}


# ---- the fit


def test_the_constants_are_what_the_measurements_give(measured: list[dict[str, Any]]) -> None:
    fitted = calibrate(measured)
    # FITTED is rounded to three digits, half of the last of which is 0.5 % at most
    assert dict(fitted.cycles) == pytest.approx(dict(FITTED.cycles), rel=5e-3)
    for name in ("launch_us", "selection_us", "chunk_us", "outputs_us", "link_share", "sharing_us"):
        assert getattr(fitted, name) == pytest.approx(getattr(FITTED, name), rel=5e-3), name
    assert fitted.kilobytes_in_flight == pytest.approx(FITTED.kilobytes_in_flight, rel=5e-3)


def test_the_error_is_as_stated(measured: list[dict[str, Any]]) -> None:
    everything, *parts = FITTED.error(measured)
    assert (everything["rows"], sum(part["rows"] for part in parts)) == (352, 352)
    assert everything["median"] == pytest.approx(0.0254, abs=1e-3)
    assert everything["largest"] == pytest.approx(0.160, abs=2e-3)
    worst = max(parts, key=lambda part: abs(part["largest"]))
    assert (worst["matrix"], worst["k_chunk"]) == ("o", [1, 8])
    # qkv alone at 4 bits uniform, too fast
    alone = next(part for part in parts if (part["matrix"], part["k_chunk"]) == ("qkv", [0, 0]))
    assert alone["largest"] == pytest.approx(-0.112, abs=2e-3)
    later = [row for row in measured if row["k_chunk"] >= 16]
    assert abs(FITTED.error(later)[0]["largest"]) < 0.08


@pytest.mark.parametrize(("target", "most_over"), [(2.5, 0.0), (5, 4.0), (10, 4.0), (20, 7.5)])
def test_predicted_budgets_cost_what_is_stated(
    target: float, most_over: float, measured: list[dict[str, Any]]
) -> None:
    for format, bits in FITTED.cycles:
        rows = [
            {**row, "kind": row["matrix"]}
            for row in measured
            if (row["format"], row["bits"]) == (format, bits) and not row.get("compensation_only")
        ]
        table = TimingTable.from_rows(rows, LLAMA)
        predicted = predicted_rows(GPUS["h200"], LLAMA, bits, format, (8, 16, 24))
        choice = search(TimingTable.from_rows(predicted, LLAMA), target)
        real = table.choice(choice.n_tb, choice.k_chunk, "speed").predicted_percent
        assert real <= target + most_over


def test_a_fit_finds_the_model_that_made_the_rows() -> None:
    made = replace(FITTED, cycles={("uniform", 4): 33.0, ("codebook", 3): 50.0}, launch_us=2.2, chunk_us=0.9)
    rows = [
        {**row_of(shape, bits, format, n_tb, k), "matrix": kind}
        for kind, shape in LLAMA.items()
        for format, bits in made.cycles
        for n_tb, k in [(0, 0)] + [(n, k) for n in (2, 8, 16) for k in (1, 8, 32, 128)]
    ]
    times = made.times_us(GPUS["h200"], rows)
    fitted = calibrate([{**row, "time_us": float(time)} for row, time in zip(rows, times, strict=True)])
    again = fitted.times_us(GPUS["h200"], rows)
    # it stops where a further step gains nothing that float64 shows of the sum of squares
    assert again == pytest.approx(times, rel=1e-3)


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        (lambda row: False, "rows must have some of one token, uniform or codebook, got none"),
        (lambda row: row["format"] == "fp16", "rows must have some of one token, uniform or codebook"),
        (lambda row: row.get("compensation_only"), "rows must have some of one token, uniform or codebook"),
        (lambda row: not row["k_chunk"], "rows must be of the product alone and of both in one launch"),
    ],
)
def test_rows_that_cannot_be_fitted_are_refused(
    keep: Callable[[dict[str, Any]], bool], message: str, measured: list[dict[str, Any]]
) -> None:
    with pytest.raises(DecDECError, match=message):
        calibrate([row for row in measured if keep(row)])


def test_a_gpu_of_unknown_multiprocessors_cannot_be_fitted(measured: list[dict[str, Any]]) -> None:
    with pytest.raises(DecDECError, match="multiprocessors of mine must be known to calibrate, got none"):
        calibrate(measured, Gpu("mine", 500, 16))


# ---- GPUs and knees


def test_knees_are_the_papers_formula() -> None:
    knees = {key: round(knee(GPUS[key], 3), 1) for key in GPUS}
    assert knees == {
        "rtx-4090": 24.4,
        "rtx-4080s": 33.4,
        "rtx-4070s": 48.8,
        "rtx-4070-mobile": 48.0,
        "rtx-4050-mobile": 64.0,
        "h200": 8.7,
    }
    assert knee(GPUS["rtx-4050-mobile"], 4) == pytest.approx(1024 * 16 / 192)


@pytest.mark.parametrize("key", PAPER)
@pytest.mark.parametrize(("format", "bits"), list(FITTED.cycles))
def test_predicted_bends_lie_below_the_knee(key: str, format: str, bits: int) -> None:
    # the link reaches 0.80 * 0.956 of its data sheet, memory 0.95, and selection comes before the first byte;
    # but scales and tables make the weight larger than its codes, by a twelfth at most
    rows = predicted_rows(GPUS[key], LLAMA, bits, format, (8,))
    table = TimingTable.from_rows(rows, LLAMA)
    curve = table.curves[8][PROJECTION_KINDS.index("gate_up")]
    bend = int((curve <= curve[1]).sum()) - 1
    assert 0.65 * knee(GPUS[key], bits) < bend < knee(GPUS[key], bits)


def test_a_data_sheets_bandwidths_are_not_reached() -> None:
    gpu = Gpu("mine", 100, 10)
    assert (gpu.memory_reached, gpu.link_reached) == (95, 8)
    known = Gpu("mine", 100, 10, source="measured")
    assert (known.memory_reached, known.link_reached) == (100, 10)
    assert knee(gpu, 4) == knee(known, 4) == pytest.approx(102.4)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Gpu("mine", 0, 16), "memory_gb_per_s must be above 0, got 0"),
        (lambda: Gpu("mine", 500, -1), "link_gb_per_s must be above 0, got -1"),
        (lambda: Gpu("mine", 500, float("nan")), "link_gb_per_s must be a finite number, got nan"),
        (lambda: Gpu("mine", 500, 16, 0), "link_latency_us must be above 0, got 0"),
        (lambda: Gpu("mine", 500, 16, source="guess"), "source must be one of measured, data sheet"),
        (lambda: Gpu("mine", 500, 16, multiprocessors=20), "multiprocessors and clock_ghz must be given"),
        (lambda: Gpu("mine", 500, 16, multiprocessors=0, clock_ghz=1), r"multiprocessors must be 1\.\.4096"),
        (lambda: Gpu("mine", 500, 16, blocks_each=0), r"blocks_each must be 1\.\.32, got 0"),
        (lambda: gpu_of("rtx-4091"), r"gpu must be one of .*'rtx-4091' \(did you mean 'rtx-4090'\?\)"),
    ],
)
def test_gpus_that_are_none_are_refused(make: Callable[[], Gpu], message: str) -> None:
    with pytest.raises(DecDECError, match=message):
        make()


# ---- times


def test_the_h200s_times_are_near_the_measured_ones(measured: list[dict[str, Any]]) -> None:
    sums = [
        sum(row["time_us"] for row in rows if (row["bits"], row["format"]) == (3, "uniform"))
        for rows in (
            [row for row in measured if row["k_chunk"] == 0],
            [row for row in measured if (row["n_tb"], row["k_chunk"]) == (16, 8)],
        )
    ]
    for (n_tb, k_chunk), wanted in zip(((0, 0), (16, 8)), sums, strict=True):
        rows = [row_of(shape, 3, "uniform", n_tb, k_chunk) for shape in LLAMA.values()]
        # errors of the four matrices add up here and there: 4 % of the sum
        assert FITTED.times_us(GPUS["h200"], rows).sum() == pytest.approx(wanted, rel=0.04)


def test_the_product_takes_the_kernels_bytes() -> None:
    # 576 inputs are padded to 640, tiles of 32 by 128: 30 slabs, 5 deep, of 3 bits and 32 scales
    gpu = Gpu("mine", 1, 1, source="measured")
    time = FITTED.times_us(gpu, [row_of((576, 960), 3, "uniform", 0, 0)])[0]
    assert time == pytest.approx(FITTED.launch_us + 30 * 5 * (32 * 128 * 3 / 8 + 128) / 1e3)


def test_a_k_chunk_without_channels_is_the_product_alone() -> None:
    rows = [row_of((576, 960), 3, "uniform", n_tb, k) for n_tb, k in ((0, 0), (8, 1), (8, 2))]
    alone, none, one = FITTED.times_us(GPUS["rtx-4090"], rows)
    assert total_channels(576, 1) == 0
    assert none == alone < one


def test_times_rise_with_k_chunk_and_with_fewer_gigabytes() -> None:
    rows = [row_of((4096, 6144), 3, "codebook", 8, k) for k in range(1, 1025, 31)]
    fast, slow = (FITTED.times_us(GPUS[key], rows) for key in ("rtx-4090", "rtx-4050-mobile"))
    for times in (fast, slow):
        assert (times[1:] >= times[:-1]).all()
    assert (slow > fast).all()


def test_blocks_share_a_compensation_as_the_kernel_divides_it() -> None:
    # chunks of down: 14, of which 16 blocks take one each; gate_up's 896 slabs are four turns of a block
    assert divided(14336, 4096, 16) == (14, 1)
    assert divided(14336, 4096, 8) == (8, 1)
    assert divided(4096, 28672, 8) == (2, 4)
    assert divided(4096, 4096, 16) == (4, 4)
    assert divided(576, 576, 24) == (1, 18)
    for n_tb in range(1, 40):
        pieces, columns = divided(4096, 28672, n_tb)
        assert 1 <= pieces * columns <= n_tb


def test_predicted_rows_are_a_tuners() -> None:
    rows = predicted_rows(GPUS["rtx-4050-mobile"], LLAMA, 3, "codebook", (4, 8, 16))
    assert all(row["predicted"] is True for row in rows)
    # of 20 blocks 16 would leave the product four
    assert {row["n_tb"] for row in rows} == {0, 4, 8}
    table = TimingTable.from_rows(rows, LLAMA)
    wanted = [row_of(LLAMA["down"], 3, "codebook", 8, k) for k in range(1, 1025)]
    # between its corners time runs straight: off by no more than their rounding
    assert table.curves[8][3][1:] == pytest.approx(FITTED.times_us(GPUS["rtx-4050-mobile"], wanted), abs=2e-3)
    assert search(table, 5).n_tb == 8


def test_without_multiprocessors_memory_alone_binds_the_product() -> None:
    known, unknown = GPUS["h200"], replace(GPUS["h200"], multiprocessors=None, clock_ghz=None)
    rows = [row_of(LLAMA["gate_up"], 4, "codebook", 0, 0)]
    assert FITTED.times_us(unknown, rows)[0] < 0.6 * FITTED.times_us(known, rows)[0]
    assert {row["n_tb"] for row in predicted_rows(unknown, LLAMA, 3, "uniform", (512,))} == {0, 512}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 5}, "a prediction must be of 3 bits codebook, .*, got 5 bits uniform"),
        ({"format": "unifrom"}, r"format must be one of uniform, codebook, got 'unifrom' \(did you mean"),
        ({"shapes": {"o": (1, 1)}}, "shapes must be of qkv, o, gate_up, down, got o"),
        ({"n_tb": (16,)}, r"n_tb must be at most half of the 20 blocks, got \[16\]"),
        ({"most_k_chunk": 0}, r"most_k_chunk must be 1\.\.1024, got 0"),
    ],
)
def test_predictions_that_cannot_be_made_are_refused(change: dict[str, Any], message: str) -> None:
    asked = {"gpu": GPUS["rtx-4050-mobile"], "shapes": LLAMA, "bits": 3, "format": "uniform", "n_tb": (8,)}
    with pytest.raises(DecDECError, match=message):
        predicted_rows(**{**asked, **change})


# ---- measuring (timing.py)


def test_the_grid_gives_a_channel_more_at_each_step() -> None:
    assert timing.grid_of(4096)[:13] == [1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20]
    assert timing.grid_of(4096)[-2:] == [896, 1024]
    # 576 * 2 // 1024 is the first channel
    assert timing.grid_of(576)[:5] == [2, 4, 6, 8, 10]
    assert timing.grid_of(1) == [1024]


@dataclass
class FakeCase:
    name: str
    in_features: int
    out_features: int


@pytest.fixture
def fake_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU on which each product takes 10 us, and each channel of 1024 one more, for gate_up four."""

    def fused_row(case: FakeCase, n_tb: int, k_chunk: int, selection: str) -> dict[str, Any]:
        assert selection == "dynamic"
        extra = k_chunk * (4 if case.name == "gate_up" else 1)
        return {"matrix": case.name, "time_us": 10.0004 + extra, "host_bytes": 1}

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(kernel_bench, "make_case", lambda name, shape, bits, format: FakeCase(name, *shape))
    monkeypatch.setattr(kernel_bench, "base_row", lambda case: {"matrix": case.name, "time_us": 10.0})
    monkeypatch.setattr(kernel_bench, "fused_row", fused_row)


def test_measured_rows_go_along_the_grid_up_to_the_limit(fake_gpu: None) -> None:
    rows = timing.measure(SMOL, 3, "uniform", n_tb=(4, 8), most_percent=50)
    assert rows[:4] == [{"kind": k, "n_tb": 0, "k_chunk": 0, "time_us": 10.0} for k in PROJECTION_KINDS]
    seen = {
        (kind, n_tb): [row["k_chunk"] for row in rows if (row["kind"], row["n_tb"]) == (kind, n_tb)]
        for kind in PROJECTION_KINDS
        for n_tb in (4, 8)
    }
    # half of 40 us is 20: the first row beyond it is the last
    assert seen["gate_up", 8] == [2, 4, 6]
    assert seen["down", 4] == [1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20]
    assert rows[-1] == {"kind": "down", "n_tb": 8, "k_chunk": 20, "time_us": 30.0}
    assert search(TimingTable.from_rows(rows, SMOL), 20).predicted_percent <= 20


def test_measuring_refuses_what_it_cannot_do(fake_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    for change, message in (
        ({"shapes": {"matrix": (1, 1)}}, "shapes must be of qkv, o, gate_up, down, got matrix"),
        ({"bits": 5}, "bits must be one of 2, 3, 4, got 5"),
        ({"format": "fp16"}, "format must be one of uniform, codebook, got 'fp16'"),
        ({"n_tb": (0,)}, r"n_tb must be 1\.\.1024, got 0"),
        ({"most_percent": "50"}, "most_percent must be a finite number, got '50'"),
    ):
        asked: dict[str, Any] = {"shapes": LLAMA, "bits": 3, "format": "uniform", **change}
        with pytest.raises(DecDECError, match=message):
            timing.measure(**asked)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(DecDECError, match="tune must have a CUDA device to measure, got none"):
        timing.measure(LLAMA, 3, "uniform")


def test_shapes_that_are_no_multiple_of_32_are_refused_with_the_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(DecDECError, match="out must be a positive multiple of 32, got 100"):
        timing.measure({**LLAMA, "qkv": (4096, 100)}, 3, "uniform")
