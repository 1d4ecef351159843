"""Full-precision model -> artifact: calibrate, quantize and store residuals, block by block."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from decdec_core import artifact, sources
from decdec_core.architectures import InputGroup, decoder_blocks, input_groups
from decdec_core.calibration import (
    ActivationStatistics,
    BlockInputs,
    StatisticsAccumulator,
    sequences,
)
from decdec_core.config import ResidualQuant, WeightQuant, require_int
from decdec_core.hooks import watching
from decdec_core.quantize import awq
from decdec_core.quantize.awq import linear_of
from decdec_core.quantize.uniform import QuantizedWeight, dequantize, quantize
from decdec_core.residuals import QuantizedResidual, quantize_residual
from decdec_core.texts import available_text, load_text

RECIPE_VERSION = 1  # raised by every change after which the same settings build other tensors
_BATCH = 8  # sequences that go through a block at once


@dataclass(frozen=True)
class CalibrationSetup:
    """text: a set's name, a text file's path, or "auto". sequences of `length` tokens each, spread evenly
    over the text; AWQ searches on the first `awq_sequences` of them."""

    text: str = "auto"
    sequences: int = 64
    length: int = 512
    awq_sequences: int = 8

    def __post_init__(self) -> None:
        require_int("calibration sequences", self.sequences, 1, 1 << 20)
        require_int("calibration length", self.length, 8, 1 << 20)
        require_int("awq_sequences", self.awq_sequences, 1, 1 << 20)


@dataclass(frozen=True)
class BuiltLayer:
    """One linear layer as the artifact stores it. input_scale: (in,) float32, or None where folded."""

    weight: QuantizedWeight
    residual: QuantizedResidual
    statistics: ActivationStatistics
    input_scale: Tensor | None


def build_artifact(
    source: str,
    out: Path,
    weight_quant: WeightQuant,
    residual_quant: ResidualQuant,
    calibration: CalibrationSetup | None = None,
    shared: bool = False,
) -> Path:
    """Build the artifact of `source` (see sources.py) in the folder `out`, and return it.

    shared: as in sources.written_whole. Raises DecDECError where `out` exists or cannot be written, or the
    source or the calibration text cannot be had.
    """
    sources.require_absent(out)
    setup = calibration or CalibrationSetup()
    dtype = getattr(sources.load_config(source), "dtype", None) or torch.float32
    tokenizer = sources.load_tokenizer(source)
    name = available_text("calibration") if setup.text == "auto" else setup.text
    text = load_text(name, "calibration")
    token_ids = sequences(tokenizer(text.text, verbose=False).input_ids, setup.sequences, setup.length)
    description = {
        "source": source,
        "calibration": {**asdict(setup), "text": text.name, "text_sha256": text.sha256},
    }
    with sources.written_whole(out, shared) as folder:  # first of all: a folder that cannot be written
        model = sources.load_model(source, torch.float32)
        layers = dict(quantized_layers(model, token_ids, weight_quant, residual_quant, setup.awq_sequences))
        artifact.save(folder, model, tokenizer, layers, weight_quant, residual_quant, description, dtype)
    return out


def cached_artifact(
    source: str,
    weight_quant: WeightQuant,
    residual_quant: ResidualQuant,
    calibration: str = "auto",
) -> Path:
    """Return the artifact of `source` from the cache, built first where it is not there yet.

    A changed model, calibration text, setting or recipe is another artifact.
    """
    setup = CalibrationSetup(text=available_text("calibration") if calibration == "auto" else calibration)
    determining = {
        "recipe_version": RECIPE_VERSION,
        "format_version": artifact.FORMAT_VERSION,
        "source": sources.fingerprint(source),
        "text_sha256": load_text(setup.text, "calibration").sha256,
        "weight": weight_quant.to_dict(),
        "residual": residual_quant.to_dict(),
        "calibration": asdict(setup),
    }
    key = hashlib.sha256(json.dumps(determining, sort_keys=True).encode()).hexdigest()[:12]
    stem = Path(source).name.removesuffix(".gguf")
    name = f"{stem}-{weight_quant.method}{weight_quant.bits}-r{residual_quant.bits}-{key}"
    folder = sources.cache_dir() / "artifacts" / name
    if not folder.is_dir():
        build_artifact(source, folder, weight_quant, residual_quant, setup, shared=True)
    return folder


@torch.no_grad()
def quantized_layers(
    model: nn.Module,
    token_ids: Tensor,
    weight_quant: WeightQuant,
    residual_quant: ResidualQuant,
    awq_sequences: int,
) -> Iterator[tuple[str, BuiltLayer]]:
    """Yield every linear layer of the decoder blocks by its full name, quantized.

    Under AWQ the model's norms and linear layers are scaled in place as its blocks go by (the function
    that the model computes stays the same up to float rounding). A quantized layer's weight is freed.
    """
    blocks = decoder_blocks(model)
    groups = input_groups(model.config)
    inputs = BlockInputs(model, blocks, token_ids, _BATCH)
    for block_name, block in tqdm(blocks.items(), desc="quantizing blocks", unit="block"):
        kept: dict[str, Tensor | None] = {}
        samples: dict[str, Tensor] = {}
        if weight_quant.method == "awq":
            count = min(awq_sequences, token_ids.shape[0])
            kept, samples = _scale_block(inputs, block_name, block, groups, weight_quant, count)
        outputs, statistics = _observe(inputs, block_name, block, groups)
        inputs.hidden = outputs
        for group in groups:
            for name in group.linears:
                linear = linear_of(block, name)
                sample = None if name in group.unclipped else samples.get(group.kind)
                weight, residual = _quantize_linear(linear.weight.data, weight_quant, residual_quant, sample)
                layer = BuiltLayer(weight, residual, statistics[group.kind], kept.get(group.kind))
                yield f"{block_name}.{name}", layer
                linear.weight.data = torch.empty(0)


def _scale_block(
    inputs: BlockInputs,
    block_name: str,
    block: nn.Module,
    groups: list[InputGroup],
    config: WeightQuant,
    count: int,
) -> tuple[dict[str, Tensor | None], dict[str, Tensor]]:
    """Search and apply AWQ's scales; return the scales that stay in the layers, and each group's sample
    of inputs in the scaled space."""
    sample = awq.Sample(block, groups, lambda: inputs.run(block_name, block, count))
    scales = {group.kind: awq.search_scale(block, group, sample, config) for group in groups}
    kept: dict[str, Tensor | None] = {}
    for group in groups:
        kept[group.kind] = awq.apply_scale(block, group, scales[group.kind])
        _divide_input(block, group, kept[group.kind])
    return kept, {group.kind: sample.inputs(group.kind) / scales[group.kind] for group in groups}


def _divide_input(block: nn.Module, group: InputGroup, scale: Tensor | None) -> None:
    if scale is not None:
        for name in group.linears:
            linear_of(block, name).register_forward_pre_hook(lambda _m, args: (args[0] / scale,))


def _observe(
    inputs: BlockInputs, block_name: str, block: nn.Module, groups: list[InputGroup]
) -> tuple[Tensor, dict[str, ActivationStatistics]]:
    """Return the block's outputs for all sequences, and the statistics of its input groups."""
    watched = {group.kind: linear_of(block, group.linears[0]) for group in groups}
    sums = {kind: StatisticsAccumulator(linear.in_features) for kind, linear in watched.items()}
    with watching(watched, lambda kind, x: sums[kind].add(x)):
        outputs = inputs.run(block_name, block)
    return outputs, {kind: accumulator.result() for kind, accumulator in sums.items()}


def _quantize_linear(
    weight: Tensor, weight_quant: WeightQuant, residual_quant: ResidualQuant, sample: Tensor | None
) -> tuple[QuantizedWeight, QuantizedResidual]:
    """Return the low-bit weight, clipped on `sample` (tokens, in) if given, and what it leaves."""
    full = weight.float()
    quantized = quantize(awq.clip(full, sample, weight_quant) if sample is not None else full, weight_quant)
    return quantized, quantize_residual(full - dequantize(quantized), residual_quant)
