"""decdec build | verify | dequantize | tune | profiles | bench: the command line of the core."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from decdec_core.cli_bench import add_bench
from decdec_core.cli_tune import add_profiles, add_tune
from decdec_core.commandline import (
    OneLineParser,
    add_calibration_size,
    add_quantization,
    quantization_of,
    run_command,
)
from decdec_core.config import (
    DecDECError,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; a refused input prints one line to standard error and returns 2."""
    options, unknown = _parser().parse_known_args(arguments)
    options.parser.refuse(unknown)
    return run_command(lambda: options.run(options), resumes=options.run is _build)


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
    add_tune(commands.add_parser("tune", help="what to compensate at a stated slowdown"))
    add_profiles(commands.add_parser("profiles", help="several profiles of one GPU as one file"))
    add_bench(commands.add_parser("bench", help="time kernels, builds, passes and decoding"))
    return parser


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
    add_calibration_size(build, 64)
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


if __name__ == "__main__":
    sys.exit(main())
