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
    layers, generate's has not. In half precision the two round at different places, so that they part where
    two tokens are nearly equal: a margin of few steps of the logits' dtype.
    """
    require_artifact(folder)
    require_int("tokens", tokens, 1, 1 << 16)
    where, usual = place(device)
    dtype = dtype or usual
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    model = model.to(where)
    set_compensation(model, compensation)
    ids = [tokenizer(prompt, return_tensors="pt").input_ids for prompt in prompts]
    wanted = [_generated(model, one.to(where), tokens) for one in ids]
    fuse(model)
    set_compensation(model, compensation)
    decoder = Decoder(model, max(one.shape[1] for one in ids) + tokens)
    rows = []
    for prompt, one, (theirs, logits) in zip(prompts, ids, wanted, strict=True):
        mine = decoder.generate(one[0], tokens).tokens
        pairs = list(zip(mine, theirs, strict=False))
        equal = next((at for at, (a, b) in enumerate(pairs) if a != b), len(pairs))
        margin = None
        if equal < len(pairs):
            margin = float(logits[equal, theirs[equal]] - logits[equal, mine[equal]])
        about = {"prompt": prompt, "dtype": str(dtype).removeprefix("torch."), **compensation.to_dict()}
        rows.append({**about, "tokens": max(len(mine), len(theirs)), "equal": equal, "margin": margin})
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return the rows for people."""
    body = []
    for row in rows:
        margin = "" if row["margin"] is None else f"{row['margin']:.4f}"
        body.append([row["prompt"].replace("\n", " "), f"{row['equal']} of {row['tokens']}", margin])
    return markdown(["prompt", "equal tokens", "margin"], body)


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
