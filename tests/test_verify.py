"""Every damage of an artifact is named, by verify and by loading alike."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_artifacts import (
    LAYER,
    MODEL,
    RESIDUAL,
    edit_json,
    edit_tensor,
    edit_tensors,
    flip,
    link_out,
    make_consistent,
    truncate,
    write_tiny,
)
from transformers import AutoModelForCausalLM

from decdec_core import errors
from decdec_core.config import WeightQuant
from decdec_core.errors import ArtifactError
from decdec_core.verify import verify

Damage = Callable[[Path], object]


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact of one file each. Shared: a test that alters it copies it first."""
    return write_tiny(tmp_path_factory.mktemp("whole") / "artifact")


@pytest.fixture(scope="session")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One of mixed bits, several files, and layers with an input order and an input scale."""
    folder = tmp_path_factory.mktemp("sharded") / "artifact"
    return write_tiny(folder, WeightQuant("rtn", 3.5), [3, 4], shard_bytes=300_000, extras=True)


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "copy"))


@pytest.fixture
def shards(sharded: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sharded, tmp_path / "shards"))


def _swap(tensors: dict[str, torch.Tensor]) -> None:
    a, b = (f"model.layers.0.mlp.{name}.codes" for name in ("gate_proj", "up_proj"))
    tensors[a], tensors[b] = tensors[b], tensors[a]


def _fill(value: float) -> Callable[[torch.Tensor], None]:
    def fill(tensor: torch.Tensor) -> None:
        tensor.view(-1)[0] = value

    return fill


def _other_manifest(folder: Path) -> None:
    other = write_tiny(folder.parent / "other", seed=1)
    shutil.copy(other / "manifest.json", folder)


def _quantization(**changes: Any) -> Damage:
    return edit_json("config.json", lambda c: c["quantization_config"].update(changes))


def _as_pickle(file: str) -> Damage:
    return lambda folder: torch.save({"weight": torch.ones(2)}, folder / file)


def _old_pickle(folder: Path) -> None:
    torch.save({}, folder / MODEL, _use_new_zipfile_serialization=False)


# what happens to folders: a disk, a download, a hand, a mix-up. The manifest does not know of it
ACCIDENTS: dict[str, tuple[Damage, type[ArtifactError], str]] = {
    "truncated file": (truncate(MODEL, -100), errors.BrokenFileError, r"must be a safetensors file, got"),
    "truncated to nothing": (truncate(RESIDUAL, 0), errors.BrokenFileError, r"must be a safetensors file"),
    "flipped byte": (flip(RESIDUAL, -5), errors.ChecksumError, r"tensor .*: sha256 must be .*, got"),
    "flipped byte in the header": (
        flip(MODEL, 8 + 19),  # of the word "format", which no reader of tensors looks at
        errors.ChecksumError,
        r"decdec.safetensors: header: sha256 must be",
    ),
    "flipped byte in the header's length": (
        flip(MODEL, 3),
        errors.BrokenFileError,
        r"must be a safetensors",
    ),
    "missing tensor": (
        edit_tensors(MODEL, lambda t: t.pop(f"{LAYER}.scales")),
        errors.MissingTensorError,
        r"scales must be there, got none",
    ),
    "extra tensor": (
        edit_tensors(MODEL, lambda t: t.update(extra=torch.ones(2))),
        errors.ExtraTensorError,
        r"tensor extra must not be there",
    ),
    "a tensor in both files": (
        edit_tensors(MODEL, lambda t: t.update({f"{LAYER}.residual.scale": torch.ones(3)})),
        errors.ExtraTensorError,
        r"residual.scale must be in one file",
    ),
    "wrong dtype": (
        edit_tensor(f"{LAYER}.scales", lambda t: t.bfloat16()),
        errors.WrongDtypeError,
        r"scales: dtype must be F16, got BF16",
    ),
    "wrong shape": (
        edit_tensor(f"{LAYER}.residual.scale", lambda t: t[:3].clone()),
        errors.WrongShapeError,
        r"scale: shape must be \[160\], got \[3\]",
    ),
    "NaN scale": (
        edit_tensor(f"{LAYER}.scales", _fill(float("nan"))),
        errors.ChecksumError,
        r"sha256 must be",
    ),
    "swapped layers": (edit_tensors(MODEL, _swap), errors.ChecksumError, r"sha256 must be"),
    "wrong residual bits": (
        _quantization(residual={"bits": 8}),
        errors.ChecksumError,
        r"config.json: sha256 must be",
    ),
    "manifest of another artifact": (
        _other_manifest,
        errors.ManifestError,
        r"must be this artifact's, got one that none of 14 residuals fits",
    ),
    "manifest missing": (
        lambda f: (f / "manifest.json").unlink(),
        errors.ManifestError,
        r"file manifest.json must be there, got none",
    ),
    "manifest that is no JSON": (truncate("manifest.json", 90), errors.ManifestError, r"must be JSON"),
    "config edited": (
        edit_json("config.json", lambda c: c.update(rms_norm_eps=0.1)),
        errors.ChecksumError,
        r"config.json: sha256 must be",
    ),
    "another format version": (
        edit_json("manifest.json", lambda m: m.update(format_version=1)),
        errors.FormatVersionError,
        r"format_version must be 2, got 1: build it again",
    ),
    "a path that escapes": (
        edit_json("manifest.json", lambda m: m["files"].update({"../x": "0"})),
        errors.UnsafePathError,
        r"must name files of its folder, got '\.\./x'",
    ),
    "an absolute path": (
        edit_json("manifest.json", lambda m: m["headers"].update({"/etc/passwd": "0"})),
        errors.UnsafePathError,
        r"must name files of its folder, got '/etc/passwd'",
    ),
    "weights that are a link out of the folder": (link_out(MODEL), errors.UnsafePathError, r"got a link to"),
    "a tokenizer that is one": (link_out("tokenizer.json"), errors.UnsafePathError, r"got a link to"),
    "a pickle in place of the weights": (_as_pickle(MODEL), errors.UnsafeFileError, r"got a pickle"),
    "an old pickle in place of the residual": (_old_pickle, errors.UnsafeFileError, r"got a pickle"),
    "a pickle beside the weights": (
        _as_pickle("pytorch_model.bin"),
        errors.UnsafeFileError,
        r"pytorch_model.bin must not be a pickle",
    ),
    "missing residual": (
        lambda f: (f / RESIDUAL).unlink(),
        errors.MissingFileError,
        r"file residual.safetensors must be there",
    ),
    "other weights beside them": (
        lambda f: shutil.copy(f / MODEL, f / "model.safetensors"),
        errors.ExtraFileError,
        r"file model.safetensors must not be there",
    ),
    "a template of somebody else's": (
        lambda f: (f / "chat_template.jinja").write_text("x"),
        errors.ExtraFileError,
        r"file chat_template.jinja must not be there",
    ),
    "manifest without config.json": (
        edit_json("manifest.json", lambda m: m["files"].pop("config.json")),
        errors.ManifestError,
        r"must list config.json, and all shards",
    ),
    "manifest entry that is none": (
        edit_json("manifest.json", lambda m: m["tensors"].update(x="y")),
        errors.ManifestError,
        r"x must be a tensor's entry, got 'y'",
    ),
}

# the same where the manifest was written to agree
CONSISTENT: dict[str, tuple[Damage, type[ArtifactError], str]] = {
    "missing tensor": (
        edit_tensors(MODEL, lambda t: t.pop(f"{LAYER}.scales")),
        errors.MissingTensorError,
        r"scales must be there, got none",
    ),
    "missing layer": (
        edit_tensors(RESIDUAL, lambda t: [t.pop(n) for n in list(t) if n.startswith(LAYER)]),
        errors.MissingTensorError,
        rf"{LAYER}.calibration.mean must be there, got none",
    ),
    "missing norm": (
        edit_tensors(MODEL, lambda t: t.pop("model.norm.weight")),
        errors.MissingTensorError,
        r"model.norm.weight must be there",
    ),
    "extra tensor": (
        edit_tensors(MODEL, lambda t: t.update(extra=torch.ones(2))),
        errors.ExtraTensorError,
        r"tensor extra must not be there",
    ),
    "wrong dtype": (
        edit_tensor(f"{LAYER}.scales", lambda t: t.float()),
        errors.WrongDtypeError,
        r"scales: dtype must be F16, got F32",
    ),
    "embeddings of another dtype than the model": (
        edit_tensor("model.embed_tokens.weight", lambda t: t.half()),
        errors.WrongDtypeError,
        r"embed_tokens.weight: dtype must be F32, got F16",
    ),
    "wrong shape": (
        edit_tensor(f"{LAYER}.zeros", lambda t: t[:, :1].clone()),
        errors.WrongShapeError,
        r"zeros: shape must be \[160, 9\], got \[160, 1\]",
    ),
    "wrong residual bits": (
        _quantization(residual={"bits": 8}),
        errors.WrongShapeError,
        r"residual.codes: shape must be \[1120, 160\], got \[1120, 80\]",
    ),
    "wrong bits": (
        _quantization(weight={"method": "rtn", "bits": 2, "group_size": 128}),
        errors.WrongShapeError,
        r"codes: shape must be \[160, 70\], got \[160, 105\]",
    ),
    "another format of weights": (
        _quantization(weight={"method": "squeezellm", "bits": 3}),
        errors.ExtraTensorError,
        r"scales must not be there",
    ),
    "swapped layers of two shapes": (
        edit_tensors(
            MODEL, lambda t: t.update({f"{LAYER}.codes": t["model.layers.0.mlp.up_proj.codes"].clone()})
        ),
        errors.WrongShapeError,
        r"codes: shape must be \[160, 105\], got \[1120, 15\]",
    ),
    "a model of more blocks": (
        edit_json("config.json", lambda c: c.update(num_hidden_layers=10**12)),
        errors.ConfigError,
        r"num_hidden_layers must be 2, got 1000000000000",
    ),
    "an architecture that is none of ours": (
        edit_json("config.json", lambda c: c.update(model_type="gpt2")),
        errors.ConfigError,
        r"model_type must be one of llama",
    ),
    "bits that are none": (
        _quantization(weight={"method": "rtn", "bits": 7}),
        errors.ConfigError,
        r"quantization_config: bits must be one of",
    ),
    "block bits without a half step": (
        _quantization(block_bits=[3, 4]),
        errors.ConfigError,
        r"block_bits must be given for a half step of bits, got \[3, 4\] at 3",
    ),
    "a path that escapes through the config": (
        _quantization(weights_file="../decdec.safetensors"),
        errors.ConfigError,
        r"weights_file must be decdec.safetensors or its index",
    ),
    "NaN scale": (
        edit_tensor(f"{LAYER}.scales", _fill(float("nan"))),
        errors.BadValueError,
        r"scales must be finite, got NaN or infinity",
    ),
    "scale of zero": (
        edit_tensor(f"{LAYER}.scales", _fill(0)),
        errors.BadValueError,
        r"scales must be positive",
    ),
    "infinite embedding": (
        edit_tensor("model.embed_tokens.weight", _fill(float("inf"))),
        errors.BadValueError,
        r"embed_tokens.weight must be finite",
    ),
    "zero of too many bits": (
        edit_tensor(f"{LAYER}.zeros", _fill(8)),
        errors.BadValueError,
        r"zeros must be below 8",
    ),
    "negative residual scale": (
        edit_tensor(f"{LAYER}.residual.scale", _fill(-1)),
        errors.BadValueError,
        r"residual.scale must be positive",
    ),
    "NaN in the statistics": (
        edit_tensor(f"{LAYER}.calibration.mean", _fill(float("nan"))),
        errors.BadValueError,
        r"calibration.mean must be finite",
    ),
    "negative mean square": (
        edit_tensor(f"{LAYER}.calibration.mean_square", _fill(-1)),
        errors.BadValueError,
        r"mean_square must be non-negative",
    ),
    "ranks out of order": (
        edit_tensor(f"{LAYER}.calibration.rank_max", lambda t: t.flip(0)),
        errors.BadValueError,
        r"rank_max must be non-negative and non-increasing",
    ),
}

SHARDED: dict[str, tuple[Damage, type[ArtifactError], str]] = {
    "an order that is no permutation": (
        edit_tensor("model.layers.1.self_attn.o_proj.input_order", _fill(7)),
        errors.BadValueError,
        r"input_order must be a permutation",
    ),
    "an input scale of zero": (
        edit_tensor("model.layers.0.mlp.down_proj.input_scale", _fill(0)),
        errors.BadValueError,
        r"input_scale must be positive",
    ),
    "block bits of other blocks": (
        _quantization(block_bits=[4, 3]),
        errors.WrongShapeError,
        r"codes: shape must be",
    ),
    "block bits that are none of the two": (
        _quantization(block_bits=[3, 5]),
        errors.ConfigError,
        r"block_bits must be a list of 3 or 4, got \[3, 5\]",
    ),
    "block bits of too few blocks": (
        _quantization(block_bits=[3]),
        errors.ConfigError,
        r"length of block_bits must be 2, got 1",
    ),
    "an index that escapes": (
        edit_json(
            "decdec.safetensors.index.json",
            lambda i: i["weight_map"].update({"model.norm.weight": "../decdec-00001-of-00006.safetensors"}),
        ),
        errors.ManifestError,
        r"index.json must place the tensors where they are",
    ),
    "an index that is no JSON": (
        truncate("decdec.safetensors.index.json", 50),
        errors.ManifestError,
        r"index.json must be JSON",
    ),
}


def _require_named(folder: Path, error: type[ArtifactError], message: str) -> None:
    """Assert that verify and loading refuse the folder alike, by class and in one line."""
    with pytest.raises(error, match=message) as by_verify:
        verify(folder)
    assert "\n" not in str(by_verify.value)
    assert type(by_verify.value) is error
    with pytest.raises(error, match=message) as by_loading:
        AutoModelForCausalLM.from_pretrained(folder)
    assert str(by_loading.value) == str(by_verify.value)


@pytest.mark.parametrize("damage", ACCIDENTS)
def test_an_accident_is_named_by_verify_and_by_loading(damage: str, copy: Path) -> None:
    alter, error, message = ACCIDENTS[damage]
    alter(copy)
    _require_named(copy, error, message)


@pytest.mark.parametrize("damage", CONSISTENT)
def test_a_manifest_that_agrees_with_the_damage_does_not_hide_it(damage: str, copy: Path) -> None:
    alter, error, message = CONSISTENT[damage]
    alter(copy)
    make_consistent(copy)
    _require_named(copy, error, message)


@pytest.mark.parametrize("damage", SHARDED)
def test_nor_in_several_files(damage: str, shards: Path) -> None:
    alter, error, message = SHARDED[damage]
    alter(shards)
    make_consistent(shards)
    _require_named(shards, error, message)
