"""The artifact: one directory that a Hugging Face user recognises.

    config.json             the model's, with quantization_config.quant_method = "decdec"
    generation_config.json  tokenizer files
    decdec.safetensors      what goes to the GPU: embeddings, norms, head; the low-bit weight of every layer
    residual.safetensors    what stays in host memory: residual codes and scale, calibration statistics
    manifest.json           every tensor's file, dtype, shape and sha256; every other file's sha256

Above a shard size a safetensors file is several, STEM-00001-of-0000N.safetensors, with an index beside them.
The weights are not called model.safetensors, so that transformers without this package finds none and fails.
The artifact's hash is the sha256 of manifest.json, and so covers everything.
"""

from __future__ import annotations

import copy
import json
import platform
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from decdec_core.architectures import block_number
from decdec_core.calibration import ActivationStatistics
from decdec_core.config import EXTRAS, DecDECError, ResidualQuant, WeightQuant
from decdec_core.errors import ArtifactError, ConfigError
from decdec_core.manifest import (
    CONFIG,
    FORMAT_VERSION,
    HOST_STEM,
    MANIFEST,
    MODEL_STEM,
    QUANT_METHOD,
    Manifest,
    header_sha256,
    own_files,
    require_format_version,
    sha256_of_file,
    shard_names,
)
from decdec_core.quantize import QuantizedWeight
from decdec_core.residuals import QuantizedResidual
from decdec_core.shards import TensorFiles, TensorSource, write_tensors

SHARD_BYTES = 4 << 30
_STATISTICS = ("rank_max", "mean_square", "mean")
HOST_SUFFIXES = ("residual.codes", "residual.scale", *(f"calibration.{name}" for name in _STATISTICS))


@dataclass(frozen=True)
class BuiltLayer:
    """One linear layer as the artifact stores it.

    input_scale: (in,) float32, the layer sees x / input_scale; None where it is folded into the model.
    input_order: (in,) int32, the layer sees x[..., input_order], before that division; None where the order
    is the model's. The weight, the residual and the statistics are in the space of what the layer sees.
    """

    weight: QuantizedWeight
    residual: QuantizedResidual
    statistics: ActivationStatistics
    input_scale: Tensor | None = None
    input_order: Tensor | None = None


def layer_tensors(name: str, layer: BuiltLayer) -> dict[str, Tensor]:
    """Return what the artifact keeps of a layer for the GPU, by the tensors' names."""
    extras = {extra: getattr(layer, extra) for extra in EXTRAS}
    stored = {**layer.weight.tensors(), **{key: t for key, t in extras.items() if t is not None}}
    return {f"{name}.{key}": tensor for key, tensor in stored.items()}


def host_tensors(name: str, layer: BuiltLayer) -> dict[str, Tensor]:
    """Return what the artifact keeps of a layer for host memory, by the tensors' names."""
    return residual_tensors(name, layer.residual, layer.statistics)


def residual_tensors(
    name: str, residual: QuantizedResidual, statistics: ActivationStatistics
) -> dict[str, Tensor]:
    """Return a layer's residual and calibration statistics by the names of HOST_SUFFIXES."""
    kept = (residual.codes, residual.scale, *(getattr(statistics, key) for key in _STATISTICS))
    return {f"{name}.{suffix}": tensor for suffix, tensor in zip(HOST_SUFFIXES, kept, strict=True)}


def is_host_tensor(name: str) -> bool:
    """Return whether the tensor of this name stays in host memory."""
    return name.endswith(tuple(f".{suffix}" for suffix in HOST_SUFFIXES))


def plain_dtype(tensor: Tensor | TensorSource, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which a tensor that is not quantized is stored: matrices in the model's `dtype`,
    vectors (norms, biases) in float32."""
    return dtype if len(tensor.shape) > 1 else torch.float32


@dataclass(frozen=True)
class Quantization:
    """config.json's quantization_config. block_bits: of each decoder block, where weight.bits is a half step.
    provenance: what the artifact was built from. weights_file: the name that transformers is to load."""

    weight: WeightQuant
    residual: ResidualQuant
    block_bits: tuple[int, ...] | None
    provenance: dict[str, Any]
    weights_file: str

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Quantization:
        """Return what to_dict saved; anything else raises FormatVersionError or ConfigError."""
        if values.get("quant_method") != QUANT_METHOD:
            raise ConfigError(f"quant_method must be {QUANT_METHOD!r}, got {values.get('quant_method')!r}")
        require_format_version(values.get("format_version"))
        weight, residual, provenance = (values.get(key) for key in ("weight", "residual", "provenance"))
        if not (isinstance(weight, dict) and isinstance(residual, dict) and isinstance(provenance, dict)):
            raise ConfigError("quantization_config must hold weight, residual and provenance, got others")
        try:
            weight_quant, residual_quant = WeightQuant.from_dict(weight), ResidualQuant.from_dict(residual)
        except DecDECError as error:
            raise ConfigError(f"quantization_config: {error}") from None
        block_bits, file = values.get("block_bits"), values.get("weights_file")
        if (block_bits is not None) != (len(weight_quant.widths) > 1):
            raise ConfigError(
                f"block_bits must be given for a half step of bits, got {block_bits!r} at {weight_quant.bits}"
            )
        if block_bits is not None:
            whole = isinstance(block_bits, (list, tuple)) and all(type(bits) is int for bits in block_bits)
            if not whole or not set(block_bits) <= set(weight_quant.widths):
                wanted = " or ".join(map(str, weight_quant.widths))
                raise ConfigError(f"block_bits must be a list of {wanted}, got {block_bits!r}")
        if file not in (f"{MODEL_STEM}.safetensors", f"{MODEL_STEM}.safetensors.index.json"):
            raise ConfigError(f"weights_file must be {MODEL_STEM}.safetensors or its index, got {file!r}")
        return cls(weight_quant, residual_quant, block_bits and tuple(block_bits), provenance, file)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types."""
        return {
            "quant_method": QUANT_METHOD,
            "format_version": FORMAT_VERSION,
            "weight": self.weight.to_dict(),
            "residual": self.residual.to_dict(),
            "block_bits": self.block_bits and list(self.block_bits),
            "provenance": self.provenance,
            "weights_file": self.weights_file,
        }

    def weight_of(self, layer: str) -> WeightQuant:
        """Return how the layer of this full name is quantized, in whole bits."""
        if self.block_bits is None:
            return self.weight
        number = block_number(layer)
        if number >= len(self.block_bits):
            raise ConfigError(
                f"block_bits must have {number + 1} blocks for {layer}, got {len(self.block_bits)}"
            )
        return self.weight.at(self.block_bits[number])


def is_artifact(path: str | Path) -> bool:
    """Return whether `path` is a folder whose config.json names decdec as its quantization method."""
    config = Path(path) / CONFIG
    if not config.is_file():
        return False
    try:
        values = json.loads(config.read_text("utf-8"))
    except (ValueError, RecursionError):
        return False
    quantization = values.get("quantization_config") if isinstance(values, dict) else None
    return isinstance(quantization, dict) and quantization.get("quant_method") == QUANT_METHOD


def require_artifact(path: str | Path) -> None:
    """Raise ArtifactError unless `path` is an artifact's folder."""
    if not is_artifact(path):
        raise ArtifactError(f"artifact must be a folder that `decdec build` made, got {path}")


def write(
    folder: Path,
    config: Any,
    generation_config: Any,
    tokenizer: Any,
    tensors: Mapping[str, TensorSource],
    host: Mapping[str, TensorSource],
    quantization: Mapping[str, Any],
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write an artifact into `folder`, whose files so far (a tokenizer's) become its own.

    config: a transformers config with the dtype of the plain matrices, which is the model's when loaded with
    dtype="auto". generation_config, tokenizer: may be None. tensors, host: all tensors by their names, for
    the GPU and for host memory. quantization: weight and residual as dictionaries, block_bits, provenance.
    shard_bytes: of one file at most; a larger tensor has one to itself. The same input gives the same bytes.
    """
    stored = {
        stem: _sharded(stem, of, shard_bytes) for stem, of in ((MODEL_STEM, tensors), (HOST_STEM, host))
    }
    loaded = f"{MODEL_STEM}.safetensors" + (".index.json" if len(stored[MODEL_STEM]) > 1 else "")
    provenance = {"versions": _versions(), **quantization.get("provenance", {})}
    block_bits = quantization.get("block_bits")
    fixed = {"quant_method": QUANT_METHOD, "format_version": FORMAT_VERSION, "weights_file": loaded}
    described = {**quantization, **fixed, "block_bits": block_bits, "provenance": provenance}
    config = copy.deepcopy(config)
    config.quantization_config = Quantization.from_dict(described).to_dict()
    config.save_pretrained(folder)
    for part in (generation_config, tokenizer):
        if part is not None:
            part.save_pretrained(folder)
    entries: dict[str, dict[str, Any]] = {}
    for stem, shards in stored.items():
        for file, contents in shards.items():
            digests = write_tensors(folder / file, contents)
            for name, source in contents.items():
                shape = list(source.shape)
                entries[name] = {"file": file, "dtype": source.dtype, "shape": shape, "sha256": digests[name]}
        if len(shards) > 1:
            total = sum(source.nbytes for contents in shards.values() for source in contents.values())
            _write_json(folder / f"{stem}.safetensors.index.json", index_of(total, shards))
    headers = {file: header_sha256(folder / file) for shards in stored.values() for file in shards}
    others = sorted(name for name in own_files(folder) if name not in headers and name != MANIFEST)
    files = {name: sha256_of_file(folder / name) for name in others}
    body = {"format": QUANT_METHOD, "format_version": FORMAT_VERSION}
    _write_json(folder / MANIFEST, {**body, "tensors": entries, "headers": headers, "files": files}, indent=1)


def index_of(total_bytes: int, shards: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return the index of several safetensors files as Hugging Face has it, from file -> tensors by name."""
    placed = {name: file for file, contents in shards.items() for name in contents}
    return {"metadata": {"total_size": total_bytes}, "weight_map": placed}


def _sharded(
    stem: str, tensors: Mapping[str, TensorSource], shard_bytes: int
) -> dict[str, dict[str, TensorSource]]:
    shards: list[dict[str, TensorSource]] = [{}]
    size = 0
    for name in sorted(tensors, key=_natural):
        source = tensors[name]
        if shards[-1] and size + source.nbytes > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = source
        size += source.nbytes
    return dict(zip(shard_names(stem, len(shards)), shards, strict=True))


def _natural(name: str) -> list[str | int]:
    """The key that sorts layer 2 before layer 10, and so keeps a block's tensors together."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]


def _write_json(path: Path, body: object, indent: int = 2) -> None:
    path.write_text(json.dumps(body, indent=indent, sort_keys=True) + "\n", "utf-8")


def _versions() -> dict[str, str]:
    packages = {name: version(name) for name in ("torch", "transformers", "safetensors")}
    return {"python": platform.python_version(), **packages}


def load_host_tensors(
    folder: Path, manifest: Manifest, residual_quant: ResidualQuant
) -> dict[str, tuple[QuantizedResidual, ActivationStatistics]]:
    """Return each quantized layer's residual and statistics, in host memory."""
    files = TensorFiles(folder / name for name in manifest.shards(HOST_STEM))
    loaded = {}
    for name in manifest.layers():
        codes, scale, *statistics = (files.read(f"{name}.{suffix}") for suffix in HOST_SUFFIXES)
        residual = QuantizedResidual(codes, scale, residual_quant)
        loaded[name] = residual, ActivationStatistics(*statistics)
    return loaded
