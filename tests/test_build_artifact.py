"""The cache of artifacts, and what building leaves behind."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from conftest import CALIBRATION

from decdec_core import build, sweeps
from decdec_core.config import DecDECError, ResidualQuant, WeightQuant
from decdec_core.verify import verify


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


def test_an_interrupted_build_keeps_its_work_and_a_refused_one_nothing(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = WeightQuant("rtn", 3), ResidualQuant(4), "pydoc"

    def left_by(error: BaseException) -> list[str]:
        def fail(*_arguments: object) -> None:
            raise error

        with monkeypatch.context() as patch:
            patch.setattr(build.artifact, "write", fail)
            with pytest.raises(type(error)):
                build.cached_artifact(str(source), *recipe)
        return [path.name for path in (tmp_path / "cache" / "artifacts").iterdir()]

    assert left_by(DecDECError("refused")) == []
    left = left_by(KeyboardInterrupt())
    assert sorted(Path(name).suffix for name in left) == [".building", ".lock"]
    monkeypatch.setattr(sweeps, "quantize", lambda *_: pytest.fail("what was done is done again"))
    done = build.cached_artifact(str(source), *recipe)
    assert list((tmp_path / "cache" / "artifacts").iterdir()) == [done]


def test_a_device_that_is_none_is_refused(source: Path, tmp_path: Path) -> None:
    with pytest.raises(DecDECError, match="device must be one that this torch can use, got 'tpu'"):
        build.build_artifact(str(source), tmp_path / "b", WeightQuant(), None, CALIBRATION, device="tpu")
    assert not (tmp_path / "b").exists()
