"""A stated slowdown and a GPU's name -> the budget of a profile for an artifact."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from decdec_core.artifact import Quantization, require_artifact
from decdec_core.config import (
    DEFAULT_N_TB,
    GROUP_SIZE,
    KERNEL_BITS,
    Compensation,
    DecDECError,
    ResidualQuant,
    WeightQuant,
    require_one_of,
)
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
        """Return what a result must say of it, as JSON types.

        slowdown_percent: what was asked for. slowdown: whether it was measured, on a whole decoding step of
        such a model with such a selection (measured_percent), or is predicted, of the linear layers.
        """
        profile, budget = self.profile, self.budget
        return {
            "slowdown_percent": budget.target_percent,
            "profile_gpu": profile.gpu,
            "profile_model": profile.model,
            "profile_bits": profile.model_bits,
            "profile_format": profile.format,
            "profile_selection": profile.selection,
            "profile_times": "predicted" if profile.predicted else "measured",
            "slowdown": "predicted" if budget.measured_percent is None else "measured",
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


def described(folder: Path) -> tuple[Any, Quantization]:
    """Return the transformers config of an artifact and how it is quantized."""
    require_artifact(folder)
    config = AutoConfig.from_pretrained(folder)
    stored = config.quantization_config
    return config, Quantization.from_dict(stored if isinstance(stored, dict) else stored.to_dict())


def require_timed(weight: WeightQuant, residual: ResidualQuant) -> None:
    """Raise DecDECError unless all layers of such a model take the one-launch kernels, whose times profiles
    hold."""
    if residual.bits != 4:
        raise DecDECError(f"residual_bits must be 4 for a budget, got {residual.bits}")
    for bits in weight.widths:
        require_one_of("bits of a model with a budget", bits, KERNEL_BITS)
    if weight.format == "uniform" and weight.group_size != GROUP_SIZE:
        raise DecDECError(f"group_size must be {GROUP_SIZE} for a budget, got {weight.group_size}")


def find_budget(
    slowdown_percent: float, profiles: Sequence[Profile], config: Any, weight: WeightQuant, selection: str
) -> Found:
    """Return the budget for a model of a transformers `config` with this `weight`.

    Blocks of two widths take the profile of the smaller: its product takes less time, so that compensation
    slows it down more. What was measured with another selection or on another average of bits counts as
    predicted. Raises DecDECError where no profile is of these shapes, bits and format.
    """
    profile = fitting(profiles, shapes_of_model(config), weight.widths[0], weight.format)
    budget = choice_for(profile, slowdown_percent)
    if selection != profile.selection or weight.bits != profile.model_bits:
        budget = budget.unmeasured()
    return Found(budget, profile)
