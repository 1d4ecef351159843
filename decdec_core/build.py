"""Full-precision model -> artifact, block by block: calibrate, quantize, store residuals."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from decdec_core import artifact, sources
from decdec_core.calibration import sequences
from decdec_core.config import DecDECError, ResidualQuant, WeightQuant, require_int
from decdec_core.importers import open_quantized, require_same_model
from decdec_core.sensitivity import block_divergences, choose_bits
from decdec_core.shards import CastTensor, TensorSource
from decdec_core.streaming import StreamedModel
from decdec_core.sweeps import Recipe, block_file, quantize_blocks
from decdec_core.texts import Text, available_text, load_text
from decdec_core.verify import verify
from decdec_core.workfolder import WorkFolder, forget_finished, publish, work_folder

_ROWS = 4096  # of a tensor, looked at together
_DETERMINING_PACKAGES = ("torch", "transformers", "numpy", "numba", "flash1dkmeans")
RECIPE_VERSION = 1  # raised by every change after which the same settings build other tensors


@dataclass(frozen=True)
class CalibrationSetup:
    """text: a set's name, a text file's path, or "auto". sequences of `length` tokens each, spread evenly
    over the text; AWQ searches on the first `awq_sequences` of them, and where blocks have two widths the
    first `sensitivity_sequences` decide which has which."""

    text: str = "auto"
    sequences: int = 64
    length: int = 512
    awq_sequences: int = 8
    sensitivity_sequences: int = 4

    def __post_init__(self) -> None:
        require_int("calibration sequences", self.sequences, 1, 1 << 20)
        require_int("calibration length", self.length, 8, 1 << 20)
        require_int("awq_sequences", self.awq_sequences, 1, 1 << 20)
        require_int("sensitivity_sequences", self.sensitivity_sequences, 1, 1 << 20)


def build_artifact(
    source: str,
    out: Path,
    weight_quant: WeightQuant | None = None,
    residual_quant: ResidualQuant | None = None,
    calibration: CalibrationSetup | None = None,
    quantized: Path | None = None,
    device: str = "cpu",
    shared: bool = False,
    shard_bytes: int = artifact.SHARD_BYTES,
) -> Path:
    """Build the artifact of `source` (see sources.py) in the folder `out`, and return it.

    quantized: a GPTQ, AWQ or compressed-tensors checkpoint of the same model, whose low-bit weights are then
    the base; weight_quant must be absent. device: where blocks are computed. shared: of two processes that
    build the same, the second waits for the first's. Memory holds a block or two at a time. An interrupted
    build goes on at the block it was in. Raises DecDECError where `out` exists or cannot be written, or the
    source, the checkpoint or the calibration text cannot be had.
    """
    forget_finished(out)
    sources.require_absent(out)
    config = sources.load_config(source)  # refuses architectures that are not supported
    checkpoint = open_quantized(quantized) if quantized is not None else None
    if checkpoint is not None and weight_quant is not None:
        raise DecDECError(f"weight_quant must be absent with a quantized checkpoint, got {weight_quant}")
    setup = calibration or CalibrationSetup()
    text = load_text(available_text("calibration") if setup.text == "auto" else setup.text, "calibration")
    recipe = Recipe(
        checkpoint.weight_quant if checkpoint is not None else weight_quant or WeightQuant(),
        residual_quant or ResidualQuant(),
        setup.awq_sequences,
        checkpoint,
    )
    plan = {
        **_determining(source, recipe, setup, text, device),
        "versions": {name: version(name) for name in _DETERMINING_PACKAGES},
        "shard_bytes": shard_bytes,
    }
    folder = sources.model_folder(source)
    tokenizer = sources.load_tokenizer(source)
    token_ids = sequences(tokenizer(text.text, verbose=False).input_ids, setup.sequences, setup.length)
    with work_folder(out, plan, wait=shared) as work:
        if shared and out.is_dir():
            return out
        model = StreamedModel(folder, config, _usable(device))
        if checkpoint is not None:
            require_same_model(model.config, model.files, checkpoint)
        _require_buildable(model, recipe.weight)
        quantize_blocks(model, work, token_ids, recipe)
        bits = _block_bits(model, work, token_ids[: setup.sensitivity_sequences], recipe.weight)
        provenance = {
            "source": source,
            "calibration": {**asdict(setup), "text": text.name, "text_sha256": text.sha256},
            "quantized": checkpoint.description if checkpoint is not None else None,
        }
        finished = work.fresh_folder()
        _assemble(finished, folder, model, tokenizer, work, recipe, bits, provenance, shard_bytes)
        sources.require_absent(out)
        verify(finished)
        publish(work, finished, out)
    return out


def cached_artifact(
    source: str,
    weight_quant: WeightQuant,
    residual_quant: ResidualQuant,
    calibration: str = "auto",
    device: str = "cpu",
) -> Path:
    """Return the artifact of `source` from the cache, built first where it is not there yet.

    A changed model, calibration text, setting, recipe or kind of device is another artifact.
    """
    folder = cached_folder(source, weight_quant, residual_quant, calibration, device)
    if not folder.is_dir():
        setup = _cached_setup(calibration)
        build_artifact(source, folder, weight_quant, residual_quant, setup, device=device, shared=True)
    return folder


def cached_folder(
    source: str,
    weight_quant: WeightQuant,
    residual_quant: ResidualQuant,
    calibration: str = "auto",
    device: str = "cpu",
) -> Path:
    """Return where cached_artifact has this artifact, or will have it: nothing is built."""
    setup = _cached_setup(calibration)
    recipe = Recipe(weight_quant, residual_quant, setup.awq_sequences)
    determining = _determining(source, recipe, setup, load_text(setup.text, "calibration"), device)
    key = hashlib.sha256(json.dumps(determining, sort_keys=True).encode()).hexdigest()[:12]
    stem = Path(source).name.removesuffix(".gguf")
    name = f"{stem}-{weight_quant.method}{weight_quant.bits}-r{residual_quant.bits}-{key}"
    return sources.cache_dir() / "artifacts" / name


def _cached_setup(calibration: str) -> CalibrationSetup:
    return CalibrationSetup(text=available_text("calibration") if calibration == "auto" else calibration)


def _determining(
    source: str, recipe: Recipe, setup: CalibrationSetup, text: Text, device: str
) -> dict[str, Any]:
    """Return everything that decides what is built, as JSON types."""
    checkpoint = recipe.checkpoint
    return {
        "recipe_version": RECIPE_VERSION,
        "format_version": artifact.FORMAT_VERSION,
        "source": sources.fingerprint(source),
        "text_sha256": text.sha256,
        "weight": recipe.weight.to_dict(),
        "residual": recipe.residual.to_dict(),
        "calibration": asdict(setup),
        "quantized": sources.fingerprint(str(checkpoint.folder)) if checkpoint is not None else None,
        "device": _usable(device).type,
    }


def _usable(device: str) -> torch.device:
    try:
        chosen = torch.device(device)
        if chosen.type not in ("cpu", "cuda"):
            raise RuntimeError("only cpu and cuda are supported")
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        first = str(error).partition("\n")[0]
        raise DecDECError(f"device must be one that this torch can use, got {device!r}: {first}") from None
    return chosen


def _require_buildable(model: StreamedModel, config: WeightQuant) -> None:
    """Raise DecDECError, before the long work, for what would be refused at its end."""
    if len(config.widths) > len(model.blocks):
        raise DecDECError(
            f"bits must be whole for a model of {len(model.blocks)} decoder block, got {config.bits}"
        )
    for name in model.plain_names():
        tensor = model.files.tensors.get(name)
        if tensor is None:
            raise DecDECError(f"tensor {name} must be in the model's files, got none")
        for first in range(0, tensor.shape[0], _ROWS):
            if not torch.isfinite(tensor.rows(first, min(first + _ROWS, tensor.shape[0]))).all():
                raise DecDECError(f"tensor {name} of the model must be finite, got NaN or infinity")


def _block_bits(
    model: StreamedModel, work: WorkFolder, token_ids: Tensor, config: WeightQuant
) -> list[int] | None:
    """Return the bits of each block where they differ, else None."""
    if len(config.widths) == 1:
        return None
    low, high = config.widths
    divergences = block_divergences(model, work, token_ids, config)
    return choose_bits(divergences[low], divergences[high], (low, high))


def _assemble(
    out: Path,
    folder: Path,
    model: StreamedModel,
    tokenizer: Any,
    work: WorkFolder,
    recipe: Recipe,
    bits: list[int] | None,
    provenance: dict[str, Any],
    shard_bytes: int,
) -> None:
    """Write the artifact from what lies in the work folder and, of plain tensors, in the model's."""
    dtype = getattr(model.config, "dtype", None) or torch.float32
    tensors: dict[str, TensorSource] = {}
    host: dict[str, TensorSource] = {}
    for name in model.plain_names():
        tensors[name] = CastTensor(
            model.files.tensors[name], artifact.plain_dtype(model.files.tensors[name], dtype)
        )
    for index in range(len(model.blocks)):
        width = int(recipe.weight.bits) if bits is None else bits[index]
        for name, tensor in work.files(block_file(width, index)).items():
            (host if artifact.is_host_tensor(name) else tensors)[name] = tensor
    config = model.config
    config.dtype = dtype
    quantization = {
        "weight": recipe.weight.to_dict(),
        "residual": recipe.residual.to_dict(),
        "block_bits": bits,
        "provenance": provenance,
    }
    generation = _generation_config(folder, model)
    artifact.write(out, config, generation, tokenizer, tensors, host, quantization, shard_bytes)


def _generation_config(folder: Path, model: StreamedModel) -> GenerationConfig:
    try:
        return GenerationConfig.from_pretrained(folder)
    except OSError:
        return model.model.generation_config
