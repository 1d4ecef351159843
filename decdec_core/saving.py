"""A model that was loaded from an artifact -> an artifact: its save_pretrained."""

from __future__ import annotations

import copy
import math
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from decdec_core import artifact
from decdec_core.artifact import is_artifact, plain_dtype
from decdec_core.config import EXTRAS, DecDECError
from decdec_core.errors import ArtifactError
from decdec_core.fusing import is_fused
from decdec_core.linear import DecLinear
from decdec_core.manifest import CONFIG, MANIFEST, own_files, read_manifest, sha256_of_file
from decdec_core.model import dec_layers
from decdec_core.quantize import weight_layout
from decdec_core.shards import DTYPE_NAMES, CastTensor, MemoryTensor, TensorSource

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_IGNORED = ("token", "save_peft_format", "save_original_format", "distributed_checkpoint")


@dataclass(frozen=True)
class _Packed:
    """A tensor of a layer's weight, brought back from the kernels' order when it is written."""

    layer: DecLinear
    name: str
    shape: tuple[int, ...]
    to: torch.dtype

    @property
    def dtype(self) -> str:
        return DTYPE_NAMES[self.to]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.to.itemsize

    def pieces(self) -> Iterator[memoryview]:
        return MemoryTensor(self.layer.state_dict()[self.name]).pieces()


def save_pretrained(
    model: Any,
    save_directory: str | os.PathLike[str],
    is_main_process: bool = True,
    max_shard_size: int | str = artifact.SHARD_BYTES,
    **options: Any,
) -> None:
    """Write `model` as an artifact to the folder `save_directory`: the method of a loaded model.

    The folder may be absent or empty, or hold an artifact, which is replaced (the one that the model was
    loaded from is no exception). The tokenizer and what else stood beside the weights is copied from there.
    Raises DecDECError for options of transformers that an artifact has no place for.
    """
    for option, value in options.items():
        if value and option not in _IGNORED:
            raise DecDECError(f"save_pretrained of an artifact must be without {option}, got {value!r}")
    shard_bytes = _bytes_of(max_shard_size)
    if is_main_process:
        _save(model, Path(save_directory), shard_bytes)


def _bytes_of(size: int | str) -> int:
    found = re.fullmatch(r"(\d+)\s*([KMGT]B)?", str(size).strip().upper())
    if found is None or int(found[1]) == 0:
        raise DecDECError(f"max_shard_size must be a positive number of bytes or such as '5GB', got {size!r}")
    return int(found[1]) * _UNITS[found[2] or ""]


def _save(model: Any, folder: Path, shard_bytes: int) -> None:
    if is_fused(model):
        raise DecDECError("a model must be saved before its layers are fused, got one after")
    origin = model.hf_quantizer
    copied = _beside_the_weights(origin.folder, origin.manifest)
    replaced = _replaceable(folder, copied)
    config = copy.deepcopy(model.config)
    config.dtype, config.architectures = model.dtype, [type(model).__name__]
    temporary = folder / f".{secrets.token_hex(4)}.tmp"
    temporary.mkdir(parents=True)
    try:
        for name in copied:
            (temporary / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(origin.folder / name, temporary / name)
        artifact.write(
            temporary,
            config,
            model.generation_config,
            None,
            _gpu_tensors(model),
            _host_tensors(model),
            origin.quantization.to_dict(),
            shard_bytes,
        )
        # without a manifest from the first change to the last: nothing half replaced loads
        for name in (MANIFEST, *replaced):
            (folder / name).unlink(missing_ok=True)
        for name in sorted(own_files(temporary), key=lambda name: name == MANIFEST):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (temporary / name).replace(folder / name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _beside_the_weights(source: Path, manifest: artifact.Manifest) -> list[str]:
    """Return the names of the files that are copied, which must be as they were when the model was loaded."""
    made = (CONFIG, "generation_config.json")
    copied = [
        name for name in manifest.files if name not in made and not name.endswith(".safetensors.index.json")
    ]
    for name in copied:
        path = source / name
        if not path.is_file() or sha256_of_file(path) != manifest.files[name]:
            raise ArtifactError(f"{path} must be as it was when the model was loaded, got another or none")
    return copied


def _replaceable(folder: Path, copied: list[str]) -> list[str]:
    """Return the names of the files in `folder`, all of which an artifact may replace."""
    if folder.exists() and not folder.is_dir():
        raise DecDECError(f"save_directory must be a folder, got a file {folder}")
    present = own_files(folder) if folder.is_dir() else []
    known = set(copied)
    if is_artifact(folder):
        old = read_manifest(folder)
        known |= {MANIFEST, *old.headers, *old.files}
    for name in sorted(present):
        if name not in known:
            raise DecDECError(f"save_directory {folder} must be empty or an artifact, got {name} in it")
    return present


def _gpu_tensors(model: Any) -> dict[str, TensorSource]:
    layers = dec_layers(model)
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    sources: dict[str, TensorSource] = {}
    for name, parameter in model.named_parameters():
        if name not in tied:
            sources[name] = CastTensor(MemoryTensor(parameter), plain_dtype(parameter, model.dtype))
    for name, layer in layers.items():
        for key, (shape, dtype) in weight_layout(layer.config, layer.in_features, layer.out_features).items():
            sources[f"{name}.{key}"] = _Packed(layer, key, shape, dtype)
        for key in (*EXTRAS, "bias"):
            tensor = getattr(layer, key)
            if tensor is not None:
                sources[f"{name}.{key}"] = MemoryTensor(tensor)
    return sources


def _host_tensors(model: Any) -> dict[str, TensorSource]:
    sources: dict[str, TensorSource] = {}
    for name, layer in dec_layers(model).items():
        assert layer.residual is not None
        assert layer.statistics is not None
        stored = artifact.residual_tensors(name, layer.residual, layer.statistics)
        sources.update({key: MemoryTensor(tensor) for key, tensor in stored.items()})
    return sources
