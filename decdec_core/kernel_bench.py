"""How long the CUDA kernels take: medians of CUDA-graph replays, weights from memory, not from the cache."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from decdec_core import ops
from decdec_core.calibration import ActivationStatistics
from decdec_core.channels import make_selection
from decdec_core.config import FORMATS, DecDECError, require_int, require_one_of, suggest, total_channels
from decdec_core.files import whole_file
from decdec_core.ops import Selection, TiledWeight
from decdec_core.packing import DEPTH, SLAB, tile_words
from decdec_core.shapes import MODELS, config_of, matrices_of

_CACHE_TIMES = 4  # the copies of a matrix together, in sizes of the L2 cache
_REPLAYS = 30
_LAUNCHES = 200  # of one graph at least, so that starting it does not count


@dataclass(frozen=True)
class Case:
    """One matrix, and copies of it and of its input, on the current device; the residual in pinned memory."""

    name: str
    in_features: int
    out_features: int
    bits: int
    format: str
    tokens: int
    weights: list[TiledWeight]
    inputs: list[Tensor]
    codes: list[Tensor]
    scale: Tensor
    statistics: ActivationStatistics

    def row(self, **values: Any) -> dict[str, Any]:
        """Return a row of results that says which matrix it is about."""
        about = {"matrix": self.name, "in": self.in_features, "out": self.out_features, "tokens": self.tokens}
        return {**about, "bits": self.bits, "format": self.format, **values}


def make_case(
    name: str,
    shape: tuple[int, int],
    bits: int,
    kind: str,
    tokens: int = 1,
    dtype: torch.dtype = torch.float16,
) -> Case:
    """Return random weights and heavy-tailed inputs of one matrix (in, out), enough to pass the cache."""
    require_one_of("format", kind, FORMATS)
    in_features, out_features = shape
    for which, size in (("in", in_features), ("out", out_features)):
        if size < SLAB or size % SLAB:
            raise DecDECError(f"{which} must be a positive multiple of {SLAB}, got {size}")
    slabs, depth = -(-out_features // SLAB), -(-in_features // DEPTH)
    words = tile_words(bits, kind == "codebook")
    copies = _copies(slabs * depth * words * 4)
    weights = [_random_weight(slabs, depth, words, bits, kind, shape, dtype) for _ in range(copies)]
    # few inputs: the layer before has just written them, so that they lie in the cache
    few = [heavy_tailed(tokens, in_features).to(dtype) for _ in range(2)]
    inputs = [few[i % 2] for i in range(copies)]
    largest = torch.cat(few).float().abs().sort(1, descending=True).values.amax(0).cpu()
    measured = ActivationStatistics(largest, torch.rand(in_features), torch.zeros(in_features))
    shape_of_codes = (in_features, out_features // 2)
    codes = [torch.randint(0, 256, shape_of_codes, dtype=torch.uint8).pin_memory() for _ in weights]
    scale = torch.rand(out_features).pin_memory()
    return Case(name, *shape, bits, kind, tokens, weights, inputs, codes, scale, measured)


def _copies(size: int) -> int:
    cache = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    return max(4, -(-_CACHE_TIMES * cache // size))


def _random_weight(
    slabs: int, depth: int, words: int, bits: int, kind: str, shape: tuple[int, int], dtype: torch.dtype
) -> TiledWeight:
    tiles = torch.randint(-(2**31), 2**31, (slabs, depth, words), dtype=torch.int32, device="cuda")
    if kind == "codebook":
        values = torch.randn(slabs, SLAB, 2**bits, device="cuda").to(dtype)
        planes = values.view(torch.uint8).view(slabs, SLAB, 2**bits, 2).transpose(2, 3).contiguous()
        return TiledWeight(tiles, bits, shape[1], shape[0], planes.view(torch.int32).view(slabs, SLAB, -1))
    scale_zero = torch.rand(slabs, depth, SLAB, 2, device="cuda") * torch.tensor(
        [0.01, 2**bits], device="cuda"
    )
    tiles[..., -SLAB:] = scale_zero.half().view(torch.int32).view(slabs, depth, SLAB)
    return TiledWeight(tiles, bits, shape[1], shape[0])


def heavy_tailed(tokens: int, in_features: int) -> Tensor:
    """Return activations (tokens, in) float32 on the GPU, most of each carried by the same few channels."""
    spread = (torch.randn(in_features, device="cuda") * 1.2).exp()
    return torch.randn(tokens, in_features, device="cuda") * spread


def shapes_of(text: str) -> dict[str, tuple[int, int]]:
    """Return the matrices of a model's name, or the one of "IN,OUT". Raises DecDECError for another text."""
    if text in MODELS:
        return matrices_of(config_of(text))
    parts = text.split(",")
    if len(parts) != 2 or not all(part.isdecimal() for part in parts):
        raise DecDECError(f"shapes must be {', '.join(MODELS)} or IN,OUT, got {text}{suggest(text, MODELS)}")
    return {"matrix": (int(parts[0]), int(parts[1]))}


def kernel_times(
    shapes: Mapping[str, tuple[int, int]],
    bits: Sequence[int],
    formats: Sequence[str],
    n_tb: Sequence[int],
    k_chunk: Sequence[int],
    selections: Sequence[str] = ("dynamic",),
    tokens: int = 1,
) -> list[dict[str, Any]]:
    """Return rows: for each matrix cuBLAS in float16 and, for each of `bits` and `formats`, the product
    alone, compensation alone, and both in one launch for each n_tb and k_chunk.

    Rows: matrix, in, out, tokens, bits, format, n_tb, k_chunk, selection, time_us, and gb_per_s of the weight
    or host_bytes and host_gb_per_s of the residual. Raises DecDECError without a CUDA device.
    """
    if not torch.cuda.is_available():
        raise DecDECError("bench kernels must have a CUDA device, got none")
    require_int("tokens", tokens, 1, ops.MOST_TOKENS)
    for value in k_chunk:
        require_int("k_chunk", value, 1, 1024)
    rows = []
    grid = [(s, n, k) for s in selections for n in n_tb for k in k_chunk]
    progress = tqdm(total=len(shapes) * (1 + len(bits) * len(formats) * (1 + len(grid))), unit="time")
    for name, shape in shapes.items():
        rows.append(fp16_row(name, shape, tokens))
        progress.update()
        for width in bits:
            for kind in formats:
                case = make_case(name, shape, width, kind, tokens)
                rows.append(base_row(case))
                progress.update()
                for selection, blocks, k in grid:
                    rows.append(fused_row(case, blocks, k, selection))
                    progress.update()
                if kind == formats[0] and width == bits[0]:
                    rows += [
                        compensation_row(case, k, selection) for selection in selections for k in k_chunk
                    ]
    progress.close()
    return rows


def markdown(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *body))


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the microseconds for people: a line per format and setting, a column per matrix, the sum."""
    matrices = list(dict.fromkeys(row["matrix"] for row in rows))
    lines: dict[str, dict[str, float]] = {}
    for row in rows:
        label = f"{row['bits']}-bit {row['format']}"
        if row["k_chunk"]:
            alone = " alone" if row.get("compensation_only") else f", n_tb {row['n_tb']}"
            label += f", {row['selection']} k_chunk {row['k_chunk']}{alone}"
        lines.setdefault(label, {})[row["matrix"]] = row["time_us"]
    head = ["", *matrices, "sum"]
    body = [
        [label, *(f"{times[m]:.2f}" for m in matrices), f"{sum(times.values()):.2f}"]
        for label, times in lines.items()
    ]
    return markdown(head, body)


def draw(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw time against k_chunk, a line per n_tb, and the knee: the last k_chunk that costs at most 5 %."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    fused = [row for row in rows if row["k_chunk"] and not row.get("compensation_only")]
    first = (fused[0]["bits"], fused[0]["format"], fused[0]["selection"])
    fused = [row for row in fused if (row["bits"], row["format"], row["selection"]) == first]
    matrices = list(dict.fromkeys(row["matrix"] for row in fused))
    figure, axes = plt.subplots(1, len(matrices), figsize=(4 * len(matrices), 3.6), squeeze=False)
    for axis, matrix in zip(axes[0], matrices, strict=True):
        same = ("matrix", "bits", "format")
        base = next(
            row["time_us"]
            for row in rows
            if not row["k_chunk"] and tuple(row[key] for key in same) == (matrix, *first[:2])
        )
        axis.axhline(base, color="#999999", label="product alone")
        mine = [row for row in fused if row["matrix"] == matrix]
        for n_tb in dict.fromkeys(row["n_tb"] for row in mine):
            line = sorted((row["k_chunk"], row["time_us"]) for row in mine if row["n_tb"] == n_tb)
            axis.plot(*zip(*line, strict=True), marker="o", label=f"n_tb {n_tb}")
        within = [row["k_chunk"] for row in mine if row["time_us"] <= 1.05 * base]
        if within:
            axis.axvline(max(within), color="#D55E00", linestyle=":", label=f"knee: {max(within)}")
        axis.set_title(f"{matrix}, {first[0]}-bit {first[1]}, {first[2]}", fontsize=9)
        axis.set_xlabel("k_chunk")
        axis.set_ylabel("microseconds")
        axis.set_xscale("log", base=2)
        axis.set_yscale("log", base=2)
        axis.xaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_major_formatter("{x:g}")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    figure.tight_layout()
    with whole_file(path) as temporary:
        figure.savefig(temporary, dpi=150, format=path.suffix[1:] or "png")
    plt.close(figure)


def compensation_row(case: Case, k_chunk: int, selection: str = "dynamic") -> dict[str, Any]:
    """Return the time of selection and compensation without the product."""
    how = _selection(case, selection, k_chunk)
    y = torch.zeros(case.tokens, case.out_features, device="cuda")

    def run(x: Tensor, codes: Tensor) -> None:
        ops.select_and_compensate(x, how, codes, case.scale, 4, y)

    pairs = zip(case.inputs, case.codes, strict=True)
    time_us = replay_us([partial(run, x, codes) for x, codes in pairs])
    about = {"n_tb": None, "k_chunk": k_chunk, "selection": selection, "compensation_only": True}
    return case.row(**about, time_us=time_us, **_fetched(case, k_chunk, time_us))


def base_row(case: Case) -> dict[str, Any]:
    """Return the time of the product alone, and the bytes per second of its weight."""
    pairs = zip(case.inputs, case.weights, strict=True)
    time_us = replay_us([partial(ops.linear, x, w) for x, w in pairs])
    size = case.weights[0].tiles.numel() * 4
    return case.row(n_tb=0, k_chunk=0, selection="none", time_us=time_us, gb_per_s=size / time_us / 1e3)


def fused_row(case: Case, n_tb: int, k_chunk: int, selection: str = "dynamic") -> dict[str, Any]:
    """Return the time of product and compensation in one launch."""
    how = _selection(case, selection, k_chunk)
    triples = zip(case.inputs, case.weights, case.codes, strict=True)
    time_us = replay_us([partial(ops.linear, x, w, how, c, case.scale, n_tb) for x, w, c in triples])
    return case.row(
        n_tb=n_tb, k_chunk=k_chunk, selection=selection, time_us=time_us, **_fetched(case, k_chunk, time_us)
    )


def _selection(case: Case, selection: str, k_chunk: int) -> Selection:
    how = make_selection(selection, k_chunk, case.statistics)
    if how is None:
        raise DecDECError(f"k_chunk must give {case.name} a channel, got {k_chunk} of {case.in_features}")
    if how.indices is not None:
        return Selection(how.kind, how.k_chunk, indices=how.indices.cuda())
    return how


def _fetched(case: Case, k_chunk: int, time_us: float) -> dict[str, float]:
    size = case.tokens * total_channels(case.in_features, k_chunk) * case.codes[0].shape[1]
    return {"host_bytes": size, "host_gb_per_s": size / time_us / 1e3}


def fp16_row(name: str, shape: tuple[int, int], tokens: int = 1) -> dict[str, Any]:
    """Return the time of cuBLAS on the same matrix in float16."""
    in_features, out_features = shape
    size = 2 * in_features * out_features
    weights = [
        torch.randn(out_features, in_features, device="cuda", dtype=torch.half) for _ in range(_copies(size))
    ]
    inputs = [heavy_tailed(tokens, in_features).half()] * len(weights)
    calls = [lambda w=w, x=x: torch.nn.functional.linear(x, w) for w, x in zip(weights, inputs, strict=True)]
    time_us = replay_us(calls)
    about = {
        "matrix": name,
        "in": in_features,
        "out": out_features,
        "tokens": tokens,
        "bits": 16,
        "format": "fp16",
    }
    return {
        **about,
        "n_tb": 0,
        "k_chunk": 0,
        "selection": "none",
        "time_us": time_us,
        "gb_per_s": size / time_us / 1e3,
    }


def replay_us(calls: Sequence[Callable[[], object]]) -> float:
    """Return the median microseconds of one of `calls`, captured one after the other in a CUDA graph."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls[:2]:
            call()
    stream.synchronize()
    graph, rounds = torch.cuda.CUDAGraph(), -(-_LAUNCHES // len(calls))
    with torch.cuda.graph(graph, stream=stream):
        for call in list(calls) * rounds:
            call()
    with torch.cuda.stream(stream):
        for _ in range(3):
            graph.replay()
        times = []
        for _ in range(_REPLAYS):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) * 1e3 / (rounds * len(calls)))
    return statistics.median(times)
