"""How long a forward pass takes with and without compensation; ratios hold where they were measured."""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from decdec_core import hf as _registers_the_quantizer  # noqa: F401
from decdec_core.artifact import require_artifact
from decdec_core.config import Compensation, DecDECError, require_int
from decdec_core.model import set_compensation
from decdec_core.sources import load_model
from decdec_core.texts import load_text


@torch.inference_mode()
def forward_times(
    directory: Path, compensations: list[Compensation], tokens: int, repeats: int, full: str | None = None
) -> list[dict[str, Any]]:
    """Return one row per configuration: the time of a forward pass over `tokens` tokens, float32, on the CPU.

    full: the full-precision source to time beside the artifact, or None. The configurations take turns, so
    that whatever else the machine does falls on all of them alike; the first turn is not counted.
    Rows: {"selection", "k_chunk", "tokens", "median_s", "min_s", "to_none": ratio of medians to `none`'s}.
    """
    require_int("tokens", tokens, 1, 1 << 20)
    require_int("repeats", repeats, 1, 1000)
    require_artifact(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    full_model = load_model(full) if full is not None else None
    ids = _token_ids(directory, tokens)
    grid: list[Compensation | None] = [Compensation("none", 0), *compensations]
    if full_model is not None:
        grid.insert(0, None)
    times: list[list[float]] = [[] for _ in grid]
    for turn in tqdm(range(repeats + 1), desc="turns", unit="turn"):
        for compensation, measured in zip(grid, times, strict=True):
            elapsed = _forward_s(full_model if compensation is None else model, compensation, ids)
            if turn > 0:
                measured.append(elapsed)
    medians = [statistics.median(measured) for measured in times]
    none = medians[1 if full_model is not None else 0]
    return [
        {
            "selection": "full" if compensation is None else compensation.selection,
            "k_chunk": "" if compensation is None else compensation.k_chunk_text(),
            "tokens": tokens,
            "median_s": median,
            "min_s": min(measured),
            "to_none": median / none,
        }
        for compensation, median, measured in zip(grid, medians, times, strict=True)
    ]


def _token_ids(directory: Path, tokens: int) -> torch.Tensor:
    token_ids = AutoTokenizer.from_pretrained(directory)(
        load_text("pydoc", "test").text, verbose=False
    ).input_ids
    if len(token_ids) < tokens:
        raise DecDECError(f"tokens must be at most the text's {len(token_ids)}, got {tokens}")
    return torch.tensor([token_ids[:tokens]])


def _forward_s(model: Any, compensation: Compensation | None, ids: torch.Tensor) -> float:
    if compensation is not None:
        set_compensation(model, compensation)
    start = time.perf_counter()
    model(ids, use_cache=False)
    return time.perf_counter() - start
