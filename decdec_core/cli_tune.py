"""decdec tune: a stated slowdown -> k_chunk, measured on the GPU at hand or predicted for another."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from decdec_core.commandline import json_file
from decdec_core.config import DecDECError, WeightQuant

if TYPE_CHECKING:
    from decdec_core.profiles import Profile
    from decdec_core.tuning import Energy

_TOKENS = 512  # of one sequence, for the error energy
_MORE = ("memory_gb_s", "link_gb_s", "link_latency_us")  # of a GPU that is not known by its name


def add_tune(tune: argparse.ArgumentParser) -> None:
    """Add the options of tune."""
    tune.add_argument("directory", type=Path, metavar="DIR", nargs="?", help="an artifact, or --shapes")
    tune.add_argument("--shapes", help="a random model of these sizes, such as llama-3-8b")
    tune.add_argument("--blocks", type=int, help="of the random model (default: all)")
    tune.add_argument("--bits", type=int, default=3, choices=(2, 3, 4), help="of the random model")
    tune.add_argument("--format", default="uniform", choices=("uniform", "codebook"), help="of it, too")
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
    tune.add_argument("--figure", type=json_file, metavar="FILE", help="draw time against k_chunk there")
    tune.set_defaults(run=_tune, parser=tune)


def _tune(options: argparse.Namespace) -> None:
    from decdec_core.profiles import write_profile
    from decdec_core.tune_figure import draw
    from decdec_core.tuning import table_of

    if (options.shapes is None) == (options.directory is None):
        raise DecDECError("tune must have either DIR or --shapes, got both or neither")
    if options.objective == "quality" and options.directory is None:
        raise DecDECError("objective quality must be with an artifact, got --shapes")
    for name in _MORE:
        if getattr(options, name) is not None and options.gpu is None:
            raise DecDECError(f"--{name.replace('_', '-')} must be with --gpu NAME, got no name")
    for target in options.slowdown:
        if not 0 <= target < 1000:
            raise DecDECError(f"slowdown must be 0 to 1000 percent, got {target:g}")
    profile = _predicted(options) if options.gpu is not None else _measured(options)
    write_profile(options.out, profile)
    print(f"{table_of(profile)}\n\nwritten: {options.out}")
    if options.figure is not None:
        draw(profile, options.figure, _own_gpu(options))


def _measured(options: argparse.Namespace) -> Profile:
    from decdec_core.decode_bench import Setup, load, place
    from decdec_core.tuning import measured_profile, tuned_profile

    setup = Setup(options.prompt, options.tokens)
    where, dtype = place("cuda")
    name, config, weight = _about(options)
    profile = measured_profile(name, config, weight)
    model = load(_source(options), where, dtype)[2]
    return tuned_profile(profile, model, options.slowdown, setup, _energy(options, model))


def _predicted(options: argparse.Namespace) -> Profile:
    from decdec_core.decode_bench import load
    from decdec_core.profiles import Budget, predicted_profile, shapes_of_model
    from decdec_core.tuner import search_quality

    name, config, weight = _about(options)
    shapes, bits = shapes_of_model(config), weight.widths[0]
    about = (options.gpu, name, shapes, config.num_hidden_layers, bits, weight.format)
    profile = predicted_profile(*about, options.slowdown, _own_gpu(options))
    if options.objective == "speed":
        return profile
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    energy = _energy(options, load(options.directory, device, torch.float32)[2])
    assert energy is not None
    found = [(target, search_quality(profile.table(), target, energy)) for target in options.slowdown]
    return replace(profile, choices=[Budget.of(target, choice) for target, choice in found])


def _own_gpu(options: argparse.Namespace) -> Any:
    """Return the GPU that the options describe in numbers, or None."""
    from decdec_core.latency import LINK_LATENCY_US, Gpu

    given = [getattr(options, name) for name in _MORE]
    if given == [None] * len(given):
        return None
    if options.memory_gb_s is None or options.link_gb_s is None:
        raise DecDECError("a GPU in numbers must have --memory-gb-s and --link-gb-s, got one of them")
    latency = LINK_LATENCY_US if options.link_latency_us is None else options.link_latency_us
    return Gpu(options.gpu, options.memory_gb_s, options.link_gb_s, latency)


def _source(options: argparse.Namespace) -> Any:
    from decdec_core.cli_bench import random_source

    return options.directory if options.shapes is None else random_source(options)


def _about(options: argparse.Namespace) -> tuple[str, Any, WeightQuant]:
    """Return name, config and weight of the model."""
    from transformers import AutoConfig

    from decdec_core.artifact import Quantization, require_artifact
    from decdec_core.shapes import config_of

    if options.shapes is not None:
        source = _source(options)
        return options.shapes, config_of(source.shapes, source.blocks), source.weight
    require_artifact(options.directory)
    config = AutoConfig.from_pretrained(options.directory)
    stored = config.quantization_config
    values = stored if isinstance(stored, dict) else stored.to_dict()
    return options.directory.resolve().name, config, Quantization.from_dict(values).weight


def _energy(options: argparse.Namespace, model: Any) -> Energy | None:
    if options.objective == "speed":
        return None
    from transformers import AutoTokenizer

    from decdec_core.calibration import sequences
    from decdec_core.energy import error_energy
    from decdec_core.texts import available_text, load_text

    named = available_text("calibration") if options.calibration == "auto" else options.calibration
    tokenizer = AutoTokenizer.from_pretrained(options.directory)
    ids = tokenizer(load_text(named, "calibration").text, verbose=False).input_ids
    return error_energy(model, sequences(ids, options.calibration_sequences, _TOKENS))
