"""decdec bench: the commands that measure."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from decdec_core.commandline import (
    OneLineParser,
    add_calibration_size,
    add_quantization,
    json_file,
    picture_file,
    quantization_of,
)
from decdec_core.config import (
    DEFAULT_N_TB,
    FORMATS,
    KERNEL_BITS,
    SELECTIONS,
    WEIGHT_BITS,
    Compensation,
    DecDECError,
    WeightQuant,
)

if TYPE_CHECKING:
    from decdec_core.decode_bench import RandomModel


def add_bench(bench: argparse.ArgumentParser) -> None:
    """Add what can be measured to `bench`."""
    kinds = bench.add_subparsers(title="what to time", required=True, parser_class=OneLineParser)
    _add_bench_build(
        kinds.add_parser("build", help="a build of a random model: seconds for a block, most memory")
    )
    _add_bench_clustering(
        kinds.add_parser("clustering", help="weighted error of squeezellm's two clusterings, layer by layer")
    )
    _add_bench_decode(kinds.add_parser("decode", help="tokens per second, compensated or not"))
    _add_bench_greedy(kinds.add_parser("greedy", help="decoded tokens against transformers' generate"))
    _add_bench_forward(kinds.add_parser("forward", help="a forward pass under each selection, on the CPU"))
    _add_bench_kernels(kinds.add_parser("kernels", help="the CUDA kernels, matrix by matrix"))
    _add_bench_prefill(
        kinds.add_parser("prefill", help="passes over many tokens on a GPU, compensated or not")
    )


def _add_bench_clustering(clustering: argparse.ArgumentParser) -> None:
    clustering.add_argument("--model", default="smollm2", metavar="SRC")
    clustering.add_argument("--bits", type=int, default=3, choices=WEIGHT_BITS)
    clustering.add_argument("--calibration", default="auto", metavar="TEXT")
    add_calibration_size(clustering, 16)
    clustering.add_argument("--device", default="cpu")
    clustering.add_argument("--json", type=json_file, metavar="FILE", help="write the rows there too")
    clustering.set_defaults(run=_bench_clustering, parser=clustering)


def _bench_clustering(options: argparse.Namespace) -> None:
    from decdec_core.clustering_bench import clustering_gain

    rows = clustering_gain(
        options.model,
        options.bits,
        options.calibration,
        options.calibration_sequences,
        options.calibration_length,
        options.device,
    )
    ratios = [row["flash1d_to_exact"] for row in rows]
    worst = max(row["flash1d_to_exact_worst_row"] for row in rows)
    print(
        f"{options.model}, {options.bits} bits, {len(rows)} layers: weighted error of flash1d over exact "
        f"{sum(ratios) / len(ratios):.4f} in the mean of layers, {max(ratios):.4f} in the worst layer, "
        f"{worst:.4f} in the worst row"
    )
    save(options.json, rows, options.device)


def _add_bench_build(build: argparse.ArgumentParser) -> None:
    build.add_argument("--shapes", default="llama-3-8b", help="llama-3-8b or smollm2-135m")
    build.add_argument("--blocks", type=int, default=3, help="decoder blocks of the random model (default 3)")
    add_quantization(build)
    add_calibration_size(build, 64)
    build.add_argument(
        "--folder", type=Path, default=Path(), help="where there is room for it (default here)"
    )
    build.add_argument("--json", type=json_file, metavar="FILE", help="write the figures there too")
    build.set_defaults(run=_bench_build, parser=build)


def _bench_build(options: argparse.Namespace) -> None:
    weight, _ = quantization_of(options)
    from decdec_core.build import CalibrationSetup
    from decdec_core.build_bench import build_cost

    setup = CalibrationSetup(options.calibration, options.calibration_sequences, options.calibration_length)
    row = build_cost(options.shapes, options.blocks, weight, setup, options.device, options.folder).to_dict()
    print(
        f"{options.shapes}, {options.blocks} blocks, {weight.method} {weight.bits} bits on {options.device}: "
        f"{row['median_seconds']:.1f} s a block, {row['projected_blocks']} blocks would take "
        f"{row['projected_seconds'] / 60:.0f} min; most memory {row['host_bytes'] / 1e9:.2f} GB "
        f"({row['start_bytes'] / 1e9:.2f} before the build), {row['device_bytes'] / 1e9:.2f} GB of tensors "
        f"on the GPU; two blocks, embeddings and 2 GB are {row['allowed_bytes'] / 1e9:.2f} GB"
    )
    save(options.json, [row], options.device)


def _add_bench_kernels(kernels: argparse.ArgumentParser) -> None:
    kernels.add_argument(
        "--shapes",
        default="llama-3-8b",
        help="llama-3-8b, phi-3-medium, llama-3-70b, or one matrix as IN,OUT",
    )
    kernels.add_argument("--bits", type=int, nargs="+", default=[3, 4], choices=KERNEL_BITS)
    kernels.add_argument("--formats", nargs="+", default=["uniform", "codebook"], metavar="FORMAT")
    kernels.add_argument("--n-tb", type=int, nargs="+", default=[8, 16], help="thread blocks that fetch")
    kernels.add_argument("--k-chunk", type=int, nargs="+", default=[8], metavar="K")
    kernels.add_argument("--selections", nargs="+", default=["dynamic"], metavar="SELECTION")
    kernels.add_argument("--tokens", type=int, default=1)
    kernels.add_argument("--json", type=json_file, metavar="FILE", help="write the rows there too")
    kernels.add_argument("--plot", type=picture_file, metavar="FILE", help="draw time against k_chunk there")
    kernels.set_defaults(run=_bench_kernels, parser=kernels)


def _add_bench_prefill(prefill: argparse.ArgumentParser) -> None:
    prefill.add_argument(
        "--shapes",
        default="llama-3-8b",
        help="llama-3-8b, phi-3-medium, llama-3-70b, or one matrix as IN,OUT",
    )
    prefill.add_argument("--tokens", type=int, default=2048)
    prefill.add_argument("--blocks", type=int, default=3, help="of those matrices, one after the other")
    prefill.add_argument("--k-chunk", type=int, default=16, metavar="K")
    prefill.add_argument("--bits", type=int, default=3, choices=KERNEL_BITS)
    prefill.add_argument(
        "--selections", nargs="+", default=["none", "static", "dynamic", "exact"], metavar="SELECTION"
    )
    prefill.add_argument("--json", type=json_file, metavar="FILE", help="write the rows there too")
    prefill.set_defaults(run=_bench_prefill, parser=prefill)


def _add_bench_decode(decode: argparse.ArgumentParser) -> None:
    add_random_model(decode)
    decode.add_argument("--selection", default="dynamic", choices=SELECTIONS[1:])
    decode.add_argument(
        "--k-chunk", nargs="+", default=["8"], metavar="K", help="one setting each (default 8)"
    )
    decode.add_argument(
        "--n-tb", type=int, default=DEFAULT_N_TB, help="thread blocks that fetch (default 16)"
    )
    decode.add_argument("--prompt", type=int, default=128, help="tokens before (default 128)")
    decode.add_argument("--tokens", type=int, default=256, help="tokens generated (default 256)")
    decode.add_argument("--repeats", type=int, default=3)
    decode.add_argument("--low-bit-only", action="store_true", help="no float16 model, no generate")
    decode.add_argument("--device", default="cuda", help="cuda (the default) or cpu")
    decode.add_argument("--json", type=json_file, metavar="FILE", help="write the rows there too")
    decode.add_argument("--profile", type=json_file, metavar="FILE", help="write a step's kernels there; GPU")
    decode.set_defaults(run=_bench_decode, parser=decode)


def _bench_decode(options: argparse.Namespace) -> None:
    from decdec_core.decode_bench import Setup, bench_decode, table

    setup = Setup(options.prompt, options.tokens, options.repeats)
    settings = [Compensation("none")]
    settings += [Compensation(options.selection, k, n_tb=options.n_tb) for k in options.k_chunk]
    source = source_of(options, "bench decode")
    rows, kernels = bench_decode(
        source,
        options.device,
        settings,
        setup,
        whole=not options.low_bit_only,
        profiled=options.profile is not None,
    )
    print(table(rows))
    save(options.json, rows, options.device)
    save(options.profile, kernels, options.device)


def _add_bench_greedy(greedy: argparse.ArgumentParser) -> None:
    greedy.add_argument("directory", type=Path, metavar="DIR")
    greedy.add_argument("--selection", default="dynamic", choices=SELECTIONS)
    greedy.add_argument("--k-chunk", default="16", metavar="K")
    greedy.add_argument("--tokens", type=int, default=64, help="of each prompt (default 64)")
    greedy.add_argument("--dtype", choices=("float32", "float16", "bfloat16"))
    greedy.add_argument("--device", default="cuda", help="cuda (the default) or cpu")
    greedy.add_argument("--json", type=json_file, metavar="FILE", help="write the rows there too")
    greedy.set_defaults(run=_bench_greedy, parser=greedy)


def _bench_greedy(options: argparse.Namespace) -> None:
    import torch

    from decdec_core.greedy_bench import greedy_rows, table

    compensation = Compensation(options.selection, options.k_chunk, "decode")
    dtype = None if options.dtype is None else getattr(torch, options.dtype)
    rows = greedy_rows(options.directory, options.device, dtype, compensation, options.tokens)
    print(table(rows))
    save(options.json, rows, options.device)


def add_random_model(parser: argparse.ArgumentParser) -> None:
    """Add a DIR, and the options of the random model in its place that source_of reads."""
    parser.add_argument("directory", type=Path, metavar="DIR", nargs="?", help="an artifact, or --shapes")
    parser.add_argument("--shapes", help="a random model of these sizes, such as llama-3-8b")
    parser.add_argument("--blocks", type=int, help="of the random model (default: all)")
    parser.add_argument("--bits", type=int, choices=KERNEL_BITS, help="of the random model (default 3)")
    parser.add_argument("--format", choices=FORMATS, help="of the random model (default uniform)")


def source_of(options: argparse.Namespace, command: str) -> RandomModel | Path:
    """Return the random model or the artifact's folder that the options of add_random_model say."""
    from decdec_core.decode_bench import RandomModel

    if (options.shapes is None) == (options.directory is None):
        got = "neither" if options.shapes is None else "both"
        raise DecDECError(f"{command} must have either DIR or --shapes, got {got}")
    if options.directory is not None:
        for name in ("blocks", "bits", "format"):
            if getattr(options, name) is not None:
                raise DecDECError(f"--{name} must be absent with DIR, got {getattr(options, name)}")
        return options.directory
    method = "squeezellm" if options.format == "codebook" else "rtn"
    return RandomModel(options.shapes, options.blocks, WeightQuant(method, options.bits or 3))


def _add_bench_forward(forward: argparse.ArgumentParser) -> None:
    forward.add_argument("directory", type=Path, metavar="DIR")
    forward.add_argument("--full", metavar="SRC", help="the full-precision model to time beside it")
    forward.add_argument("--selections", nargs="+", default=["static", "dynamic"], metavar="SELECTION")
    forward.add_argument("--k-chunk", default="16")
    forward.add_argument("--tokens", type=int, default=2048)
    forward.add_argument("--repeats", type=int, default=5)
    forward.add_argument("--json", type=json_file, metavar="FILE", help="write the rows there too")
    forward.set_defaults(run=_bench_forward, parser=forward)


def _bench_forward(options: argparse.Namespace) -> None:
    from decdec_core.bench import forward_times

    compensations = [Compensation(selection, options.k_chunk) for selection in options.selections]
    rows = forward_times(options.directory, compensations, options.tokens, options.repeats, options.full)
    for row in rows:
        label = f"{row['selection']} {row['k_chunk']}".strip()
        print(f"{label:12} {row['median_s']:8.3f} s   {row['to_none']:5.2f} of none")
    save(options.json, rows, "cpu")


def _bench_kernels(options: argparse.Namespace) -> None:
    from decdec_core.kernel_bench import draw, kernel_times, shapes_of, table

    rows = kernel_times(
        shapes_of(options.shapes),
        options.bits,
        options.formats,
        options.n_tb,
        options.k_chunk,
        options.selections,
        options.tokens,
    )
    print(table(rows))
    save(options.json, rows, "cuda")
    if options.plot:
        draw(rows, options.plot)


def _bench_prefill(options: argparse.Namespace) -> None:
    from decdec_core.prefill_bench import prefill_times, table

    rows = prefill_times(
        options.shapes, options.tokens, options.blocks, options.k_chunk, options.bits, options.selections
    )
    print(table(rows))
    save(options.json, rows, "cuda")


def save(file: Path | None, rows: list[dict[str, Any]], device: str) -> None:
    """Write rows, and where they come from, to `file` if there is one."""
    if file is not None:
        import torch

        from decdec_core.files import write_json
        from decdec_core.provenance import result_of

        write_json(file, result_of(rows, torch.device(device)))
