"""What a result says about where it came from: versions, hardware, commit."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import decdec_core


def versions(*packages: str) -> dict[str, str]:
    """Return the versions of this package, Python, torch, transformers and `packages`."""
    others = {name: version(name) for name in ("transformers", *packages)}
    # torch's own word: the package's leaves out whether it was built for CUDA, and for which
    own = {"decdec_eval": decdec_core.__version__, "python": platform.python_version()}
    return {**own, "torch": torch.__version__, **others}


def hardware(device: torch.device) -> str:
    """Return the GPU's name, or the CPU's kind and the number of threads used."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.system()} {platform.machine()} CPU, {torch.get_num_threads()} threads"


def commit() -> str | None:
    """Return the commit of this checkout, with "+" where files differ from it. Outside of a checkout (a
    copy of the tree sent to another machine) the variable DECDEC_COMMIT says it; None where that is unset."""
    if os.environ.get("DECDEC_COMMIT"):
        return os.environ["DECDEC_COMMIT"]
    here = Path(__file__).resolve().parent.parent
    if not (here / ".git").exists():
        return None
    try:
        revision = _git(here, "rev-parse", "--short=12", "HEAD")
        changed = _git(here, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.CalledProcessError):
        return None
    return revision + ("+" if changed else "")


def _git(folder: Path, *words: str) -> str:
    done = subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def environment(device: torch.device, *packages: str) -> dict[str, Any]:
    """Return versions, of `packages` too, hardware and commit together, as every run saves them."""
    return {"versions": versions(*packages), "hardware": hardware(device), "commit": commit()}


def result_of(rows: Sequence[dict[str, Any]], device: torch.device) -> dict[str, Any]:
    """Return what a benchmark saves: {"versions", "hardware", "commit", "measured": True, "rows"}."""
    return {**environment(device), "measured": True, "rows": list(rows)}
