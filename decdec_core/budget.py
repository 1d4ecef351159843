"""A stated slowdown and a GPU's name -> the budget of a profile for an artifact."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from decdec_core.config import DEFAULT_N_TB, Compensation, DecDECError, WeightQuant
from decdec_core.profiles import (
    Budget,
    Profile,
    choice_for,
    fitting,
    key_of,
    read_bundled,
    read_profiles,
    shapes_of_model,
)
from decdec_core.tuner import Choice


@dataclass(frozen=True)
class Found:
    """A budget and the profile that it is of."""

    budget: Budget
    profile: Profile

    def ledger(self) -> dict[str, Any]:
        """Return what a result must say of it, as JSON types. slowdown_percent is what was asked for;
        measured_percent, of a whole decoding step, None where that was not measured."""
        profile, budget = self.profile, self.budget
        return {
            "slowdown_percent": budget.target_percent,
            "profile_gpu": profile.gpu,
            "profile_model": profile.model,
            "profile_bits": profile.bits,
            "profile": "predicted" if profile.predicted else "measured",
            "predicted_percent": budget.predicted_percent,
            "measured_percent": budget.measured_percent,
            "objective": budget.objective,
        }


def compensation_of(budget: Budget | Choice, **others: Any) -> Compensation:
    """Return what a budget compensates; `others`: of Compensation, except for k_chunk and n_tb."""
    return Compensation(**{**others, "k_chunk": budget.k_chunk, "n_tb": budget.n_tb or DEFAULT_N_TB})


def profiles_of(gpu: str | None) -> list[Profile]:
    """Return the profiles of a GPU: of a profile's file, of a bundled one by its key or the device's name, or
    where `gpu` is None of the GPU at hand. Raises DecDECError where there are none."""
    if gpu is None:
        if not torch.cuda.is_available():
            raise DecDECError(
                "slowdown must be with gpu=NAME, or gpu=FILE of `decdec tune`, on a machine without a GPU, "
                "got neither"
            )
        gpu = torch.cuda.get_device_name()
    if gpu.endswith(".json"):
        return read_profiles(Path(gpu))
    return read_bundled(key_of(gpu))


def find_budget(slowdown_percent: float, profiles: list[Profile], config: Any, weight: WeightQuant) -> Found:
    """Return the budget for a model of a transformers `config` with this `weight`.

    Blocks of two widths take the profile of the smaller: its product takes less time, so that compensation
    slows it down more. Raises DecDECError where no profile is of these shapes, bits and format.
    """
    profile = fitting(profiles, shapes_of_model(config), weight.widths[0], weight.format)
    return Found(choice_for(profile, slowdown_percent), profile)
