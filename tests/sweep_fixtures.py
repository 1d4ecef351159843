"""A tiny chat model, MT-Bench of four questions, and sweeps over them: what the tests of the sweep share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from mtbench_models import save_chat, write_questions

from decdec_eval.sweep import __main__ as command

PERPLEXITY = {"kind": "perplexity", "text": "pydoc", "windows": 3, "window_length": 64}
FIDELITY = {"kind": "fidelity", "limit": 2, "max_new_tokens": 6}


@pytest.fixture(scope="session")
def tiny_chat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `model`, `data/mt_bench`, a calibration text and the `cache` of all sweeps."""
    root = tmp_path_factory.mktemp("sweep")
    save_chat(root / "model")
    write_questions(root / "data" / "mt_bench")
    (root / "calibration.txt").write_text("The quick brown fox jumps over the lazy dog. " * 900)
    return root


class Place:
    """Where a test's sweeps are written, and how they are run."""

    def __init__(self, root: Path, tmp_path: Path) -> None:
        self.root, self.folder, self.out = root, tmp_path, tmp_path / "out"

    def write(self, name: str = "sweep.yaml", **changes: Any) -> Path:
        values = {
            "models": [{"source": str(self.root / "model"), "name": "tiny"}],
            "methods": ["rtn"],
            "calibration": str(self.root / "calibration.txt"),
            "selections": ["none", "dynamic"],
            "k_chunk": [64],
            "device": "cpu",
            "tasks": [PERPLEXITY],
            **changes,
        }
        path = self.folder / name
        path.write_text(yaml.safe_dump(values))
        return path

    def sweep(self, *options: str, **changes: Any) -> int:
        return command.main([str(self.write(**changes)), "--out", str(self.out), *options])

    def runs(self) -> list[dict[str, Any]]:
        return [json.loads(path.read_text()) for path in sorted((self.out / "runs").glob("*.json"))]

    def run_of(self, selection: str | None, **wanted: Any) -> dict[str, Any]:
        """Return the one run of a selection, None for full precision, with such a compensation."""
        found = []
        for run in self.runs():
            compensation = run["configuration"]["compensation"]
            own = None if compensation is None else compensation["selection"]
            if own == selection and (compensation is None or wanted.items() <= compensation.items()):
                found.append(run)
        assert len(found) == 1
        return found[0]


@pytest.fixture
def place(tiny_chat: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.setenv("DECDEC_CACHE_DIR", str(tiny_chat / "cache"))
    monkeypatch.setenv("DECDEC_DATA_DIR", str(tiny_chat / "data"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return Place(tiny_chat, tmp_path)
