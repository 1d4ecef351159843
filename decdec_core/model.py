"""A Hugging Face model -> the same model with DecLinear, and what it compensates."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from decdec_core import kernels
from decdec_core.architectures import block_number, kind_of
from decdec_core.channels import make_selection
from decdec_core.config import Compensation, DecDECError, WeightQuant, require_one_of, total_channels
from decdec_core.linear import DecLinear, Scope
from decdec_core.prefill import Stage


@dataclass
class ModelState:
    """What a model compensates, and whose artifact it is. Kept as `model.decdec`."""

    compensation: Compensation
    artifact_hash: str
    scope: Scope = field(default_factory=Scope)
    stage: Stage = field(default_factory=Stage)


def replace_linears(
    model: nn.Module,
    config: WeightQuant,
    layers: Mapping[str, tuple[str, ...]],
    block_bits: Sequence[int] | None = None,
) -> None:
    """Put an empty DecLinear in the place of each linear layer named in `layers` (full names).

    The value says which extras the layer has (config.EXTRAS). block_bits: the bits of each decoder block,
    where config.bits is their average. Raises DecDECError for a name that is none, and for bits that are
    missing or not of config.widths.
    """
    modules = dict(model.named_modules())
    for name, extras in layers.items():
        linear = modules.get(name)
        if not isinstance(linear, nn.Linear):
            got = type(linear).__name__ if linear is not None else "nothing"
            raise DecDECError(f"artifact layer {name} must be a linear layer of the model, got {got}")
        parent, _, leaf = name.rpartition(".")
        whole = config if block_bits is None else config.at(_bits_of(name, config, block_bits))
        layer = DecLinear(linear.in_features, linear.out_features, whole, linear.bias is not None, extras)
        # the dtype tells the layer what its activations will be
        setattr(modules[parent], leaf, layer.to(linear.weight.device, linear.weight.dtype))


def _bits_of(name: str, config: WeightQuant, block_bits: Sequence[int]) -> int:
    number = block_number(name)
    if number >= len(block_bits):
        raise DecDECError(f"artifact layer {name} must be in one of {len(block_bits)} blocks, got another")
    require_one_of(f"bits of block {number}", block_bits[number], config.widths)
    return block_bits[number]


def attach(model: nn.Module, compensation: Compensation, artifact_hash: str) -> None:
    """Make `model`, whose DecLinear layers hold their residuals, compensate; inference only."""
    model.requires_grad_(False)
    state = ModelState(compensation, artifact_hash)
    model.decdec = state  # type: ignore[assignment]
    for layer in dec_layers(model).values():
        layer.scope, layer.stage = state.scope, state.stage
    # on the inner model, which every way into the outer one passes, and some callers use by itself
    model.base_model.register_forward_pre_hook(  # type: ignore[union-attr]
        lambda _model, args, kwargs: _choose_pass(state, args, kwargs), with_kwargs=True
    )
    set_compensation(model, compensation)


def _choose_pass(state: ModelState, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Before a forward pass: the stage begins again, and whether the pass is compensated. Generation is a
    pass with a key-value cache, or one that asks for it (where a rotation changes all is read again), which
    a likelihood request never does; a decoding step is one token after others in that cache."""
    state.stage.reset()
    mode = state.compensation.compensate
    cache = kwargs.get("past_key_values")
    given = kwargs.get("input_ids", args[0] if args else kwargs.get("inputs_embeds"))
    single = given is not None and given.shape[1] == 1
    if mode == "all" or (cache is None and not kwargs.get("use_cache")):
        state.scope.active = mode != "decode"
    else:
        state.scope.active = single and cache is not None and _holds_tokens(cache)


def _holds_tokens(cache: Any) -> bool:
    """Return whether tokens came before. A static cache counts them on its device, where a pass that is being
    compiled or captured cannot look: there one that has its memory counts as one that holds tokens."""
    length = cache.get_seq_length()
    if isinstance(length, torch.Tensor) and (
        torch.compiler.is_compiling() or (length.is_cuda and torch.cuda.is_current_stream_capturing())
    ):
        return True
    return bool(length > 0)


def dec_layers(model: nn.Module) -> dict[str, DecLinear]:
    """Return the model's DecLinear layers by their full names, in order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, DecLinear)}


def state_of(model: nn.Module) -> ModelState:
    """Return the model's state; a model that was not loaded from an artifact raises DecDECError."""
    state = getattr(model, "decdec", None)
    if not isinstance(state, ModelState):
        raise DecDECError(f"model must be loaded from a decdec artifact, got a plain {type(model).__name__}")
    return state


def layer_seed(seed: int, name: str) -> int:
    """Return the seed of a layer's random selection: the model's, made another for each layer."""
    return zlib.crc32(f"{seed}:{name}".encode()) & 0x7FFFFFFF


def set_compensation(model: nn.Module, compensation: Compensation) -> None:
    """Switch what `model` compensates, in place; takes no time."""
    state = state_of(model)
    for name, layer in dec_layers(model).items():
        assert layer.statistics is not None
        layer.selection = make_selection(
            compensation.selection,
            compensation.k_chunk_of(kind_of(name)),
            layer.statistics,
            layer_seed(compensation.seed, name),
        )
        layer.n_tb = compensation.n_tb
    state.compensation = compensation


def compensation_ledger(model: nn.Module) -> dict[str, Any]:
    """Return what a result must say about the compensation it was measured with, as JSON types.

    channels_per_token and bytes_per_token: fetched for one compensated token, summed over the layers. The
    memory is that of memory_ledger.
    """
    state = state_of(model)
    compensation = state.compensation
    channels = fetched = 0
    for name, layer in dec_layers(model).items():
        count = total_channels(layer.in_features, compensation.k_chunk_of(kind_of(name)))
        channels += count
        fetched += count * layer.residual.bytes_per_channel if layer.residual else 0
    return {
        **compensation.to_dict(),
        **memory_ledger(model),
        "artifact_hash": state.artifact_hash,
        "channels_per_token": channels,
        "bytes_per_token": fetched,
        "kernel": kernels.in_use(),
    }


def memory_ledger(model: nn.Module) -> dict[str, Any]:
    """Return what `model`, which has DecLinear layers, keeps in memory, as JSON types.

    weight_bits: of the layers' codes, averaged over their weights. bits_per_weight: of the layers' codes,
    scales, zeros, tables, input orders and scales together, as on disk; kernel_bits_per_weight: as a GPU
    keeps them. gpu_bytes: of all parameters and buffers, tied
    ones once: of the layers as on disk, of the rest in the dtypes it was loaded in. host_bytes: of the
    residuals.
    """
    layers = dec_layers(model).values()
    sizes = [layer.in_features * layer.out_features for layer in layers]
    weights, low_bit = sum(sizes), sum(layer.weight_bytes for layer in layers)
    codes = sum(size * layer.config.bits for size, layer in zip(sizes, layers, strict=True))
    others = [module for module in model.modules() if not isinstance(module, DecLinear)]
    plain = [t for module in others for t in (*module.parameters(False), *module.buffers(False))]
    plain += [layer.bias for layer in layers if layer.bias is not None]
    residuals = [layer.residual for layer in layers if layer.residual is not None]
    return {
        "weight_bits": codes / weights,
        "bits_per_weight": low_bit * 8 / weights,
        "kernel_bits_per_weight": sum(layer.kernel_bytes for layer in layers) * 8 / weights,
        "gpu_bytes": low_bit + sum({id(t): t.nbytes for t in plain}.values()),
        "host_bytes": sum(kept.codes.nbytes + kept.scale.nbytes for kept in residuals),
    }
