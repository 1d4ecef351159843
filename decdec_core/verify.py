"""An artifact's folder against its manifest, and the manifest against what such a model must consist of.

    names -> files -> headers -> config.json -> tensors' names, shapes, dtypes -> bytes -> values

A damage is named by the first of these that sees it. The bytes' hashes find any accident; the other checks
hold also where a manifest was written to agree with the damage. Tensors are read one at a time.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING

from decdec_core.architectures import block_number, decoder_blocks, input_groups, require_supported
from decdec_core.artifact import HOST_SUFFIXES, Quantization, index_of, plain_dtype
from decdec_core.config import DecDECError
from decdec_core.errors import (
    ArtifactError,
    BrokenFileError,
    ChecksumError,
    ConfigError,
    ExtraFileError,
    ExtraTensorError,
    ManifestError,
    MissingFileError,
    MissingTensorError,
    UnsafeFileError,
    WrongDtypeError,
    WrongShapeError,
)
from decdec_core.manifest import (
    CONFIG,
    HOST_STEM,
    MANIFEST,
    MODEL_STEM,
    Manifest,
    header_sha256,
    own_files,
    read_manifest,
    sha256_of_file,
)
from decdec_core.packing import channel_bytes
from decdec_core.quantize import weight_layout
from decdec_core.shards import DTYPE_NAMES, FileTensor, TensorFileError, file_tensors
from decdec_core.values import require_values

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_PICKLES = (".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth")
_PICKLE_STARTS = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
Spec = tuple[str, tuple[int, ...]]  # a tensor's dtype by safetensors' name, and its shape


def verify(path: str | Path) -> Manifest:
    """Return the manifest of the artifact at `path` after comparing every tensor and file with it.

    Raises one of the ArtifactErrors of errors.py: which tensor or file, what it must be, what is there.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise ArtifactError(f"artifact must be a folder, got {folder}")
    present = own_files(folder)
    manifest = read_manifest(folder)
    _require_files(folder, manifest, present)
    tensors = _stored_tensors(folder, manifest)
    try:
        for name, wanted in manifest.files.items():
            _require_sha256(f"{folder}: {name}", wanted, sha256_of_file(folder / name))
        for name, wanted in manifest.headers.items():
            _require_sha256(f"{folder}: {name}: header", wanted, header_sha256(folder / name))
        quantization, wanted_tensors = _from_config(folder, manifest)
        _require_specs(str(folder), wanted_tensors, {name: _spec(t) for name, t in tensors.items()})
        _require_indices(folder, manifest, tensors)
        for name, tensor in tensors.items():
            _require_sha256(f"{folder}: tensor {name}", manifest.tensors[name]["sha256"], tensor.sha256())
    except ChecksumError:
        _require_own_manifest(folder, manifest, tensors)
        raise
    require_values(folder, tensors, manifest, quantization)
    return manifest


def require_same_tensors(
    where: str, wanted: Mapping[str, Sequence[int]], got: Mapping[str, Sequence[int]]
) -> None:
    """Raise MissingTensorError, ExtraTensorError or WrongShapeError unless both name the same tensors with
    the same shapes."""
    for name in sorted(wanted.keys() | got.keys()):
        if name not in got:
            raise MissingTensorError(f"{where}: tensor {name} must be there, got none")
        if name not in wanted:
            raise ExtraTensorError(f"{where}: tensor {name} must not be there, got one")
        shapes = list(wanted[name]), list(got[name])
        if shapes[0] != shapes[1]:
            raise WrongShapeError(f"{where}: tensor {name}: shape must be {shapes[0]}, got {shapes[1]}")


def _require_files(folder: Path, manifest: Manifest, present: Sequence[str]) -> None:
    listed = {MANIFEST, *manifest.headers, *manifest.files}
    for name in sorted(present):
        if name.endswith(_PICKLES):
            raise UnsafeFileError(f"{folder}: file {name} must not be a pickle, got one by its name")
    for name in sorted(listed.difference(present)):
        raise MissingFileError(f"{folder}: file {name} must be there, got none")
    for name in sorted(set(present).difference(listed)):
        raise ExtraFileError(f"{folder}: file {name} must not be there, got one")


def _stored_tensors(folder: Path, manifest: Manifest) -> dict[str, FileTensor]:
    """Return the tensors of all files, which have the names, dtypes and shapes of the manifest."""
    tensors: dict[str, FileTensor] = {}
    for file in sorted(manifest.headers):
        for name, tensor in _opened(folder / file).items():
            if name in tensors:
                raise ExtraTensorError(f"{folder}: tensor {name} must be in one file, got it in {file} too")
            tensors[name] = tensor
    wanted = {name: (entry["dtype"], tuple(entry["shape"])) for name, entry in manifest.tensors.items()}
    _require_specs(str(folder), wanted, {name: _spec(tensor) for name, tensor in tensors.items()})
    for name, entry in manifest.tensors.items():
        if tensors[name].path.name != entry["file"]:
            raise MissingTensorError(
                f"{folder}: tensor {name} must be in {entry['file']}, got it in {tensors[name].path.name}"
            )
    return tensors


def _opened(path: Path) -> dict[str, FileTensor]:
    with path.open("rb") as file:
        start = file.read(9)
    # the ninth byte of a safetensors file begins its JSON
    if start.startswith(_PICKLE_STARTS) and start[8:] != b"{":
        raise UnsafeFileError(f"{path} must be a safetensors file, got a pickle")
    try:
        return file_tensors(path)
    except TensorFileError as error:
        raise BrokenFileError(str(error)) from None


def _spec(tensor: FileTensor) -> Spec:
    return tensor.dtype, tensor.shape


def _require_specs(where: str, wanted: Mapping[str, Spec], got: Mapping[str, Spec]) -> None:
    shapes = ({name: shape for name, (_, shape) in specs.items()} for specs in (wanted, got))
    require_same_tensors(where, *shapes)
    for name, (dtype, _) in wanted.items():
        if got[name][0] != dtype:
            raise WrongDtypeError(f"{where}: tensor {name}: dtype must be {dtype}, got {got[name][0]}")


def _require_sha256(which: str, wanted: str, got: str) -> None:
    if wanted != got:
        raise ChecksumError(f"{which}: sha256 must be {wanted}, got {got}")


def _require_own_manifest(folder: Path, manifest: Manifest, tensors: Mapping[str, FileTensor]) -> None:
    """Raise ManifestError if the manifest is another artifact's: none of the residuals' scales fits it."""
    scales = [name for name in tensors if name.endswith(".residual.scale")]
    if scales and all(tensors[name].sha256() != manifest.tensors[name]["sha256"] for name in scales):
        raise ManifestError(
            f"{folder / MANIFEST} must be this artifact's, got one that none of {len(scales)} residuals fits"
        )


def _require_indices(folder: Path, manifest: Manifest, tensors: Mapping[str, FileTensor]) -> None:
    """Raise ManifestError unless each set of several files has the index that the manifest implies."""
    for stem in (MODEL_STEM, HOST_STEM):
        shards = manifest.shards(stem)
        name = f"{stem}.safetensors.index.json"
        if (name in manifest.files) != (len(shards) > 1):
            raise ManifestError(f"{folder}: {name} must be there with several {stem} files only")
        if len(shards) > 1:
            placed = {file: {n: t for n, t in tensors.items() if t.path.name == file} for file in shards}
            total = sum(tensor.nbytes for contents in placed.values() for tensor in contents.values())
            if _json(folder / name, ManifestError) != index_of(total, placed):
                raise ManifestError(f"{folder / name} must place the tensors where they are, got another")


def _json(path: Path, error_class: type[ArtifactError]) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise error_class(f"{path} must be JSON, got {error}") from None


def _from_config(folder: Path, manifest: Manifest) -> tuple[Quantization, dict[str, Spec]]:
    """Return what config.json says of the quantization, and the tensors that its model consists of."""
    values = _json(folder / CONFIG, ConfigError)
    quantized = values.pop("quantization_config", None) if isinstance(values, dict) else None
    if not isinstance(quantized, dict):
        raise ConfigError(f"{folder / CONFIG} must hold a quantization_config, got none")
    quantization = Quantization.from_dict(quantized)
    layers = manifest.layers()
    blocks = len({block_number(layer) for layer in layers})
    shards = manifest.shards(MODEL_STEM)
    wanted = f"{MODEL_STEM}.safetensors" + (".index.json" if len(shards) > 1 else "")
    for which, needed, got in (
        ("weights_file", wanted, quantization.weights_file),
        ("num_hidden_layers", blocks, values.get("num_hidden_layers")),  # before they are made
        ("the length of block_bits", blocks, len(quantization.block_bits or range(blocks))),
    ):
        if got != needed:
            raise ConfigError(f"{folder / CONFIG}: {which} must be {needed}, got {got!r}")
    model = _empty_model(folder / CONFIG, values)
    return quantization, dict(_model_tensors(model, quantization, layers))


def _empty_model(path: Path, values: dict[str, Any]) -> Any:
    """Return the model of a config.json, on the meta device."""
    try:
        kind = str(values.pop("model_type", None))
        require_supported(SimpleNamespace(model_type=kind))
        config = CONFIG_MAPPING[kind].from_dict(values)
        if config.dtype not in _DTYPES:
            raise ConfigError(f"dtype must be one of {', '.join(map(str, _DTYPES))}, got {config.dtype}")
        model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
        with torch.device("meta"):
            return model_class(config)
    except DecDECError as error:
        raise ConfigError(f"{path}: {error}") from None
    except (
        Exception
    ) as error:  # what transformers raises for a config that makes no sense has no common class
        raise ConfigError(f"{path} must be a model's, got {type(error).__name__}: {error}") from None


def _model_tensors(
    model: Any, quantization: Quantization, layers: Mapping[str, Sequence[str]]
) -> Iterator[tuple[str, Spec]]:
    """Yield every tensor that an artifact of `model` must hold; `layers` says which extras a layer has."""
    linears = [name for group in input_groups(model.config) for name in group.linears]
    quantized = [f"{block}.{name}" for block in decoder_blocks(model) for name in linears]
    for name in quantized:
        linear = model.get_submodule(name)
        for suffix, spec in _layer_tensors(linear, name, quantization, layers.get(name, ())):
            yield f"{name}.{suffix}", spec
    replaced = {f"{name}.weight" for name in quantized}
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    dtype = model.config.dtype
    for name, tensor in model.state_dict().items():
        if name not in replaced and name not in tied:
            yield name, (DTYPE_NAMES[plain_dtype(tensor, dtype)], tuple(tensor.shape))


def _layer_tensors(
    linear: nn.Module, name: str, quantization: Quantization, extras: Sequence[str]
) -> Iterator[tuple[str, Spec]]:
    out_features, in_features = (int(length) for length in linear.get_parameter("weight").shape)
    layout = weight_layout(quantization.weight_of(name), in_features, out_features)
    for suffix, (shape, dtype) in layout.items():
        yield suffix, (DTYPE_NAMES[dtype], shape)
    for extra in extras:
        yield extra, ("F32" if extra == "input_scale" else "I32", (in_features,))
    bits = quantization.residual.bits
    codes: Spec = ("U8", (in_features, channel_bytes(out_features, bits)))
    if bits == 16:
        codes = ("F16", (in_features, out_features))
    statistics: list[Spec] = [("F32", (in_features,))] * (len(HOST_SUFFIXES) - 2)
    yield from zip(HOST_SUFFIXES, [codes, ("F32", (out_features,)), *statistics], strict=True)
