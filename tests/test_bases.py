from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest

from decdec_core.config import DecDECError
from decdec_eval import bases, bases_report, compare


@pytest.fixture
def arguments(tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setenv("DECDEC_CACHE_DIR", str(tmp_path / "cache"))
    # small windows: the tiny model's text has one token per byte
    monkeypatch.setattr(compare, "windows", lambda ids: [ids[i : i + 128] for i in range(0, 1280, 128)])
    return [
        *("--model", str(tiny_model_dir), "--calibration", "pydoc", "--text", "pydoc", "--methods", "rtn"),
        *("--windows", "3", "--k-chunk", "64", "256", "--out", str(tmp_path / "out")),
    ]


def test_every_base_is_built_measured_and_kept(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert bases.main([*arguments, "--bits", "3", "3.5"]) == 0
    files = sorted((tmp_path / "out" / "runs").iterdir())
    assert len(files) == 1 + 2 * (1 + 2 * 2)  # full; none, and static and dynamic at two k_chunk
    rows = pd.read_csv(tmp_path / "out" / "table.csv")
    half = rows[(rows.bits == 3.5) & (rows.selection == "none")].iloc[0]
    # a block has 640000 weights: 2880 rows of 160 with 2 groups, 160 of 1120 with 9, of three bytes each
    assert half.bits_per_weight == 3.5 + 8 * 3 * (2880 * 2 + 160 * 9) / 640000
    # the kernels' order has inputs in multiples of 128
    assert half.kernel_bits_per_weight > 3.5 * (2880 * 256 + 160 * 1152) / 640000
    assert half.nll_change == 0
    dynamic = rows[(rows.bits == 3) & (rows.selection == "dynamic")].set_index("k_chunk")
    none = rows[(rows.bits == 3) & (rows.selection == "none")].iloc[0]
    assert dynamic.nll_change[256] == pytest.approx(dynamic.nll[256] - none.nll, abs=1e-9) != 0
    assert dynamic.nll_change_stderr[256] > 0
    assert dynamic.bytes_per_token[256] > 3.5 * dynamic.bytes_per_token[64]
    run = json.loads(files[0].read_text())
    assert run["disk_bytes"] > run["ledger"]["host_bytes"] if run["ledger"] else True
    text = (tmp_path / "out" / "table.md").read_text()
    assert "| RTN | 3.5 |" in text
    assert "RTN 3 bits with dynamic compensation against 3.5 without, nats: k_chunk 64:" in text
    before = {
        name: (tmp_path / "out" / name).read_bytes() for name in ("table.md", "table.csv", "figure.png")
    }
    monkeypatch.setattr(compare, "window_nll", lambda *a: pytest.fail("a kept run was run again"))
    assert bases.main([*arguments, "--bits", "3", "3.5"]) == 0
    assert bases.main([*arguments, "--only-report"]) == 0
    assert {name: (tmp_path / "out" / name).read_bytes() for name in before} == before
    assert "written: " in capsys.readouterr().out


def test_equal_bytes_are_equal(arguments: list[str], tmp_path: Path) -> None:
    options = ["--bits", "3", "--residual-bits", "2", "4", "16", "--equal-bytes", "--selections", "dynamic"]
    assert bases.main([*arguments, *options]) == 0
    rows = pd.read_csv(tmp_path / "out" / "table.csv")
    found = rows[rows.method == "rtn"].pivot_table(
        index="residual_bits", columns="k_chunk", values="bytes_per_token"
    )
    # 64 at 4 bits is 128 at 2 and 16 at 16; where a chunk is ragged, channels round down
    assert found[64][4] == pytest.approx(found[128][2], rel=0.05)
    assert found[64][4] == pytest.approx(found[16][16], rel=0.3)
    assert (tmp_path / "out" / "figure.png").is_file()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--k-chunk", "2000"], "k_chunk must be 1..1024, got 2000"),
        (["--k-chunk", "2", "--residual-bits", "16", "--equal-bytes"], "got 0.5 for 2"),
        (["--selections", "dinamic"], "did you mean 'dynamic'?"),
        (["--windows", "0"], "windows must be 1..1048576, got 0"),
        (["--only-report"], "out must be a folder with runs/*.json, got"),
    ],
)
def test_bad_arguments_cost_one_line(
    change: list[str], message: str, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert bases.main([*arguments, *change]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert len(error.splitlines()) == 1


def test_only_codebooks_have_clusterings() -> None:
    found = bases.bases(["rtn", "squeezellm"], [3], [4], ["exact", "flash1d"])
    assert [base.label() for base in found] == [
        "rtn, 3 bits, residual 4",
        "squeezellm, 3 bits, residual 4",
        "squeezellm, flash1d, 3 bits, residual 4",
    ]


def test_runs_of_different_models_make_no_table(tmp_path: Path) -> None:
    for name in ("a", "b"):
        run = {"configuration": {"model": name, "task": {}}, "metrics": {}, "environment": {}}
        (tmp_path / f"{name}.json").write_text(json.dumps(run))
    with pytest.raises(DecDECError, match="runs of one table must share model, got a and b"):
        bases_report.write_bases(tmp_path, sorted(tmp_path.glob("*.json")))
