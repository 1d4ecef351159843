from __future__ import annotations

import json
from pathlib import Path

import pytest

from decdec_core.config import DecDECError
from decdec_eval import compare, compare_report
from decdec_eval.presentation import with_error


@pytest.fixture
def arguments(tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setenv("DECDEC_CACHE_DIR", str(tmp_path / "cache"))
    # small windows and calibration: the tiny model's text has one token per byte
    monkeypatch.setattr(compare, "windows", lambda ids: [ids[i : i + 128] for i in range(0, 1280, 128)])
    return [
        *("--model", str(tiny_model_dir), "--method", "rtn", "--calibration", "pydoc", "--text", "pydoc"),
        *("--windows", "3", "--k-chunk", "16", "64", "--out", str(tmp_path / "out")),
    ]


def test_every_cell_is_run_once_and_kept(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert compare.main(arguments) == 0
    files = sorted((tmp_path / "out" / "runs").iterdir())
    assert len(files) == 10  # full, none, and four selections at two k_chunk
    run = json.loads(next(f for f in files if f.name.startswith("dynamic-k16-")).read_text())
    assert run["measured"] is True
    assert run["ledger"]["channels_per_token"] > 0
    assert run["configuration"]["task"]["windows"] == len(run["metrics"]["window_nll"]) == 3
    assert run["configuration"]["artifact_hash"] == run["ledger"]["artifact_hash"]
    assert {"torch", "transformers", "decdec_eval"} <= run["environment"]["versions"].keys()
    printed = capsys.readouterr().out
    assert "dynamic (DecDEC)" in printed
    assert "pydoc" in printed
    first = {name: (tmp_path / "out" / name).read_bytes() for name in ("table.md", "table.csv", "figure.png")}

    (tmp_path / "out" / "runs" / "half.json.123.tmp").write_text("{")
    (tmp_path / "out" / "figure.png").unlink()
    monkeypatch.setattr(compare, "window_nll", lambda *a: pytest.fail("a kept cell was run again"))
    assert compare.main(arguments) == 0
    assert (tmp_path / "out" / "table.md").read_bytes() == first["table.md"]
    assert compare_report.main([str(tmp_path / "out")]) == 0
    assert {name: (tmp_path / "out" / name).read_bytes() for name in first} == first


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--k-chunk", "2000"], "k_chunk must be 0..1024, got 2000"),
        (["--selections", "dynamic", "dinamic"], "did you mean 'dynamic'?"),
        (["--windows", "0"], "windows must be 1..1048576, got 0"),
        (["--text", "absent.txt"], "absent.txt"),
    ],
)
def test_bad_arguments_cost_one_line(
    change: list[str], message: str, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert compare.main([*arguments, *change]) == 2
    line = capsys.readouterr().err.strip()
    assert message in line
    assert "\n" not in line


def test_an_artifact_is_no_full_precision_model(
    tiny_artifact_dir: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert compare.main([*arguments, "--model", str(tiny_artifact_dir)]) == 2
    assert "must be a full-precision model, got the artifact" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("value", "error", "wanted"),
    [
        (38.1234, 0.0123, "38.123 ± 0.012"),
        (38.1234, 1.7, "38.1 ± 1.7"),
        (38.1234, 25.0, "38 ± 25"),
        (1234.5, 123.0, "1234 ± 123"),
        (3.14159, None, "3.142"),
        (3.14159, float("nan"), "3.142"),
        (None, None, ""),
        (0.5, 0.0, "0.5"),
    ],
)
def test_no_more_digits_than_the_error_allows(value: float | None, error: float | None, wanted: str) -> None:
    assert with_error(value, error) == wanted


def test_runs_of_different_artifacts_do_not_share_a_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "runs").mkdir()
    for number in range(2):
        configuration = {"model": "m", "artifact_hash": str(number), "task": {}, "compensation": None}
        run = {"configuration": configuration, "metrics": {}, "environment": {}}
        (tmp_path / "runs" / f"{number}.json").write_text(json.dumps(run))
    with pytest.raises(DecDECError, match="must share artifact_hash"):
        compare_report.write_report(tmp_path, sorted((tmp_path / "runs").glob("*.json")))
    assert compare_report.main([str(tmp_path / "absent")]) == 2
    assert f"got {tmp_path / 'absent'} without any" in capsys.readouterr().err
