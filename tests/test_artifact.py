from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_artifacts import (
    MODEL,
    RESIDUAL,
    edit_json,
    hub_cache,
    link_out,
    write_tiny,
)

from decdec_core import errors, values
from decdec_core.artifact import is_artifact, require_artifact
from decdec_core.config import WeightQuant
from decdec_core.errors import ArtifactError
from decdec_core.manifest import read_manifest
from decdec_core.packing import pack_codes
from decdec_core.verify import verify

Damage = Callable[[Path], object]
MIXED = WeightQuant("rtn", 3.5)


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact of one file each. Shared: a test that alters it copies it first."""
    return write_tiny(tmp_path_factory.mktemp("whole") / "artifact")


@pytest.fixture(scope="session")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One of mixed bits, several files, and layers with an input order and an input scale."""
    folder = tmp_path_factory.mktemp("sharded") / "artifact"
    return write_tiny(folder, MIXED, [3, 4], shard_bytes=300_000, extras=True)


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "copy"))


def test_the_folder_is_what_a_hugging_face_user_expects(whole: Path) -> None:
    assert {path.name for path in whole.iterdir()} == {
        "config.json",
        "decdec.safetensors",
        "generation_config.json",
        "manifest.json",
        "residual.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    quantization = json.loads((whole / "config.json").read_text())["quantization_config"]
    assert quantization["quant_method"] == "decdec"
    assert quantization["format_version"] == 2
    assert quantization["weight"] == WeightQuant("rtn", 3).to_dict()
    assert quantization["block_bits"] is None
    assert quantization["provenance"]["source"] == "tiny"
    assert "torch" in quantization["provenance"]["versions"]
    assert is_artifact(whole)


def test_verify_covers_every_tensor_and_file(whole: Path) -> None:
    manifest = verify(whole)
    stored = [load_file(whole / name) for name in (MODEL, RESIDUAL)]
    assert manifest.tensors.keys() == stored[0].keys() | stored[1].keys()
    assert manifest.layers().keys() == {
        f"model.layers.{block}.{name}"
        for block in (0, 1)
        for name in (
            *(f"self_attn.{letter}_proj" for letter in "qkvo"),
            *(f"mlp.{kind}_proj" for kind in ("gate", "up", "down")),
        )
    }
    files = {path.name for path in whole.iterdir()}
    assert {*manifest.files, *manifest.headers, "manifest.json"} == files


def test_shards_keep_blocks_together_and_within_their_size(sharded: Path) -> None:
    manifest = verify(sharded)
    for stem in ("decdec", "residual"):
        files = manifest.shards(stem)
        assert len(files) > 2
        index = json.loads((sharded / f"{stem}.safetensors.index.json").read_text())
        assert sorted(set(index["weight_map"].values())) == files
        for file in files:
            tensors = load_file(sharded / file)
            assert len(tensors) == 1 or sum(t.nbytes for t in tensors.values()) <= 300_000
        numbers = [int(name.split(".")[2]) for file in files for name in _blocks_of(sharded / file)]
        assert numbers == sorted(numbers)
    assert sum(bool(extras) for extras in manifest.layers().values()) == 2


def _blocks_of(path: Path) -> list[str]:
    return sorted(name for name in load_file(path) if name.startswith("model.layers."))


def test_the_same_input_gives_the_same_bytes(sharded: Path, tmp_path: Path) -> None:
    again = write_tiny(tmp_path / "again", MIXED, [3, 4], shard_bytes=300_000, extras=True)
    assert read_manifest(again).hash == read_manifest(sharded).hash
    for path in sharded.iterdir():
        assert (again / path.name).read_bytes() == path.read_bytes(), path.name


@pytest.mark.parametrize("weight", [WeightQuant("squeezellm", 4), WeightQuant("rtn", 2, 65536)])
def test_other_formats_are_verified_alike(weight: WeightQuant, tmp_path: Path) -> None:
    assert len(verify(write_tiny(tmp_path / "a", weight, residual_bits=16)).layers()) == 14


def test_the_users_own_notes_do_not_matter(copy: Path) -> None:
    (copy / "README.md").write_text("mine")
    (copy / ".gitattributes").write_text("*.safetensors filter=lfs")
    (copy / ".git").mkdir()
    (copy / ".git" / "config").write_text("x")
    assert verify(copy).tensors


def test_a_folder_of_somebody_elses_is_a_stranger_too(copy: Path) -> None:
    (copy.parent / "templates").mkdir()
    (copy / "additional_chat_templates").symlink_to(copy.parent / "templates")
    with pytest.raises(errors.UnsafePathError, match="additional_chat_templates must be in its folder"):
        verify(copy)


def test_the_folder_itself_may_be_a_link(copy: Path) -> None:
    (copy.parent / "link").symlink_to(copy)
    assert verify(copy.parent / "link").hash == read_manifest(copy).hash


def test_the_cache_of_a_hub_links_to_its_own_blobs_only(whole: Path, tmp_path: Path) -> None:
    snapshot = hub_cache(whole, tmp_path / "hub")
    assert verify(snapshot).hash == read_manifest(whole).hash
    link_out("config.json")(snapshot)
    with pytest.raises(errors.UnsafePathError, match=r"config.json must be in its folder"):
        verify(snapshot)


def test_padding_of_codes() -> None:
    codes = torch.randint(0, 8, (4, 40), dtype=torch.uint8)
    padded = pack_codes(codes, 3)
    assert values._is_padded(padded, 3, 40)
    assert not values._is_padded(padded, 3, 33)


def test_a_folder_that_is_none(tmp_path: Path) -> None:
    assert not is_artifact(tmp_path)
    assert not is_artifact(tmp_path / "absent")
    for config in ("[]", "{", "[" * 100_000, '{"quantization_config": [1]}', '{"quantization_config": null}'):
        (tmp_path / "config.json").write_text(config)
        assert not is_artifact(tmp_path)
    with pytest.raises(ArtifactError, match="artifact must be a folder that `decdec build` made, got"):
        require_artifact(tmp_path)
    with pytest.raises(ArtifactError, match="artifact must be a folder, got"):
        verify(tmp_path / "absent")
    with pytest.raises(errors.ManifestError, match=r"file manifest\.json must be there"):
        verify(tmp_path)


def test_the_hash_is_of_the_manifest_and_so_of_everything(copy: Path) -> None:
    before = read_manifest(copy).hash
    (copy / "manifest.json").write_text((copy / "manifest.json").read_text() + " ")
    assert read_manifest(copy).hash != before


def test_a_message_is_one_line_whatever_the_names(copy: Path) -> None:
    edit_json("manifest.json", lambda m: m["files"].update({"a\nb\u2028c\ud800": "0"}))(copy)
    with pytest.raises(ArtifactError) as caught:
        verify(copy)
    assert len(str(caught.value).splitlines()) == 1
    str(caught.value).encode()
