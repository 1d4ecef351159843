"""A causal language model on disk whose decoder blocks are in memory one at a time.

folder of safetensors --embed--> hidden states --block 0--> ... --block n-1--> --head--> logits
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from decdec_core.architectures import decoder_blocks
from decdec_core.config import DecDECError
from decdec_core.shards import FileTensor, TensorFiles

_BATCH = 8  # sequences that go through a block at once


class StreamedModel:
    """The model of a Hugging Face folder. Blocks and head are float32 on `device`; hidden states on the CPU.

    config: its transformers config. files: its tensors on disk. blocks: the names of its decoder blocks.
    Raises DecDECError for a folder without safetensors files.
    """

    def __init__(self, folder: Path, config: Any, device: torch.device) -> None:
        self.config, self.device = config, device
        self.files = TensorFiles.of_folder(folder)
        with torch.device("meta"):
            self.model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        # the one module beside embeddings, blocks and head; its buffers are in no file
        rotary = self.model.model.rotary_emb
        self.model.model.rotary_emb = type(rotary)(config=config)
        self._blocks = list(decoder_blocks(self.model).items())
        self.blocks = [name for name, _ in self._blocks]
        self._arguments: list[dict[str, Any]] = []
        self._arguments_length = 0  # of the sequences they are for

    @property
    def embedding_name(self) -> str:
        """The full name of the embedding's weight."""
        wanted = self.model.get_input_embeddings()
        return next(f"{name}.weight" for name, module in self.model.named_modules() if module is wanted)

    def plain_names(self) -> list[str]:
        """Return the names of the tensors outside of the decoder blocks, those tied to another left out."""
        tied = set(getattr(self.model, "all_tied_weights_keys", None) or {})
        inside = tuple(f"{name}." for name in self.blocks)
        return [n for n in self.model.state_dict() if n not in tied and not n.startswith(inside)]

    def embed(self, token_ids: Tensor) -> Iterator[Tensor]:
        """Yield the first block's input (sequences, tokens, hidden) float32 on the CPU, a batch at a time."""
        weight = self.files.read(self.embedding_name)
        for ids in token_ids.split(_BATCH):
            yield nn.functional.embedding(ids, weight).float()

    @contextmanager
    def block(self, index: int) -> Iterator[nn.Module]:
        """Within the block, decoder block `index` with its weights, for whatever is to be done to it."""
        name, empty = self._blocks[index]
        block = self._filled(copy.deepcopy(empty), f"{name}.")
        block.requires_grad_(False)
        yield block
        block.to("meta")

    @contextmanager
    def head(self) -> Iterator[nn.Module]:
        """Within the block, what makes logits of the last hidden states: the final norm and the head."""
        norm = self._filled(copy.deepcopy(self.model.model.norm), "model.norm.")
        head = copy.deepcopy(self.model.get_output_embeddings())
        names = {"weight": "lm_head.weight", "bias": "lm_head.bias"}
        if "lm_head.weight" not in self.plain_names():
            names["weight"] = self.embedding_name
        state = {key: self.files.read(names[key]).float() for key in head.state_dict()}
        head.load_state_dict(state, assign=True)
        module = nn.Sequential(norm, head).to(self.device).requires_grad_(False)
        yield module
        module.to("meta")

    def run(self, index: int, block: nn.Module, hidden: Tensor, batch: int = _BATCH) -> Tensor:
        """Return the outputs of `block`, the `index`-th, for `hidden` (sequences, tokens, hidden)."""
        parts = [self.call(index, block, part.to(self.device)).cpu() for part in hidden.split(batch)]
        return torch.cat(parts)

    def run_stored(self, index: int, block: nn.Module, hidden: FileTensor) -> Iterator[Tensor]:
        """Yield what `run` returns of hidden states in a file, a batch of sequences at a time."""
        count = hidden.shape[0]
        for first in range(0, count, _BATCH):
            yield self.run(index, block, hidden.rows(first, min(first + _BATCH, count)))

    def call(self, index: int, block: nn.Module, hidden: Tensor) -> Tensor:
        """Return the block's outputs for a batch on its device, as part of a graph where there is one."""
        output = block(hidden, **self._block_arguments(hidden.shape[1])[index])
        return output[0] if isinstance(output, tuple) else output

    def _filled(self, module: nn.Module, prefix: str) -> nn.Module:
        state = {key: self.files.read(prefix + key).float() for key in module.state_dict()}
        for key, tensor in state.items():
            wanted = module.state_dict()[key].shape
            if tensor.shape != wanted:
                raise DecDECError(
                    f"tensor {prefix}{key} must be {tuple(wanted)} by the model's config, "
                    f"got {tuple(tensor.shape)}"
                )
        module.load_state_dict(state, assign=True)
        return module.to(self.device)

    def _block_arguments(self, length: int) -> list[dict[str, Any]]:
        """Return the keyword arguments that the model gives to each block (masks, rotary embeddings).

        They depend on the sequence length alone; taken per block, because masks can differ between blocks.
        """
        if self._arguments_length != length:
            self._arguments = [_moved(a, self.device) for a in self._recorded_arguments(length)]
            self._arguments_length = length
        return self._arguments

    @torch.no_grad()
    def _recorded_arguments(self, length: int) -> list[dict[str, Any]]:
        arguments: list[dict[str, Any]] = []

        def record(hidden_states: Tensor, **kwargs: Any) -> Tensor:
            arguments.append(kwargs)
            return hidden_states

        inner = self.model.model
        blocks = inner.layers
        inner.layers = nn.ModuleList(_Recorder(block, record) for block in blocks)
        norm, inner.norm = inner.norm, nn.Identity()
        try:
            hidden = torch.zeros(1, length, self.config.hidden_size)
            inner(inputs_embeds=hidden, use_cache=False)
        finally:
            inner.layers, inner.norm = blocks, norm
        return arguments


class _Recorder(nn.Module):
    """Stands for a block that it asks about its settings, and hands on what the block would be given."""

    def __init__(self, block: nn.Module, record: Any) -> None:
        super().__init__()
        self._asked = [block]  # in a list: no submodule
        self._record = record

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self._record(hidden_states, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_asked"][0], name)


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: _moved(item, device) for key, item in value.items()}
    if isinstance(value, tuple):
        return tuple(_moved(item, device) for item in value)
    return value
