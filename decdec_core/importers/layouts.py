"""The three layouts of a quantized linear layer on disk -> codes, scales and zeros in logical order.

    gptq                 qweight (in * bits / 32, out), codes dense along `in`; qzeros (groups,
                         out * bits / 32), dense along `out`, each less one unless checkpoint_format is
                         gptq_v2; scales (groups, out); g_idx (in,), the group of each input
    awq                  qweight (in, out / 8), qzeros (groups, out / 8), scales (groups, out): eight 4-bit
                         codes to a word along `out`, its nibbles holding outputs 0 2 4 6 1 3 5 7
    compressed-tensors   weight_packed (out, in * bits / 32), dense along `in`, or in older files
                         32 // bits codes to a word; weight_scale (out, groups); weight_zero_point
                         (out * bits / 32, groups), packed as the weight is, along `out`, absent where
                         symmetric: 2**(bits - 1); weight_g_idx (in,)

Everywhere value = (code - zero) * scale, and words are int32, filled from the least significant bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from decdec_core.config import DecDECError, WeightQuant, groups_of, require_one_of
from decdec_core.packing import BLOCK, unpack_codes

WHOLE_ROW = 65536  # the group_size of one scale for a whole row: more than any layer has inputs
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_FLOATS = ("F16", "BF16", "F32")


class CheckpointError(DecDECError):
    """A quantized checkpoint that cannot be read, cannot be represented, or is of another model."""


class Expected(NamedTuple):
    """What a tensor of a layer must be: one of `shapes`, one of safetensors' `dtypes`."""

    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[str, ...] = ("I32",)


class Parts(NamedTuple):
    """A layer in logical order: codes (out, in) and zeros (out, groups) uint8, scales (out, groups) of the
    checkpoint's dtype, and the group of each input (in,) or None where groups are consecutive."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    group_index: Tensor | None


class Layout(Protocol):
    """How a checkpoint stores its layers."""

    @property
    def weight_quant(self) -> WeightQuant: ...
    def needed(self, in_features: int, out_features: int) -> dict[str, Expected]:
        """Return what a layer must have, by the last part of the tensors' names."""
        ...

    def optional(self, in_features: int) -> dict[str, Expected]:
        """Return what it may have."""
        ...

    def parts(self, tensors: Mapping[str, Tensor], in_features: int, out_features: int) -> Parts:
        """Return the layer whose tensors are as `needed` and `optional` say."""
        ...


@dataclass(frozen=True)
class GptqLayout:
    """stored_below: what qzeros lack to the zero: 1, or 0 in gptq_v2. act_order: g_idx must be there."""

    weight_quant: WeightQuant
    stored_below: int
    act_order: bool

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> GptqLayout:
        """Return the layout that the checkpoint's `settings` tell."""
        if settings.get("is_marlin_format"):
            raise CheckpointError("checkpoint_format must be one of gptq, gptq_v2, got 'marlin'")
        # GPTQModel says "format" where AutoGPTQ says "checkpoint_format"
        form = settings.get("checkpoint_format") or settings.get("format") or "gptq"
        require_one_of("checkpoint_format", form, ("gptq", "gptq_v2"))
        require_one_of("bits of a gptq checkpoint", settings.get("bits"), (2, 3, 4))
        quant = WeightQuant("gptq", settings["bits"], _group_size(settings.get("group_size", 128)))
        return cls(quant, 0 if form == "gptq_v2" else 1, bool(settings.get("desc_act", False)))

    def needed(self, in_features: int, out_features: int) -> dict[str, Expected]:
        bits, groups = int(self.weight_quant.bits), _groups(self.weight_quant, in_features)
        needed = {
            "qweight": Expected(((_dense_words(in_features, bits), out_features),)),
            "qzeros": Expected(((groups, _dense_words(out_features, bits)),)),
            "scales": Expected(((groups, out_features),), _FLOATS),
        }
        return needed | (self._index(in_features) if self.act_order else {})

    def optional(self, in_features: int) -> dict[str, Expected]:
        return {} if self.act_order else self._index(in_features)

    @staticmethod
    def _index(in_features: int) -> dict[str, Expected]:
        return {"g_idx": Expected(((in_features,),), ("I32", "I64"))}

    def parts(self, tensors: Mapping[str, Tensor], in_features: int, out_features: int) -> Parts:
        bits = int(self.weight_quant.bits)
        codes = _unpack_dense(tensors["qweight"].T, bits, in_features)
        stored = _unpack_dense(tensors["qzeros"], bits, out_features)
        # a zero of 0 is stored as the highest code
        zeros = (stored + self.stored_below) & (2**bits - 1)
        return Parts(codes, tensors["scales"].T, zeros.T, tensors.get("g_idx"))


@dataclass(frozen=True)
class AwqLayout:
    weight_quant: WeightQuant

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> AwqLayout:
        """Return the layout that the checkpoint's `settings` tell; its first files had other words."""
        version = settings.get("version") or settings.get("checkpoint_format") or settings.get("format")
        require_one_of("version of an awq checkpoint", str(version or "gemm").lower(), ("gemm",))
        bits = settings.get("bits", settings.get("w_bit"))
        require_one_of("bits of an awq checkpoint", bits, (4,))
        group_size = settings.get("group_size", settings.get("q_group_size", 128))
        return cls(WeightQuant("awq", 4, _group_size(group_size)))

    def needed(self, in_features: int, out_features: int) -> dict[str, Expected]:
        groups, words = _groups(self.weight_quant, in_features), -(-out_features // 8)
        return {
            "qweight": Expected(((in_features, words),)),
            "qzeros": Expected(((groups, words),)),
            "scales": Expected(((groups, out_features),), _FLOATS),
        }

    def optional(self, in_features: int) -> dict[str, Expected]:
        return {}

    def parts(self, tensors: Mapping[str, Tensor], in_features: int, out_features: int) -> Parts:
        codes, zeros = (self._unpack(tensors[key], out_features).T for key in ("qweight", "qzeros"))
        return Parts(codes, tensors["scales"].T, zeros, None)

    @staticmethod
    def _unpack(words: Tensor, count: int) -> Tensor:
        nibbles = _unpack_by_word(words, 4, words.shape[1] * 8).view(*words.shape, 8)
        codes = torch.empty_like(nibbles)
        codes[..., list(_AWQ_ORDER)] = nibbles
        return codes.flatten(1)[:, :count]


@dataclass(frozen=True)
class CompressedLayout:
    """symmetric: without zero points."""

    weight_quant: WeightQuant
    symmetric: bool

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> CompressedLayout:
        """Return the layout that the checkpoint's `settings` tell."""
        require_one_of(
            "format of a compressed-tensors checkpoint", settings.get("format"), ("pack-quantized",)
        )
        for key in ("kv_cache_scheme", "sparsity_config", "transform_config"):
            if settings.get(key):
                raise CheckpointError(f"{key} must be absent, got {settings[key]!r}")
        groups = settings.get("config_groups")
        if not isinstance(groups, dict):
            raise CheckpointError(f"config_groups must be an object, got {groups!r}")
        found = {(q.weight_quant, q.symmetric): q for q in map(cls._of_group, groups.values())}
        if len(found) != 1:
            raise CheckpointError(f"config_groups must quantize weights in one way, got {len(found)}")
        return next(iter(found.values()))

    @classmethod
    def _of_group(cls, group: Any) -> CompressedLayout:
        weights = group.get("weights") if isinstance(group, dict) else None
        if not isinstance(weights, dict):
            raise CheckpointError(f"a group of config_groups must quantize weights, got {group!r}")
        for key in ("input_activations", "output_activations"):
            if group.get(key):
                raise CheckpointError(f"{key} must be absent, got {group[key]!r}")
        require_one_of(
            "format of a group of weights", group.get("format") or "pack-quantized", ("pack-quantized",)
        )
        require_one_of("type of weights", weights.get("type", "int"), ("int",))
        require_one_of("num_bits of weights", weights.get("num_bits"), (2, 3, 4, 5))
        require_one_of("dynamic of weights", weights.get("dynamic") or False, (False,))
        require_one_of("strategy of weights", weights.get("strategy"), ("group", "channel"))
        size = weights.get("group_size") if weights["strategy"] == "group" else -1
        quant = WeightQuant("compressed-tensors", weights["num_bits"], _group_size(size))
        return cls(quant, bool(weights.get("symmetric", True)))

    def needed(self, in_features: int, out_features: int) -> dict[str, Expected]:
        bits, groups = int(self.weight_quant.bits), _groups(self.weight_quant, in_features)
        needed = {
            "weight_packed": Expected(tuple((out_features, n) for n in _either_words(in_features, bits))),
            "weight_scale": Expected(((out_features, groups),), _FLOATS),
            "weight_shape": Expected(((2,),), ("I64", "I32")),
        }
        if not self.symmetric:
            shapes = tuple((n, groups) for n in _either_words(out_features, bits))
            needed["weight_zero_point"] = Expected(shapes)
        return needed

    def optional(self, in_features: int) -> dict[str, Expected]:
        return {"weight_g_idx": Expected(((in_features,),), ("I32", "I64"))}

    def parts(self, tensors: Mapping[str, Tensor], in_features: int, out_features: int) -> Parts:
        bits, shape = int(self.weight_quant.bits), tensors["weight_shape"].tolist()
        if shape != [out_features, in_features]:
            raise CheckpointError(f"weight_shape must be {[out_features, in_features]}, got {shape}")
        # of a small layer both packings can have as many words; only the dense one is written today
        dense = tensors["weight_packed"].shape[1] == _dense_words(in_features, bits)
        unpack = _unpack_dense if dense else _unpack_by_word
        codes = unpack(tensors["weight_packed"], bits, in_features)
        scales = tensors["weight_scale"]
        if self.symmetric:
            zeros = torch.full(scales.shape, 2 ** (bits - 1), dtype=torch.uint8)
        else:
            zeros = unpack(tensors["weight_zero_point"].T, bits, out_features).T
        index = tensors.get("weight_g_idx")
        # written as -1 by a quantizer that did not order its inputs
        return Parts(codes, scales, zeros, None if index is None or (index == -1).all() else index)


def _group_size(value: object) -> int:
    """Return our group_size of a checkpoint's, of which -1 is a whole row."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise CheckpointError(f"group_size must be a number or -1 for a whole row, got {value!r}")
    return WHOLE_ROW if value == -1 else value


def _groups(config: WeightQuant, in_features: int) -> int:
    assert config.group_size is not None
    return groups_of(in_features, config.group_size)


def _dense_words(count: int, bits: int) -> int:
    return -(-count * bits // 32)


def _either_words(count: int, bits: int) -> tuple[int, ...]:
    """Return the words of `count` codes packed densely, and by 32 // bits to a word where that differs."""
    return tuple(dict.fromkeys((_dense_words(count, bits), -(-count // (32 // bits)))))


def _unpack_dense(words: Tensor, bits: int, count: int) -> Tensor:
    """Return codes (rows, count) uint8 from dense words (rows, _dense_words) int32."""
    # the last words of a block of 32 codes may be left out
    whole = -(-count // BLOCK) * bits
    return unpack_codes(F.pad(words, (0, whole - words.shape[1])).contiguous(), bits, count)


def _unpack_by_word(words: Tensor, bits: int, count: int) -> Tensor:
    """Return codes (rows, count) uint8 from words (rows, n) int32 that hold 32 // bits whole codes each."""
    shifts = torch.arange(32 // bits, dtype=torch.int32) * bits
    codes = (words.unsqueeze(-1) >> shifts) & (2**bits - 1)
    return codes.to(torch.uint8).flatten(1)[:, :count]
