from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from decdec_core.artifact import ArtifactError, is_artifact, read_manifest, verify

LAYER = "model.layers.0.mlp.down_proj"


@pytest.fixture
def copy(tiny_artifact_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_artifact_dir, tmp_path / "copy"))


def test_the_folder_is_what_a_hugging_face_user_expects(tiny_artifact_dir: Path) -> None:
    names = {path.name for path in tiny_artifact_dir.iterdir()}
    assert {
        "config.json",
        "generation_config.json",
        "manifest.json",
        "model.safetensors",
        "residual.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    } == names
    config = json.loads((tiny_artifact_dir / "config.json").read_text())
    quantization = config["quantization_config"]
    assert quantization["quant_method"] == "decdec"
    assert quantization["weight"] == {"method": "awq", "bits": 3, "group_size": 128}
    assert quantization["provenance"]["calibration"]["text"].startswith("pydoc")
    assert is_artifact(tiny_artifact_dir)


def test_verify_covers_every_tensor_and_file(tiny_artifact_dir: Path) -> None:
    manifest = verify(tiny_artifact_dir)
    stored = [load_file(tiny_artifact_dir / f"{name}.safetensors") for name in ("model", "residual")]
    assert manifest.tensors.keys() == stored[0].keys() | stored[1].keys()
    assert len(manifest.layers()) == 14
    assert set(manifest.files) == {
        p.name
        for p in tiny_artifact_dir.iterdir()
        if p.suffix != ".safetensors" and p.name != "manifest.json"
    }


def _flip_byte(folder: Path) -> None:
    path = folder / "residual.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


def _edit(file: str, change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        tensors = load_file(folder / file)
        change(tensors)
        save_file(tensors, folder / file, metadata={"format": "pt"})

    return edit


def _swap(tensors: dict[str, torch.Tensor]) -> None:
    a, b = (f"model.layers.0.mlp.{name}.codes" for name in ("gate_proj", "up_proj"))
    tensors[a], tensors[b] = tensors[b], tensors[a]


def _edit_config(folder: Path) -> None:
    path = folder / "config.json"
    path.write_text(path.read_text().replace('"bits": 3', '"bits": 4'))


def _truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def _manifest(change: Callable[[dict[str, object]], object]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        body = json.loads((folder / "manifest.json").read_text())
        change(body)
        (folder / "manifest.json").write_text(json.dumps(body))

    return edit


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "flipped byte": (_flip_byte, r"tensor .*: sha256 must be .*, got"),
    "missing tensor": (
        _edit("model.safetensors", lambda t: t.pop(f"{LAYER}.scales")),
        r"scales must be there, got none",
    ),
    "extra tensor": (
        _edit("model.safetensors", lambda t: t.update(extra=torch.ones(2))),
        r"tensor extra must not be there",
    ),
    "wrong dtype": (
        _edit("model.safetensors", lambda t: t.update({f"{LAYER}.scales": t[f"{LAYER}.scales"].float()})),
        r"scales: dtype must be F16, got F32",
    ),
    "wrong shape": (
        _edit("residual.safetensors", lambda t: t.update({f"{LAYER}.residual.scale": torch.ones(3)})),
        r"scale: shape must be \[160\], got \[3\]",
    ),
    "swapped layers": (_edit("model.safetensors", _swap), r"codes: sha256 must be"),
    "edited config": (_edit_config, r"config.json: sha256 must be"),
    "truncated file": (_truncate, r"model.safetensors must be a safetensors file, got"),
    "missing residual": (
        lambda f: (f / "residual.safetensors").unlink(),
        r"file residual.safetensors must be there",
    ),
    "missing manifest": (lambda f: (f / "manifest.json").unlink(), r"file manifest.json must be there"),
    "manifest that is no JSON": (lambda f: (f / "manifest.json").write_text("{"), r"must be JSON"),
    "another format version": (
        _manifest(lambda m: m.update(format_version=2)),
        r"format_version must be 1, got 2",
    ),
    "a path that escapes": (
        _manifest(lambda m: m["files"].update({"../x": "0"})),  # type: ignore[attr-defined]
        r"file \.\./x must be there",
    ),
    "manifest without config.json": (
        _manifest(lambda m: m["files"].pop("config.json")),  # type: ignore[attr-defined]
        r"must list tensors and files, config.json among them",
    ),
    "manifest entry that is none": (
        _manifest(lambda m: m["tensors"].update(x="y")),  # type: ignore[attr-defined]
        r"x must be a tensor's entry, got 'y'",
    ),
    "a file of somebody else's": (
        lambda f: (f / "chat_template.jinja").write_text("x"),
        r"file chat_template.jinja must not be there",
    ),
    "a tensor in both files": (
        _edit("model.safetensors", lambda t: t.update({f"{LAYER}.residual.scale": torch.ones(3)})),
        r"residual.scale must be in one file",
    ),
    "a pickle": (lambda f: torch.save({}, f / "model.safetensors"), r"must be a safetensors file"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named_by_verify_and_by_loading(damage: str, copy: Path) -> None:
    alter, message = DAMAGE[damage]
    alter(copy)
    with pytest.raises(ArtifactError, match=message) as caught:
        verify(copy)
    assert "\n" not in str(caught.value)
    # transformers itself opens the weights before it asks us: a file that is none ends there, in its error
    expected = Exception if damage in ("truncated file", "a pickle") else ArtifactError
    with pytest.raises(expected):
        AutoModelForCausalLM.from_pretrained(copy)


def test_weights_beside_the_manifest_are_not_loaded(copy: Path) -> None:
    altered = load_file(copy / "model.safetensors")
    altered["model.norm.weight"] *= 5
    (copy / "model.safetensors").rename(copy / ".kept")
    save_file(altered, copy / "model.fp16.safetensors", metadata={"format": "pt"})
    with pytest.raises(ArtifactError, match=r"must be loaded from model\.safetensors, got model\.fp16"):
        AutoModelForCausalLM.from_pretrained(copy, variant="fp16")


def test_the_users_own_notes_do_not_matter(copy: Path) -> None:
    (copy / "README.md").write_text("mine")
    (copy / ".gitattributes").write_text("*.safetensors filter=lfs")
    assert verify(copy).tensors


def test_another_format_version_in_the_config_is_refused(copy: Path) -> None:
    path = copy / "config.json"
    path.write_text(path.read_text().replace('"format_version": 1', '"format_version": 9'))
    with pytest.raises(ArtifactError, match="format_version must be 1, got 9: build it again"):
        AutoModelForCausalLM.from_pretrained(copy)


def test_a_folder_that_is_none(tmp_path: Path) -> None:
    assert not is_artifact(tmp_path)
    assert not is_artifact(tmp_path / "absent")
    for config in ("[]", "{", '{"quantization_config": [1]}', '{"quantization_config": null}'):
        (tmp_path / "config.json").write_text(config)
        assert not is_artifact(tmp_path)
    with pytest.raises(ArtifactError, match="artifact must be a folder, got"):
        verify(tmp_path / "absent")
    with pytest.raises(ArtifactError, match=r"file manifest\.json must be there"):
        verify(tmp_path)


def test_the_hash_is_of_the_manifest_and_so_of_everything(copy: Path) -> None:
    before = read_manifest(copy).hash
    (copy / "manifest.json").write_text((copy / "manifest.json").read_text() + " ")
    assert read_manifest(copy).hash != before
