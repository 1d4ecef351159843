"""decdec build | verify | dequantize | bench: the command line of the core."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from decdec_core.config import (
    AVERAGE_BITS,
    CLUSTERINGS,
    RESIDUAL_BITS,
    WEIGHT_BITS,
    WEIGHT_METHODS,
    Compensation,
    DecDECError,
    ResidualQuant,
    WeightQuant,
    suggest,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; a refused input prints one line to standard error and returns 2."""
    options, unknown = _parser().parse_known_args(arguments)
    options.parser.refuse(unknown)
    return run_command(lambda: options.run(options))


def run_command(command: Callable[[], object]) -> int:
    """Return 0 after running `command`, or 2 after printing what it refused as one line."""
    try:
        command()
    except (DecDECError, OSError) as error:  # such as a full disk
        if os.environ.get("DECDEC_TRACEBACK"):
            raise
        print(f"decdec: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("decdec: interrupted: the same command goes on where a build was", file=sys.stderr)
        return 130
    return 0


class OneLineParser(argparse.ArgumentParser):
    """An argument parser whose refusals are one line, with the nearest option for an unknown one."""

    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: error: {message}", file=sys.stderr)
        sys.exit(2)

    def refuse(self, unknown: Sequence[str]) -> None:
        """End the program if there are unknown arguments."""
        if unknown:
            known = [option for action in self._actions for option in action.option_strings]
            self.error(f"unknown argument {unknown[0]}{suggest(unknown[0].split('=')[0], known)}")


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(prog="decdec", description=__doc__)
    commands = parser.add_subparsers(title="commands", required=True, parser_class=OneLineParser)
    _add_build(commands.add_parser("build", help="quantize a model and store its residuals"))
    verify = commands.add_parser("verify", help="compare every byte of an artifact with its manifest")
    verify.add_argument("directory", type=Path, metavar="DIR")
    verify.set_defaults(run=_verify, parser=verify)
    dense = commands.add_parser(
        "dequantize", help="write an artifact's low-bit weights as a plain Hugging Face model"
    )
    dense.add_argument("directory", type=Path, metavar="DIR")
    dense.add_argument("--out", type=Path, required=True, metavar="DIR")
    dense.set_defaults(run=_dequantize, parser=dense)
    bench = commands.add_parser("bench", help="time an artifact")
    kinds = bench.add_subparsers(title="what to time", required=True, parser_class=OneLineParser)
    _add_bench_build(
        kinds.add_parser("build", help="a build of a random model: seconds for a block, most memory")
    )
    _add_bench_clustering(
        kinds.add_parser("clustering", help="weighted error of squeezellm's two clusterings, layer by layer")
    )
    _add_bench_forward(kinds.add_parser("forward", help="a forward pass under each selection, on the CPU"))
    _add_bench_kernels(kinds.add_parser("kernels", help="the CUDA kernels, matrix by matrix"))
    _add_bench_prefill(
        kinds.add_parser("prefill", help="passes over many tokens on a GPU, compensated or not")
    )
    return parser


def _add_bench_clustering(clustering: argparse.ArgumentParser) -> None:
    clustering.add_argument("--model", default="smollm2", metavar="SRC")
    clustering.add_argument("--bits", type=int, default=3, choices=WEIGHT_BITS)
    clustering.add_argument("--calibration", default="auto", metavar="TEXT")
    _add_calibration_size(clustering, 16)
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
    _save(options.json, rows, options.device)


def _add_bench_build(build: argparse.ArgumentParser) -> None:
    build.add_argument("--shapes", default="llama-3-8b", help="llama-3-8b or smollm2-135m")
    build.add_argument("--blocks", type=int, default=3, help="decoder blocks of the random model (default 3)")
    add_quantization(build)
    _add_calibration_size(build, 64)
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
    _save(options.json, [row], options.device)


def _add_bench_kernels(kernels: argparse.ArgumentParser) -> None:
    kernels.add_argument(
        "--shapes",
        default="llama-3-8b",
        help="llama-3-8b, phi-3-medium, llama-3-70b, or one matrix as IN,OUT",
    )
    kernels.add_argument("--bits", type=int, nargs="+", default=[3, 4], choices=(2, 3, 4))
    kernels.add_argument("--formats", nargs="+", default=["uniform", "codebook"], metavar="FORMAT")
    kernels.add_argument("--n-tb", type=int, nargs="+", default=[8, 16], help="thread blocks that fetch")
    kernels.add_argument("--k-chunk", type=int, nargs="+", default=[8], metavar="K")
    kernels.add_argument("--selections", nargs="+", default=["dynamic"], metavar="SELECTION")
    kernels.add_argument("--tokens", type=int, default=1)
    kernels.add_argument("--json", type=json_file, metavar="FILE", help="write the rows there too")
    kernels.add_argument("--plot", type=Path, metavar="FILE", help="draw time against k_chunk there")
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
    prefill.add_argument("--bits", type=int, default=3, choices=(2, 3, 4))
    prefill.add_argument(
        "--selections", nargs="+", default=["none", "static", "dynamic", "exact"], metavar="SELECTION"
    )
    prefill.add_argument("--json", type=json_file, metavar="FILE", help="write the rows there too")
    prefill.set_defaults(run=_bench_prefill, parser=prefill)


def _add_bench_forward(forward: argparse.ArgumentParser) -> None:
    forward.add_argument("directory", type=Path, metavar="DIR")
    forward.add_argument("--full", metavar="SRC", help="the full-precision model to time beside it")
    forward.add_argument("--selections", nargs="+", default=["static", "dynamic"], metavar="SELECTION")
    forward.add_argument("--k-chunk", default="16")
    forward.add_argument("--tokens", type=int, default=2048)
    forward.add_argument("--repeats", type=int, default=5)
    forward.add_argument("--json", type=json_file, metavar="FILE", help="write the rows there too")
    forward.set_defaults(run=_bench_forward, parser=forward)


def add_quantization(parser: argparse.ArgumentParser) -> None:
    """Add the options that weight_quant_of and residual_quant_of read."""
    parser.add_argument("--method", choices=WEIGHT_METHODS, help="default awq")
    parser.add_argument(
        "--bits",
        type=bits_of,
        metavar="BITS",
        help="2 to 5 (default 3); 2.5, 3.5, 4.5: half of the decoder blocks have a bit more",
    )
    parser.add_argument(
        "--group-size", type=int, help="input channels per scale (default 128); not squeezellm"
    )
    parser.add_argument("--clustering", choices=CLUSTERINGS, help="of squeezellm's codebooks (default exact)")
    parser.add_argument("--residual-bits", type=int, default=4, choices=RESIDUAL_BITS)
    parser.add_argument(
        "--calibration",
        default="auto",
        metavar="TEXT",
        help="wikitext2, pydoc, or a text file; auto (the default) takes wikitext2 where it can be had",
    )
    parser.add_argument("--device", default="cpu", help="cpu (the default) or cuda")


def bits_of(text: str) -> int | float:
    """Return "3" as 3 and "3.5" as 3.5; anything that is none of AVERAGE_BITS is refused."""
    for bits in AVERAGE_BITS:
        if text == str(bits):
            return bits
    raise argparse.ArgumentTypeError(f"must be one of {', '.join(map(str, AVERAGE_BITS))}, got {text!r}")


def json_file(text: str) -> Path:
    """Return the path of a file that is to be written; one in no folder is refused before the work begins."""
    path = Path(text)
    if not path.parent.is_dir() or path.is_dir():
        raise argparse.ArgumentTypeError(f"must be a file in a folder that exists, got {text!r}")
    return path


def quantization_of(options: argparse.Namespace) -> tuple[WeightQuant, ResidualQuant]:
    """Return what the options of add_quantization say."""
    given = {name: getattr(options, name) for name in ("method", "bits", "group_size", "clustering")}
    weight = WeightQuant(**{name: value for name, value in given.items() if value is not None})
    return weight, ResidualQuant(options.residual_bits)


def _save(file: Path | None, rows: list[dict[str, Any]], device: str) -> None:
    """Write rows, and where they come from, to `file` if there is one."""
    if file is not None:
        import torch

        from decdec_core.files import write_json
        from decdec_core.provenance import result_of

        write_json(file, result_of(rows, torch.device(device)))


def _add_calibration_size(parser: argparse.ArgumentParser, sequences: int) -> None:
    parser.add_argument("--calibration-sequences", type=int, default=sequences, metavar="N")
    parser.add_argument("--calibration-length", type=int, default=512, metavar="TOKENS")


def _add_build(build: argparse.ArgumentParser) -> None:
    build.add_argument(
        "--model", required=True, metavar="SRC", help="a hub id, a folder, a .gguf file, or smollm2"
    )
    build.add_argument(
        "--quantized",
        type=Path,
        metavar="DIR",
        help="a GPTQ, AWQ or compressed-tensors checkpoint of that model, taken as the base",
    )
    add_quantization(build)
    _add_calibration_size(build, 64)
    build.add_argument("--out", type=Path, required=True, metavar="DIR")
    build.set_defaults(run=_build, parser=build)


def _build(options: argparse.Namespace) -> None:
    weight, residual = quantization_of(options)
    if options.quantized is not None:
        for name in ("method", "bits", "group_size", "clustering"):
            if getattr(options, name) is not None:
                flag = f"--{name.replace('_', '-')}"
                raise DecDECError(f"{flag} must be absent with --quantized, got {getattr(options, name)}")
    # torch and transformers take seconds to import: not before the arguments are known to be good
    from decdec_core.build import CalibrationSetup, build_artifact

    setup = CalibrationSetup(options.calibration, options.calibration_sequences, options.calibration_length)
    out = build_artifact(
        options.model,
        options.out,
        weight if options.quantized is None else None,
        residual,
        setup,
        options.quantized,
        options.device,
    )
    _print_summary(out)


def _verify(options: argparse.Namespace) -> None:
    from decdec_core.verify import verify

    verify(options.directory)
    _print_summary(options.directory)


def _print_summary(directory: Path) -> None:
    from decdec_core.artifact import Quantization
    from decdec_core.manifest import CONFIG, HOST_STEM, MODEL_STEM, read_manifest

    manifest = read_manifest(directory)
    sizes = [
        sum((directory / file).stat().st_size for file in manifest.shards(stem)) / 1e6
        for stem in (MODEL_STEM, HOST_STEM)
    ]
    config = json.loads((directory / CONFIG).read_text("utf-8"))
    quantization = Quantization.from_dict(config["quantization_config"])
    widths = quantization.block_bits or ()
    mean = f" (mean of blocks {sum(widths) / len(widths):.2f})" if widths else ""
    print(
        f"{directory}: {len(manifest.tensors)} tensors as in the manifest, "
        f"{len(manifest.layers())} quantized layers, {quantization.weight.method} {quantization.weight.bits} "
        f"bits{mean}, model {sizes[0]:.1f} MB, residual {sizes[1]:.1f} MB, artifact {manifest.hash[:12]}"
    )
    for bits in sorted(set(widths)):
        blocks = [str(index) for index, width in enumerate(widths) if width == bits]
        print(f"{bits} bits in blocks {' '.join(blocks)}")


def _dequantize(options: argparse.Namespace) -> None:
    from decdec_core.dense import write_dense

    print(write_dense(options.directory, options.out))


def _bench_forward(options: argparse.Namespace) -> None:
    from decdec_core.bench import forward_times

    compensations = [Compensation(selection, options.k_chunk) for selection in options.selections]
    rows = forward_times(options.directory, compensations, options.tokens, options.repeats, options.full)
    for row in rows:
        label = f"{row['selection']} {row['k_chunk']}".strip()
        print(f"{label:12} {row['median_s']:8.3f} s   {row['to_none']:5.2f} of none")
    _save(options.json, rows, "cpu")


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
    _save(options.json, rows, "cuda")
    if options.plot:
        draw(rows, options.plot)


def _bench_prefill(options: argparse.Namespace) -> None:
    from decdec_core.prefill_bench import prefill_times, table

    rows = prefill_times(
        options.shapes, options.tokens, options.blocks, options.k_chunk, options.bits, options.selections
    )
    print(table(rows))
    _save(options.json, rows, "cuda")


if __name__ == "__main__":
    sys.exit(main())
