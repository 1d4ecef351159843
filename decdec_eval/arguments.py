"""Arguments of `--model decdec` that exclude each other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from decdec_core.budget import profiles_of
from decdec_core.config import DecDECError
from decdec_core.profiles import Profile


def asked_profiles(budget: Mapping[str, Any], chosen: Mapping[str, Any]) -> list[Profile]:
    """Return the profiles that slowdown and gpu name; none where no slowdown is stated."""
    slowdown = budget.get("slowdown")
    if slowdown is None:
        if budget.get("gpu") is not None:
            raise DecDECError(f"gpu must be with slowdown, got gpu={budget['gpu']} alone")
        return []
    if not isinstance(slowdown, (int, float)) or isinstance(slowdown, bool) or not 0 <= slowdown <= 1000:
        raise DecDECError(f"slowdown must be 0 to 1000 percent, got {slowdown!r}")
    for name in ("k_chunk", "n_tb"):
        if name in chosen:
            raise DecDECError(f"{name} must be absent with slowdown, which sets it, got {chosen[name]!r}")
    if chosen.get("selection") == "none":
        raise DecDECError("selection must compensate something at a slowdown, got 'none'")
    gpu = budget.get("gpu")
    return profiles_of(None if gpu is None else str(gpu))


def refuse_with_full(arguments: Mapping[str, Any]) -> None:
    """Raise DecDECError for an argument that would be ignored by method=full."""
    for name, value in arguments.items():
        if name != "method" and (name, value) not in {("selection", "none"), ("k_chunk", 0)}:
            raise DecDECError(
                f"{name} must be absent with method=full, which compensates nothing, got {value!r}"
            )


def refuse_dtype(dtype: Any) -> None:
    """Raise DecDECError unless HFLM can make a torch dtype of it."""
    named = getattr(torch, str(dtype).removeprefix("torch."), None)
    if dtype != "auto" and not isinstance(named, torch.dtype):
        raise DecDECError(f"dtype must be auto, float32, bfloat16 or float16, got {str(dtype)!r}")
