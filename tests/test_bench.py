from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from decdec_core.cli import main


def test_every_configuration_is_timed_and_none_is_one(
    tiny_artifact_dir: Path, tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "times.json"
    options = ["--full", str(tiny_model_dir), "--tokens", "32", "--repeats", "2", "--json", str(target)]
    assert main(["bench", "forward", str(tiny_artifact_dir), *options]) == 0
    result = json.loads(target.read_text())
    assert result["measured"]
    assert result["versions"]["torch"] == torch.__version__
    assert result["hardware"].endswith("threads")
    rows = result["rows"]
    assert [row["selection"] for row in rows] == ["full", "none", "static", "dynamic"]
    assert rows[1]["to_none"] == 1
    assert all(0 < row["min_s"] <= row["median_s"] for row in rows)
    assert "of none" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--tokens", "999999"], "tokens must be at most the text's"),
        (["--repeats", "0"], "repeats must be 1..1000, got 0"),
        (["--selections", "best"], "selection must be one of"),
    ],
)
def test_refused(
    option: list[str], message: str, tiny_artifact_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "forward", str(tiny_artifact_dir), *option]) == 2
    assert message in capsys.readouterr().err
