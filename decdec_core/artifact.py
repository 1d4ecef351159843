"""The artifact: one directory that a Hugging Face user recognises.

    config.json             the model's, with quantization_config.quant_method = "decdec"
    generation_config.json  tokenizer files
    model.safetensors       embeddings, norms, head; codes, scales, zeros of every quantized layer
    residual.safetensors    residual codes and scale, calibration statistics: what stays in host memory
    manifest.json           every tensor's file, dtype, shape and sha256; every other file's sha256

The artifact's hash is the sha256 of manifest.json, and so covers everything.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from decdec_core.calibration import ActivationStatistics
from decdec_core.config import DecDECError, ResidualQuant, WeightQuant
from decdec_core.residuals import QuantizedResidual

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from decdec_core.build import BuiltLayer

FORMAT_VERSION = 1
QUANT_METHOD = "decdec"
MANIFEST, CONFIG = "manifest.json", "config.json"
MODEL_FILE, RESIDUAL_FILE = "model.safetensors", "residual.safetensors"
_DTYPES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.uint8: "U8",
}


class ArtifactError(DecDECError):
    """An artifact that is not what its manifest says, or none at all."""


@dataclass(frozen=True)
class Manifest:
    """tensors: name -> {"file", "dtype", "shape", "sha256"}. files: name -> sha256. hash: the artifact's."""

    tensors: dict[str, dict[str, Any]]
    files: dict[str, str]
    hash: str

    def layers(self) -> dict[str, bool]:
        """Return the quantized layers' names, and whether each keeps an input scale."""
        names = [name.removesuffix(".codes") for name in self.tensors if name.endswith(".codes")]
        layers = [name for name in names if f"{name}.scales" in self.tensors]
        return {name: f"{name}.input_scale" in self.tensors for name in layers}


def is_artifact(path: str | Path) -> bool:
    """Return whether `path` is a folder whose config.json names decdec as its quantization method."""
    config = Path(path) / CONFIG
    if not config.is_file():
        return False
    try:
        values = json.loads(config.read_text("utf-8"))
    except ValueError:
        return False
    quantization = values.get("quantization_config") if isinstance(values, dict) else None
    return isinstance(quantization, dict) and quantization.get("quant_method") == QUANT_METHOD


def require_artifact(path: str | Path) -> None:
    """Raise ArtifactError unless `path` is an artifact's folder."""
    if not is_artifact(path):
        raise ArtifactError(f"artifact must be a folder that `decdec build` made, got {path}")


def save(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: Any,
    layers: Mapping[str, BuiltLayer],
    weight_quant: WeightQuant,
    residual_quant: ResidualQuant,
    provenance: Mapping[str, Any],
    dtype: torch.dtype,
) -> None:
    """Write the artifact of `model`, whose `layers` are quantized, into the empty `folder`.

    dtype: of the embeddings and the head on disk, and the model's when loaded with dtype="auto".
    provenance: what it was built from, kept in config.json.
    """
    config = model.config
    config.dtype = dtype
    config.quantization_config = {
        "quant_method": QUANT_METHOD,
        "format_version": FORMAT_VERSION,
        "weight": weight_quant.to_dict(),
        "residual": residual_quant.to_dict(),
        "provenance": {**provenance, "versions": _versions()},
    }
    config.save_pretrained(folder)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    stored = {
        MODEL_FILE: {**_plain_tensors(model, layers, dtype), **_layer_tensors(layers)},
        RESIDUAL_FILE: _host_tensors(layers),
    }
    tensors: dict[str, dict[str, Any]] = {}
    for file, contents in stored.items():
        save_file(contents, folder / file, metadata={"format": "pt"})
        for name, tensor in contents.items():
            tensors[name] = {"file": file, **_fingerprint(tensor)}
    others = sorted(name for name in _names(folder) if name not in stored)
    files = {name: _sha256_of_file(folder / name) for name in others}
    body = {"format": QUANT_METHOD, "format_version": FORMAT_VERSION, "tensors": tensors, "files": files}
    (folder / MANIFEST).write_text(json.dumps(body, indent=1, sort_keys=True) + "\n", "utf-8")


def _versions() -> dict[str, str]:
    packages = {name: version(name) for name in ("torch", "transformers", "safetensors")}
    return {"python": platform.python_version(), **packages}


def _plain_tensors(
    model: PreTrainedModel, layers: Mapping[str, BuiltLayer], dtype: torch.dtype
) -> dict[str, Tensor]:
    """Return everything that is not quantized: matrices in `dtype`, vectors (norms, biases) in float32,
    because folded scales live in them. Tied weights appear once."""
    quantized = {f"{name}.weight" for name in layers}
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    plain = {}
    for name, tensor in model.state_dict().items():
        if name not in quantized and name not in tied:
            plain[name] = tensor.to(dtype if tensor.dim() > 1 else torch.float32).contiguous()
    return plain


def _layer_tensors(layers: Mapping[str, BuiltLayer]) -> dict[str, Tensor]:
    tensors = {}
    for name, layer in layers.items():
        tensors[f"{name}.codes"] = layer.weight.codes
        tensors[f"{name}.scales"] = layer.weight.scales
        tensors[f"{name}.zeros"] = layer.weight.zeros
        if layer.input_scale is not None:
            tensors[f"{name}.input_scale"] = layer.input_scale
    return tensors


def _host_tensors(layers: Mapping[str, BuiltLayer]) -> dict[str, Tensor]:
    tensors = {}
    for name, layer in layers.items():
        tensors[f"{name}.residual.codes"] = layer.residual.codes
        tensors[f"{name}.residual.scale"] = layer.residual.scale
        # layers that read one input share their statistics, which safetensors wants as separate memory
        tensors[f"{name}.calibration.rank_max"] = layer.statistics.rank_max.clone()
        tensors[f"{name}.calibration.mean_square"] = layer.statistics.mean_square.clone()
        tensors[f"{name}.calibration.mean"] = layer.statistics.mean.clone()
    return tensors


def load_host_tensors(
    folder: Path, manifest: Manifest, residual_quant: ResidualQuant
) -> dict[str, tuple[QuantizedResidual, ActivationStatistics]]:
    """Return each quantized layer's residual and statistics, in host memory."""
    loaded = {}
    with safe_open(folder / RESIDUAL_FILE, framework="pt", device="cpu") as file:
        for name in manifest.layers():
            codes = file.get_tensor(f"{name}.residual.codes")
            scale = file.get_tensor(f"{name}.residual.scale")
            statistics = ActivationStatistics(
                file.get_tensor(f"{name}.calibration.rank_max"),
                file.get_tensor(f"{name}.calibration.mean_square"),
                file.get_tensor(f"{name}.calibration.mean"),
            )
            loaded[name] = QuantizedResidual(codes, scale, residual_quant), statistics
    return loaded


def verify(path: str | Path) -> Manifest:
    """Return the manifest of the artifact at `path` after comparing every tensor and file with it.

    Raises ArtifactError: which tensor or file, what the manifest says, what is there.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise ArtifactError(f"artifact must be a folder, got {folder}")
    manifest = read_manifest(folder)
    for name, wanted in manifest.files.items():
        _require_file(folder, name)
        _require_equal(f"{folder}: {name}: sha256", wanted, _sha256_of_file(folder / name))
    _refuse_strangers(folder, manifest)
    found: dict[str, dict[str, Any]] = {}
    for file in (MODEL_FILE, RESIDUAL_FILE):
        _require_file(folder, file)
        for name, fingerprint in _stored_tensors(folder / file).items():
            if name in found:
                raise ArtifactError(f"{folder}: tensor {name} must be in one file, got it in {file} too")
            found[name] = fingerprint
    for name in sorted(manifest.tensors.keys() | found.keys()):
        if name not in found:
            raise ArtifactError(f"{folder}: tensor {name} must be there, got none")
        if name not in manifest.tensors:
            raise ArtifactError(
                f"{folder}: tensor {name} must not be there, got one in {found[name]['file']}"
            )
        for key in ("file", "dtype", "shape", "sha256"):
            _require_equal(
                f"{folder}: tensor {name}: {key}", manifest.tensors[name].get(key), found[name][key]
            )
    return manifest


def read_manifest(folder: Path) -> Manifest:
    """Return the manifest of an artifact of this format version; anything else raises ArtifactError."""
    _require_file(folder, MANIFEST)
    text = (folder / MANIFEST).read_bytes()
    try:
        body = json.loads(text)
    except ValueError as error:
        raise ArtifactError(f"{folder / MANIFEST} must be JSON, got {error}") from None
    if not isinstance(body, dict) or body.get("format") != QUANT_METHOD:
        raise ArtifactError(f"{folder / MANIFEST} must be of format {QUANT_METHOD!r}")
    require_format_version(body.get("format_version"))
    tensors, files = body.get("tensors"), body.get("files")
    if not isinstance(tensors, dict) or not isinstance(files, dict) or CONFIG not in files:
        raise ArtifactError(f"{folder / MANIFEST} must list tensors and files, {CONFIG} among them")
    for name, entry in tensors.items():
        if not isinstance(entry, dict):
            raise ArtifactError(f"{folder / MANIFEST}: {name} must be a tensor's entry, got {entry!r}")
    return Manifest(tensors, files, hashlib.sha256(text).hexdigest())


def require_format_version(got: object) -> None:
    """Raise ArtifactError unless `got` is the format version that this release reads."""
    if got != FORMAT_VERSION:
        raise ArtifactError(f"artifact format_version must be {FORMAT_VERSION}, got {got!r}: build it again")


def _require_file(folder: Path, name: str) -> None:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or not (folder / path).is_file():
        raise ArtifactError(f"{folder}: file {name} must be there, got none")


def _names(folder: Path) -> list[str]:
    """Return the names of the files that belong to an artifact, relative to its folder. Hidden files and
    Markdown are the user's: nothing reads them."""
    names = [p.relative_to(folder) for p in folder.rglob("*") if p.is_file()]
    return [n.as_posix() for n in names if not n.name.startswith(".") and n.suffix != ".md"]


def _refuse_strangers(folder: Path, manifest: Manifest) -> None:
    """Raise ArtifactError for a file that is not in the manifest: a loader might read it (a template, an
    adapter, other weights)."""
    known = {MANIFEST, MODEL_FILE, RESIDUAL_FILE, *manifest.files}
    for name in sorted(_names(folder)):
        if name not in known:
            raise ArtifactError(f"{folder}: file {name} must not be there, got one")


def _require_equal(which: str, wanted: object, got: object) -> None:
    if wanted != got:
        raise ArtifactError(f"{which} must be {wanted}, got {got}")


def _fingerprint(tensor: Tensor) -> dict[str, Any]:
    raw = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
    return {
        "dtype": _DTYPES[tensor.dtype],
        "shape": list(tensor.shape),
        "sha256": hashlib.sha256(raw).hexdigest(),
    }


def _sha256_of_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _stored_tensors(path: Path) -> dict[str, dict[str, Any]]:
    """Return the fingerprints of a safetensors file's tensors, read from its bytes."""
    try:
        with safe_open(path, framework="np") as file:  # checks the header and the length of the file
            names = list(file.keys())
    except (SafetensorError, OSError) as error:
        raise ArtifactError(f"{path} must be a safetensors file, got: {error}") from None
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        view, fingerprints = memoryview(data), {}
        for name in names:
            start, end = (8 + length + offset for offset in header[name]["data_offsets"])
            with view[start:end] as raw:
                digest = hashlib.sha256(raw).hexdigest()
            fingerprints[name] = {
                "file": os.path.basename(path),
                "dtype": header[name]["dtype"],
                "shape": header[name]["shape"],
                "sha256": digest,
            }
        view.release()
    return fingerprints
