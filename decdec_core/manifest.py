"""manifest.json: what an artifact's folder holds, and the rules for the names in it."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from decdec_core.config import EXTRAS
from decdec_core.errors import FormatVersionError, ManifestError, UnsafePathError

FORMAT_VERSION = 2
QUANT_METHOD = "decdec"
MANIFEST, CONFIG = "manifest.json", "config.json"
MODEL_STEM, HOST_STEM = "decdec", "residual"


@dataclass(frozen=True)
class Manifest:
    """tensors: name -> {"file", "dtype", "shape", "sha256"}. headers: safetensors file -> sha256 of its
    header. files: every other file -> sha256. hash: the artifact's."""

    tensors: dict[str, dict[str, Any]]
    headers: dict[str, str]
    files: dict[str, str]
    hash: str

    def layers(self) -> dict[str, tuple[str, ...]]:
        """Return the quantized layers' names, and which of EXTRAS each has."""
        names = [
            name.removesuffix(".residual.codes") for name in self.tensors if name.endswith(".residual.codes")
        ]
        return {name: tuple(e for e in EXTRAS if f"{name}.{e}" in self.tensors) for name in names}

    def shards(self, stem: str) -> list[str]:
        """Return the names of the files of MODEL_STEM or HOST_STEM, in order."""
        count = sum(name.startswith((f"{stem}.", f"{stem}-")) for name in self.headers)
        return shard_names(stem, max(1, count))


def shard_names(stem: str, count: int) -> list[str]:
    """Return the names of `count` safetensors files that hold one set of tensors."""
    if count == 1:
        return [f"{stem}.safetensors"]
    return [f"{stem}-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]


def require_format_version(got: object) -> None:
    """Raise FormatVersionError unless `got` is the format version that this release reads."""
    if got != FORMAT_VERSION or isinstance(got, (bool, float)):
        raise FormatVersionError(f"format_version must be {FORMAT_VERSION}, got {got!r}: build it again")


def own_files(folder: Path) -> list[str]:
    """Return the names of the files that belong to an artifact, relative to its folder. Hidden files and
    Markdown are the user's: nothing reads them. A link that leads out of it raises UnsafePathError."""
    # in the cache of a model hub a file is a link to a blob of the same repository
    roots = [folder.resolve()]
    if folder.parent.name == "snapshots":
        roots.append(folder.resolve().parents[1] / "blobs")
    names = []
    for where, directories, files in os.walk(folder):
        directories[:] = [name for name in directories if not name.startswith(".")]
        for name in (*directories, *files):
            path = Path(where, name)
            own = not name.startswith(".") and path.suffix != ".md"
            if own and path.is_symlink() and not any(map(path.resolve().is_relative_to, roots)):
                raise UnsafePathError(f"{path} must be in its folder, got a link to {path.resolve()}")
            if own and path.is_file():
                names.append(path.relative_to(folder).as_posix())
    return names


def read_manifest(folder: Path) -> Manifest:
    """Return the manifest of an artifact of this format version; anything else raises ArtifactError."""
    path = folder / MANIFEST
    if not path.is_file():
        raise ManifestError(f"{folder}: file {MANIFEST} must be there, got none")
    text = path.read_bytes()
    try:
        body = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ManifestError(f"{path} must be JSON, got {error}") from None
    if not isinstance(body, dict) or body.get("format") != QUANT_METHOD:
        raise ManifestError(f"{path} must be of format {QUANT_METHOD!r}, got another")
    require_format_version(body.get("format_version"))
    tensors, headers, files = (body.get(key) for key in ("tensors", "headers", "files"))
    if not (isinstance(tensors, dict) and isinstance(headers, dict) and isinstance(files, dict)):
        raise ManifestError(f"{path} must list tensors, headers and files, got others")
    for name in (*headers, *files):
        _require_inside(path, name)
    manifest = Manifest(tensors, headers, files, hashlib.sha256(text).hexdigest())
    named = [name for stem in (MODEL_STEM, HOST_STEM) for name in manifest.shards(stem)]
    if CONFIG not in files or sorted(headers) != sorted(named):
        raise ManifestError(f"{path} must list {CONFIG}, and all shards of weights and residual, got others")
    for name, entry in tensors.items():
        if not _is_entry(entry, headers):
            raise ManifestError(f"{path}: {name} must be a tensor's entry, got {entry!r}")
    return manifest


def _is_entry(entry: object, headers: Mapping[str, str]) -> bool:
    if not isinstance(entry, dict) or entry.keys() != {"file", "dtype", "shape", "sha256"}:
        return False
    shape, words = entry["shape"], (entry["file"], entry["dtype"], entry["sha256"])
    whole = isinstance(shape, list) and all(type(length) is int for length in shape)
    return whole and all(isinstance(word, str) for word in words) and entry["file"] in headers


def _require_inside(listing: Path, name: str) -> None:
    """Raise UnsafePathError unless `name` is a plain path below the folder, before anything is opened."""
    path = PurePosixPath(name)
    plain = path.as_posix() == name and name != "." and "\\" not in name and "\0" not in name
    if not plain or path.is_absolute() or ".." in path.parts:
        raise UnsafePathError(f"{listing} must name files of its folder, got {name!r}")


def sha256_of_file(path: Path) -> str:
    """Return the digest of a whole file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def header_sha256(path: Path) -> str:
    """Return the digest of a safetensors file's header, its length included."""
    with path.open("rb") as file:
        length = file.read(8)
        return hashlib.sha256(length + file.read(int.from_bytes(length, "little"))).hexdigest()
