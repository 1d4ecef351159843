"""Safetensors files read and written tensor by tensor: nothing is held that is not being worked on.

A file is 8 bytes of header length, a JSON header {name: {dtype, shape, data_offsets}}, the tensors' bytes.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from decdec_core.config import DecDECError
from decdec_core.files import whole_file

DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
_PIECE = 1 << 24  # bytes copied at once


class TensorFileError(DecDECError):
    """A file that is no safetensors file, or lacks a tensor."""


class TensorSource(Protocol):
    """A tensor that can be written to a file: safetensors' dtype name, shape, and bytes piece by piece."""

    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def nbytes(self) -> int: ...
    def pieces(self) -> Iterator[memoryview]: ...


@dataclass(frozen=True)
class MemoryTensor:
    """A tensor in memory, of any device."""

    tensor: Tensor

    @property
    def dtype(self) -> str:
        return DTYPE_NAMES[self.tensor.dtype]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    @property
    def nbytes(self) -> int:
        return self.tensor.nbytes

    def pieces(self) -> Iterator[memoryview]:
        yield _bytes_of(self.tensor.detach().cpu().contiguous())

    def rows(self, first: int, last: int) -> Tensor:
        """Return rows first..last - 1."""
        return self.tensor.detach()[first:last]


@dataclass(frozen=True)
class FileTensor:
    """A tensor in a safetensors file. start: of its bytes in the file."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int

    def pieces(self) -> Iterator[memoryview]:
        with self.path.open("rb") as file:
            file.seek(self.start)
            left = self.nbytes
            while left:
                piece = file.read(min(left, _PIECE))
                if not piece:
                    raise TensorFileError(f"{self.path} must hold {left} bytes more of a tensor, got its end")
                left -= len(piece)
                yield memoryview(piece)

    def read(self) -> Tensor:
        """Return the tensor in memory of its own."""
        if self.dtype not in _DTYPES:
            raise TensorFileError(f"{self.path}: dtype must be one of {', '.join(_DTYPES)}, got {self.dtype}")
        tensor = torch.empty(self.shape, dtype=_DTYPES[self.dtype])
        view, filled = _bytes_of(tensor), 0
        for piece in self.pieces():
            view[filled : filled + len(piece)] = piece
            filled += len(piece)
        return tensor

    def rows(self, first: int, last: int) -> Tensor:
        """Return rows first..last - 1 in memory of their own."""
        size = self.nbytes // self.shape[0]
        shape = (last - first, *self.shape[1:])
        return FileTensor(
            self.path, self.dtype, shape, self.start + first * size, (last - first) * size
        ).read()

    def sha256(self) -> str:
        """Return the digest of its bytes."""
        digest = hashlib.sha256()
        for piece in self.pieces():
            digest.update(piece)
        return digest.hexdigest()


@dataclass(frozen=True)
class ComputedTensor:
    """A float32 tensor that is made while it is written; `make` yields it some rows at a time."""

    shape: tuple[int, ...]
    make: Callable[[], Iterable[Tensor]]

    @property
    def dtype(self) -> str:
        return DTYPE_NAMES[torch.float32]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * torch.float32.itemsize

    def pieces(self) -> Iterator[memoryview]:
        for part in self.make():
            yield from MemoryTensor(part).pieces()


@dataclass(frozen=True)
class CastTensor:
    """A tensor of at least one dimension in another floating dtype, cast some rows at a time."""

    source: FileTensor | MemoryTensor
    to: torch.dtype

    @property
    def dtype(self) -> str:
        return DTYPE_NAMES[self.to]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.source.shape

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.to.itemsize

    def pieces(self) -> Iterator[memoryview]:
        count = self.shape[0]
        rows = max(1, _PIECE * count // max(1, self.nbytes))
        for first in range(0, count, rows):
            part = self.source.rows(first, min(first + rows, count))
            yield from MemoryTensor(part.to(self.to)).pieces()


def _bytes_of(tensor: Tensor) -> memoryview:
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def file_tensors(path: Path) -> dict[str, FileTensor]:
    """Return the tensors of a safetensors file by name; a file that is none raises TensorFileError."""
    try:
        with safe_open(path, framework="np") as checked:  # checks the header and the length of the file
            names = list(checked.keys())
    except (SafetensorError, OSError) as error:
        first = str(error).partition("\n")[0]
        raise TensorFileError(f"{path} must be a safetensors file, got: {first}") from None
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    tensors = {}
    for name in names:
        entry = header[name]
        start, end = entry["data_offsets"]
        tensors[name] = FileTensor(
            path, entry["dtype"], tuple(entry["shape"]), 8 + length + start, end - start
        )
    return tensors


def write_tensors(path: Path, tensors: Mapping[str, TensorSource]) -> dict[str, str]:
    """Write a safetensors file, whole or not at all, and return the sha256 of each tensor's bytes."""
    # the widest first, so that every tensor begins at a multiple of its width
    ordered = sorted(tensors, key=lambda name: (-_width(tensors[name]), name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in ordered:
        source = tensors[name]
        header[name] = {
            "dtype": source.dtype,
            "shape": list(source.shape),
            "data_offsets": [end, end + source.nbytes],
        }
        end += source.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digests = {}
    with whole_file(path) as temporary, temporary.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in ordered:
            digest = hashlib.sha256()
            for piece in tensors[name].pieces():
                digest.update(piece)
                file.write(piece)
            digests[name] = digest.hexdigest()
        file.flush()
        os.fsync(file.fileno())
    return digests


def _width(source: TensorSource) -> int:
    return _DTYPES[source.dtype].itemsize


class TensorFiles:
    """The tensors of several safetensors files, by name; a name in two of them raises TensorFileError."""

    def __init__(self, paths: Iterable[Path]) -> None:
        self.paths = list(paths)

    @classmethod
    def of_folder(cls, folder: Path, stem: str = "model") -> TensorFiles:
        """Return those of a folder as Hugging Face lays them out: STEM.safetensors, or the shards that
        STEM.safetensors.index.json names. A folder without either raises TensorFileError."""
        single, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
        if single.is_file():
            return cls([single])
        if not index.is_file():
            raise TensorFileError(f"{folder} must hold {single.name} or {index.name}, got neither")
        try:
            files = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise TensorFileError(f"{index} must be JSON with a weight_map, got something else") from None
        for file in files:
            if not isinstance(file, str) or Path(file).name != file or not (folder / file).is_file():
                raise TensorFileError(f"{index} must name files of its folder, got {file!r}")
        return cls([folder / file for file in files])

    @cached_property
    def tensors(self) -> dict[str, FileTensor]:
        """The tensors by their names."""
        found: dict[str, FileTensor] = {}
        for path in self.paths:
            for name, tensor in file_tensors(path).items():
                if name in found:
                    raise TensorFileError(f"tensor {name} must be in one file, got it in {path.name} too")
                found[name] = tensor
        return found

    def __contains__(self, name: object) -> bool:
        return name in self.tensors

    def read(self, name: str) -> Tensor:
        """Return a tensor in memory of its own; a name that is not there raises TensorFileError."""
        if name not in self.tensors:
            raise TensorFileError(f"tensor {name} must be in {self.paths[0].parent}, got none")
        return self.tensors[name].read()
