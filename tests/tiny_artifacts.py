"""Tiny artifacts written without calibration, their damages, and manifests that agree with a damage."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from conftest import byte_tokenizer, tiny_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from decdec_core import artifact
from decdec_core.architectures import decoder_blocks, input_groups
from decdec_core.artifact import BuiltLayer, host_tensors, layer_tensors, plain_dtype
from decdec_core.calibration import ActivationStatistics
from decdec_core.config import ResidualQuant, WeightQuant
from decdec_core.manifest import header_sha256
from decdec_core.packing import pack_codes
from decdec_core.quantize import CodebookWeight, QuantizedWeight
from decdec_core.quantize.uniform import quantize
from decdec_core.residuals import quantize_residual
from decdec_core.shards import MemoryTensor, file_tensors

LAYER = "model.layers.0.mlp.down_proj"
ORDERED, SCALED = "model.layers.1.self_attn.o_proj", "model.layers.0.mlp.down_proj"
RTN3 = WeightQuant("rtn", 3)
MODEL, RESIDUAL = "decdec.safetensors", "residual.safetensors"


def low_bit(weight: Tensor, config: WeightQuant) -> QuantizedWeight:
    """Return `weight` in either format; a codebook's values are evenly spread over each row."""
    if config.format == "uniform":
        return quantize(weight, config)
    low, high = weight.aminmax(dim=1, keepdim=True)
    table = (low + (high - low) * torch.linspace(0, 1, 2 ** int(config.bits))).half()
    codes = (weight.unsqueeze(2) - table.float().unsqueeze(1)).abs().argmin(2).to(torch.uint8)
    return CodebookWeight(pack_codes(codes, int(config.bits)), table, weight.shape[1], config)


def built(name: str, weight: Tensor, config: WeightQuant, residual_bits: int, extras: bool) -> BuiltLayer:
    """Return a layer with statistics of random inputs; with `extras`, SCALED and ORDERED have theirs."""
    in_features = weight.shape[1]
    scale = torch.rand(in_features) + 0.5 if extras and name == SCALED else None
    order = torch.randperm(in_features).int() if extras and name == ORDERED else None
    seen = weight if order is None else weight[:, order.long()]
    seen = seen if scale is None else seen * scale
    packed = low_bit(seen, config)
    x = torch.randn(64, in_features)
    ranked = x.abs().sort(1, descending=True).values.amax(0)
    statistics = ActivationStatistics(ranked, x.square().mean(0), x.mean(0))
    residual = quantize_residual(seen - packed.dequantize(), ResidualQuant(residual_bits))
    return BuiltLayer(packed, residual, statistics, scale, order)


@torch.no_grad()
def write_tiny(
    folder: Path,
    weight: WeightQuant = RTN3,
    block_bits: list[int] | None = None,
    residual_bits: int = 4,
    architecture: str = "llama",
    dtype: torch.dtype = torch.float32,
    shard_bytes: int = 1 << 30,
    extras: bool = False,
    seed: int = 0,
) -> Path:
    """Write the artifact of a tiny random model to `folder`."""
    model = tiny_model(architecture, seed)
    tensors: dict[str, Tensor] = {}
    host: dict[str, Tensor] = {}
    linears = [name for group in input_groups(model.config) for name in group.linears]
    state = model.state_dict()
    for number, block in enumerate(decoder_blocks(model)):
        config = weight if block_bits is None else weight.at(block_bits[number])
        for name in (f"{block}.{linear}" for linear in linears):
            layer = built(name, state.pop(f"{name}.weight").float(), config, residual_bits, extras)
            tensors |= layer_tensors(name, layer)
            host |= host_tensors(name, layer)
    for name, tensor in state.items():
        if name not in model.all_tied_weights_keys:
            tensors[name] = tensor.to(plain_dtype(tensor, dtype)).contiguous()
    folder.mkdir(parents=True)
    model.config.dtype, model.config.architectures = dtype, [type(model).__name__]
    artifact.write(
        folder,
        model.config,
        model.generation_config,
        byte_tokenizer(),
        {name: MemoryTensor(tensor) for name, tensor in tensors.items()},
        {name: MemoryTensor(tensor) for name, tensor in host.items()},
        {
            "weight": weight.to_dict(),
            "residual": {"bits": residual_bits},
            "block_bits": block_bits,
            "provenance": {"source": "tiny", "seed": seed},
        },
        shard_bytes,
    )
    return folder


def edit_tensors(file: str, change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    """Return the damage that rewrites a safetensors file with other tensors."""

    def edit(folder: Path) -> None:
        tensors = load_file(folder / file)
        change(tensors)
        save_file(tensors, folder / file, metadata={"format": "pt"})

    return edit


def edit_tensor(name: str, change: Callable[[Tensor], Tensor | None]) -> Callable[[Path], None]:
    """Return the damage that changes one tensor, in place or for what `change` returns, in whichever file."""

    def edit(folder: Path) -> None:
        file = json.loads((folder / "manifest.json").read_text())["tensors"][name]["file"]
        tensors = load_file(folder / file)
        changed = change(tensors[name])
        tensors[name] = tensors[name] if changed is None else changed.contiguous()
        save_file(tensors, folder / file, metadata={"format": "pt"})

    return edit


def edit_json(file: str, change: Callable[[Any], object]) -> Callable[[Path], None]:
    """Return the damage that rewrites a JSON file."""

    def edit(folder: Path) -> None:
        body = json.loads((folder / file).read_text())
        change(body)
        (folder / file).write_text(json.dumps(body))

    return edit


def flip(file: str, position: int) -> Callable[[Path], None]:
    """Return the damage that flips a bit of a file."""

    def edit(folder: Path) -> None:
        data = bytearray((folder / file).read_bytes())
        data[position] ^= 1
        (folder / file).write_bytes(data)

    return edit


def truncate(file: str, keep: int) -> Callable[[Path], object]:
    """Return the damage that leaves the first bytes of a file."""
    return lambda folder: (folder / file).write_bytes((folder / file).read_bytes()[:keep])


def link_out(file: str) -> Callable[[Path], None]:
    """Return the damage that moves a file out of the folder and leaves a link to it."""

    def link(folder: Path) -> None:
        (folder / file).rename(folder.parent / "outside")
        (folder / file).symlink_to(folder.parent / "outside")

    return link


def make_consistent(folder: Path) -> None:
    """Rewrite the manifest so that it says what the folder holds, as an attacker or a faulty builder does."""
    body = json.loads((folder / "manifest.json").read_text())
    body["tensors"] = {}
    for file in body["headers"]:
        tensors = file_tensors(folder / file)
        body["headers"][file] = header_sha256(folder / file)
        for name, tensor in tensors.items():
            found: Mapping[str, Any] = {"dtype": tensor.dtype, "shape": list(tensor.shape)}
            body["tensors"][name] = {"file": file, "sha256": tensor.sha256(), **found}
    for file in body["files"]:
        if (folder / file).is_file():
            body["files"][file] = hashlib.sha256((folder / file).read_bytes()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(body))


def hub_cache(folder: Path, cache: Path, repository: str = "org/name") -> Path:
    """Return the snapshot of `folder` in a model hub's cache as a download leaves it: links to blobs."""
    root = cache / ("models--" + repository.replace("/", "--"))
    commit = "0123456789abcdef0123456789abcdef01234567"
    (root / "blobs").mkdir(parents=True)
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text(commit)
    snapshot = root / "snapshots" / commit
    snapshot.mkdir(parents=True)
    for path in folder.iterdir():
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        (root / "blobs" / digest).write_bytes(path.read_bytes())
        (snapshot / path.name).symlink_to(Path("..", "..", "blobs", digest))
    return snapshot
