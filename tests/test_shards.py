from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from decdec_core.shards import (
    FileTensor,
    MemoryTensor,
    TensorFileError,
    TensorFiles,
    file_tensors,
    write_tensors,
)

TENSORS = {
    "b": torch.arange(7, dtype=torch.uint8),
    "a": torch.randn(3, 5, 2),
    "half": torch.randn(4, 3).half(),
    "brain": torch.randn(9).bfloat16(),
    "empty": torch.empty(0, 4),
    "scalar": torch.tensor(2.5),
    "strided": torch.arange(12, dtype=torch.int32).view(3, 4).T,
}


def test_what_is_written_is_what_safetensors_reads(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    digests = write_tensors(path, {name: MemoryTensor(tensor) for name, tensor in TENSORS.items()})
    loaded = load_file(path)
    assert loaded.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)
        raw = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        assert digests[name] == hashlib.sha256(raw).hexdigest()
    found = file_tensors(path)
    for name, tensor in found.items():
        assert torch.equal(tensor.read(), TENSORS[name])
        assert tensor.sha256() == digests[name]
    assert torch.equal(found["a"].rows(1, 3), TENSORS["a"][1:3])
    # a copy from file to file, in another order of names, is the same file
    again = tmp_path / "y.safetensors"
    assert write_tensors(again, dict(reversed(found.items()))) == digests
    assert again.read_bytes() == path.read_bytes()
    assert [p.name for p in tmp_path.iterdir() if p.suffix == ".tmp"] == []


def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_tensors(path, {"a": MemoryTensor(torch.ones(3))})
    before = path.read_bytes()
    gone = FileTensor(tmp_path / "gone", "F32", (3,), 0, 12)
    with pytest.raises(FileNotFoundError):
        write_tensors(path, {"a": gone})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "content", [b"", b"\x80\x02}q", b"{}", b"\xff" * 40, (1 << 40).to_bytes(8, "little") + b"{}"]
)
def test_what_is_no_safetensors_file_is_named(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(TensorFileError, match=r"x\.safetensors must be a safetensors file, got") as caught:
        file_tensors(path)
    assert "\n" not in str(caught.value)


def test_a_file_cut_short_after_its_header_was_read(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_tensors(path, {"a": MemoryTensor(torch.ones(300))})
    tensor = file_tensors(path)["a"]
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(TensorFileError, match="must hold 8 bytes more of a tensor, got its end"):
        tensor.read()


def test_shards_of_a_folder(tmp_path: Path) -> None:
    for number, name in enumerate(("a", "b")):
        save_file({name: torch.full((2,), float(number))}, tmp_path / f"m-{number}.safetensors")
    index = tmp_path / "model.safetensors.index.json"

    def write(weight_map: object) -> None:
        index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))

    write({"a": "m-0.safetensors", "b": "m-1.safetensors"})
    files = TensorFiles.of_folder(tmp_path)
    assert "a" in files
    assert "c" not in files
    assert files.read("b").tolist() == [1, 1]
    with pytest.raises(TensorFileError, match="tensor c must be in"):
        files.read("c")
    for wrong in ("../m-0.safetensors", "absent.safetensors", 3):
        write({"a": wrong})
        with pytest.raises(TensorFileError, match="must name files of its folder, got"):
            TensorFiles.of_folder(tmp_path)
    write([])
    with pytest.raises(TensorFileError, match="must be JSON with a weight_map"):
        TensorFiles.of_folder(tmp_path)
    save_file({"a": torch.ones(1)}, tmp_path / "m-1.safetensors")
    write({"a": "m-0.safetensors", "b": "m-1.safetensors"})
    with pytest.raises(
        TensorFileError, match=r"tensor a must be in one file, got it in m-1\.safetensors too"
    ):
        TensorFiles.of_folder(tmp_path).tensors  # noqa: B018
