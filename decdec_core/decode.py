"""Generation of one sequence with a static key-value cache: on a GPU a step is one captured CUDA graph.

The prompt is the model's own forward pass. A step (decode_step.py) is captured once and replayed for every
token; the token that it chooses stays on the GPU as the next step's input. On a CPU the same interface runs
the step as it is.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from decdec_core.config import DecDECError, require_int
from decdec_core.decode_step import Step
from decdec_core.linear import DecLinear

_WARM_UPS = 2  # before a capture: what is made at first use
_AT_ONCE = 16  # steps launched before the tokens of those before them are looked at
_MANY = 1 << 20
_PARTS = 256  # of a vocabulary, in the search for the most likely token


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. temperature: 0 takes the most likely. top_k, top_p: leave the others out;
    0 and 1 leave none out. seed: of the draw."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for which in ("temperature", "top_p"):
            if not isinstance(getattr(self, which), (int, float)):
                raise DecDECError(f"{which} must be a number, got {getattr(self, which)!r}")
        if not self.temperature >= 0:
            raise DecDECError(f"temperature must be 0 or more, got {self.temperature!r}")
        require_int("top_k", self.top_k, 0, _MANY)
        if not 0 < self.top_p <= 1:
            raise DecDECError(f"top_p must be above 0 and at most 1, got {self.top_p!r}")
        require_int("seed", self.seed, 0, 2**31 - 1)

    def choose(self, logits: Tensor, generator: torch.Generator) -> Tensor:
        """Return the next token (rows,) int64 for logits (rows, vocabulary)."""
        if self.temperature == 0:
            return _most_likely(logits)
        scores = logits.float() / self.temperature
        if 0 < self.top_k < scores.shape[-1]:
            least = scores.topk(self.top_k).values[..., -1:]
            scores = scores.masked_fill(scores < least, -torch.inf)
        if self.top_p < 1:
            ordered, order = scores.sort(descending=True)
            share = ordered.softmax(-1)
            beyond = share.cumsum(-1) - share >= self.top_p  # of those before it: the first always stays
            scores = scores.masked_fill(torch.zeros_like(beyond).scatter(-1, order, beyond), -torch.inf)
        # the least of exponential times with these rates: a draw without a look at the probabilities' sum
        waits = torch.empty_like(scores).exponential_(generator=generator)
        return (scores.softmax(-1) / waits).argmax(-1)


def _most_likely(logits: Tensor) -> Tensor:
    """Return argmax(-1), the first of equals: in two rounds where the vocabulary is even, since torch's own
    has a single block for a row."""
    rows, vocabulary = logits.shape
    parts = math.gcd(vocabulary, _PARTS)
    best, index = logits.view(rows, parts, -1).max(-1)
    part = best.argmax(-1, keepdim=True)
    return (part * (vocabulary // parts) + index.gather(-1, part)).squeeze(-1)


@dataclass(frozen=True)
class Generation:
    """tokens: without the prompt, the stop token included. first_s: seconds to the first. step_s: seconds of
    each further one, of the steps that were run."""

    tokens: list[int]
    first_s: float
    step_s: list[float]

    @property
    def tokens_per_second(self) -> float:
        """Of the steps after the first token."""
        return len(self.step_s) / sum(self.step_s) if self.step_s else 0.0

    def spread(self) -> dict[str, float]:
        """Return the seconds of a step: median, and the tenth and ninetieth of a hundred parts."""
        if len(self.step_s) < 2:
            value = self.step_s[0] if self.step_s else 0.0
            return {"median_s": value, "p10_s": value, "p90_s": value}
        tenths = statistics.quantiles(self.step_s, n=10, method="inclusive")
        return {"median_s": statistics.median(self.step_s), "p10_s": tenths[0], "p90_s": tenths[-1]}


class Decoder:
    """Generates with `model` on the device where it is.

    model: a causal language model of a supported architecture, with DecLinear layers or plain ones, on one
    device. max_length: tokens of prompt and answer together that the cache holds, at most what
    decode_step.Step allows. The model may be used otherwise between calls, not during one; what it
    compensates may change between calls, and it may be fused, and the step is then captured again. A model
    that is moved or cast needs a new Decoder.
    """

    def __init__(self, model: Any, max_length: int, sampling: Sampling | None = None) -> None:
        if not isinstance(model, PreTrainedModel):
            raise DecDECError(f"model must be a causal language model, got {type(model).__name__}")
        require_int("max_length", max_length, 2, _MANY)
        self.model, self.max_length, self.sampling = model.eval(), max_length, sampling or Sampling()
        self.device = torch.device(model.device)
        self.step = Step(model, max_length)
        self.generator = torch.Generator(self.device)
        self.token = torch.zeros((1, 1), dtype=torch.int64, device=self.device)
        self.tokens = torch.zeros(max_length, dtype=torch.int64, device=self.device)
        self.count = torch.zeros(1, dtype=torch.int64, device=self.device)
        self.length = torch.zeros(1, dtype=torch.int64, device=self.device)  # of what the cache holds
        self._graph: torch.cuda.CUDAGraph | None = None
        self._captured: list[tuple[object, ...]] = []

    @torch.no_grad()
    def generate(
        self, ids: Sequence[int] | Tensor, max_new_tokens: int, stop: Collection[int] | None = None
    ) -> Generation:
        """Return what follows the prompt `ids`.

        stop: tokens that end it, by default those of the model's generation_config. Raises DecDECError for a
        prompt that is empty, and one that does not fit into the cache with max_new_tokens.
        """
        require_int("max_new_tokens", max_new_tokens, 1, self.max_length - 1)
        prompt = _one_sequence(ids, self.model.config.vocab_size).to(self.device)
        if not 0 < prompt.shape[1] <= self.max_length - max_new_tokens:
            raise DecDECError(
                f"prompt must be 1..{self.max_length - max_new_tokens} tokens for {max_new_tokens} more in a "
                f"cache of {self.max_length}, got {prompt.shape[1]}"
            )
        ends = _ends(stop_tokens(self.model) if stop is None else stop)
        if self.device.type == "cuda":
            self._capture()
        else:
            self.step.look_up()
        self._reset()
        self.generator.manual_seed(self.sampling.seed)
        start = time.perf_counter()
        self._keep(self._read(prompt))
        tokens = self.tokens[:1].tolist()
        first_s = time.perf_counter() - start
        if tokens[-1] in ends or max_new_tokens == 1:
            return Generation(tokens, first_s, [])
        run = self._steps_on_gpu if self.device.type == "cuda" else self._steps_on_cpu
        step_s = run(max_new_tokens - 1, ends)
        tokens = self.tokens[: 1 + len(step_s)].tolist()
        last = next((i for i, token in enumerate(tokens) if token in ends), len(tokens) - 1)
        return Generation(tokens[: last + 1], first_s, step_s)

    def _steps_on_cpu(self, steps: int, ends: frozenset[int]) -> list[float]:
        taken = []
        for _ in range(steps):
            start = time.perf_counter()
            self._step()
            ended = int(self.token) in ends
            taken.append(time.perf_counter() - start)
            if ended:
                break
        return taken

    def _steps_on_gpu(self, steps: int, ends: frozenset[int]) -> list[float]:
        """Launch steps a few at once, and look at their tokens while the next few run."""
        assert self._graph is not None
        seen = torch.empty(self.max_length, dtype=torch.int64, pin_memory=True)
        marks = [_mark()]
        looked_at = 0
        while len(marks) <= steps:
            for _ in range(min(_AT_ONCE, steps + 1 - len(marks))):
                self._graph.replay()
                marks.append(_mark())
            if looked_at:
                marks[looked_at].synchronize()
                if not ends.isdisjoint(seen[: looked_at + 1].tolist()):
                    break
            looked_at = len(marks) - 1
            seen[: looked_at + 1].copy_(self.tokens[: looked_at + 1], non_blocking=True)
            marks[looked_at].record()
        marks[-1].synchronize()
        return [before.elapsed_time(after) / 1e3 for before, after in pairwise(marks)]

    def _read(self, prompt: Tensor) -> Tensor:
        """Return the logits (1, vocabulary) after a prompt (1, tokens), from an empty cache."""
        places = torch.arange(prompt.shape[1], device=self.device).unsqueeze(0)
        cached = {"past_key_values": self.step.cache, "use_cache": True}
        logits = self.model(prompt, position_ids=places, **cached, logits_to_keep=1).logits
        self.length.add_(prompt.shape[1])
        return logits[:, -1]

    def _keep(self, logits: Tensor) -> None:
        token = self.sampling.choose(logits, self.generator)
        self.token.copy_(token.unsqueeze(1))
        self.tokens.index_copy_(0, self.count, token)
        self.count.add_(1)

    def _step(self) -> None:
        self._keep(self.step(self.token, self.length))
        self.length.add_(1)

    def _reset(self) -> None:
        self.step.cache.reset()
        self.length.zero_()
        self.count.zero_()

    def replay(self, steps: int) -> None:
        """Run `steps` captured steps more, of which nothing is looked at: for a profile. GPU only, after
        `generate`. Raises DecDECError where the cache does not hold them."""
        if self._graph is None:
            raise DecDECError("steps must be replayed after generate on a GPU, got none captured")
        room = self.max_length - int(self.length)
        require_int("steps", steps, 1, room)
        for _ in range(steps):
            self._graph.replay()

    def _capture(self) -> None:
        """Capture a step, unless the layers are as they were at the last one."""
        modules = self.step.look_up()
        for module in modules:
            if isinstance(module, DecLinear):
                module.prepare_for_gpu(self.model.dtype)
        if self._graph is not None and _same(self._captured, [_state(module) for module in modules]):
            return
        self._graph, stream = None, _capture_stream(self.device)  # its memory first
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UPS):
                self._reset()
                self._step()
        stream.synchronize()
        self._reset()
        torch.cuda.synchronize(self.device)
        graph = torch.cuda.CUDAGraph()
        graph.register_generator_state(self.generator)
        with torch.cuda.graph(graph, stream=stream):
            self._step()
        self._graph, self._captured = graph, [_state(module) for module in modules]


@cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """Return the one stream of all captures: cuBLAS keeps a workspace for every stream that it has seen."""
    return torch.cuda.Stream(device)


def _state(module: nn.Module) -> tuple[object, ...]:
    """Return what a captured step has of a layer: kept, so that nothing of it is freed and made anew."""
    if not isinstance(module, DecLinear):
        return (module,)
    return module, module.tiled, module.selection, module.residual, module.n_tb


def _same(one: list[tuple[object, ...]], other: list[tuple[object, ...]]) -> bool:
    return len(one) == len(other) and all(
        len(mine) == len(theirs) and all(a is b for a, b in zip(mine, theirs, strict=True))
        for mine, theirs in zip(one, other, strict=True)
    )


def _one_sequence(ids: Sequence[int] | Tensor, vocabulary: int) -> Tensor:
    """Return token ids as (1, tokens) int64."""
    try:
        prompt = torch.as_tensor(ids)
    except (TypeError, ValueError, RuntimeError):
        raise DecDECError(f"prompt must be token ids, got {type(ids).__name__}") from None
    if prompt.dim() == 2 and prompt.shape[0] == 1:
        prompt = prompt[0]
    whole = not (prompt.is_floating_point() or prompt.is_complex() or prompt.dtype == torch.bool)
    if prompt.dim() != 1 or not (whole or prompt.numel() == 0):
        raise DecDECError(
            f"prompt must be one sequence of token ids, got {tuple(prompt.shape)} of {prompt.dtype}"
        )
    if prompt.numel() and not 0 <= int(prompt.min()) <= int(prompt.max()) < vocabulary:
        raise DecDECError(
            f"prompt must be tokens 0..{vocabulary - 1}, got {int(prompt.min())}..{int(prompt.max())}"
        )
    return prompt.to(torch.int64).unsqueeze(0)


def _ends(stop: Collection[int]) -> frozenset[int]:
    if isinstance(stop, str) or not isinstance(stop, Collection):
        raise DecDECError(f"stop must be a collection of tokens, got {stop!r}")
    for token in stop:
        require_int("stop token", token, 0, 2**31 - 1)
    return frozenset(stop)


def _mark() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def stop_tokens(model: nn.Module) -> list[int]:
    """Return the tokens that end a sequence, of the model's generation_config."""
    ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    return [] if ends is None else list(ends) if isinstance(ends, (list, tuple)) else [ends]
