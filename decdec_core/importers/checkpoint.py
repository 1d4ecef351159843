"""An existing quantized checkpoint's folder, layer by layer."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from decdec_core.architectures import SUPPORTED, decoder_blocks, input_groups
from decdec_core.config import DecDECError, WeightQuant, require_int, require_one_of
from decdec_core.importers.layouts import (
    AwqLayout,
    CheckpointError,
    CompressedLayout,
    Expected,
    GptqLayout,
    Layout,
    Parts,
)
from decdec_core.packing import pack_codes
from decdec_core.quantize.awq import linear_of
from decdec_core.quantize.uniform import UniformWeight
from decdec_core.shards import FileTensor, TensorFiles
from decdec_core.sources import load_config

_LAYOUTS: dict[str, type[GptqLayout] | type[AwqLayout] | type[CompressedLayout]] = {
    "gptq": GptqLayout,
    "awq": AwqLayout,
    "compressed-tensors": CompressedLayout,
}
# beside config.json, where the first quantizers wrote their settings, and whose they are unless they say
_SETTINGS_FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq"}
_MOST_BLOCKS = 10_000  # a model of more is none
_CODES = (".qweight", ".weight_packed")  # the tensors that a quantized layer is known by


@dataclass(frozen=True)
class ImportedLayer:
    """One layer in our format. input_order: (in,) int32, the logical input of each of the weight's columns,
    or None where they are in logical order."""

    weight: UniformWeight
    input_order: Tensor | None

    def dense(self) -> Tensor:
        """Return the float32 weight (out, in) in logical order: what the checkpoint's layer decodes to."""
        return self._logical(self.weight.dequantize(), 1)

    def noise(self) -> Tensor:
        """Return the expected squared rounding error of each logical input (in,) float32, a mean over the
        outputs: a twelfth of the squared step."""
        assert self.weight.config.group_size is not None
        per_group = self.weight.scales.float().square().mean(0) / 12
        size = min(self.weight.config.group_size, self.weight.in_features)
        return self._logical(per_group.repeat_interleave(size)[: self.weight.in_features], 0)

    def _logical(self, values: Tensor, dim: int) -> Tensor:
        if self.input_order is None:
            return values
        return torch.empty_like(values).index_copy_(dim, self.input_order.long(), values)


class QuantizedCheckpoint:
    """A checkpoint whose decoder blocks' linear layers are all quantized in one way, and nothing else is.

    folder: where it lies. format: "gptq", "awq" or "compressed-tensors". weight_quant: bits and groups.
    config: the transformers config. description: JSON types, for the artifact's provenance. Raises
    CheckpointError unless every layer has the tensors, shapes and dtypes that `layout` needs.
    """

    def __init__(
        self, folder: Path, config: Any, layout: Layout, files: TensorFiles, description: dict[str, Any]
    ) -> None:
        self.folder = folder
        self.format: str = description["format"]
        self.weight_quant: WeightQuant = layout.weight_quant
        self.config = config
        self.description = description
        self._layout = layout
        self._files = files
        self._sizes = _layer_sizes(config)
        self._require_layers()

    def layer(self, name: str) -> ImportedLayer:
        """Return the quantized layer of a full module name, such as model.layers.0.self_attn.q_proj."""
        if name not in self._sizes:
            raise CheckpointError(f"layer must be a linear layer of a decoder block, got {name!r}")
        expected = self._expected(name)
        tensors = {leaf: self._files.read(f"{name}.{leaf}") for leaf in expected if self._has(name, leaf)}
        try:
            return imported_layer(self._layout.parts(tensors, *self._sizes[name]), self.weight_quant)
        except CheckpointError as error:
            raise CheckpointError(f"layer {name}: {error}") from None

    def plain(self, name: str) -> Tensor | None:
        """Return a tensor that is not quantized, or None where there is none of that name."""
        return self._files.read(name) if name in self._files else None

    def _has(self, name: str, leaf: str) -> bool:
        return f"{name}.{leaf}" in self._files

    def _expected(self, name: str) -> dict[str, Expected]:
        sizes = self._sizes[name]
        return self._layout.needed(*sizes) | self._layout.optional(sizes[0])

    def _require_layers(self) -> None:
        for tensor in self._files.tensors:
            layer = next((tensor.removesuffix(end) for end in _CODES if tensor.endswith(end)), None)
            if layer is not None and layer not in self._sizes:
                raise CheckpointError(
                    f"quantized layers must be the decoder blocks' linear layers alone, got {layer}"
                )
        for name, sizes in self._sizes.items():
            if self._has(name, "weight"):
                raise CheckpointError(f"layer {name} must be quantized, got a full-precision weight")
            needed = self._layout.needed(*sizes)
            for leaf, expected in self._expected(name).items():
                if self._has(name, leaf):
                    _require_as_expected(f"{name}.{leaf}", self._files.tensors[f"{name}.{leaf}"], expected)
                elif leaf in needed:
                    raise CheckpointError(f"layer {name} must have a tensor {leaf}, got none")


def open_quantized(folder: str | Path) -> QuantizedCheckpoint:
    """Return the quantized checkpoint in `folder`.

    Raises DecDECError, naming what it is, for a folder that holds none, for a format or a setting that
    cannot be represented, and for tensors that are missing or not as its settings say.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"quantized must be a folder with a config.json, got {folder}")
    model_settings = _json(folder / "config.json")
    settings = _settings(folder, model_settings)
    kind = settings.get("quant_method")
    require_one_of("quant_method", kind, _LAYOUTS)
    require_one_of("model_type of a quantized checkpoint", model_settings.get("model_type"), SUPPORTED)
    layout = _LAYOUTS[str(kind)].of(settings)
    description = {
        "format": kind,
        "quantization_config": settings,
        "config_sha256": hashlib.sha256((folder / "config.json").read_bytes()).hexdigest(),
    }
    require_int("num_hidden_layers", model_settings.get("num_hidden_layers"), 1, _MOST_BLOCKS)
    files = _tensor_files(folder)
    try:
        return QuantizedCheckpoint(folder, load_config(str(folder)), layout, files, description)
    except DecDECError:
        raise
    except Exception as error:  # whatever transformers makes of odd values
        first = str(error).strip().partition("\n")[0]
        raise CheckpointError(
            f"{folder / 'config.json'} must describe a model, got {type(error).__name__}: {first}"
        ) from error


def _settings(folder: Path, model_settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the checkpoint's own quantization settings; what config.json says goes before other files."""
    settings: dict[str, Any] = {}
    for file, method in _SETTINGS_FILES.items():
        if (folder / file).is_file():
            settings = {"quant_method": method} | _json(folder / file) | settings
    inside = model_settings.get("quantization_config")
    if inside is not None and not isinstance(inside, dict):
        raise CheckpointError(f"quantization_config must be an object, got {inside!r}")
    settings |= {key: value for key, value in (inside or {}).items() if value is not None}
    if not settings:
        raise CheckpointError(f"{folder} must hold a quantized model, got no quantization_config")
    return settings


def _json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} must be JSON, got {error}") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} must be a JSON object, got {type(values).__name__}")
    return values


def _tensor_files(folder: Path) -> TensorFiles:
    """Return the folder's tensors: those named model, or of the one other name that older tools gave."""
    for suffix in (".safetensors.index.json", ".safetensors"):
        stems = [path.name.removesuffix(suffix) for path in folder.glob(f"*{suffix}")]
        if len(stems) == 1 and "model" not in stems:
            return TensorFiles.of_folder(folder, stems[0])
    return TensorFiles.of_folder(folder)


def _layer_sizes(config: Any) -> dict[str, tuple[int, int]]:
    """Return (in, out) of every linear layer of the decoder blocks by its full name."""
    plain = copy.deepcopy(config)
    if hasattr(plain, "quantization_config"):
        del plain.quantization_config
    with torch.device("meta"):
        model: nn.Module = AutoModelForCausalLM.from_config(plain)
    sizes = {}
    for block_name, block in decoder_blocks(model).items():
        for name in (name for group in input_groups(config) for name in group.linears):
            linear = linear_of(block, name)
            sizes[f"{block_name}.{name}"] = (linear.in_features, linear.out_features)
    return sizes


def _require_as_expected(name: str, tensor: FileTensor, expected: Expected) -> None:
    if tensor.shape not in expected.shapes:
        wanted = " or ".join(map(str, expected.shapes))
        raise CheckpointError(f"tensor {name} must be {wanted}, got {tensor.shape}")
    require_one_of(f"dtype of tensor {name}", tensor.dtype, expected.dtypes)


def imported_layer(parts: Parts, config: WeightQuant) -> ImportedLayer:
    """Return the layer in our format, whose groups are consecutive and whose scales positive float16.

    Raises CheckpointError for groups that are not of one size and for scales that float16 cannot hold.
    """
    order, scales = _input_order(parts.group_index, config), _float16(parts.scales)
    codes = parts.codes if order is None else parts.codes[:, order.long()]
    codes, zeros, scales = _with_positive_scales(codes, parts.zeros, scales, config)
    weight = UniformWeight(pack_codes(codes, int(config.bits)), scales, zeros, codes.shape[1], config)
    return ImportedLayer(weight, order)


def _with_positive_scales(
    codes: Tensor, zeros: Tensor, scales: Tensor, config: WeightQuant
) -> tuple[Tensor, Tensor, Tensor]:
    """Return codes, zeros and scales of the same values: a negative scale is that of the codes counted from
    the other end, and a group of scale zero is all zeros at any scale."""
    if (scales > 0).all():
        return codes, zeros.contiguous(), scales
    assert config.group_size is not None
    highest, group = 2 ** int(config.bits) - 1, torch.arange(codes.shape[1]) // config.group_size
    negative, dead = scales < 0, scales == 0
    codes = torch.where(negative[:, group], highest - codes, codes)
    codes = torch.where(dead[:, group], zeros[:, group], codes)
    zeros = torch.where(negative, highest - zeros, zeros)
    return codes, zeros, torch.where(dead, torch.ones_like(scales), scales.abs())


def _input_order(group_index: Tensor | None, config: WeightQuant) -> Tensor | None:
    """Return the inputs (in,) int32 in the order in which groups are consecutive, or None for their own."""
    if group_index is None:
        return None
    assert config.group_size is not None
    consecutive = torch.arange(len(group_index)) // config.group_size
    order = torch.argsort(group_index, stable=True)
    if not torch.equal(group_index[order].long(), consecutive):
        labels, sizes = torch.unique(group_index, return_counts=True)
        raise CheckpointError(
            f"g_idx must number groups of {config.group_size} inputs from 0, got {len(labels)} groups of "
            f"{int(sizes.min())}..{int(sizes.max())}, numbered {int(labels[0])}..{int(labels[-1])}"
        )
    return None if torch.equal(group_index.long(), consecutive) else order.int()


def _float16(scales: Tensor) -> Tensor:
    """Return `scales` contiguous in float16; one that it cannot hold raises CheckpointError."""
    half = scales.half().contiguous()
    lost = ~torch.isfinite(half) | ((half == 0) & (scales != 0))
    if lost.any():
        raise CheckpointError(f"scales must be ones that float16 can hold, got {scales[lost][0].item()}")
    return half
