"""What is computed, as data: frozen dataclasses that validate themselves and travel as JSON.

Each is saved whole in the artifact's config.json and in every result. Unknown keys are refused.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Self

CHUNK = 1024  # consecutive input channels that share one budget (method.md, "Words")
SELECTIONS = ("none", "random", "static", "exact", "dynamic")
COMPENSATE_MODES = ("all", "decode", "auto")
PROJECTION_KINDS = ("qkv", "o", "gate_up", "down")  # the order of Compensation.k_chunk
WEIGHT_METHODS = ("rtn", "awq", "squeezellm")  # by which this package quantizes
ALL_METHODS = (*WEIGHT_METHODS, "gptq", "compressed-tensors")  # and by which imported weights were
FORMATS = ("uniform", "codebook")  # of low-bit weights
WEIGHT_BITS = (2, 3, 4, 5)
KERNEL_BITS = (2, 3, 4)  # that CUDA kernels multiply; 5 are decoded for each pass
AVERAGE_BITS = (2, 2.5, 3, 3.5, 4, 4.5, 5)  # a half: half of the decoder blocks at a bit more
CLUSTERINGS = ("exact", "flash1d")
GROUP_SIZE = 128
EXTRAS = ("input_order", "input_scale")  # what some layers have, in the order that they act on x
RESIDUAL_BITS = (2, 4, 8, 16)
DEFAULT_N_TB = 16  # thread blocks that fetch: best for the layers of Llama-3-8B on an H200


class DecDECError(ValueError):
    """A refused input. The message is one line that says which, wanted and got."""


def suggest(word: str, known: Iterable[str]) -> str:
    """Return " (did you mean 'x'?)" for the nearest of `known`, or an empty string."""
    near = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean '{near[0]}'?)" if near and near[0] != word else ""


def require_one_of(which: str, got: object, wanted: Iterable[object]) -> None:
    """Raise DecDECError unless `got` is one of `wanted`."""
    options = list(wanted)
    # True == 1 and 3.0 == 3, and neither is a number of bits
    if any(got == option and type(got) is type(option) for option in options):
        return
    hint = suggest(got, [str(o) for o in options]) if isinstance(got, str) else ""
    raise DecDECError(f"{which} must be one of {', '.join(map(str, options))}, got {got!r}{hint}")


def require_int(which: str, got: object, low: int, high: int) -> None:
    """Raise DecDECError unless `got` is an int (not a bool) with low <= got <= high."""
    if not isinstance(got, int) or isinstance(got, bool) or not low <= got <= high:
        raise DecDECError(f"{which} must be {low}..{high}, got {got!r}")


def channels_per_chunk(in_features: int, k_chunk: int) -> list[int]:
    """Return how many channels each chunk of a layer contributes: k_chunk * length // 1024."""
    lengths = [min(CHUNK, in_features - start) for start in range(0, in_features, CHUNK)]
    return [k_chunk * length // CHUNK for length in lengths]


def total_channels(in_features: int, k_chunk: int) -> int:
    """Return how many channels of a layer are compensated for each token."""
    return sum(channels_per_chunk(in_features, k_chunk))


def groups_of(in_features: int, group_size: int) -> int:
    """Return the number of quantization groups along `in`; the last may be ragged."""
    return -(-in_features // group_size)


class Config:
    """A frozen dataclass that travels as JSON."""

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Return the configuration saved by to_dict; unknown keys raise DecDECError."""
        known = [f.name for f in fields(cls)]  # type: ignore[arg-type]
        for key in values:
            if key not in known:
                raise DecDECError(
                    f"{cls.__name__} takes {', '.join(known)}, got unknown key {key!r}{suggest(key, known)}"
                )
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types."""
        values = asdict(self)  # type: ignore[call-overload]
        return {key: list(v) if isinstance(v, tuple) else v for key, v in values.items()}


@dataclass(frozen=True)
class WeightQuant(Config):
    """The low-bit base weight.

    method: how it was made, one of ALL_METHODS. bits: 2..5, or an average in half steps, where half of the
    decoder blocks have a bit more than the others. group_size: input channels that share a scale and a zero
    (128), None for the codebook format. clustering: of a codebook, "exact" or "flash1d", else None.
    """

    method: str = "awq"
    bits: int | float = 3
    group_size: int | None = None
    clustering: str | None = None

    def __post_init__(self) -> None:
        require_one_of("method", self.method, ALL_METHODS)
        require_one_of("bits", self.bits, AVERAGE_BITS)
        if self.format == "codebook":
            if self.group_size is not None:
                raise DecDECError(
                    f"group_size must be absent with {self.method}, which has a codebook per output channel, "
                    f"got {self.group_size!r}"
                )
            object.__setattr__(self, "clustering", self.clustering or CLUSTERINGS[0])
            require_one_of("clustering", self.clustering, CLUSTERINGS)
            return
        if self.clustering is not None:
            raise DecDECError(f"clustering must be absent with {self.method}, got {self.clustering!r}")
        object.__setattr__(self, "group_size", GROUP_SIZE if self.group_size is None else self.group_size)
        require_int("group_size", self.group_size, 8, 65536)

    @property
    def format(self) -> str:
        """ "uniform" or "codebook" (method.md section 1)."""
        return "codebook" if self.method == "squeezellm" else "uniform"

    @property
    def widths(self) -> tuple[int, ...]:
        """The bits that decoder blocks have: one number, or two that differ by one, the smaller first."""
        return (int(self.bits),) if self.bits == int(self.bits) else (int(self.bits), int(self.bits) + 1)

    def at(self, bits: int) -> WeightQuant:
        """Return the same with whole `bits`: what a layer has."""
        return replace(self, bits=bits)


@dataclass(frozen=True)
class ResidualQuant(Config):
    """The residual in CPU memory. bits: 2, 4, 8, or 16 for the residual itself in float16."""

    bits: int = 4

    def __post_init__(self) -> None:
        require_one_of("residual_bits", self.bits, RESIDUAL_BITS)


@dataclass(frozen=True)
class Compensation(Config):
    """Which channels are compensated, how many, and for which tokens.

    selection: see channels.py. k_chunk: channels per 1024, one number or one each for qkv, o, gate_up
    and down (a sequence of four, or text such as "8/8/16/16"); 0 where the selection is "none".
    compensate: "all" tokens of every pass; "decode", only passes of a single token after others in the
    key-value cache; "auto", all in a pass without such a cache and decode in one that is given it (which is
    how generation calls a model). Steps of several tokens (speculative decoding) count as prompt, and
    generation without a cache has no decoding steps. seed: for random selection. n_tb: thread blocks of a
    launch on a GPU that fetch residuals, at most; of the time only, not of what is computed.
    """

    selection: str = "dynamic"
    k_chunk: Any = (16, 16, 16, 16)
    compensate: str = "auto"
    seed: int = 0
    n_tb: int = DEFAULT_N_TB

    def __post_init__(self) -> None:
        require_one_of("selection", self.selection, SELECTIONS)
        require_int("n_tb", self.n_tb, 1, 1024)
        require_one_of("compensate", self.compensate, COMPENSATE_MODES)
        require_int("seed", self.seed, 0, 2**31 - 1)
        k_chunk = _parse_k_chunk(self.k_chunk)
        object.__setattr__(self, "k_chunk", (0, 0, 0, 0) if self.selection == "none" else k_chunk)

    def k_chunk_of(self, kind: str) -> int:
        """Return k_chunk of a projection kind."""
        return self.k_chunk[PROJECTION_KINDS.index(kind)]

    def k_chunk_text(self) -> str:
        """Return "16", or "8/8/16/16" where the kinds differ."""
        same = len(set(self.k_chunk)) == 1
        return str(self.k_chunk[0]) if same else "/".join(map(str, self.k_chunk))


def _parse_k_chunk(value: object) -> tuple[int, int, int, int]:
    parts: list[object]
    if isinstance(value, str):
        parts = [int(p) if p.strip().isdecimal() else p for p in value.split("/")]
    else:
        parts = list(value) if isinstance(value, (tuple, list)) else [value]
    if len(parts) not in (1, 4):
        raise DecDECError(f"k_chunk must be one number or four as qkv/o/gate_up/down, got {value!r}")
    for part in parts:
        require_int("k_chunk", part, 0, CHUNK)
    numbers = [part for part in parts if isinstance(part, int)] * (4 // len(parts))
    return numbers[0], numbers[1], numbers[2], numbers[3]
