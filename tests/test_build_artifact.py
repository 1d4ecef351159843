"""The cache of artifacts, and what building leaves behind."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import CALIBRATION

from decdec_core import build, hf
from decdec_core.verify import verify
from decdec_core.config import ResidualQuant, WeightQuant


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


def test_a_failed_build_leaves_nothing(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(build.artifact, "save", fail)
    with pytest.raises(KeyboardInterrupt):
        build.cached_artifact(str(source), WeightQuant("rtn", 3), ResidualQuant(4), "pydoc")
    assert list((tmp_path / "cache" / "artifacts").iterdir()) == []


def test_from_a_hub_every_file_of_the_manifest_is_fetched(
    tiny_artifact_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "models--org--name" / "snapshots" / "abc"
    folder.mkdir(parents=True)
    shutil.copy(tiny_artifact_dir / "manifest.json", folder)
    fetched: set[tuple[object, ...]] = set()
    monkeypatch.setattr(
        hf, "cached_file", lambda name, file, **where: fetched.add((name, file, *where.values()))
    )
    model = SimpleNamespace(config=SimpleNamespace(name_or_path="org/name", _commit_hash="abc"))
    assert hf._artifact_folder(model, [str(folder / "model.safetensors")]) == folder  # type: ignore[arg-type]
    wanted = {p.name for p in tiny_artifact_dir.iterdir()} - {"model.safetensors"}
    assert fetched == {("org/name", file, "abc", tmp_path) for file in wanted}
