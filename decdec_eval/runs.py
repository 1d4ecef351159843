"""The files of runs: each is named by everything that determines its result."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FORMAT_VERSION = 1


def key_of(configuration: Mapping[str, Any]) -> str:
    """Return the first 16 hexadecimal digits of the configuration's SHA-256."""
    return hashlib.sha256(json.dumps(configuration, sort_keys=True).encode()).hexdigest()[:16]


def path_of(out: Path, configuration: Mapping[str, Any]) -> Path:
    """Return where the run of a configuration is written."""
    return out / "runs" / f"{key_of(configuration)}.json"
