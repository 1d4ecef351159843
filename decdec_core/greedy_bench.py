"""Whether decode.py generates the greedy tokens of transformers' generate, prompt by prompt."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from decdec_core.artifact import require_artifact
from decdec_core.config import Compensation, require_int
from decdec_core.decode import Decoder
from decdec_core.decode_bench import place
from decdec_core.fusing import fuse
from decdec_core.kernel_bench import markdown
from decdec_core.model import set_compensation

PROMPTS = (
    "The residual of a weight is",
    "In 1905, Albert Einstein published",
    "def fibonacci(n):",
    "Once upon a time there was a small GPU that",
    "List three uses of a paper clip:\n1.",
)


def greedy_rows(
    folder: Path,
    device: str,
    dtype: torch.dtype | None,
    compensation: Compensation,
    tokens: int,
    prompts: Sequence[str] = PROMPTS,
) -> list[dict[str, Any]]:
    """Return a row for each prompt: prompt, dtype, tokens, how many are `equal` from the first on, and where
    they part the `margin`, generate's logit of its own token less that of ours; None where all are equal.

    folder: an artifact. dtype: None for float16 on a GPU, float32 on a CPU. The decoder's model has fused
    layers, generate's has not. In half precision the two round at different places, and a rounding may turn
    the choice of a channel, so that they part at tokens of nearly equal logits. What that says of either is
    told by generate in float32: how many tokens ours and generate's in half precision have in common with it,
    `equal_float32` and `generate_equal_float32` (None in float32).
    """
    require_artifact(folder)
    require_int("tokens", tokens, 1, 1 << 16)
    where, usual = place(device)
    dtype = dtype or usual
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    ids = [tokenizer(prompt, return_tensors="pt").input_ids.to(where) for prompt in prompts]
    exact: list[list[int] | None] = [None] * len(ids)
    if dtype != torch.float32:
        model = _loaded(folder, torch.float32, where, compensation)
        exact = [_generated(model, one, tokens)[0] for one in ids]
    model = _loaded(folder, dtype, where, compensation)
    wanted = [_generated(model, one, tokens) for one in ids]
    fuse(model)
    set_compensation(model, compensation)
    decoder = Decoder(model, max(one.shape[1] for one in ids) + tokens)
    rows = []
    for prompt, one, (theirs, logits), ideal in zip(prompts, ids, wanted, exact, strict=True):
        mine = decoder.generate(one[0], tokens).tokens
        equal = _equal(mine, theirs)
        margin = None
        if equal < min(len(mine), len(theirs)):
            margin = float(logits[equal, theirs[equal]] - logits[equal, mine[equal]])
        about = {"prompt": prompt, "dtype": str(dtype).removeprefix("torch."), **compensation.to_dict()}
        of_float32 = {
            "equal_float32": None if ideal is None else _equal(mine, ideal),
            "generate_equal_float32": None if ideal is None else _equal(theirs, ideal),
        }
        rows.append(
            {**about, "tokens": max(len(mine), len(theirs)), "equal": equal, "margin": margin, **of_float32}
        )
    return rows


def _loaded(folder: Path, dtype: torch.dtype, where: torch.device, compensation: Compensation) -> Any:
    loaded: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    model = loaded.to(where)
    set_compensation(model, compensation)
    return model


def _equal(one: Sequence[int], other: Sequence[int]) -> int:
    """Return how many tokens are the same, from the first on."""
    pairs = list(zip(one, other, strict=False))
    return next((at for at, (a, b) in enumerate(pairs) if a != b), len(pairs))


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return the rows for people."""
    half = any(row["equal_float32"] is not None for row in rows)
    header = ["prompt", "equal tokens", "margin"]
    header += ["ours as in float32", "generate's as in float32"] if half else []
    body = []
    for row in rows:
        margin = "" if row["margin"] is None else f"{row['margin']:.4f}"
        of_float32 = [str(row["equal_float32"]), str(row["generate_equal_float32"])] if half else []
        prompt = row["prompt"].replace("\n", " ")
        body.append([prompt, f"{row['equal']} of {row['tokens']}", margin, *of_float32])
    return markdown(header, body)


@torch.no_grad()
def _generated(model: Any, prompt: Tensor, tokens: int) -> tuple[list[int], Tensor]:
    """Return what generate appends, and the logits (tokens, vocabulary) of each."""
    done = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=tokens,
        do_sample=False,
        # of the configuration's rules these would make another token of the most likely one
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return done.sequences[0, prompt.shape[1] :].tolist(), torch.cat(done.logits).float()
