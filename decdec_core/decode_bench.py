"""Tokens per second of a model, low-bit and in half precision, captured and by transformers' generate."""

from __future__ import annotations

import copy
import gc
import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import DeviceType
from tqdm import tqdm
from transformers import AutoModelForCausalLM

from decdec_core.artifact import require_artifact
from decdec_core.calibration import ActivationStatistics
from decdec_core.config import Compensation, DecDECError, ResidualQuant, WeightQuant, require_int
from decdec_core.decode import Decoder
from decdec_core.fusing import fuse
from decdec_core.kernel_bench import markdown
from decdec_core.linear import DecLinear
from decdec_core.model import attach, compensation_ledger, dec_layers, set_compensation
from decdec_core.packing import channel_bytes
from decdec_core.residuals import QuantizedResidual
from decdec_core.shapes import config_of

_SPREAD = 0.02  # of random weights, as of trained ones
_RANDOM = "random weights"  # in the place of an artifact's hash
_CALIBRATED_ON = 64  # tokens
_NOTHING = "nothing running"


@dataclass(frozen=True)
class Setup:
    """How decoding is timed. prompt, tokens: before and after. repeats: in turns over all settings; a first
    one is not counted."""

    prompt: int = 128
    tokens: int = 256
    repeats: int = 3

    def __post_init__(self) -> None:
        require_int("prompt", self.prompt, 1, 1 << 16)
        require_int("tokens", self.tokens, 2, 1 << 16)
        require_int("repeats", self.repeats, 1, 1000)

    def ids(self, vocabulary: int) -> Tensor:
        """Return the prompt (prompt,) int64, the same for every model of one vocabulary."""
        draw = torch.Generator().manual_seed(0)
        return torch.randint(0, vocabulary, (self.prompt,), generator=draw)


@dataclass(frozen=True)
class RandomModel:
    """A model of shapes.MODELS with random weights: `blocks` decoder blocks, None for all, in `weight`."""

    shapes: str
    blocks: int | None
    weight: WeightQuant


def bench_decode(
    source: RandomModel | Path,
    device: str,
    compensations: Sequence[Compensation],
    setup: Setup,
    whole: bool = True,
    profiled: bool = False,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the rows of decode_rows for a random model or an artifact's folder, and a step's kernels.

    float16 on a GPU, float32 on a CPU. whole: also transformers' generate, and a plain model of the same
    sizes with random weights. profiled: with the last of `compensations`; else there are no kernels. The
    first of `compensations` is "none". Raises DecDECError where there is no such device.
    """
    where, dtype = place(device)
    if profiled and where.type != "cuda":
        raise DecDECError(f"a step's profile must be of a GPU, got {device}")
    config, name, model = load(source, where, dtype)
    rows = decode_rows(model, name, compensations, setup, whole)
    kernels = []
    if profiled:
        set_compensation(model, compensations[-1])
        kernels = step_profile(Decoder(model, setup.prompt + setup.tokens), setup.ids(config.vocab_size))
    if whole:
        del model
        gc.collect()  # what is in cycles too
        plain = str(dtype).removeprefix("torch.")
        try:
            rows += decode_rows(random_model(config, None, where, dtype), plain, (), setup)
        except torch.OutOfMemoryError:
            tqdm.write(f"{plain} model of these sizes: not measured, it does not fit the GPU", sys.stderr)
    return rows, kernels


@dataclass
class Peak:
    """Bytes of GPU memory; 0 on a CPU."""

    bytes: int = 0


@contextmanager
def peak_memory(device: torch.device) -> Iterator[Peak]:
    """Let the Peak that is given hold, in the end, the most that torch had allocated on `device` at once."""
    peak = Peak()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    yield peak
    if device.type == "cuda":
        peak.bytes = torch.cuda.max_memory_allocated(device)


def place(device: str) -> tuple[torch.device, torch.dtype]:
    """Return the device of that name and the dtype that decodes there. Raises DecDECError for a GPU that is
    not there."""
    try:
        where = torch.device(device)
    except RuntimeError:
        raise DecDECError(f"device must be cpu or cuda, got {device}") from None
    if where.type == "cuda" and not torch.cuda.is_available():
        raise DecDECError("decoding on a GPU must have a CUDA device, got none")
    return where, torch.float16 if where.type == "cuda" else torch.float32


def load(source: RandomModel | Path, where: torch.device, dtype: torch.dtype) -> tuple[Any, str, Any]:
    """Return config, name and model, its layers of one input fused."""
    if isinstance(source, RandomModel):
        sizes = config_of(source.shapes, source.blocks, dtype)
        name = f"{source.shapes}, {source.weight.bits}-bit {source.weight.format}"
        return sizes, name, random_model(sizes, source.weight, where, dtype)
    require_artifact(source)
    model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
    fuse(model)
    config = copy.deepcopy(model.config)
    del config.quantization_config
    return config, source.name, model.to(where)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return the rows for people."""
    head = ["model", "how", "k_chunk", "tokens/s", "least to most", "step ms", "slowdown %", "first token ms"]
    head += ["KB fetched a token", "weights GB"]
    body = []
    for row in rows:
        k_chunk = "/".join(map(str, row["k_chunk"])) if row["k_chunk"] else ""
        slower = row["slowdown_percent"]
        cells = [row["model"], row["how"], k_chunk, f"{row['tokens_per_second']:.1f}"]
        cells += [f"{row['least']:.1f} to {row['most']:.1f}", f"{row['median_ms']:.3f}"]
        cells += ["" if slower is None else f"{slower:.1f}", f"{row['first_ms']:.1f}"]
        cells += [f"{row['fetched_bytes'] / 1e3:.0f}", f"{row['gpu_bytes'] / 1e9:.2f}"]
        body.append(cells)
    return markdown(head, body)


def random_model(config: Any, weight: WeightQuant | None, device: torch.device, dtype: torch.dtype) -> Any:
    """Return a model of `config` with random weights, layers of one input fused, on `device`.

    weight: of the decoder blocks' layers, which then are DecLinear with 4-bit residuals; None for plain
    layers of `dtype`. The statistics are those of random tokens.
    """
    torch.manual_seed(0)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    fuse(model)
    blocks = model.get_submodule("model.layers")
    linears = [name for name, module in blocks.named_modules() if isinstance(module, nn.Linear)]
    for name in linears if weight is not None else []:
        assert weight is not None
        parent, _, leaf = name.rpartition(".")
        linear = blocks.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        layer = _random_layer(linear.in_features, linear.out_features, weight, device, dtype)
        setattr(blocks.get_submodule(parent), leaf, layer)
    _fill(model, device)
    model.eval().requires_grad_(False)
    if weight is not None:
        _take_statistics(model)
        attach(model, Compensation("none"), _RANDOM)
    return model


def _random_layer(
    in_features: int, out_features: int, weight: WeightQuant, device: torch.device, dtype: torch.dtype
) -> DecLinear:
    bits = int(weight.bits)
    with torch.device(device):
        layer = DecLinear(in_features, out_features, weight)
        layer.codes = torch.randint(-(2**31), 2**31, layer.codes.shape, dtype=torch.int32)
        if weight.format == "codebook":
            layer.table = (torch.randn(layer.table.shape) * _SPREAD).sort(1).values.half()
        else:
            # codes spread evenly over 2**bits steps, in the mean around zero
            layer.scales = torch.full_like(layer.scales, _SPREAD * 12**0.5 / 2**bits)
            half = 2 ** (bits - 1)
            layer.zeros = torch.randint(half - 1, half + 1, layer.zeros.shape, dtype=torch.uint8)
        residual = torch.randint(0, 256, (in_features, channel_bytes(out_features, 4)), dtype=torch.uint8)
    scale = torch.full((out_features,), _SPREAD / 2**bits / 7)
    layer.residual = QuantizedResidual(residual.cpu(), scale, ResidualQuant(4))
    return layer.to(device=device, dtype=dtype)


def _fill(model: Any, device: torch.device) -> None:
    """Give everything that is still on the meta device random values, norms ones."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_meta:
                value = torch.ones(parameter.shape, dtype=parameter.dtype, device=device)
                if parameter.dim() > 1:
                    value.normal_(std=_SPREAD)
                setattr(module, name, nn.Parameter(value, requires_grad=False))
    rotary = model.get_submodule("model.rotary_emb")
    model.model.rotary_emb = type(rotary)(config=model.config).to(device)  # its buffers are computed
    model.tie_weights()


@torch.no_grad()
def _take_statistics(model: Any) -> None:
    """Measure the layers' inputs on random tokens."""

    def look(layer: DecLinear, inputs: tuple[Tensor, ...], _output: Tensor) -> None:
        x = inputs[0].reshape(-1, layer.in_features).float()
        ranked = x.abs().sort(1, descending=True).values.amax(0)
        layer.statistics = ActivationStatistics(ranked.cpu(), x.square().mean(0).cpu(), x.mean(0).cpu())

    hooks = [layer.register_forward_hook(look) for layer in dec_layers(model).values()]
    model(
        torch.randint(0, model.config.vocab_size, (1, _CALIBRATED_ON), device=model.device), use_cache=False
    )
    for hook in hooks:
        hook.remove()


def decode_rows(
    model: Any, name: str, compensations: Sequence[Compensation], setup: Setup, generate: bool = True
) -> list[dict[str, Any]]:
    """Return a row for each of `compensations`, or for a plain model one, and with `generate` one more for
    transformers' generate without compensation.

    Rows: model (`name`), how ("captured" on a GPU, "eager" on a CPU, or "generate"), selection, k_chunk,
    n_tb, prompt, tokens, tokens_per_second (median of the repeats), least and most, median_ms, p10_ms and
    p90_ms of a step, first_ms, slowdown_percent (of the median step against the row of k_chunk 0, None
    without one), fetched_bytes (a token), gpu_bytes (of weights), peak_bytes (the most GPU memory, 0 on a
    CPU). The first of `compensations` is "none".
    """
    decoder, ids = Decoder(model, setup.prompt + setup.tokens), setup.ids(model.config.vocab_size)
    low_bit = bool(dec_layers(model))
    grid: list[Compensation | None] = list(compensations) if low_bit else [None]
    runs: list[list[Any]] = [[] for _ in grid]
    most = [0] * len(grid)
    for turn in tqdm(range(setup.repeats + 1), desc=name, unit="turn", leave=False):
        for which, (compensation, measured) in enumerate(zip(grid, runs, strict=True)):
            if compensation is not None:
                set_compensation(model, compensation)
            with peak_memory(decoder.device) as peak:
                done = decoder.generate(ids, setup.tokens, stop=())
            # of its own, since a step may have been captured just before
            first_s = decoder.generate(ids, 1, stop=()).first_s
            if turn:
                measured.append(replace(done, first_s=first_s))
                most[which] = max(most[which], peak.bytes)
    rows = [_row(model, name, c, setup, done) for c, done in zip(grid, runs, strict=True)]
    for row, peak_bytes in zip(rows, most, strict=True):
        row["peak_bytes"] = peak_bytes
    base = next((row["median_ms"] for row in rows if low_bit and not row["fetched_bytes"]), None)
    for row in rows:
        row["slowdown_percent"] = None if base is None else 100 * (row["median_ms"] / base - 1)
    if generate:
        rows.append(_generate_row(model, name, setup, ids, rows[0]))
    return rows


def _row(
    model: Any, name: str, compensation: Compensation | None, setup: Setup, done: Sequence[Any]
) -> dict[str, Any]:
    rates = [run.tokens_per_second for run in done]
    spreads = [run.spread() for run in done]
    if compensation is not None:
        set_compensation(model, compensation)
    steps = {
        f"{key}_ms": 1e3 * statistics.median(s[f"{key}_s"] for s in spreads)
        for key in ("median", "p10", "p90")
    }
    return {
        "model": name,
        "how": "captured" if model.device.type == "cuda" else "eager",
        **_setting(compensation),
        "prompt": setup.prompt,
        "tokens": setup.tokens,
        "tokens_per_second": statistics.median(rates),
        "least": min(rates),
        "most": max(rates),
        **steps,
        "first_ms": 1e3 * statistics.median(run.first_s for run in done),
        "fetched_bytes": compensation_ledger(model)["bytes_per_token"] if compensation else 0,
        "gpu_bytes": weight_bytes(model),
    }


def _setting(compensation: Compensation | None) -> dict[str, Any]:
    if compensation is None:
        return {"selection": None, "k_chunk": None, "n_tb": None}
    return {
        "selection": compensation.selection,
        "k_chunk": list(compensation.k_chunk),
        "n_tb": compensation.n_tb,
    }


def weight_bytes(model: Any) -> int:
    """Return the bytes of parameters and of low-bit weights as the model's device keeps them."""
    plain = {id(p): p.nbytes for p in model.parameters()}
    on_gpu = model.device.type == "cuda"
    layers = dec_layers(model).values()
    return sum(plain.values()) + sum(layer.kernel_bytes if on_gpu else layer.weight_bytes for layer in layers)


def _generate_row(model: Any, name: str, setup: Setup, ids: Tensor, like: dict[str, Any]) -> dict[str, Any]:
    """Return the row of transformers' generate, by the time of all tokens less that of the first."""
    if like["selection"] is not None:
        set_compensation(model, Compensation("none"))
    run = partial(_generate_s, model, ids)
    run(2)
    first = statistics.median(run(1) for _ in range(3))
    whole = [run(setup.tokens) - first for _ in range(min(2, setup.repeats))]
    rates = [(setup.tokens - 1) / seconds for seconds in whole]
    kept = {key: like[key] for key in ("model", "n_tb", "prompt", "tokens", "gpu_bytes")}
    none = {"selection": "none", "k_chunk": [0, 0, 0, 0]} if like["selection"] is not None else _setting(None)
    return {
        **kept,
        **none,
        "how": "generate",
        "tokens_per_second": statistics.median(rates),
        "least": min(rates),
        "most": max(rates),
        "median_ms": 1e3 / statistics.median(rates),
        "p10_ms": None,
        "p90_ms": None,
        "first_ms": 1e3 * first,
        "fetched_bytes": 0,
        "peak_bytes": None,
        "slowdown_percent": None,
    }


@torch.no_grad()
def _generate_s(model: Any, ids: Tensor, tokens: int) -> float:
    prompt = ids[None].to(model.device)
    start = time.perf_counter()
    model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        do_sample=False,
        pad_token_id=0,
    )
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def step_profile(decoder: Decoder, ids: Tensor, steps: int = 16) -> list[dict[str, Any]]:
    """Return where a captured step's time goes: for each kernel its "us" and "launches" in it, and the same
    of "nothing running".

    A kernel's time runs from the end of those before it, so that launches which overlap are counted once.
    """
    from torch.profiler import ProfilerActivity, profile

    decoder.generate(ids, 2, stop=())
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as trace:
        decoder.replay(steps)
        torch.cuda.synchronize()
    ranges = [(e.name, e.time_range) for e in trace.events() if e.device_type == DeviceType.CUDA]
    times, launches = Counter[str](), Counter[str]()
    ended = None
    for name, taken in sorted(ranges, key=lambda item: item[1].end):
        if ended is not None and taken.start > ended:
            times[_NOTHING] += taken.start - ended
            launches[_NOTHING] += 1
        times[name] += taken.end - (taken.start if ended is None else max(taken.start, ended))
        launches[name] += 1
        ended = taken.end
    rows = [{"kernel": k, "us": us / steps, "launches": launches[k] / steps} for k, us in times.items()]
    return sorted(rows, key=lambda row: -row["us"])
