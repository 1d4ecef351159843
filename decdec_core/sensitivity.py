"""Which decoder blocks deserve the higher of two widths (method.md section 1, "3.5 bits").

One pass over the blocks carries the hidden states of the full-precision model and of every variant in which a
single block is quantized, at the lower or at the higher width:

    full ------------ block 0 ------------- block 1 ------------- ... head
    variant 0, low    quantized block 0 --- block 1 ------------- ... head
    variant 1, low                          quantized block 1 --- ... head
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from decdec_core.artifact import is_host_tensor
from decdec_core.config import WeightQuant
from decdec_core.quantize import for_plain_inputs, weight_layout, weight_of
from decdec_core.shards import ComputedTensor, MemoryTensor, TensorSource
from decdec_core.streaming import StreamedModel
from decdec_core.sweeps import block_file
from decdec_core.workfolder import WorkFolder

_FULL = "full"


def choose_bits(low: Sequence[float], high: Sequence[float], widths: tuple[int, int]) -> list[int]:
    """Return the bits of each block: the higher width for the half (rounded down) of the blocks that lose
    most by the lower, the earlier first among equals.

    low, high: each block's KL divergence from the full-precision model at the lower and the higher width.
    """
    gains = [a - b for a, b in zip(low, high, strict=True)]
    ranked = sorted(range(len(gains)), key=lambda block: (-gains[block], block))
    chosen = set(ranked[: len(gains) // 2])
    return [widths[1] if block in chosen else widths[0] for block in range(len(gains))]


@torch.no_grad()
def block_divergences(
    model: StreamedModel, work: WorkFolder, token_ids: Tensor, config: WeightQuant
) -> dict[int, list[float]]:
    """Return, for both widths of `config`, each block's KL divergence in nats a token: from the full
    model's next-token distribution to that of the model in which this one block is quantized.

    token_ids: (sequences, tokens). The quantized blocks are those in the work folder (sweeps.block_file).
    """
    kept = work.noted("sensitivity")
    if kept is None:
        _carry_variants(model, work, token_ids, config)
        divergences = _divergences(model, work, len(token_ids))
        kept = {
            str(bits): [divergences[_variant(bits, index)] for index in range(len(model.blocks))]
            for bits in config.widths
        }
        work.note("sensitivity", kept)
        work.drop(_state(len(model.blocks)))
    return {bits: kept[str(bits)] for bits in config.widths}


def _state(index: int) -> str:
    return f"sensitivity/hidden-{index:05}"


def _variant(bits: int, index: int) -> str:
    return f"{bits}bit-{index:05}"


def _carry_variants(model: StreamedModel, work: WorkFolder, token_ids: Tensor, config: WeightQuant) -> None:
    count = len(model.blocks)
    first = next((i for i in range(count, 0, -1) if work.has(_state(i))), 0)
    if first == 0:
        embedded = torch.cat(list(model.embed(token_ids)))
        work.save(_state(0), {_FULL: embedded})
    bar = tqdm(total=count, initial=first, desc="measuring sensitivity", unit="block")
    for index in range(first, count):
        before = work.files(_state(index))
        with model.block(index) as block:
            after: dict[str, TensorSource] = {
                name: ComputedTensor(tensor.shape, partial(model.run_stored, index, block, tensor))
                for name, tensor in before.items()
            }
            for bits in config.widths:
                after[_variant(bits, index)] = MemoryTensor(
                    _run_quantized(model, work, index, config.at(bits), before[_FULL].read())
                )
            work.save(_state(index + 1), after)
        work.drop(_state(index))
        bar.update()
    bar.close()


def _run_quantized(
    model: StreamedModel, work: WorkFolder, index: int, config: WeightQuant, hidden: Tensor
) -> Tensor:
    """Return the outputs of block `index` quantized to the whole bits of `config`."""
    prefix, files = f"{model.blocks[index]}.", work.files(block_file(int(config.bits), index))
    stored = {n.removeprefix(prefix): t.read() for n, t in files.items() if not is_host_tensor(n)}
    with model.block(index) as block:
        for name, module in block.named_modules():
            if isinstance(module, nn.Linear) and f"{name}.codes" in stored:
                module.weight.data = dense_weight(name, stored, config, module.in_features).to(model.device)
        # norms and biases into which scales were folded
        block.load_state_dict(
            {key: tensor for key, tensor in stored.items() if key in block.state_dict()}, strict=False
        )
        return model.run(index, block, hidden)


def dense_weight(name: str, tensors: Mapping[str, Tensor], config: WeightQuant, in_features: int) -> Tensor:
    """Return the float32 weight (out, in) that layer `name` of an artifact's tensors has for plain inputs."""
    parts = weight_layout(config, in_features, tensors[f"{name}.codes"].shape[0])
    weight = weight_of(config, in_features, {part: tensors[f"{name}.{part}"] for part in parts}).dequantize()
    return for_plain_inputs(weight, tensors.get(f"{name}.input_scale"), tensors.get(f"{name}.input_order"))


def _divergences(model: StreamedModel, work: WorkFolder, sequences: int) -> dict[str, float]:
    """Return each variant's mean KL divergence from the full-precision model, in nats a token."""
    stored = work.files(_state(len(model.blocks)))
    variants = [name for name in stored if re.fullmatch(r"\d+bit-\d+", name)]
    sums = dict.fromkeys(variants, 0.0)
    with model.head() as head, tqdm(total=sequences, desc="comparing outputs", unit="sequence") as bar:

        def log_probabilities(name: str, row: int) -> Tensor:
            return F.log_softmax(head(stored[name].rows(row, row + 1)[0].to(model.device)), dim=-1)

        for row in range(sequences):
            wanted = log_probabilities(_FULL, row)
            for name in variants:
                got = log_probabilities(name, row)
                sums[name] += (wanted.exp() * (wanted - got)).sum(-1).mean().item() / sequences
            bar.update()
    return sums
