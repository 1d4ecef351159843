"""What the wheels carry: without csrc there are no kernels, without the .pth no `--model decdec`."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
INPUTS = ("csrc", "decdec_core", "decdec_eval", "tasks")
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("hatchling") is None, reason="needs hatchling: pip install 'decdec-eval[test]'"
)


def contents(tmp_path: Path, target: str) -> set[str]:
    """Return the names in the wheel that hatchling builds for `target` from a copy of the checkout."""
    copy = tmp_path / "copy"
    for folder in INPUTS:
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ROOT.iterdir():
        if file.is_file():
            shutil.copy(file, copy)
    command = [sys.executable, "-m", "hatchling", "build", "-t", target, "-d", str(tmp_path / "dist")]
    done = subprocess.run(command, cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def carried(folder: str, inside: str) -> set[str]:
    """Return the names in the wheel that the files under `folder` must have."""
    files = [path.relative_to(ROOT / folder) for path in (ROOT / folder).rglob("*.*")]
    return {f"{inside}/{path.as_posix()}" for path in files if "__pycache__" not in path.parts}


def test_wheel(tmp_path: Path) -> None:
    names = contents(tmp_path, "wheel")
    wanted = carried("csrc", "decdec_core/csrc") | carried("tasks", "decdec_eval/tasks")
    assert {"decdec_core/csrc/ops.cpp", "decdec_core/csrc/cpu/select.cpp"} <= wanted
    assert "decdec_eval/tasks/decdec_wikitext2.yaml" in wanted
    assert wanted | {"decdec_eval_hook.pth", "decdec_eval/lm_model.py"} <= names


@pytest.mark.skipif(
    importlib.util.find_spec("editables") is None, reason="needs editables, as pip would fetch"
)
def test_editable_wheel(tmp_path: Path) -> None:
    names = contents(tmp_path, "wheel:editable")
    assert "decdec_eval_hook.pth" in names
    assert not [name for name in names if "csrc" in name or name.endswith(".py")]
