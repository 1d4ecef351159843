"""What a build takes: seconds for a block and the most memory, on a random model of a real one's shape.

The model is written to disk block by block and built by a process of its own, whose peak is then known.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import re
import resource
import statistics
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from decdec_core.architectures import decoder_blocks
from decdec_core.artifact import index_of
from decdec_core.build import CalibrationSetup, build_artifact
from decdec_core.config import ResidualQuant, WeightQuant
from decdec_core.shapes import MODELS, config_of
from decdec_core.shards import MemoryTensor, write_tensors

_SPARE = 2 << 30  # bytes that a build may take beside two blocks and the embeddings


@dataclass(frozen=True)
class BuildCost:
    """seconds: of each block. block_bytes, embedding_bytes: in float32. host_bytes, device_bytes: the most
    that the process held, in host memory with all its libraries, and in tensors on a GPU; start_bytes: of
    host memory before the build."""

    shapes: str
    blocks: int
    weight: dict[str, Any]
    device: str
    tokens: int
    seconds: list[float]
    total_seconds: float
    block_bytes: int
    embedding_bytes: int
    start_bytes: int
    host_bytes: int
    device_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """Return the fields, what the build may take, and the time of all blocks of the real model."""
        real = MODELS[self.shapes]["num_hidden_layers"]
        return {
            **asdict(self),
            "allowed_bytes": 2 * self.block_bytes + self.embedding_bytes + _SPARE,
            "median_seconds": statistics.median(self.seconds),
            # the rest of a build, assembling and hashing, grows with the blocks as well
            "projected_seconds": self.total_seconds * real / self.blocks,
            "projected_blocks": real,
        }


def build_cost(
    shapes: str, blocks: int, weight_quant: WeightQuant, setup: CalibrationSetup, device: str, folder: Path
) -> BuildCost:
    """Return what building a random model of `blocks` blocks takes; `folder` must have room for it."""
    config = config_of(shapes, blocks, torch.bfloat16)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        sizes = write_random_model(Path(temporary) / "model", config)
        context = multiprocessing.get_context("spawn")
        mine, theirs = context.Pipe(duplex=False)
        arguments = (theirs, Path(temporary), weight_quant, setup, device)
        child = context.Process(target=_build, args=arguments)
        child.start()
        theirs.close()
        try:
            measured = mine.recv()
        except EOFError:
            child.join()
            raise RuntimeError(f"the build ended with exit status {child.exitcode}") from None
        child.join()
    return BuildCost(
        shapes=shapes,
        blocks=blocks,
        weight=weight_quant.to_dict(),
        device=device,
        tokens=setup.sequences * setup.length,
        block_bytes=sizes[0],
        embedding_bytes=sizes[1],
        **measured,
    )


def _build(pipe: Any, folder: Path, weight_quant: WeightQuant, setup: CalibrationSetup, device: str) -> None:
    seconds: list[float] = []
    handler = logging.Handler()
    handler.emit = lambda record: seconds.append(float(record.args[1]))  # type: ignore[method-assign,index,arg-type]
    log = logging.getLogger("decdec_core.sweeps")
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    if device != "cpu":
        torch.empty(1, device=device)
    start_bytes, start = _peak_bytes(), time.perf_counter()
    build_artifact(str(folder / "model"), folder / "out", weight_quant, ResidualQuant(), setup, device=device)
    pipe.send(
        {
            "seconds": seconds,
            "total_seconds": time.perf_counter() - start,
            "start_bytes": start_bytes,
            "host_bytes": _peak_bytes(),
            "device_bytes": torch.cuda.max_memory_allocated() if device != "cpu" else 0,
        }
    )


def _peak_bytes() -> int:
    """Return the most memory this process has held (getrusage counts what started it, /proc does not)."""
    status = Path("/proc/self/status")
    found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.is_file() else None
    return int(found[1]) * 1024 if found else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def write_random_model(folder: Path, config: Any, seed: int = 0) -> tuple[int, int]:
    """Write a random bfloat16 model with outlier channels, and a tokenizer of bytes, to `folder`; return
    the float32 bytes of a block and of embeddings and head."""
    folder.mkdir()
    draw = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    blocks = tuple(f"{name}." for name in decoder_blocks(model))
    parts: dict[str, dict[str, torch.Size]] = {}
    for name, tensor in model.state_dict().items():
        part = next((block for block in blocks if name.startswith(block)), "rest")
        parts.setdefault(part, {})[name] = tensor.shape
    shards: dict[str, Mapping[str, Any]] = {}
    for number, shapes in enumerate(parts.values(), 1):
        file = f"model-{number:05}-of-{len(parts):05}.safetensors"
        write_tensors(
            folder / file, {n: MemoryTensor(_random(n, shape, draw)) for n, shape in shapes.items()}
        )
        shards[file] = shapes
    total = 2 * sum(shape.numel() for shapes in parts.values() for shape in shapes.values())
    (folder / "model.safetensors.index.json").write_text(json.dumps(index_of(total, shards)), "utf-8")
    config.save_pretrained(folder)
    _byte_tokenizer().save_pretrained(folder)
    block, rest = (4 * sum(shape.numel() for shape in parts[part].values()) for part in (blocks[0], "rest"))
    return block, rest


def _random(name: str, shape: torch.Size, draw: torch.Generator) -> torch.Tensor:
    if len(shape) > 1:
        return torch.randn(shape, generator=draw).mul_(0.02).bfloat16()
    values = torch.ones(shape)
    values[::97] *= 8
    return values.bfloat16()


def _byte_tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)
