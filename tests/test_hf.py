"""from_pretrained and save_pretrained of artifacts, through transformers."""

from __future__ import annotations

import copy
import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import with_checkout_first
from tiny_artifacts import ORDERED, SCALED, hub_cache, write_tiny
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from decdec_core import errors
from decdec_core.config import Compensation, DecDECError, WeightQuant
from decdec_core.dense import write_dense
from decdec_core.manifest import read_manifest
from decdec_core.model import dec_layers, set_compensation
from decdec_core.verify import verify

KINDS: dict[str, dict[str, Any]] = {
    "uniform": {},
    "codebook": {"weight": WeightQuant("squeezellm", 3), "dtype": torch.bfloat16},
    "mixed, several files, extras": {
        "weight": WeightQuant("rtn", 3.5),
        "block_bits": [4, 3],
        "shard_bytes": 200_000,
        "extras": True,
    },
    "mixed codebooks": {"weight": WeightQuant("squeezellm", 2.5), "block_bits": [2, 3]},
    "tied": {"architecture": "llama-grouped-tied", "dtype": torch.float16},
    "tied, several files": {"architecture": "llama-grouped-tied", "shard_bytes": 100_000},
    "biases": {"architecture": "qwen2", "residual_bits": 16},
    "fused": {"architecture": "phi3", "weight": WeightQuant("rtn", 5), "residual_bits": 8},
}
IDS = torch.arange(40)[None]
CROSSED = {
    "model.embed_tokens": 1,
    "model.layers.0": 1,
    "model.layers.1": 0,
    "model.norm": 0,
    "model.rotary_emb": 0,
    "lm_head": 1,
}


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain one. Shared: a test that alters it copies it first."""
    return write_tiny(tmp_path_factory.mktemp("hf") / "artifact")


@pytest.fixture
def own(artifact: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(artifact, tmp_path / "own"))


def _load(folder: Path | str, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, **options)


@torch.no_grad()
def _logits(model: Any) -> torch.Tensor:
    return model(IDS.to(model.device)).logits


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_loads_saves_and_loads_again_bit_for_bit(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_tiny(tmp_path / "artifact", **KINDS[kind])
    with caplog.at_level(logging.WARNING, "transformers"):
        model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert not report["mismatched_keys"]
    logits = _logits(model)
    assert logits.isfinite().all()
    model.save_pretrained(tmp_path / "saved", max_shard_size="150KB")
    saved = verify(tmp_path / "saved")
    assert len(saved.shards("decdec")) > 2
    assert torch.equal(_logits(_load(tmp_path / "saved")), logits)
    # with the shard size that it had before it is the same artifact, byte for byte
    model.save_pretrained(tmp_path / "same", max_shard_size=KINDS[kind].get("shard_bytes", "4GB"))
    assert read_manifest(tmp_path / "same").hash == read_manifest(folder).hash


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_loaded_is_what_was_written(kind: str, tmp_path: Path) -> None:
    """The dense twin has been through no kernel and no DecLinear: equal to float32 rounding."""
    folder = write_tiny(tmp_path / "artifact", **KINDS[kind])
    model = _load(folder, dtype=torch.float32)
    set_compensation(model, Compensation("none"))
    dense = _load(write_dense(folder, tmp_path / "dense"))
    assert not dec_layers(dense)
    assert torch.allclose(_logits(model), _logits(dense), atol=1e-4)


@pytest.mark.parametrize("dtype", ["auto", torch.float32, torch.bfloat16, torch.float16])
def test_every_dtype(dtype: Any, tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "artifact", extras=True, dtype=torch.bfloat16)
    model = _load(folder, dtype=dtype)
    assert model.dtype == (torch.bfloat16 if dtype == "auto" else dtype)
    assert model.model.norm.weight.dtype == model.dtype
    scaled, ordered = model.get_submodule(SCALED), model.get_submodule(ORDERED)
    kept = (scaled.scales.dtype, scaled.input_scale.dtype, ordered.input_order.dtype, scaled.zeros.dtype)
    assert kept == (torch.float16, torch.float32, torch.int32, torch.uint8)
    logits = _logits(model)
    model.save_pretrained(tmp_path / "saved")
    again = _load(tmp_path / "saved")
    assert again.dtype == model.dtype
    assert torch.equal(_logits(again), logits)


@pytest.mark.parametrize("device_map", ["auto", "cpu", {"": "cpu"}, None])
def test_device_maps(device_map: Any, artifact: Path) -> None:
    model = _load(artifact, device_map=device_map)
    assert len(dec_layers(model)) == 14
    if model.device.type == "cpu":
        assert torch.equal(_logits(model), _logits(_load(artifact, device_map="cpu")))


@pytest.mark.parametrize(
    "options",
    [
        {"device_map": "auto", "max_memory": {"cpu": 300_000}},
        {"device_map": {"model": "cpu", "lm_head": "disk"}},
        {"device_map": {"model": "cuda:0", "lm_head": "cpu"}},
    ],
)
def test_offloading_is_refused(options: dict[str, Any], artifact: Path, tmp_path: Path) -> None:
    with pytest.raises(DecDECError, match="device_map must place a decdec model on GPUs or on the CPU"):
        _load(artifact, offload_folder=tmp_path, **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.cuda
def test_offloading_from_a_gpu_is_refused(artifact: Path, tmp_path: Path) -> None:
    rooms = {0: 400_000, "cpu": "1GB"}  # of 1.1 MB; accelerate puts a model on the CPU where none fits
    with pytest.raises(DecDECError, match="without offloading, got 0, cpu"):
        _load(artifact, device_map="auto", max_memory=rooms, dtype=torch.float16, offload_folder=tmp_path)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_device_map_auto_takes_a_gpu(dtype: torch.dtype, artifact: Path) -> None:
    placed = _load(artifact, device_map="auto", dtype=dtype)
    assert {str(p.device) for p in placed.parameters()} <= {f"cuda:{i}" for i in range(4)}
    assert _continuation(placed) == _continuation(_load(artifact, dtype=dtype).to("cuda:0"))


@pytest.mark.cuda(2)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("device_map", ["auto", "balanced", CROSSED], ids=["auto", "balanced", "crossed"])
def test_device_maps_over_two_gpus(device_map: Any, dtype: torch.dtype, artifact: Path) -> None:
    """Blocks on either GPU: a pass and decoding steps, compensated, are those on one, bit for bit."""
    placed = _load(artifact, device_map=device_map, dtype=dtype)
    places = {layer.scales.device.index for layer in dec_layers(placed).values()}
    assert places == {0, 1}
    for compensation in (Compensation("none"), Compensation("static", 64), Compensation("dynamic", 64)):
        one = _load(artifact, device_map={"": 0}, dtype=dtype)
        for model in (placed, one):
            set_compensation(model, compensation)
        assert torch.equal(_logits(placed).cpu(), _logits(one).cpu())
        assert _continuation(placed) == _continuation(one)


def _continuation(model: Any) -> list[int]:
    """Return the prompt and what greedy decoding appends."""
    ids = IDS[:, :8].to(model.device)
    done = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, pad_token_id=0
    )
    return done[0].tolist()


def test_a_copy_of_the_model_saves_itself(artifact: Path, tmp_path: Path) -> None:
    model = _load(artifact)
    twin = copy.deepcopy(model)
    twin.model.norm.weight.data.mul_(2)
    twin.save_pretrained(tmp_path / "twin")
    assert torch.equal(_load(tmp_path / "twin").model.norm.weight, model.model.norm.weight * 2)


def test_saving_over_the_folder_that_was_loaded(own: Path) -> None:
    (own / "README.md").write_text("mine")
    model = _load(own)
    before, logits = read_manifest(own), _logits(model)
    model.save_pretrained(own, max_shard_size="200KB")
    after = verify(own)
    assert len(after.shards("residual")) > 2
    assert not (own / "decdec.safetensors").exists()
    assert torch.equal(_logits(model), logits)
    assert torch.equal(_logits(_load(own)), logits)
    model.save_pretrained(own)
    assert verify(own).hash == before.hash
    assert {path.name for path in own.iterdir()} == {
        *before.files,
        *before.headers,
        "manifest.json",
        "README.md",
    }


def test_the_tokenizer_and_the_provenance_come_along(own: Path, tmp_path: Path) -> None:
    model = _load(own)
    model.save_pretrained(tmp_path / "saved")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert tokenizer("ab").input_ids == AutoTokenizer.from_pretrained(own)("ab").input_ids
    configs = [json.loads((f / "config.json").read_text()) for f in (own, tmp_path / "saved")]
    assert configs[0] == configs[1]
    # saved first it is replaced by what the artifact had; saved afterwards it is not the artifact's
    tokenizer.save_pretrained(tmp_path / "first")
    model.save_pretrained(tmp_path / "first")
    assert verify(tmp_path / "first").hash == read_manifest(own).hash
    tokenizer.save_pretrained(tmp_path / "first")
    with pytest.raises(errors.ChecksumError, match=r"tokenizer_config\.json: sha256 must be"):
        verify(tmp_path / "first")
    (own / "tokenizer.json").unlink()
    with pytest.raises(errors.ArtifactError, match=r"tokenizer.json must be as it was when the model was"):
        model.save_pretrained(tmp_path / "third")


def test_saving_where_something_else_is(artifact: Path, tmp_path: Path) -> None:
    model = _load(artifact)
    (tmp_path / "model.safetensors").write_text("somebody's")
    with pytest.raises(DecDECError, match=r"must be empty or an artifact, got model\.safetensors in it"):
        model.save_pretrained(tmp_path)
    with pytest.raises(DecDECError, match="must be a folder, got a file"):
        model.save_pretrained(tmp_path / "model.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_saving_with_what_an_artifact_has_no_place_for(artifact: Path, tmp_path: Path) -> None:
    model = _load(artifact)
    for option, value in {"variant": "fp16", "push_to_hub": True, "state_dict": {"x": 1}}.items():
        with pytest.raises(DecDECError, match=f"save_pretrained of an artifact must be without {option}"):
            model.save_pretrained(tmp_path / "saved", **{option: value})
    for size in ("many", 0, "5XB", -1):
        with pytest.raises(DecDECError, match="max_shard_size must be a positive number of bytes"):
            model.save_pretrained(tmp_path / "saved", max_shard_size=size)
    model.save_pretrained(tmp_path / "saved", is_main_process=False)
    assert not (tmp_path / "saved").exists()
    # transformers' own method, which would leave the residual out
    with pytest.raises(ValueError, match="is not serializable"):
        type(model).save_pretrained(model, tmp_path / "saved")


def _fresh_python(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, str(folder)],
        env={**os.environ, "PYTHONPATH": with_checkout_first()},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize("sharded", [False, True])
def test_transformers_without_this_package_fails_instead_of_loading_random_weights(
    sharded: bool, artifact: Path, tmp_path: Path
) -> None:
    folder = write_tiny(tmp_path / "a", shard_bytes=300_000) if sharded else artifact
    done = _fresh_python(
        "import sys\n"
        "from transformers import AutoModelForCausalLM, LlamaForCausalLM\n"
        "for loader in (AutoModelForCausalLM, LlamaForCausalLM):\n"
        "    try:\n"
        "        loader.from_pretrained(sys.argv[1])\n"
        "    except OSError as error:\n"
        "        print('refused:', error)\n"
        "assert 'decdec_core' not in sys.modules\n",
        folder,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("refused: Error no file named model.safetensors") == 2


def test_other_ways_into_transformers(artifact: Path, tmp_path: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(artifact)
    assert torch.equal(_logits(model), _logits(_load(artifact)))
    damaged = shutil.copytree(artifact, tmp_path / "damaged")
    (damaged / "residual.safetensors").write_bytes(b"")
    with pytest.raises(errors.BrokenFileError, match="must be a safetensors file"):
        LlamaForCausalLM.from_pretrained(damaged)
    # a config that is told to forget the quantization finds no weights
    with pytest.raises(OSError, match=r"no file named model\.safetensors"):
        _load(artifact, quantization_config=None, config=_forgetful(artifact))
    # ways to other weights: these are found by their name alone, or not at all
    outcomes = {}
    for option, value in (("use_safetensors", False), ("variant", "fp16"), ("quantization_config", None)):
        try:
            outcomes[option] = torch.equal(_logits(_load(artifact, **{option: value})), _logits(model))
        except OSError as error:
            outcomes[option] = "no file named" in str(error)
    assert outcomes == {"use_safetensors": True, "variant": True, "quantization_config": True}


def _forgetful(folder: Path) -> Any:
    config = AutoConfig.from_pretrained(folder)
    del config.quantization_config
    return config


def test_a_config_that_is_not_the_folders(artifact: Path, own: Path, tmp_path: Path) -> None:
    with pytest.raises(errors.ArtifactError, match=r"must be loaded from decdec\.safetensors in .*, got"):
        _load(artifact, config=AutoConfig.from_pretrained(own))
    config = AutoConfig.from_pretrained(artifact)
    config.quantization_config["residual"]["bits"] = 2
    with pytest.raises(errors.ConfigError, match="quantization_config must be that of"):
        _load(artifact, config=config)
    with pytest.raises(DecDECError, match=r"layer model\.layers\.1\..* must be a linear layer of the model"):
        _load(artifact, num_hidden_layers=1)
    config = AutoConfig.from_pretrained(artifact)
    config.distributed_config = {"tp_size": 2}
    with pytest.raises(DecDECError, match="must be loaded without tensor parallelism"):
        _load(artifact, config=config)
    with pytest.raises(errors.ManifestError, match=r"file manifest\.json must be there, got none"):
        _load(artifact.parent, subfolder=artifact.name)


def test_the_first_format_is_refused(own: Path) -> None:
    for file in ("manifest.json", "config.json"):
        text = (own / file).read_text()
        (own / file).write_text(text.replace('"format_version": 2', '"format_version": 1'))
    with pytest.raises(errors.FormatVersionError, match="format_version must be 2, got 1: build it again"):
        _load(own)


@pytest.mark.parametrize("shard_bytes", [1 << 30, 300_000])
def test_from_a_hub(shard_bytes: int, tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "artifact", shard_bytes=shard_bytes)
    cache = tmp_path / "hub"
    snapshot = hub_cache(folder, cache)
    model = _load("org/name", cache_dir=cache, local_files_only=True)
    assert model.decdec.artifact_hash == read_manifest(folder).hash
    assert torch.equal(_logits(model), _logits(_load(folder)))
    model.save_pretrained(tmp_path / "saved", max_shard_size=shard_bytes)
    assert verify(tmp_path / "saved").hash == read_manifest(folder).hash
    weights = (snapshot / read_manifest(snapshot).shards("residual")[-1]).resolve()
    data = bytearray(weights.read_bytes())
    data[-5] ^= 1
    weights.write_bytes(data)
    with pytest.raises(errors.ChecksumError, match="sha256 must be"):
        _load("org/name", cache_dir=cache, local_files_only=True)
