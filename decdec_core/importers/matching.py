"""Whether a checkpoint is a quantization of the original: of its weights, and of no other model's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from decdec_core.architectures import InputGroup
from decdec_core.importers.checkpoint import QuantizedCheckpoint
from decdec_core.importers.layouts import CheckpointError
from decdec_core.shards import TensorFiles

_SETTINGS = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "rms_norm_eps",
    "rope_parameters",
)
_EMBEDDING, _NORM, _HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
_ROWS = 4096  # of a tensor, compared at once
# Bounds on the relative difference of a quantized weight, by bits: whole, and the part of it that scales
# channels. Measured on SmolLM2-135M, groups of 128 and whole rows, rounded to nearest and by GPTQ, which
# makes up to three times the error to lower that of the output: at most 1.48, 0.65, 0.31 whole at 2, 3, 4
# bits, and 0.37, 0.08, 0.02 of it scaling. Another model's weight has 1.4 whole and 1 of scaling; a scale
# off by two has 0.5 or 1 of scaling.
_MOST_DIFFERENCE = {2: 3.0, 3: 1.3, 4: 0.65, 5: 0.35}
_MOST_SCALING = {2: 0.45, 3: 0.15, 4: 0.05, 5: 0.03}


def require_same_model(config: Any, original: TensorFiles, checkpoint: QuantizedCheckpoint) -> None:
    """Raise CheckpointError, naming the setting or the tensor, unless the checkpoint is of the model that the
    `original` with that transformers `config` is, and its embeddings, final norm and head to rounding."""
    for setting in _SETTINGS:
        wanted, got = getattr(config, setting, None), getattr(checkpoint.config, setting, None)
        if got != wanted:
            raise CheckpointError(f"{setting} of the checkpoint must be the original's {wanted}, got {got}")
    for name in (_EMBEDDING, _NORM, _HEAD):
        # tied weights are stored once, and a quantizer may have untied them
        wanted_tensor = original.read(name if name in original or name != _HEAD else _EMBEDDING)
        got_tensor = checkpoint.plain(name)
        if got_tensor is None and name == _HEAD:
            got_tensor = checkpoint.plain(_EMBEDDING)
        if got_tensor is None:
            raise CheckpointError(f"tensor {name} must be in the checkpoint, got none")
        _require_equal(name, got_tensor, wanted_tensor)


def require_same_plain(
    block_name: str,
    block: nn.Module,
    groups: Sequence[InputGroup],
    scales: Mapping[str, Tensor | None],
    checkpoint: QuantizedCheckpoint,
) -> None:
    """Raise CheckpointError, naming the tensor, unless what is not quantized in a block is the checkpoint's
    to rounding: norms and biases.

    block: the original's, float32, with the recovered `scales` (by input group) folded in. The bias of a
    linear layer into which an estimated scale was folded is left out: it differs as the estimate does.
    """
    quantized = {f"{name}.weight" for group in groups for name in group.linears}
    estimated = {f"{g.producer}.bias" for g in groups if g.producer and scales.get(g.kind) is not None}
    for key, tensor in block.state_dict().items():
        if key in quantized or key in estimated:
            continue
        got = checkpoint.plain(f"{block_name}.{key}")
        if got is None:
            raise CheckpointError(f"tensor {block_name}.{key} must be in the checkpoint, got none")
        _require_equal(f"{block_name}.{key}", got, tensor.cpu())


def _require_equal(name: str, got: Tensor, wanted: Tensor) -> None:
    if got.shape != wanted.shape:
        raise CheckpointError(f"tensor {name} must be {tuple(wanted.shape)}, got {tuple(got.shape)}")
    pairs = zip(got.split(_ROWS), wanted.split(_ROWS), strict=True)
    different = sum(int((~equal_to_rounding(a, b)).sum()) for a, b in pairs)
    if different:
        raise CheckpointError(
            f"tensor {name} must be the original's to rounding, got {different} others of {got.numel()}"
        )


def require_near(name: str, weight: Tensor, dequantized: Tensor, bits: int) -> None:
    """Raise CheckpointError unless `dequantized` (out, in) can be `weight` rounded to so many bits.

    Both float32, in one order of inputs. Rounding is blind to the weight's own direction, so that what the
    difference has along it, input by input or output by output, tells a scale, or another model.
    """
    difference, power = dequantized - weight, weight.square().sum().clamp(min=torch.finfo(torch.float32).tiny)
    whole = (difference.square().sum() / power).sqrt().item()
    scaling = max(_along(difference, weight, dim) / power.item() for dim in (0, 1)) ** 0.5
    if not (whole <= _MOST_DIFFERENCE[bits] and scaling <= _MOST_SCALING[bits]):
        raise CheckpointError(
            f"layer {name} must be a quantization of the original's weight to {bits} bits, got a relative "
            f"difference of {whole:.2f}, {scaling:.2f} of it in the scale of channels"
        )


def _along(difference: Tensor, weight: Tensor, dim: int) -> float:
    """Return the energy of `difference` along `weight`'s vectors in `dim`, less what chance puts there."""
    power = weight.square().sum(dim)
    along = (difference * weight).sum(dim).square() / power.clamp(min=torch.finfo(torch.float32).tiny)
    across = difference.square().sum(dim) - along
    return max(0.0, (along - across / max(1, weight.shape[dim] - 1)).double().sum().item())


def equal_to_rounding(a: Tensor, b: Tensor) -> Tensor:
    """Return, per element, whether `a` and `b` are one number to a step of the coarser of their dtypes.
    NaN and infinity are no numbers."""
    if not (a.is_floating_point() and b.is_floating_point()):
        return a == b
    coarse = max((torch.finfo(a.dtype), torch.finfo(b.dtype)), key=lambda info: info.eps)
    # below the least normal number a step no longer shrinks; float16's is the largest such step
    least = max(torch.finfo(t.dtype).smallest_normal * torch.finfo(t.dtype).eps for t in (a, b))
    a, b = a.float(), b.float()
    near = (a - b).abs() <= torch.maximum(a.abs(), b.abs()) * coarse.eps + least
    return near & torch.isfinite(a) & torch.isfinite(b)
