"""Writers of GPTQ and AWQ checkpoints from the formats' definitions, bit by bit, sharing nothing with the
importers; and of compressed-tensors ones through that format's own library."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    apply_quantization_config,
)
from compressed_tensors.quantization.utils import calculate_qparams
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from decdec_core.architectures import InputGroup, decoder_blocks, input_groups

AWQ_NIBBLES = [0, 2, 4, 6, 1, 3, 5, 7]


@dataclass
class Rounded:
    """A weight rounded to nearest: codes (out, in), zeros and scales (out, groups), index (in,)."""

    codes: np.ndarray
    zeros: np.ndarray
    scales: np.ndarray
    index: np.ndarray

    def dense(self) -> Tensor:
        """Return the formats' value (code - zero) * scale (out, in), float32."""
        zeros, scales = self.zeros[:, self.index], self.scales[:, self.index].astype(np.float32)
        return torch.from_numpy((self.codes - zeros).astype(np.float32) * scales)


def rounded(
    weight: Tensor, bits: int, group_size: int, symmetric: bool = False, order: np.ndarray | None = None
) -> Rounded:
    """Return `weight` (out, in) rounded; the inputs fill the groups in `order`."""
    values = weight.detach().double().numpy()
    out_features, in_features = values.shape
    size = in_features if group_size == -1 else group_size
    index = np.empty(in_features, np.int64)
    index[np.arange(in_features) if order is None else order] = np.arange(in_features) // size
    groups, highest = index.max() + 1, 2**bits - 1
    codes = np.zeros(values.shape, np.int64)
    zeros = np.zeros((out_features, groups), np.int64)
    scales = np.zeros((out_features, groups), np.float16)
    for group in range(groups):
        part = values[:, index == group]
        low, high = np.minimum(part.min(1), 0), np.maximum(part.max(1), 0)
        if symmetric:
            high = np.maximum(high, -low)
            low = -high
        scales[:, group] = np.maximum((high - low) / highest, 1e-5)
        step = scales[:, group].astype(np.float64)
        zeros[:, group] = 2 ** (bits - 1) if symmetric else np.clip(np.round(-low / step), 0, highest)
        found = np.round(part / step[:, None]) + zeros[:, group, None]
        codes[:, index == group] = np.clip(found, 0, highest)
    return Rounded(codes, zeros, scales, index)


def dense_words(codes: np.ndarray, bits: int) -> Tensor:
    """Return (n * bits / 32, m) int32 from codes (n, m): bit after bit down each column."""
    count = codes.shape[0] * bits
    assert count % 32 == 0, "the format has no partial words"
    words = np.zeros((count // 32, codes.shape[1]), np.uint32)
    for place in range(count):
        bit = (codes[place // bits] >> (place % bits)) & 1
        words[place // 32] |= bit.astype(np.uint32) << np.uint32(place % 32)
    return torch.from_numpy(words.view(np.int32))


def gptq_tensors(layer: Rounded, bits: int, version: int = 1) -> dict[str, Tensor]:
    """Return a GPTQ layer's tensors; version 1 stores zeros less one, in as many bits."""
    stored = (layer.zeros - 1) % 2**bits if version == 1 else layer.zeros
    return {
        "qweight": dense_words(layer.codes.T, bits),
        "qzeros": dense_words(stored, bits).T.contiguous(),
        "scales": torch.from_numpy(layer.scales.T.copy()),
        "g_idx": torch.from_numpy(layer.index.astype(np.int32)),
    }


def awq_tensors(layer: Rounded) -> dict[str, Tensor]:
    """Return an AWQ layer's tensors in the gemm layout."""

    def words(codes: np.ndarray) -> Tensor:
        packed = np.zeros((codes.shape[0], codes.shape[1] // 8), np.uint32)
        for word in range(packed.shape[1]):
            for nibble, place in enumerate(AWQ_NIBBLES):
                packed[:, word] |= codes[:, word * 8 + place].astype(np.uint32) << np.uint32(4 * nibble)
        return torch.from_numpy(packed.view(np.int32))

    scales = torch.from_numpy(layer.scales.T.copy())
    return {"qweight": words(layer.codes.T), "qzeros": words(layer.zeros.T), "scales": scales}


def linear_names(model: PreTrainedModel) -> list[str]:
    """Return the full names of the decoder blocks' linear layers."""
    groups = input_groups(model.config)
    return [f"{block}.{n}" for block in decoder_blocks(model) for group in groups for n in group.linears]


def write_checkpoint(
    folder: Path,
    model: PreTrainedModel,
    settings: dict[str, Any],
    layer_tensors: Callable[[str, Tensor], dict[str, Tensor]],
    shards: int = 1,
    stem: str = "model",
) -> Path:
    """Write `model` in float16 with its linear layers as `layer_tensors` makes them of (name, weight)."""
    folder.mkdir(parents=True)
    state = {k: v.half() for k, v in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del state["lm_head.weight"]
    for name in linear_names(model):
        state.pop(f"{name}.weight")
        made = layer_tensors(name, model.get_submodule(name).weight.data)
        state |= {f"{name}.{leaf}": tensor for leaf, tensor in made.items()}
    state = {key: tensor.contiguous().clone() for key, tensor in state.items()}
    names = sorted(state)
    parts = [names[i::shards] for i in range(shards)]
    if shards == 1:
        save_file(state, folder / f"{stem}.safetensors")
    else:
        where = {n: f"{stem}-{i:05}-of-{shards:05}.safetensors" for i, p in enumerate(parts, 1) for n in p}
        for i, part in enumerate(parts, 1):
            save_file({n: state[n] for n in part}, folder / f"{stem}-{i:05}-of-{shards:05}.safetensors")
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    config = model.config.to_dict() | {"quantization_config": settings}
    (folder / "config.json").write_text(json.dumps(config, default=str))
    return folder


def gptq_settings(bits: int, group_size: int, **more: Any) -> dict[str, Any]:
    return {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group_size,
        "desc_act": False,
        "sym": False,
        "checkpoint_format": "gptq",
    } | more


def awq_settings(group_size: int, **more: Any) -> dict[str, Any]:
    return {
        "quant_method": "awq",
        "bits": 4,
        "group_size": group_size,
        "version": "gemm",
        "zero_point": True,
        "modules_to_not_convert": None,
    } | more


def write_compressed(
    folder: Path, model: PreTrainedModel, args: dict[str, Any], ignore: tuple[str, ...] = ("lm_head",)
) -> dict[str, Tensor]:
    """Write `model` as compressed-tensors does, changing it, and return each layer's weight as that library
    decodes it. args: of its QuantizationArgs."""
    weights = QuantizationArgs(**args)
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    apply_quantization_config(
        model, QuantizationConfig(config_groups={"group_0": scheme}, ignore=list(ignore))
    )
    quantized = [n for n, m in model.named_modules() if hasattr(m, "weight_scale")]
    for name in quantized:
        module = model.get_submodule(name)
        size = args.get("group_size") or module.in_features
        grouped = module.weight.data.view(module.out_features, -1, size)
        scale, zero = calculate_qparams(grouped.amin(-1), grouped.amax(-1), weights)
        module.weight_scale.data.copy_(scale)
        if not weights.symmetric:
            module.weight_zero_point.data.copy_(zero)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(str(folder))
    compressor.decompress_model(model)
    return {name: model.get_submodule(name).weight.data for name in quantized}


def fold_scales(model: PreTrainedModel, spread: float, fold_output: bool = True) -> dict[str, Tensor]:
    """Scale the inputs of every group by random s and fold 1/s as AutoAWQ does; return s by block and kind.

    fold_output: also of o, into the value projection, where their shapes allow it.
    """
    found = {}
    for block_name, block in decoder_blocks(model).items():
        for group in input_groups(model.config):
            if group.kind == "o" and not (fold_output and group.producer):
                continue
            scale = (torch.randn(block.get_submodule(group.linears[0]).in_features) * spread).exp()
            _scale_inputs(block, group, scale)
            found[f"{block_name}.{group.kind}"] = scale
    return found


def _scale_inputs(block: torch.nn.Module, group: InputGroup, scale: Tensor) -> None:
    for name in group.linears:
        block.get_submodule(name).weight.data *= scale
    if group.norm:
        block.get_submodule(group.norm).weight.data /= scale
        return
    producer = block.get_submodule(group.producer)
    rows = slice(group.first_row, group.first_row + len(scale))
    producer.weight.data[rows] /= scale.unsqueeze(1)
    if producer.bias is not None:
        producer.bias.data[rows] /= scale


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> Path:
    """Apply `change` to the tensors of a single-file checkpoint."""
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors")
    return folder
