"""The passes of a build over a model's decoder blocks, each resumable at the block it was in.

forward   hidden states from block to block, each quantized when its turn comes (RTN, AWQ, imported weights)
Fisher    forward, keeping every block's input; then gradients of the loss from the last block to the first,
          each quantized when its turn comes (SqueezeLLM). One block's weights at a time in memory, both ways.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from decdec_core.architectures import InputGroup, input_groups
from decdec_core.artifact import BuiltLayer, host_tensors, layer_tensors
from decdec_core.calibration import ActivationStatistics, StatisticsAccumulator
from decdec_core.config import DecDECError, ResidualQuant, WeightQuant
from decdec_core.hooks import watching
from decdec_core.importers import (
    QuantizedCheckpoint,
    recovered_scales,
    require_near,
    require_same_plain,
)
from decdec_core.quantize import QuantizedWeight, awq
from decdec_core.quantize.awq import linear_of
from decdec_core.quantize.squeezellm import quantize_codebook
from decdec_core.quantize.uniform import quantize
from decdec_core.residuals import quantize_residual
from decdec_core.shards import ComputedTensor, FileTensor
from decdec_core.streaming import StreamedModel
from decdec_core.workfolder import WorkFolder

_HIDDEN = "hidden"  # the one tensor of a set of hidden states, or of gradients in them
_log = logging.getLogger(__name__)
# of a linear layer: its full name, its group, its full-precision weight -> low-bit weight, order of inputs
_Quantize = Callable[[str, InputGroup, Tensor], tuple[QuantizedWeight, Tensor | None]]


@dataclass(frozen=True)
class Recipe:
    """How blocks are quantized. awq_sequences: of the calibration sequences, how many AWQ searches on.
    checkpoint: somebody else's low-bit weights, taken instead of making any."""

    weight: WeightQuant
    residual: ResidualQuant
    awq_sequences: int
    checkpoint: QuantizedCheckpoint | None = None


def block_file(bits: int, index: int) -> str:
    """Return the name in the work folder of what block `index` became at `bits`."""
    return f"{bits}bit/block-{index:05}"


def quantize_blocks(model: StreamedModel, work: WorkFolder, token_ids: Tensor, recipe: Recipe) -> None:
    """Put every decoder block, at each of the recipe's bits, into the work folder: the block's tensors by
    their names in an artifact. token_ids: (sequences, tokens), the calibration text."""
    if recipe.weight.method == "squeezellm":
        fisher_sweep(model, work, token_ids, recipe)
        return
    for bits in recipe.weight.widths:
        forward_sweep(model, work, token_ids, recipe, recipe.weight.at(bits))


@torch.no_grad()
def forward_sweep(
    model: StreamedModel, work: WorkFolder, token_ids: Tensor, recipe: Recipe, config: WeightQuant
) -> None:
    """Quantize block after block to the whole bits of `config`, each on what the full-precision ones before
    it put out. Under AWQ, and where imported weights are scaled, the block is scaled as well: the function
    that it computes stays the same up to float rounding."""
    bits = int(config.bits)
    state, count = f"{bits}bit/hidden", len(model.blocks)
    first = _reached(work, state, count)
    if first == 0:
        work.save(_at(state, 0), {_HIDDEN: _embedded(model, token_ids)})
    for index in _progress(range(first, count), f"quantizing to {bits} bits", count, first):
        with _timed(index), model.block(index) as block:
            hidden = work.files(_at(state, index))[_HIDDEN]

            def run(hidden: FileTensor = hidden, index: int = index, block: nn.Module = block) -> None:
                outputs = ComputedTensor(hidden.shape, partial(model.run_stored, index, block, hidden))
                work.save(f"{state}-next", {_HIDDEN: outputs})

            tensors = _quantize_block(model, index, block, hidden, recipe, config, run)
            work.save(block_file(bits, index), tensors)
            work.rename(f"{state}-next", _at(state, index + 1))
            work.drop(_at(state, index))


def _quantize_block(
    model: StreamedModel,
    index: int,
    block: nn.Module,
    hidden: FileTensor,
    recipe: Recipe,
    config: WeightQuant,
    run: Callable[[], None],
) -> dict[str, Tensor]:
    """Return the block's tensors as an artifact has them. run: a pass of all its inputs `hidden`."""
    name, groups, checkpoint = model.blocks[index], input_groups(model.config), recipe.checkpoint
    kept: dict[str, Tensor | None] = {}
    samples: dict[str, Tensor] = {}
    if checkpoint is not None:
        scales = recovered_scales(block, name, groups, checkpoint)
        kept = {g.kind: _apply_scale(block, g, s) for g in groups if (s := scales.get(g.kind)) is not None}
        require_same_plain(name, block, groups, scales, checkpoint)
    elif config.method == "awq":
        few = hidden.rows(0, min(recipe.awq_sequences, hidden.shape[0]))
        sample = awq.Sample(block, groups, lambda: model.run(index, block, few))
        found = {group.kind: awq.search_scale(block, group, sample, config) for group in groups}
        kept = {group.kind: _apply_scale(block, group, found[group.kind]) for group in groups}
        samples = {group.kind: sample.inputs(group.kind) / found[group.kind] for group in groups}
    sums = _accumulators(block, groups)
    with _observing(block, groups, sums):
        run()

    def make(full_name: str, group: InputGroup, weight: Tensor) -> tuple[QuantizedWeight, Tensor | None]:
        if checkpoint is not None:
            imported = checkpoint.layer(full_name)
            order = imported.input_order
            ordered = weight if order is None else weight[:, order.long()]
            require_near(full_name, ordered.cpu(), imported.weight.dequantize(), int(config.bits))
            return imported.weight, order
        clipped = group.kind in samples and full_name.removeprefix(f"{name}.") not in group.unclipped
        return quantize(awq.clip(weight, samples[group.kind], config) if clipped else weight, config), None

    statistics = {kind: accumulator.result() for kind, accumulator in sums.items()}
    return _built_tensors(name, block, groups, statistics, kept, recipe.residual, make)


def _apply_scale(block: nn.Module, group: InputGroup, scale: Tensor) -> Tensor | None:
    """Scale a group's weights in place; return the scale if its layers must divide their input by it."""
    scale = scale.to(linear_of(block, group.linears[0]).weight.device)
    kept = awq.apply_scale(block, group, scale)
    if kept is not None:
        for name in group.linears:
            linear_of(block, name).register_forward_pre_hook(lambda _m, args: (args[0] / kept,))
    return kept


@dataclass(frozen=True)
class FisherBlock:
    """A decoder block with its calibration statistics by input group and, by the full name of each linear
    layer, the diagonal Fisher information of its weight: (out, in) float32, the mean over sequences of the
    squared gradient of a sequence's mean next-token loss."""

    index: int
    block: nn.Module
    statistics: dict[str, ActivationStatistics]
    fisher: dict[str, Tensor]


def fisher_blocks(model: StreamedModel, work: WorkFolder, token_ids: Tensor) -> Iterator[FisherBlock]:
    """Yield the decoder blocks from the last to the first; what has been yielded before a kill is not again.
    token_ids: (sequences, tokens)."""
    count, state = len(model.blocks), "fisher/gradient"
    start = next((i for i in range(count + 1) if work.has(_at(state, i))), None)
    if start is None:
        _keep_hidden(model, work, token_ids)
        last = work.files(_at("fisher/hidden", count))[_HIDDEN]
        with model.head() as head:
            gradients = partial(_loss_gradients, model, head, last, token_ids)
            work.save(_at(state, count), {_HIDDEN: ComputedTensor(last.shape, gradients)})
        start = count
    for index in _progress(range(start - 1, -1, -1), "quantizing, last block first", count, count - start):
        with _timed(index), model.block(index) as block:
            hidden = work.files(_at("fisher/hidden", index))[_HIDDEN]
            flowing = work.files(_at(state, index + 1))[_HIDDEN]
            groups = input_groups(model.config)
            sums, fisher = _accumulators(block, groups), dict[str, Tensor]()
            into = partial(_backward, model, index, block, hidden, flowing, fisher)
            with _observing(block, groups, sums):
                work.save(f"{state}-next", {_HIDDEN: ComputedTensor(hidden.shape, into)})
            statistics = {kind: accumulator.result() for kind, accumulator in sums.items()}
            yield FisherBlock(index, block, statistics, fisher)
            work.rename(f"{state}-next", _at(state, index))
            work.drop(_at(state, index + 1))
            work.drop(_at("fisher/hidden", index + 1))


def fisher_sweep(model: StreamedModel, work: WorkFolder, token_ids: Tensor, recipe: Recipe) -> None:
    """Quantize to codebooks by the diagonal Fisher information (method.md section 1), at each of the
    recipe's bits."""
    for seen in fisher_blocks(model, work, token_ids):
        for bits in recipe.weight.widths:
            config = recipe.weight.at(bits)

            def make(
                name: str, _group: InputGroup, weight: Tensor, seen: FisherBlock = seen, config: Any = config
            ) -> tuple[QuantizedWeight, None]:
                return quantize_codebook(weight.cpu(), seen.fisher[name].cpu(), config), None

            groups, prefix = input_groups(model.config), model.blocks[seen.index]
            tensors = _built_tensors(prefix, seen.block, groups, seen.statistics, {}, recipe.residual, make)
            work.save(block_file(bits, seen.index), tensors)


@torch.no_grad()
def _keep_hidden(model: StreamedModel, work: WorkFolder, token_ids: Tensor) -> None:
    """Put the input of every block, and the last one's output, into the work folder."""
    count, state = len(model.blocks), "fisher/hidden"
    first = _reached(work, state, count)
    if first == 0:
        work.save(_at(state, 0), {_HIDDEN: _embedded(model, token_ids)})
    for index in _progress(range(first, count), "running forward", count, first):
        with model.block(index) as block:
            hidden = work.files(_at(state, index))[_HIDDEN]
            outputs = ComputedTensor(hidden.shape, partial(model.run_stored, index, block, hidden))
            work.save(_at(state, index + 1), {_HIDDEN: outputs})


@torch.enable_grad()
def _loss_gradients(
    model: StreamedModel, head: nn.Module, hidden: FileTensor, token_ids: Tensor
) -> Iterator[Tensor]:
    """Yield the gradient of each sequence's mean next-token loss in `hidden`, the last block's outputs."""
    for row, ids in enumerate(token_ids):
        leaf = hidden.rows(row, row + 1).to(model.device).requires_grad_()
        loss = F.cross_entropy(head(leaf)[0, :-1], ids[1:].to(model.device))
        yield torch.autograd.grad(loss, leaf)[0]


@torch.enable_grad()
def _backward(
    model: StreamedModel,
    index: int,
    block: nn.Module,
    hidden: FileTensor,
    gradient: FileTensor,
    fisher: dict[str, Tensor],
) -> Iterator[Tensor]:
    """Yield, sequence by sequence, the gradient in the block's inputs `hidden` of a loss with `gradient` in
    its outputs; put the mean of the squared gradient of each linear layer's weight into `fisher`."""
    count = hidden.shape[0]
    for name in (name for group in input_groups(model.config) for name in group.linears):
        weight = linear_of(block, name).weight
        total = fisher[f"{model.blocks[index]}.{name}"] = torch.zeros_like(weight)

        def accumulate(parameter: Tensor, total: Tensor = total) -> None:
            assert parameter.grad is not None
            total.addcmul_(parameter.grad, parameter.grad, value=1 / count)
            parameter.grad = None

        weight.requires_grad_().register_post_accumulate_grad_hook(accumulate)
    for row in range(count):
        leaf = hidden.rows(row, row + 1).to(model.device).requires_grad_()
        # the fused kernels' backward adds up in any order: a resumed build would end in other bytes
        with sdpa_kernel(SDPBackend.MATH) if leaf.is_cuda else nullcontext():
            model.call(index, block, leaf).backward(gradient.rows(row, row + 1).to(model.device))
        assert leaf.grad is not None
        yield leaf.grad
    block.requires_grad_(False)


@torch.no_grad()
def _built_tensors(
    name: str,
    block: nn.Module,
    groups: list[InputGroup],
    statistics: dict[str, ActivationStatistics],
    kept: dict[str, Tensor | None],
    residual_quant: ResidualQuant,
    make: _Quantize,
) -> dict[str, Tensor]:
    """Return a block's tensors as an artifact has them: its quantized layers', and what is plain in it."""
    built: dict[str, Tensor] = {}
    quantized = set()
    for group in groups:
        for linear in group.linears:
            full_name = f"{name}.{linear}"
            weight = linear_of(block, linear).weight.data.float()
            try:
                low_bit, order = make(full_name, group, weight)
            except DecDECError as error:
                named = full_name in str(error)
                raise error if named else DecDECError(f"layer {full_name}: {error}") from None
            ordered = weight if order is None else weight[:, order.long()]
            residual = quantize_residual(ordered - low_bit.dequantize().to(weight.device), residual_quant)
            seen = statistics[group.kind]
            seen = seen if order is None else seen.reordered(order)
            layer = BuiltLayer(low_bit, residual, seen, kept.get(group.kind), order)
            built |= layer_tensors(full_name, layer) | host_tensors(full_name, layer)
            quantized.add(f"{linear}.weight")
    plain = {f"{name}.{key}": tensor for key, tensor in block.state_dict().items() if key not in quantized}
    return built | plain


def _accumulators(block: nn.Module, groups: list[InputGroup]) -> dict[str, StatisticsAccumulator]:
    return {g.kind: StatisticsAccumulator(linear_of(block, g.linears[0]).in_features) for g in groups}


def _observing(block: nn.Module, groups: list[InputGroup], sums: dict[str, StatisticsAccumulator]) -> Any:
    watched = {group.kind: linear_of(block, group.linears[0]) for group in groups}
    return watching(watched, lambda kind, x: sums[kind].add(x.detach()))


def _reached(work: WorkFolder, state: str, count: int) -> int:
    """Return the last position whose hidden states are in the work folder, else 0."""
    return next((i for i in range(count, 0, -1) if work.has(_at(state, i))), 0)


def _embedded(model: StreamedModel, token_ids: Tensor) -> ComputedTensor:
    shape = (*token_ids.shape, model.config.hidden_size)
    return ComputedTensor(shape, partial(model.embed, token_ids))


def _at(state: str, index: int) -> str:
    return f"{state}-{index:05}"


def _progress(indices: Iterable[int], label: str, total: int, done: int) -> Iterator[int]:
    return iter(tqdm(indices, desc=label, unit="block", total=total, initial=done))


@contextmanager
def _timed(index: int) -> Iterator[None]:
    start = time.perf_counter()
    yield
    _log.info("block %d took %.3f s", index, time.perf_counter() - start)
