"""decdec tune: a stated slowdown -> k_chunk, measured on the GPU at hand or predicted for another."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from decdec_core.cli_bench import add_random_model, source_of
from decdec_core.commandline import json_file, picture_file
from decdec_core.config import DecDECError, WeightQuant, require_int

if TYPE_CHECKING:
    from torch import Tensor

    from decdec_core.decode_bench import RandomModel, Setup
    from decdec_core.profiles import Profile
    from decdec_core.tuning import Energy

_TOKENS = 512  # of one sequence, for the error energy
_MORE = ("memory_gb_s", "link_gb_s", "link_latency_us")  # of a GPU that is not known by its name


def add_tune(tune: argparse.ArgumentParser) -> None:
    """Add the options of tune."""
    add_random_model(tune)
    tune.add_argument("--slowdown", type=float, nargs="+", default=[2.5, 5.0, 10.0, 20.0], metavar="PERCENT")
    tune.add_argument(
        "--objective", default="speed", choices=("speed", "quality"), help="quality needs an artifact"
    )
    tune.add_argument("--gpu", metavar="NAME", help="predict for it, such as rtx-4050-mobile")
    tune.add_argument("--memory-gb-s", type=float, help="of a GPU that is not known by its name: its memory")
    tune.add_argument("--link-gb-s", type=float, help="of that GPU: from host memory")
    tune.add_argument("--link-latency-us", type=float, help="of that GPU: one read from host memory")
    tune.add_argument("--prompt", type=int, default=128, help="tokens before those that are timed")
    tune.add_argument("--tokens", type=int, default=256, help="tokens timed")
    tune.add_argument("--calibration", default="auto", metavar="TEXT", help="for --objective quality")
    tune.add_argument("--calibration-sequences", type=int, default=4, metavar="N", help="of 512 tokens")
    tune.add_argument("--out", type=json_file, required=True, metavar="FILE", help="the profile")
    tune.add_argument("--figure", type=picture_file, metavar="FILE", help="draw time against k_chunk there")
    tune.add_argument("--json", type=json_file, metavar="FILE", help="write a row for each slowdown there")
    tune.set_defaults(run=_tune, parser=tune)


def add_profiles(profiles: argparse.ArgumentParser) -> None:
    """Add the options of profiles."""
    profiles.add_argument("files", type=Path, nargs="+", metavar="FILE", help="of decdec tune, for one GPU")
    profiles.add_argument("--out", type=json_file, required=True, metavar="FILE", help="all of them")
    profiles.add_argument("--json", type=json_file, metavar="FILE", help="write a row for each budget there")
    profiles.set_defaults(run=_profiles, parser=profiles)


def _profiles(options: argparse.Namespace) -> None:
    from decdec_core.files import write_json
    from decdec_core.profiles import of_one_gpu, read_profiles, write_profiles
    from decdec_core.tuning import budget_rows, table_of

    if options.json is not None and options.json.resolve() == options.out.resolve():
        raise DecDECError(f"--out and --json must be different files, got {options.out} twice")
    profiles = of_one_gpu(profile for file in options.files for profile in read_profiles(file))
    write_profiles(options.out, profiles)
    if options.json is not None:
        rows = []
        for profile in profiles:
            made = {key: (profile.environment or {}).get(key) for key in ("commit", "versions")}
            rows += [{**row, "predicted": profile.predicted, **made} for row in budget_rows(profile)]
        write_json(options.json, {"hardware": profiles[0].gpu, "driver": profiles[0].driver, "rows": rows})
    print("\n\n".join(table_of(profile) for profile in profiles) + f"\n\nwritten: {options.out}")


def _tune(options: argparse.Namespace) -> None:
    from decdec_core.decode_bench import Setup
    from decdec_core.files import write_json
    from decdec_core.profiles import write_profile
    from decdec_core.tune_figure import draw
    from decdec_core.tuning import budget_rows, table_of

    source = source_of(options, "tune")
    if options.objective == "quality" and options.directory is None:
        raise DecDECError("objective quality must be with an artifact, got --shapes")
    for name in _MORE:
        if getattr(options, name) is not None and options.gpu is None:
            raise DecDECError(f"--{name.replace('_', '-')} must be with --gpu NAME, got no name")
    for target in options.slowdown:
        if not 0 <= target <= 1000:
            raise DecDECError(f"slowdown must be 0 to 1000 percent, got {target:g}")
    files = [path.resolve() for path in (options.out, options.json, options.figure) if path is not None]
    if len(set(files)) < len(files):
        raise DecDECError(f"--out, --json and --figure must be different files, got {files[0]} twice")
    setup = Setup(options.prompt, options.tokens)
    options.slowdown = list(dict.fromkeys(options.slowdown))
    profile = _predicted(options, source) if options.gpu is not None else _measured(options, source, setup)
    write_profile(options.out, profile)
    if options.json is not None:
        made = {**(profile.environment or {}), "measured": not profile.predicted}
        write_json(options.json, {**made, "rows": budget_rows(profile)})
    if options.figure is not None:
        draw(profile, options.figure, _own_gpu(options))
    written = [str(path) for path in (options.out, options.json, options.figure) if path is not None]
    print(f"{table_of(profile)}\n\nwritten: {', '.join(written)}")


def _measured(options: argparse.Namespace, source: RandomModel | Path, setup: Setup) -> Profile:
    import torch

    from decdec_core.decode_bench import load, place
    from decdec_core.tuning import measured_profile, tuned_profile

    if not torch.cuda.is_available():
        raise DecDECError("tune must have a CUDA device, or --gpu NAME to predict for, got neither")
    text = _calibration(options)
    where, dtype = place("cuda")
    name, config, weight = _about(source)
    profile = measured_profile(name, config, weight)
    model = load(source, where, dtype)[2]
    return tuned_profile(profile, model, options.slowdown, setup, _energy(text, model))


def _predicted(options: argparse.Namespace, source: RandomModel | Path) -> Profile:
    import torch

    from decdec_core.decode_bench import load
    from decdec_core.profiles import Budget, predicted_profile, shapes_of_model
    from decdec_core.tuner import search_quality

    name, config, weight = _about(source)
    shapes, bits = shapes_of_model(config), weight.widths[0]
    about = (options.gpu, name, shapes, config.num_hidden_layers, bits, weight.format)
    profile = replace(predicted_profile(*about, options.slowdown, _own_gpu(options)), model_bits=weight.bits)
    text = _calibration(options)
    if text is None:
        return profile
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    energy = _energy(text, load(source, device, torch.float32)[2])
    assert energy is not None
    found = [(target, search_quality(profile.table(), target, energy)) for target in options.slowdown]
    return replace(profile, choices=[Budget.of(target, choice) for target, choice in found])


def _own_gpu(options: argparse.Namespace) -> Any:
    """Return the GPU that the options describe in numbers, or None."""
    from decdec_core.latency import GPUS, LINK_LATENCY_US, Gpu

    given = [getattr(options, name) for name in _MORE]
    if given == [None] * len(given):
        return None
    if options.gpu in GPUS:
        raise DecDECError(f"a GPU in numbers must have a name of its own, got {options.gpu}, which is known")
    for name in _MORE[:2]:
        if getattr(options, name) is None:
            raise DecDECError(f"a GPU in numbers must have --{name.replace('_', '-')}, got none")
    latency = LINK_LATENCY_US if options.link_latency_us is None else options.link_latency_us
    return Gpu(options.gpu, options.memory_gb_s, options.link_gb_s, latency)


def _about(source: RandomModel | Path) -> tuple[str, Any, WeightQuant]:
    """Return name, config and weight of the model, which must take the kernels that are timed."""
    from decdec_core.budget import described, require_timed
    from decdec_core.shapes import config_of

    if not isinstance(source, Path):
        return source.shapes, config_of(source.shapes, source.blocks), source.weight
    config, quantization = described(source)
    require_timed(quantization.weight, quantization.residual)
    return source.resolve().name, config, quantization.weight


def _calibration(options: argparse.Namespace) -> Tensor | None:
    """Return the calibration text's tokens for an objective that needs them."""
    require_int("calibration sequences", options.calibration_sequences, 1, 1 << 20)
    if options.objective == "speed":
        return None
    from transformers import AutoTokenizer

    from decdec_core.artifact import require_artifact
    from decdec_core.calibration import sequences
    from decdec_core.texts import available_text, load_text

    require_artifact(options.directory)
    named = available_text("calibration") if options.calibration == "auto" else options.calibration
    tokenizer = AutoTokenizer.from_pretrained(options.directory)
    ids = tokenizer(load_text(named, "calibration").text, verbose=False).input_ids
    return sequences(ids, options.calibration_sequences, _TOKENS)


def _energy(text: Tensor | None, model: Any) -> Energy | None:
    from decdec_core.energy import error_energy

    return None if text is None else error_energy(model, text)
