"""The lm-eval model type `decdec`: an artifact, or a plain model quantized once into the cache.

lm_eval --model decdec --model_args pretrained=DIR,selection=dynamic,k_chunk=16 --tasks ...
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import simple_parse_args_string

from decdec_core.artifact import is_artifact
from decdec_core.budget import Found, compensation_of, described, find_budget, require_timed
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
from decdec_core.provenance import environment
from decdec_core.sources import materialize
from decdec_eval import batching
from decdec_eval.arguments import asked_profiles, refuse_dtype, refuse_with_full
from decdec_eval.perplexity import window_nll
from decdec_eval.processes import as_of_one

FULL = "full"  # method=full: the unquantized model itself, through the same code path
TOKEN_WINDOWS = "token_windows"  # the request type of tasks/utils.py, and the name of its method here
_COMPENSATION = ("selection", "k_chunk", "compensate", "seed", "n_tb")
_BUDGET = ("slowdown", "gpu")
_QUANTIZATION = ("method", "bits", "group_size", "clustering", "residual_bits", "calibration")
# arguments of from_pretrained that HFLM hands through unnamed
_FROM_PRETRAINED = (
    "attn_implementation",
    "device_map",
    "local_files_only",
    "low_cpu_mem_usage",
    "max_memory",
    "offload_buffers",
    "offload_state_dict",
)
_OTHER_LOADERS = ("autogptq", "delta", "gguf_file", "gptqmodel")  # of HFLM; an artifact is loaded one way
_LIKELIHOOD = ("loglikelihood", "loglikelihood_rolling", "multiple_choice", TOKEN_WINDOWS)


class DecDECLM(HFLM):
    """HFLM whose model may be compensated; takes all of HFLM's arguments and these.

    pretrained: an artifact's folder, or with `method` a hub id, a folder, a .gguf file or smollm2.
    selection, k_chunk, compensate, seed, n_tb: see decdec_core.Compensation.
    slowdown: percent that a decoding step (where it is predicted: its linear layers) may take longer, in
    the place of k_chunk and n_tb, which are then those of a profile: of the GPU at hand, or of `gpu`, a
    GPU's name or a file that `decdec tune` wrote.
    method ("awq", "rtn", "squeezellm", or "full" for no quantization), bits, group_size, clustering,
    residual_bits, calibration: how a plain model is quantized; built on first use, then reused.

    A refused argument raises DecDECError before anything is loaded or built.
    """

    def __init__(self, pretrained: str | Path | None = None, device: str = "cuda", **arguments: Any) -> None:
        _refuse_unknown(arguments)
        refuse_dtype(arguments.get("dtype", "auto"))
        chosen = {name: arguments.pop(name) for name in _COMPENSATION if name in arguments}
        if "selection" in chosen and chosen["selection"] is None:
            chosen["selection"] = "none"  # lm-eval's parser makes None of the word
        budget = {name: arguments.pop(name) for name in _BUDGET if name in arguments}
        recipe = {name: arguments.pop(name) for name in _QUANTIZATION if name in arguments}
        self._quantized = recipe.get("method") != FULL
        if not self._quantized:
            refuse_with_full({**chosen, **budget, **recipe})
            chosen["selection"] = "none"
        self.compensation = Compensation(**chosen)
        profiles = asked_profiles(budget, chosen)
        if profiles and "method" in recipe:
            require_timed(*_quants(recipe))
        self.prompts_cut, self._cut = 0, set[str]()
        self._longest: tuple[int, int] | None = None  # tokens of prompt and answer, while generating
        self._fitting: int | None = None  # rows, once more of them did not fit in the GPU's memory
        device = _usable(str(device))
        folder = _resolve(pretrained, recipe, arguments)
        self.budget: Found | None = None
        if profiles:
            config, quantization = described(Path(folder))
            require_timed(quantization.weight, quantization.residual)
            asked = (budget["slowdown"], profiles, config, quantization.weight)
            self.budget = find_budget(*asked, self.compensation.selection)
            self.compensation = compensation_of(self.budget.budget, **self.compensation.to_dict())
            if not any(self.compensation.k_chunk):
                warnings.warn(f"at a slowdown of {budget['slowdown']} % nothing is compensated", stacklevel=2)
        try:
            super().__init__(pretrained=folder, device=device, **arguments)
        except OSError as error:  # transformers' word for a model that is not there, in several lines
            first = str(error).strip().partition("\n")[0]
            raise DecDECError(f"pretrained must be one that can be loaded, got {folder}: {first}") from error
        accelerator = getattr(self, "accelerator", None)
        if accelerator is not None and self.world_size == 1:  # HFLM forgets it without two GPUs at hand
            self._rank, self._world_size = accelerator.process_index, accelerator.num_processes
        if self._quantized:
            set_compensation(self.model, self.compensation)

    def switch(self, compensation: Compensation, budget: Found | None = None) -> None:
        """Compensate otherwise from now on, in place. budget: whose k_chunk and n_tb the compensation has.

        The unquantized model raises DecDECError for anything but the selection none.
        """
        if not self._quantized:
            refuse_with_full({"selection": compensation.selection})
        else:
            set_compensation(self.model, compensation)
        self.compensation, self.budget, self.prompts_cut = compensation, budget, 0

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None
    ) -> Self:
        """Return the model of lm-eval's command line; what stands in --model_args comes before its options.

        lm-eval's own would pass `device` and `batch_size` twice where --model_args names them.
        """
        options = {name: value for name, value in (additional_config or {}).items() if value is not None}
        return cls(**{**options, **arg_dict})

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> Self:
        """Return the model of "name=value,...", which comes before `additional_config`."""
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    def _create_model(self, *args: Any, **kwargs: Any) -> None:
        with warnings.catch_warnings():
            # HFLM hands over the very configuration that from_pretrained finds in the folder
            warnings.filterwarnings("ignore", message="You passed `quantization_config`")
            super()._create_model(*args, **kwargs)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        self.refuse_uncompensated(("loglikelihood",))
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        self.refuse_uncompensated(("loglikelihood_rolling",))
        return super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm)

    def token_windows(self, requests: Sequence[Instance]) -> list[float]:
        """Return the mean next-token loss, in nats, of each request's window of token ids."""
        self.refuse_uncompensated((TOKEN_WINDOWS,))
        return token_windows(self, requests)

    def refuse_uncompensated(self, output_types: Iterable[str]) -> None:
        """Raise DecDECError if one of the tasks' output types would be scored without compensation.

        The plugin asks before lm-eval's evaluator runs any request, the methods here when one comes.
        """
        compensation = self.compensation
        decode = compensation.compensate == "decode" and compensation.selection != "none"
        if decode and not set(_LIKELIHOOD).isdisjoint(output_types):
            raise DecDECError(
                "compensate must be auto or all for a likelihood request, got 'decode': "
                "every token of it is prompt, so the uncompensated baseline would be scored"
            )

    def gather_object(self, obj: Any, dst: int = 0) -> list[Any] | None:
        """Return on process `dst`, in a list of one, what one process would have measured alone."""
        gathered = super().gather_object(obj, dst)
        return gathered if self.world_size == 1 or gathered is None else [as_of_one(gathered)]

    def set_cache_hook(self, cache_hook: Any) -> None:
        """Refuse lm-eval's response cache: it would answer for another selection, k_chunk or artifact."""
        raise DecDECError(
            "use_cache must be off with --model decdec, got a cache file: "
            "its entries are found by the request alone, whatever model answered"
        )

    def _detect_batch_size(self, requests: Sequence[Any] | None = None, pos: int = 0) -> int:
        if self._longest is not None:  # HFLM would score texts of the model's longest length
            return batching.rows_that_fit(self.model, *self._longest, self.max_batch_size)
        # HFLM halves from max_batch_size until a pass fits; host memory swaps or kills instead of refusing
        return 1 if self.device.type == "cpu" else super()._detect_batch_size(requests, pos)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return the answers. In greedy decoding and float32 they do not depend on the batch, but for
        rounding: a choice between all but equal tokens, or channels, may fall otherwise.

        A max_gen_toks that leaves no room for a prompt, and several beams, raise DecDECError.
        """
        if self.backend != "causal":
            raise DecDECError(f"generation must be of a causal model, got {self.backend}")
        new = max(
            (normalize_gen_kwargs(r.args[1], self.max_gen_toks)["max_gen_toks"] for r in requests), default=0
        )
        if new >= self.max_length:
            raise DecDECError(
                f"max_gen_toks must be less than the model's max_length {self.max_length}, got {new}"
            )
        batching.refuse_beams(self.model, [r.args[1] for r in requests])
        longest = max((r.args[0] for r in requests), key=len, default="")
        self._longest = (min(len(self.tok_encode(longest)), self.max_length - new), new)
        try:
            answers = super().generate_until(requests, disable_tqdm=disable_tqdm)
        finally:
            self._longest = None
        self._count_cut(requests)
        return answers

    def _count_cut(self, requests: Sequence[Instance]) -> None:
        """Count the prompts that were cut, of all processes; lm-eval asks some twice, to ask all equally."""
        distinct = {id(request): request for request in requests}.values()
        cut = sum(request.repeats or 1 for request in distinct if request.args[0] in self._cut)
        self.prompts_cut += int(self.all_gather(torch.tensor([cut], device=self.device)).sum())
        self._cut.clear()

    def tok_batch_encode(
        self,
        strings: list[str],
        padding_side: str = "left",
        left_truncate_len: int | None = None,
        truncation: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return token ids and mask, each text encoded as it would be alone: HFLM lets the first one's
        beginning decide whether any of them gets a BOS."""
        alone = [super(DecDECLM, self).tok_batch_encode([s], truncation=truncation)[0][0] for s in strings]
        if left_truncate_len:
            self._cut |= {s for s, ids in zip(strings, alone, strict=True) if len(ids) > left_truncate_len}
            alone = [ids[-left_truncate_len:] for ids in alone]
        masks = [torch.ones_like(ids) for ids in alone]
        return batching.padded(alone, self.tokenizer.pad_token_id, padding_side), batching.padded(
            masks, 0, padding_side
        )

    def _model_generate(
        self, context: torch.Tensor, max_length: int, stop: list[str], **settings: Any
    ) -> torch.Tensor:
        """Return the prompts (rows, tokens) with their answers behind, both padded."""
        mask, prompt = settings.pop("attention_mask"), context.shape[1]
        groups = [list(range(len(context)))]
        if batching.padding_changes_answers(self.model, settings, prompt, max_length - prompt):
            groups = batching.of_equal_length(mask)
        generate = partial(self._generate, max_length - prompt, stop, settings)
        new: dict[int, torch.Tensor] = {}
        for group in groups:
            # the padding that all of them have is left out
            first = int(prompt - mask[group].sum(1).max())
            ids, there = context[group, first:], mask[group, first:]
            new.update(zip(group, self._in_parts(generate, ids, there), strict=True))
        rows = [new[row] for row in range(len(context))]
        return torch.cat([context, batching.padded(rows, self.tokenizer.pad_token_id, "right")], dim=1)

    def _in_parts(
        self,
        generate: Callable[[torch.Tensor, torch.Tensor], list[torch.Tensor]],
        ids: torch.Tensor,
        mask: torch.Tensor,
    ) -> list[torch.Tensor]:
        """Return the rows' answers; where batch_size is auto and they do not fit, of fewer at a time."""
        at_once = min(len(ids), self._fitting or len(ids))
        answers: list[torch.Tensor] = []
        while len(answers) < len(ids):
            part = slice(len(answers), len(answers) + at_once)
            try:
                answers += generate(ids[part], mask[part])
            except torch.OutOfMemoryError:
                if self.batch_size != "auto" or at_once == 1:
                    raise
                at_once = self._fitting = (at_once + 1) // 2
            if self._fitting:  # what the failed pass held is free only here, where its exception is gone
                torch.cuda.empty_cache()
        return answers

    def _generate(
        self,
        new_tokens: int,
        stop: list[str],
        settings: dict[str, Any],
        ids: torch.Tensor,
        mask: torch.Tensor,
    ) -> list[torch.Tensor]:
        dtype = self.mixed_precision_dtype
        if not settings["do_sample"]:  # transformers warns of a temperature that it does not use
            settings = {name: value for name, value in settings.items() if name != "temperature"}
        with torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None):
            return batching.generate(self.model, self.tokenizer, ids, mask, new_tokens, stop, settings)

    def get_model_info(self) -> dict[str, Any]:
        """Return HFLM's information and under `decdec` what this result was measured with."""
        ledger = compensation_ledger(self.model) if self._quantized else {"method": FULL, "selection": "none"}
        budget = {} if self.budget is None else {"budget": self.budget.ledger()}
        stated = {**ledger, **budget, "bos": self._bos_policy(), "prompts_cut": self.prompts_cut}
        stated |= environment(self.device, "lm_eval")
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
    known = ("pretrained", *_COMPENSATION, *_BUDGET, *_QUANTIZATION, *named[1:], *_FROM_PRETRAINED)
    for name in arguments:
        if name not in known:
            own = ", ".join(("pretrained", *_COMPENSATION, *_BUDGET, *_QUANTIZATION))
            raise DecDECError(
                f"model_args must be {own} or an argument of --model hf, got {name!r}{suggest(name, known)}"
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
        no_artifact = "a folder without an artifact"
        what = no_artifact if Path(source).is_dir() else "no folder here, and none is fetched from a hub"
        raise DecDECError(
            "pretrained must be an artifact's local folder, or a plain model with method=awq, rtn or full: "
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
    calibration = str(recipe.get("calibration", "auto"))
    return str(cached_artifact(source, *_quants(recipe), calibration).resolve())


def _quants(recipe: Mapping[str, Any]) -> tuple[WeightQuant, ResidualQuant]:
    """Return what a recipe with a method quantizes to."""
    weight = {name: recipe[name] for name in ("method", "bits", "group_size", "clustering") if name in recipe}
    residual = ResidualQuant(recipe["residual_bits"]) if "residual_bits" in recipe else ResidualQuant()
    return WeightQuant(**weight), residual


def _usable(device: str) -> str:
    """Return `device`, or "cpu" for a GPU that is not there: lm-eval's command line asks for one even where
    nobody did, so a refusal would be of its default."""
    return "cpu" if device.startswith("cuda") and not torch.cuda.is_available() else device
