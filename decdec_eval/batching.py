"""Batches of generation: how many sequences fit, which of them may be padded, when each has ended."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

from decdec_core.architectures import SUPPORTED
from decdec_core.config import DecDECError

_BY_LENGTH = ("dynamic", "longrope")  # rotations that the longest sequence of a batch sets for all of it
# settings of generate that read a prompt's tokens or its padded length, and their values that read nothing
_READ_THE_PROMPT = {
    "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "min_length": 0,
}
_STEPS_AT_ONCE = 32  # then the sequences that have ended leave their batch
# settings of generate that mean the same after some steps as before the first
_OF_A_STEP = {
    *("do_sample", "temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff"),
    *("repetition_penalty", "no_repeat_ngram_size", "bad_words_ids", "suppress_tokens", "renormalize_logits"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "max_length", "max_new_tokens", "use_cache"),
    *("output_attentions", "output_hidden_states", "transformers_version", "_from_model_config"),
}
_ROWS_ON_CPU = 8  # of a batch: most of what reading the weights once for all of them saves
_SHARE = 0.8  # of the free memory: the rest is for what the estimate leaves out


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    ids: Tensor,
    mask: Tensor,
    new_tokens: int,
    stops: Sequence[str],
    settings: Mapping[str, Any],
) -> list[Tensor]:
    """Return the new tokens of each of the prompts (rows, tokens), at most new_tokens, padding behind some.

    By transformers' generate with `settings`. Every 32 tokens the sequences that have ended leave the batch,
    where generation can be interrupted: else all of them go on until the last has ended.
    """
    prompt, longest = ids.shape[1], ids.shape[1] + new_tokens
    steps = _STEPS_AT_ONCE if _may_be_interrupted(model, settings) else new_tokens
    answers: dict[int, Tensor] = {}
    rows = list(range(len(ids)))  # which of them the batch still holds
    cached: dict[str, Any] = {}
    while rows:
        texts = StopTexts(tokenizer, stops, prompt)
        done: Any = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=min(steps, longest - ids.shape[1]),
            stopping_criteria=StoppingCriteriaList([texts]),
            pad_token_id=tokenizer.pad_token_id,
            use_cache=True,
            return_dict_in_generate=True,
            **cached,
            **settings,
        )
        ids = done.sequences
        new = ids[:, prompt:]
        ended = texts.ended | _holds(new, settings.get("eos_token_id", model.generation_config.eos_token_id))
        if ids.shape[1] >= longest:
            ended = torch.ones_like(ended)
        kept = (~ended).nonzero()[:, 0]
        answers |= {rows[i]: new[i] for i in ended.nonzero()[:, 0].tolist()}
        rows = [rows[i] for i in kept.tolist()]
        mask = torch.cat([mask, mask.new_ones(len(mask), ids.shape[1] - mask.shape[1])], dim=1)
        cached = {"past_key_values": done.past_key_values}
        if 0 < len(rows) < len(ids):
            done.past_key_values.batch_select_indices(kept)
            ids, mask = ids[kept], mask[kept]
    return [answers[row] for row in range(len(answers))]


def refuse_beams(model: PreTrainedModel, settings: Sequence[Mapping[str, Any]]) -> None:
    """Raise DecDECError where generation would keep several sequences for a prompt: here it has one."""
    own = model.generation_config
    for given in settings:
        for name in ("num_beams", "num_return_sequences"):
            asked = given.get(name, getattr(own, name, None))
            if asked not in (None, 1):
                raise DecDECError(f"{name} must be 1 with --model decdec, got {asked!r}")


def _may_be_interrupted(model: PreTrainedModel, settings: Mapping[str, Any]) -> bool:
    """Return whether generation that goes on from its cache is generation that was never interrupted."""
    own = model.generation_config.to_diff_dict()
    return model.config.model_type in SUPPORTED and _OF_A_STEP.issuperset([*settings, *own])


def _holds(ids: Tensor, ends: int | Sequence[int] | None) -> Tensor:
    """Return, per row of ids (rows, tokens), whether one of `ends` is in it: (rows,) bool."""
    some = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    return torch.isin(ids, torch.tensor(some, dtype=ids.dtype, device=ids.device)).any(1)


class StopTexts(StoppingCriteria):
    """Ends each sequence by itself, as soon as its new text holds one of `stops`.

    `ended`: which have, of those of the last call: (rows,) bool.

    lm-eval's own ends a batch when every sequence has met the same stop: one of them that met another, or
    none, keeps all of them at work until max_gen_toks.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stops: Sequence[str], prompt_tokens: int) -> None:
        self._tokenizer, self._prompt_tokens = tokenizer, prompt_tokens
        self._stops = [stop for stop in stops if stop]
        # a token is a byte at least; two more, because a text's first token may be decoded otherwise
        self._recent = 2 + max((len(stop.encode()) for stop in self._stops), default=0)
        self.ended = torch.zeros(1, dtype=torch.bool)

    def __call__(self, input_ids: Tensor, scores: Any, **_others: Any) -> Tensor:
        """Return, per sequence, whether it has ended, now or before: (rows,) bool."""
        new = input_ids[:, self._prompt_tokens :][:, -self._recent :]
        texts = self._tokenizer.batch_decode(new)
        now = [any(stop in text for stop in self._stops) for text in texts]
        self.ended = self.ended.to(input_ids.device) | torch.tensor(now, device=input_ids.device)
        return self.ended


def padding_changes_answers(
    model: PreTrainedModel, settings: Mapping[str, Any], prompt_tokens: int, new_tokens: int
) -> bool:
    """Return whether a sequence's answer would depend on longer ones beside it.

    settings: generation's, before the model's own. It is so where a penalty counts the padding among the
    prompt's tokens, and where the longest of prompt_tokens + new_tokens is beyond the length at which the
    model's rotation changes.
    """
    own = model.generation_config
    for name, neutral in _READ_THE_PROMPT.items():
        if settings.get(name, getattr(own, name, None)) not in (None, neutral):
            return True
    limit = _rotation_limit(model.config)
    return limit is not None and prompt_tokens + new_tokens > limit


def _rotation_limit(config: PretrainedConfig) -> int | None:
    """Return the tokens up to which the model's rotation is one and the same, None without such a limit."""
    rotation = getattr(config, "rope_parameters", None) or {}
    several = [kind for kind in rotation.values() if isinstance(kind, Mapping)]  # one for each kind of layer
    limits = [
        kind.get("original_max_position_embeddings") or config.max_position_embeddings
        for kind in several or [rotation]
        if kind.get("rope_type") in _BY_LENGTH
    ]
    return min(limits, default=None)


def of_equal_length(attention_mask: Tensor) -> list[list[int]]:
    """Return the rows of a mask (rows, tokens) in groups that need no padding."""
    groups: dict[int, list[int]] = {}
    for row, tokens in enumerate(attention_mask.sum(1).tolist()):
        groups.setdefault(tokens, []).append(row)
    return list(groups.values())


def padded(rows: Sequence[Tensor], pad: int, side: str) -> Tensor:
    """Return token ids of several lengths as one tensor (rows, longest), `pad` on the side of the shorter
    ones that `side` names: left or right."""
    return pad_sequence(list(rows), batch_first=True, padding_value=pad, padding_side=side)


def rows_that_fit(model: PreTrainedModel, prompt_tokens: int, new_tokens: int, at_most: int) -> int:
    """Return how many sequences to generate at a time, 1..at_most.

    prompt_tokens, new_tokens: of the longest one. On a GPU by its free memory, on a CPU at most 8: there
    nothing says what is free in time.
    """
    device = model.device
    if device.type != "cuda":
        return max(1, min(at_most, _ROWS_ON_CPU))
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    free = torch.cuda.mem_get_info(device)[0] + unused
    return max(1, min(at_most, int(free * _SHARE) // bytes_of_a_row(model, prompt_tokens, new_tokens)))


def bytes_of_a_row(model: PreTrainedModel, prompt_tokens: int, new_tokens: int) -> int:
    """Return an estimate from above of the memory that one sequence takes in generation.

    Its keys and values, and once more one layer's while they grow; the prompt's widest activations, in
    float32 where compensation is summed; attention's mask and, without a fused kernel, its scores; logits.
    """
    config, item = model.config, model.dtype.itemsize
    heads = config.num_attention_heads
    head = getattr(config, "head_dim", None) or config.hidden_size // heads
    layer = 2 * config.num_key_value_heads * head * (prompt_tokens + new_tokens) * item
    activations = prompt_tokens * (4 * config.intermediate_size + 8 * config.hidden_size) * 4
    scores = heads * 8 if config._attn_implementation == "eager" else 0
    attention = prompt_tokens**2 * (item + scores)
    return layer * (config.num_hidden_layers + 1) + activations + attention + 3 * 4 * config.vocab_size
