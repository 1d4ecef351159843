"""Which channels of one layer are outliers at each decoding step, and how many of them calibration knew.

A channel is an outlier of a step where its |x| is among the largest 1 % of the layer's. Figure 4 of the
DecDEC paper draws such a map: few channels stay, most come and go, which is why channels are chosen anew for
every token.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import DynamicCache

from decdec_core.architectures import block_number, kind_of
from decdec_core.config import Compensation, DecDECError, require_int, suggest
from decdec_core.decode import Sampling, stop_tokens
from decdec_core.linear import DecLinear
from decdec_core.model import dec_layers, set_compensation, state_of

SHARE = 0.01  # of a layer's channels


def middle_down(layers: Iterable[str]) -> str:
    """Return, of the names of a model's layers, the middle decoder block's down projection."""
    names = sorted((name for name in layers if kind_of(name) == "down"), key=block_number)
    return names[len(names) // 2]


def require_layer(layer: str, layers: Collection[str]) -> None:
    """Raise DecDECError unless `layer` is one of a model's `layers`."""
    if layer not in layers:
        hint = suggest(layer, layers) or f", such as {middle_down(layers)}"
        raise DecDECError(f"layer must be the full name of one of the artifact's layers, got {layer!r}{hint}")


@torch.no_grad()
def outlier_map(
    model: Any,
    layer: str,
    prompt: Sequence[int],
    steps: int,
    sampling: Sampling,
    compensation: Compensation,
) -> tuple[dict[str, Any], list[int]]:
    """Return the outliers at each of `steps` decoding steps after `prompt`, and the tokens of those steps.

    layer: its full name. compensation: while decoding. Tokens that would end the text are not drawn.
    The map as JSON types: {"layer", "steps", "in_features", "share", "top": channels of each step, ascending,
    as the layer sees them; "calibration_top": as many channels, largest in mean square on the calibration
    text; "persistent_share": mean share of a step's that are among those; "distinct": of all steps together;
    "compensation"}. Refused input raises DecDECError.
    """
    layers = dec_layers(model)
    require_layer(layer, layers)
    room = model.config.max_position_embeddings - len(prompt)
    if len(prompt) < 2 or room < 1:
        raise DecDECError(f"prompt must be 2..{len(prompt) + room - 1} tokens, got {len(prompt)}")
    require_int("steps", steps, 1, room)
    count = max(1, int(layers[layer].in_features * SHARE))
    top: list[list[int]] = []

    def see(module: DecLinear, inputs: tuple[Tensor, ...]) -> None:
        x = module.seen(inputs[0])
        if x.shape[1] == 1:
            top.append(x[0, 0].abs().topk(count).indices.sort().values.tolist())

    before = state_of(model).compensation
    set_compensation(model, compensation)
    hook = layers[layer].register_forward_pre_hook(see)
    try:
        tokens = _decode(model, prompt, steps, sampling)
    finally:
        hook.remove()
        set_compensation(model, before)
    statistics = layers[layer].statistics
    assert statistics is not None
    known = set(statistics.mean_square.topk(count).indices.tolist())
    shares = [len(known.intersection(channels)) / count for channels in top]
    found = {
        "layer": layer,
        "steps": steps,
        "in_features": layers[layer].in_features,
        "share": SHARE,
        "top": top,
        "calibration_top": sorted(known),
        "persistent_share": sum(shares) / steps,
        "distinct": len({channel for channels in top for channel in channels}),
        "compensation": compensation.to_dict(),
        "sampling": asdict(sampling),
    }
    return found, tokens


def _decode(model: Any, prompt: Sequence[int], steps: int, sampling: Sampling) -> list[int]:
    """Return the tokens that the model went on with, each of them read by a step of its own."""
    generator = torch.Generator(model.device).manual_seed(sampling.seed)
    cache = DynamicCache(config=model.config)
    ids = torch.tensor([list(prompt)], device=model.device)
    tokens = []
    for _ in tqdm(range(steps), desc="decoding", unit="step"):
        logits = _next_logits(model, ids, cache)
        ids = sampling.choose(logits, generator).unsqueeze(1)
        tokens.append(int(ids))
    _next_logits(model, ids, cache)  # the last token's own step
    return tokens


def _next_logits(model: Any, ids: Tensor, cache: DynamicCache) -> Tensor:
    logits = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
    logits[:, stop_tokens(model)] = -torch.inf
    return logits
