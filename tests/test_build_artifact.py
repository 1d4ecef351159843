"""The cache of artifacts, and what building leaves behind."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import CALIBRATION
from safetensors.torch import load_file, save_file

from decdec_core import build, sweeps
from decdec_core.config import DecDECError, ResidualQuant, WeightQuant
from decdec_core.verify import verify

LAYER = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def source(tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DECDEC_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(build, "CalibrationSetup", lambda text: CALIBRATION)
    return Path(shutil.copytree(tiny_model_dir, tmp_path / "model"))


def test_an_artifact_is_built_once_and_again_for_a_changed_model(source: Path, tmp_path: Path) -> None:
    recipe = WeightQuant("rtn", 3), ResidualQuant(4), "pydoc"
    first = build.cached_artifact(str(source), *recipe)
    before = (first / "manifest.json").stat().st_mtime_ns
    assert build.cached_artifact(str(source), *recipe) == first
    assert (first / "manifest.json").stat().st_mtime_ns == before
    assert build.cached_artifact(str(source), WeightQuant("rtn", 4), ResidualQuant(4), "pydoc") != first
    (source / "model.safetensors").touch()
    again = build.cached_artifact(str(source), *recipe)
    assert again != first
    assert verify(again).tensors == verify(first).tensors
    assert not list((tmp_path / "cache").rglob("*.tmp"))


def test_a_refusal_leaves_nothing_and_what_was_done_is_kept(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = WeightQuant("rtn", 3), ResidualQuant(4), "pydoc"

    def left_by(error: BaseException, module: object, name: str) -> list[str]:
        def fail(*_arguments: object) -> None:
            raise error

        with monkeypatch.context() as patch:
            patch.setattr(module, name, fail)
            with pytest.raises(type(error)):
                build.cached_artifact(str(source), *recipe)
        found = (tmp_path / "cache" / "artifacts").iterdir()
        return sorted(path.suffix for path in found)

    kept = [".building", ".lock"]
    assert left_by(DecDECError("refused"), build, "_require_buildable") == []
    assert left_by(KeyboardInterrupt(), build.artifact, "write") == kept
    assert left_by(DecDECError("refused"), build.artifact, "write") == kept
    monkeypatch.setattr(sweeps, "quantize", lambda *_: pytest.fail("what was done is done again"))
    done = build.cached_artifact(str(source), *recipe)
    assert list((tmp_path / "cache" / "artifacts").iterdir()) == [done]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t["model.norm.weight"].fill_(torch.inf), "tensor model.norm.weight of the model must be"),
        (lambda t: t[f"{LAYER}.weight"].fill_(torch.nan), f"layer {LAYER}: weight must be finite"),
        (lambda t: t.pop("model.norm.weight"), "tensor model.norm.weight must be in the model's files"),
    ],
)
def test_what_cannot_be_quantized_is_named(
    change: Callable[[dict[str, torch.Tensor]], object], message: str, source: Path, tmp_path: Path
) -> None:
    tensors = load_file(source / "model.safetensors")
    change(tensors)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DecDECError, match=message):
        build.build_artifact(str(source), tmp_path / "x", WeightQuant("rtn", 3), None, CALIBRATION)
    assert not (tmp_path / "x").exists()


def test_half_bits_need_two_blocks(tmp_path: Path, source: Path) -> None:
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    with pytest.raises(DecDECError, match=r"bits must be whole for a model of 1 decoder block, got 3\.5"):
        build.build_artifact(str(source), tmp_path / "x", WeightQuant("rtn", 3.5), None, CALIBRATION)


def test_a_device_that_is_none_is_refused(source: Path, tmp_path: Path) -> None:
    with pytest.raises(DecDECError, match="device must be one that this torch can use, got 'tpu'"):
        build.build_artifact(str(source), tmp_path / "b", WeightQuant(), None, CALIBRATION, device="tpu")
    assert not (tmp_path / "b").exists()
