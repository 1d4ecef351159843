"""What the command lines share: a parser that refuses in one line, options, and how a command ends."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from decdec_core.config import (
    AVERAGE_BITS,
    CLUSTERINGS,
    RESIDUAL_BITS,
    WEIGHT_METHODS,
    DecDECError,
    ResidualQuant,
    WeightQuant,
    suggest,
)


def run_command(command: Callable[[], object], resumes: bool = True) -> int:
    """Return 0 after running `command`, or 2 after printing what it refused as one line. resumes: whether it
    goes on where it was when it is interrupted and run again."""
    try:
        command()
    except (DecDECError, OSError) as error:  # such as a full disk
        if os.environ.get("DECDEC_TRACEBACK"):
            raise
        print(f"decdec: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        goes_on = ": the same command goes on where it was" if resumes else ""
        print(f"decdec: interrupted{goes_on}", file=sys.stderr)
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
    if not path.parent.is_dir() or (path.exists() and not path.is_file()):
        raise argparse.ArgumentTypeError(f"must be a file in a folder that exists, got {text!r}")
    return path


def picture_file(text: str) -> Path:
    """Return the path of a picture that is to be written, as json_file does."""
    path = json_file(text)
    if path.suffix not in (".png", ".svg", ".pdf"):
        raise argparse.ArgumentTypeError(f"must end in .png, .svg or .pdf, got {text!r}")
    return path


def quantization_of(options: argparse.Namespace) -> tuple[WeightQuant, ResidualQuant]:
    """Return what the options of add_quantization say."""
    given = {name: getattr(options, name) for name in ("method", "bits", "group_size", "clustering")}
    weight = WeightQuant(**{name: value for name, value in given.items() if value is not None})
    return weight, ResidualQuant(options.residual_bits)


def add_calibration_size(parser: argparse.ArgumentParser, sequences: int) -> None:
    """Add how much calibration text is taken, by default `sequences` of 512 tokens."""
    parser.add_argument("--calibration-sequences", type=int, default=sequences, metavar="N")
    parser.add_argument("--calibration-length", type=int, default=512, metavar="TOKENS")
