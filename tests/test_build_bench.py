"""decdec bench build and clustering on models small enough for a test."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import CALIBRATION

from decdec_core import build_bench, cli
from decdec_core.build import CalibrationSetup
from decdec_core.config import WeightQuant
from decdec_core.shapes import MODELS

SHAPES = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 300,
}


@pytest.mark.parametrize("method", ["awq", "squeezellm"])
def test_what_a_build_takes(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MODELS, "tiny", SHAPES)
    cost = build_bench.build_cost("tiny", 3, WeightQuant(method, 3), CALIBRATION, "cpu", tmp_path)
    row = cost.to_dict()
    assert len(row["seconds"]) == 3
    assert 0 < sum(row["seconds"]) < row["total_seconds"]
    # a block: 256 x 256 twice, 256 x 128 twice, 256 x 512 three times, two norms; embeddings and head, a norm
    assert row["block_bytes"] == 4 * (2 * 256 * 256 + 2 * 256 * 128 + 3 * 256 * 512 + 2 * 256)
    assert row["embedding_bytes"] == 4 * (2 * 300 * 256 + 256)
    assert row["projected_seconds"] == row["total_seconds"] * 8 / 3
    assert row["host_bytes"] > row["start_bytes"] > 0
    assert list(tmp_path.iterdir()) == []


def test_hidden_states_are_not_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # 128 sequences of 512 tokens of 2048 channels are half a gigabyte, of which a batch is held
    shapes = {**SHAPES, "hidden_size": 2048, "num_attention_heads": 16, "num_key_value_heads": 4}
    monkeypatch.setitem(MODELS, "wide", shapes)
    setup = CalibrationSetup("pydoc", sequences=128, length=512)
    cost = build_bench.build_cost("wide", 1, WeightQuant("rtn", 3), setup, "cpu", tmp_path)
    states = 128 * 512 * 2048 * 4
    assert cost.host_bytes - cost.start_bytes < 2 * cost.block_bytes + cost.embedding_bytes + states


def test_the_gain_of_optimal_clustering(
    tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "gain.json"
    options = ["--calibration", "pydoc", "--calibration-sequences", "2", "--calibration-length", "32"]
    assert (
        cli.main(["bench", "clustering", "--model", str(tiny_model_dir), *options, "--json", str(out)]) == 0
    )
    rows = json.loads(out.read_text())["rows"]
    assert len(rows) == 14
    assert all(row["flash1d_to_exact"] >= 1 and row["exact_error"] > 0 for row in rows)
    assert "14 layers: weighted error of flash1d over exact" in capsys.readouterr().out
