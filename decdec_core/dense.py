"""Artifact -> the same low-bit weights as a plain Hugging Face model, for tools that know no decdec."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from decdec_core import hf as _registers_the_quantizer  # noqa: F401
from decdec_core.artifact import require_artifact
from decdec_core.model import dec_layers
from decdec_core.sources import require_absent, save_plain


@torch.no_grad()
def write_dense(directory: Path, out: Path) -> Path:
    """Write the model that `directory`'s artifact is without compensation to the folder `out`, in float32.

    Input scales are divided into the weights, and input orders undone. Raises DecDECError where `out` exists.
    """
    require_absent(out)
    require_artifact(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    for name, layer in dec_layers(model).items():
        linear = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        linear.weight = nn.Parameter(layer.dense_weight(), requires_grad=False)
        if layer.bias is not None:
            linear.bias = nn.Parameter(layer.bias.float(), requires_grad=False)
        model.set_submodule(name, linear)
    return save_plain(model, AutoTokenizer.from_pretrained(directory), out)
