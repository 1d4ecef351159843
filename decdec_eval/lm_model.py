"""The lm-eval model type `decdec`: an artifact, or a plain model quantized once into the cache.

lm_eval --model decdec --model_args pretrained=DIR,selection=dynamic,k_chunk=16 --tasks ...
"""

from __future__ import annotations

import inspect
import os
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from decdec_core.artifact import is_artifact
from decdec_core.build import cached_artifact
from decdec_core.config import (
    WEIGHT_METHODS,
    Compensation,
    DecDECError,
    ResidualQuant,
    WeightQuant,
    require_one_of,
    suggest,
)
from decdec_core.model import compensation_ledger, set_compensation
from decdec_core.sources import materialize
from decdec_eval.perplexity import window_nll
from decdec_eval.provenance import environment

FULL = "full"  # method=full: the unquantized model itself, through the same code path
TOKEN_WINDOWS = "token_windows"  # the request type of tasks/utils.py, and the name of its method here
_COMPENSATION = ("selection", "k_chunk", "compensate", "seed")
_QUANTIZATION = ("method", "bits", "group_size", "residual_bits", "calibration")
# arguments of from_pretrained that HFLM hands through unnamed
_FROM_PRETRAINED = (
    "attn_implementation",
    "cache_dir",
    "device_map",
    "local_files_only",
    "low_cpu_mem_usage",
    "max_memory",
    "offload_buffers",
    "offload_state_dict",
    "token",
    "use_safetensors",
    "variant",
)
_OTHER_LOADERS = ("autogptq", "delta", "gguf_file", "gptqmodel")  # of HFLM; an artifact is loaded one way


class DecDECLM(HFLM):
    """HFLM whose model may be compensated; takes all of HFLM's arguments and these.

    pretrained: an artifact's folder, or with `method` a hub id, a folder, a .gguf file or smollm2.
    selection, k_chunk, compensate, seed: see decdec_core.Compensation.
    method ("awq", "rtn", or "full" for no quantization), bits, group_size, residual_bits, calibration: how a
    plain model is quantized; built on first use, then reused.

    A refused argument raises DecDECError before anything is loaded or built.
    """

    def __init__(self, pretrained: str | Path | None = None, device: str = "cuda", **arguments: Any) -> None:
        _refuse_unknown(arguments)
        chosen = {name: arguments.pop(name) for name in _COMPENSATION if name in arguments}
        recipe = {name: arguments.pop(name) for name in _QUANTIZATION if name in arguments}
        self._quantized = recipe.get("method") != FULL
        if not self._quantized:
            _refuse_with_full({**chosen, **recipe})
            chosen["selection"] = "none"
        self.compensation = Compensation(**chosen)
        folder = _resolve(pretrained, recipe, arguments)
        super().__init__(pretrained=folder, device=_present(device), **arguments)
        if self._quantized:
            set_compensation(self.model, self.compensation)

    def _create_model(self, *args: Any, **kwargs: Any) -> None:
        with warnings.catch_warnings():
            # HFLM hands over the very configuration that from_pretrained finds in the folder
            warnings.filterwarnings("ignore", message="You passed `quantization_config`")
            super()._create_model(*args, **kwargs)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        self._refuse_uncompensated_likelihood()
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        self._refuse_uncompensated_likelihood()
        return super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm)

    def token_windows(self, requests: Sequence[Instance]) -> list[float]:
        """Return the mean next-token loss, in nats, of each request's window of token ids."""
        self._refuse_uncompensated_likelihood()
        return token_windows(self, requests)

    def _refuse_uncompensated_likelihood(self) -> None:
        compensation = self.compensation
        if compensation.compensate == "decode" and compensation.selection != "none":
            raise DecDECError(
                "compensate must be auto or all for a likelihood request, got 'decode': "
                "every token of it is prompt, so the uncompensated baseline would be scored"
            )

    def set_cache_hook(self, cache_hook: Any) -> None:
        """Refuse lm-eval's response cache: it would answer for another selection, k_chunk or artifact."""
        raise DecDECError(
            "use_cache must be off with --model decdec, got a cache file: "
            "its entries are found by the request alone, whatever model answered"
        )

    def _detect_batch_size(self, requests: Sequence[Any] | None = None, pos: int = 0) -> int:
        # HFLM halves from max_batch_size until a pass fits; host memory swaps or kills instead of refusing
        return 1 if self.device.type == "cpu" else super()._detect_batch_size(requests, pos)

    def get_model_info(self) -> dict[str, Any]:
        """Return HFLM's information and under `decdec` what this result was measured with."""
        ledger = compensation_ledger(self.model) if self._quantized else {"method": FULL, "selection": "none"}
        stated = {**ledger, "bos": self._bos_policy(), **environment(self.device)}
        return {**super().get_model_info(), "decdec": stated}

    def _bos_policy(self) -> dict[str, Any]:
        """Return what really precedes a scored text: with `tok_encode_adds_bos` false, nothing does."""
        bos = self.tokenizer.bos_token_id
        return {
            "bos_token_id": bos,
            "add_bos_token": self.add_bos_token,
            "tok_encode_adds_bos": bos is not None and self.tok_encode("a")[:1] == [bos],
            "first_token_window_starts_with_bos": bos is not None
            and self.tokenizer("a").input_ids[:1] == [bos],
            "prefix_token_id_of_empty_contexts": self.prefix_token_id,
        }


def token_windows(lm: Any, requests: Sequence[Instance]) -> list[float]:
    """Return the mean next-token loss, in nats, of each request's window: arguments (label, token ids).

    For any model type built on HFLM; another one, or one whose context is shorter than a window, raises
    DecDECError.
    """
    if not isinstance(lm, HFLM) or lm.backend != "causal":
        raise DecDECError(
            f"token windows must be scored by --model decdec (method=full for a plain model) or a causal hf, "
            f"got {type(lm).__name__}"
        )
    windows = [request.args[1] for request in requests]
    longest = max(map(len, windows), default=0)
    if lm.max_length < longest:
        raise DecDECError(f"max_length must be at least {longest} for token windows, got {lm.max_length}")
    dtype = lm.mixed_precision_dtype
    with torch.autocast(lm.device.type, dtype=dtype, enabled=dtype is not None):
        return window_nll(lm.model, windows, progress=lm.rank == 0)


def _refuse_unknown(arguments: Mapping[str, Any]) -> None:
    """Raise DecDECError for an argument that nobody takes: HFLM would hand it on to from_pretrained."""
    named = [
        p.name for p in inspect.signature(HFLM.__init__).parameters.values() if p.kind is not p.VAR_KEYWORD
    ]
    known = ("pretrained", *_COMPENSATION, *_QUANTIZATION, *named[1:], *_FROM_PRETRAINED)
    for name in arguments:
        if name not in known:
            own = ", ".join(("pretrained", *_COMPENSATION, *_QUANTIZATION))
            raise DecDECError(
                f"model_args must be {own} or an argument of --model hf, got {name!r}{suggest(name, known)}"
            )


def _refuse_with_full(arguments: Mapping[str, Any]) -> None:
    """Raise DecDECError for an argument that would be ignored by method=full."""
    for name, value in arguments.items():
        if name != "method" and (name, value) not in {("selection", "none"), ("k_chunk", 0)}:
            raise DecDECError(
                f"{name} must be absent with method=full, which compensates nothing, got {value!r}"
            )


def _resolve(pretrained: str | Path | None, recipe: Mapping[str, Any], others: Mapping[str, Any]) -> str:
    """Return the folder or hub id that HFLM loads: an artifact, built first if `recipe` asks for one."""
    if not isinstance(pretrained, (str, Path)) or not str(pretrained):
        raise DecDECError(f"pretrained must be an artifact folder or a plain model, got {pretrained!r}")
    for name in _OTHER_LOADERS:
        if others.get(name):
            raise DecDECError(f"{name} must be absent with --model decdec, got {others[name]!r}")
    source = str(pretrained)
    if is_artifact(source):
        if recipe:
            given = ", ".join(f"{name}={value}" for name, value in recipe.items())
            raise DecDECError(
                f"pretrained must be a plain model where {given} is given, got the artifact {source}"
            )
        # absolute: a relative one looks like a hub id, and lm-eval would ask the hub for its revision
        return str(Path(source).resolve())
    method = recipe.get("method")
    if method is None:
        what = "a folder without an artifact" if Path(source).is_dir() else "no folder here"
        raise DecDECError(
            "pretrained must be an artifact folder, or a plain model with method=awq, rtn or full: "
            f"{source} is {what}"
        )
    require_one_of("method", method, (*WEIGHT_METHODS, FULL))
    for name in ("revision", "subfolder"):
        if others.get(name) not in (None, "", "main"):
            raise DecDECError(
                f"{name} must be absent with method={method}, got {others[name]!r}: download it first"
            )
    if method == FULL:
        folder = materialize(source)
        return str(Path(folder).resolve()) if Path(folder).exists() else folder
    weight = {name: recipe[name] for name in ("method", "bits", "group_size") if name in recipe}
    residual = ResidualQuant(recipe["residual_bits"]) if "residual_bits" in recipe else ResidualQuant()
    calibration = str(recipe.get("calibration", "auto"))
    return str(cached_artifact(source, WeightQuant(**weight), residual, calibration).resolve())


def _present(device: str) -> str:
    """Return `device`, or "cpu" for a GPU that is not there: lm-eval's command line asks for one anyway."""
    return "cpu" if str(device).startswith("cuda") and not torch.cuda.is_available() else device


def _one_line_errors(otherwise: Callable[..., object]) -> Callable[..., None]:
    """Return an excepthook that prints an uncaught DecDECError as one line; the exit code stays 1."""

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if isinstance(error, DecDECError) and os.environ.get("DECDEC_TRACEBACK") != "1":
            print(f"decdec: error: {error}", file=sys.stderr)
        else:
            otherwise(kind, error, trace)

    return hook


# lm-eval's command line knows nothing of DecDECError: without this a refused argument ends in a traceback
sys.excepthook = _one_line_errors(sys.excepthook)
