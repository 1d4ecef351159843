"""Batches of generation: how many sequences fit, which of them may be padded, when each has ended."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteria

_BY_LENGTH = ("dynamic", "longrope")  # rotations that the longest sequence of a batch sets for all of it
# settings of generate that read a prompt's tokens or its padded length, and their values that read nothing
_READ_THE_PROMPT = {
    "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "min_length": 0,
}
_ON_CPU = 8  # rows: most of what reading the weights once for all of them saves
_SHARE = 0.8  # of the free memory: the rest is for what the estimate leaves out


class StopTexts(StoppingCriteria):
    """Ends each sequence by itself, as soon as its new text holds one of `stops`.

    lm-eval's own ends a batch when every sequence has met the same stop: one of them that met another, or
    none, keeps all of them at work until max_gen_toks.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stops: Sequence[str], prompt_tokens: int) -> None:
        self._tokenizer, self._prompt_tokens = tokenizer, prompt_tokens
        self._stops = [stop for stop in stops if stop]
        # a token is a byte at least; two more, because a text's first token may be decoded otherwise
        self._recent = 2 + max((len(stop.encode()) for stop in self._stops), default=0)

    def __call__(self, input_ids: Tensor, scores: Any, **_others: Any) -> Tensor:
        """Return, per sequence, whether it has ended: (rows,) bool."""
        new = input_ids[:, self._prompt_tokens :][:, -self._recent :]
        texts = self._tokenizer.batch_decode(new)
        ended = [any(stop in text for stop in self._stops) for text in texts]
        return torch.tensor(ended, dtype=torch.bool, device=input_ids.device)


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
        return max(1, min(at_most, _ON_CPU))
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
