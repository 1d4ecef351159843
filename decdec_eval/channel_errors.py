"""Which channels each selection finds, and how much of a layer's output error it leaves, token by token.

    text --model without compensation--> x of each layer --every selection, every k_chunk--> channels
                                                                    |
              recall: share of exact's channels;  energy left: ||Wx - ŷ||² / ||Wx - Ŵx||², ŷ compensated

One pass over the text serves all of them. What is kept are sums over stretches of consecutive tokens: of the
mean over layers they give a standard error over tokens that allows for neighbours' likeness, beside the one
over layers.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from decdec_core.architectures import kind_of
from decdec_core.channels import make_selection
from decdec_core.config import CHUNK, PROJECTION_KINDS, DecDECError, require_int, total_channels
from decdec_core.energy import energy_left, watching_uncompensated
from decdec_core.linear import DecLinear
from decdec_core.model import dec_layers, layer_seed
from decdec_core.residuals import dequantize_residual
from decdec_eval.originals import Originals

SELECTIONS = ("random", "static", "dynamic", "exact")
STRETCH = 64  # consecutive tokens
_AT_ONCE = 8  # sequences of a pass
_TOKENS = 1 << 11  # whose outputs are in memory together
Floats = NDArray[np.float64]


class Key(NamedTuple):
    """A number measured of each token. of: "recall" or "energy_left", with a selection and a k_chunk;
    "floor", what all channels leave."""

    of: str
    selection: str = ""
    k_chunk: int = 0

    def text(self) -> str:
        """Return "recall dynamic 8"."""
        return f"{self.of} {self.selection} {self.k_chunk}" if self.selection else self.of


class Share(NamedTuple):
    """A layer's share: sums of what is above and below the line, over each stretch of tokens."""

    above: Floats
    below: Floats

    @property
    def value(self) -> float:
        return float(self.above.sum() / self.below.sum())


def require_k_chunks(k_chunks: Sequence[int], in_features: Iterable[int]) -> None:
    """Raise DecDECError unless there are k_chunks, and each chooses channels of layers so wide."""
    if not k_chunks:
        raise DecDECError("k_chunk must be at least one number, got none")
    narrowest = min(in_features)
    for k_chunk in k_chunks:
        require_int("k_chunk", k_chunk, 1, CHUNK)
        if total_channels(narrowest, k_chunk) == 0:
            raise DecDECError(
                f"k_chunk must choose channels of every layer, got {k_chunk}, which is none of {narrowest}"
            )


class ChannelErrors:
    """Measures the layers of a model that was loaded from an artifact, one text or several.

    k_chunks: each must choose a channel of every layer. original: the full-precision model; without it the
    weight and its stored residual together stand for it. seed: of random selection. Refused input raises
    DecDECError.
    """

    def __init__(
        self, model: Any, k_chunks: Sequence[int], original: Originals | None = None, seed: int = 0
    ) -> None:
        self.model, self.layers, self.original, self.seed = model, dec_layers(model), original, seed
        self.k_chunks = sorted(set(k_chunks))
        require_k_chunks(self.k_chunks, [layer.in_features for layer in self.layers.values()])

    @torch.no_grad()
    def shares(self, ids: Tensor, skipped: int) -> dict[str, dict[Key, Share]]:
        """Return each layer's shares by what they are of, over ids (sequences, tokens).

        The first `skipped` tokens of a sequence are read and not measured. Raises DecDECError for sequences
        that leave no token.
        """
        if ids.dim() != 2 or not 0 <= skipped < ids.shape[1]:
            raise DecDECError(f"ids must be (sequences, more than {skipped} tokens), got {tuple(ids.shape)}")
        sums: dict[str, dict[str | Key, list[Floats]]] = {name: defaultdict(list) for name in self.layers}

        def see(name: str, x: Tensor, _y: Tensor) -> None:
            tokens = x[:, skipped:].reshape(-1, x.shape[-1])
            for key, values in self._measure(name, tokens).items():
                sums[name][key].append(_by_stretch(values.view(x.shape[0], -1)))

        with watching_uncompensated(self.model, see):
            for some in tqdm(ids.split(_AT_ONCE), desc="text", unit="pass"):
                self.model.base_model(some.to(self.model.device), use_cache=False)
        return {name: _shares(name, values) for name, values in sums.items()}

    def _measure(self, name: str, x: Tensor) -> dict[str | Key, Tensor]:
        """Return, of each token of x (tokens, in), what shares are made of: (tokens,) float64 by its key."""
        layer = self.layers[name]
        assert layer.residual is not None
        residual = dequantize_residual(layer.residual).to(x.device)
        missing = residual if self.original is None else self.original.weight(name) - layer.dequantize()
        parts: dict[str | Key, list[Tensor]] = defaultdict(list)
        for some in x.split(_TOKENS):
            for key, values in self._measure_some(name, layer, some, missing, residual).items():
                parts[key].append(values.double().cpu())
        return {key: torch.cat(values) for key, values in parts.items()}

    def _measure_some(
        self, name: str, layer: DecLinear, x: Tensor, missing: Tensor, residual: Tensor
    ) -> dict[str | Key, Tensor]:
        assert layer.statistics is not None
        error = x.float() @ missing.T
        found: dict[str | Key, Tensor] = {
            "tokens": torch.ones(x.shape[0]),
            "error": error.square().sum(1),
            Key("floor"): (error - x.float() @ residual.T).square().sum(1),
        }
        x = x.contiguous()
        for k_chunk in self.k_chunks:
            chosen = {}
            for kind in SELECTIONS:
                how = make_selection(kind, k_chunk, layer.statistics, layer_seed(self.seed, name))
                assert how is not None
                chosen[kind] = how(x)
                found[Key("energy_left", kind, k_chunk)] = energy_left(error, x, residual, chosen[kind])
            for kind in SELECTIONS[:-1]:
                found[Key("recall", kind, k_chunk)] = recall(chosen[kind], chosen["exact"], x.shape[1])
        return found


def recall(chosen: Tensor, exact: Tensor, in_features: int) -> Tensor:
    """Return, per token, the share of exact's channels that is among the chosen: (tokens,) float32.

    exact: (tokens, K). chosen: (tokens, K), or (1, K) for the same channels in every token.
    """
    wanted = torch.zeros((exact.shape[0], in_features), dtype=torch.bool, device=exact.device)
    wanted.scatter_(1, exact.long(), True)
    return wanted.gather(1, chosen.long().expand(exact.shape[0], -1)).float().mean(1)


def _by_stretch(values: Tensor) -> Floats:
    """Return the sums of (sequences, tokens) over stretches of a sequence, one after another."""
    return torch.stack([part.sum(1) for part in values.split(STRETCH, dim=1)], 1).flatten().numpy()


def _shares(name: str, sums: Mapping[str | Key, Sequence[Floats]]) -> dict[Key, Share]:
    whole = {key: np.concatenate(list(parts)) for key, parts in sums.items()}
    if not whole["error"].sum() > 0:
        raise DecDECError(f"layer {name} must have an output error, got {whole['error'].sum()}")
    below = {"recall": whole["tokens"], "energy_left": whole["error"], "floor": whole["error"]}
    return {key: Share(whole[key], below[key.of]) for key in whole if isinstance(key, Key)}


def by_kind(shares: Mapping[str, Mapping[Key, Share]]) -> dict[str, Any]:
    """Return the means over the layers of each projection kind, as JSON types.

    {kind: {"count": layers, "recall": {selection: {k_chunk: [mean, standard error over layers]}},
    "energy_left": likewise, "floor": [mean, error], "token_stderr": the same with the standard error over
    tokens alone in the place of each pair}}. An error is None where there is one layer, or one stretch.
    """
    found: dict[str, Any] = {}
    for kind in PROJECTION_KINDS:
        layers = [values for name, values in shares.items() if kind_of(name) == kind]
        over_layers: dict[str, Any] = {}
        over_tokens: dict[str, Any] = {}
        for key in layers[0]:
            these = [layer[key] for layer in layers]
            mean, error = _over_layers([share.value for share in these])
            _put(over_layers, key, [mean, error])
            _put(over_tokens, key, _over_tokens(these))
        found[kind] = {"count": len(layers), **over_layers, "token_stderr": over_tokens}
    return found


def by_layer(shares: Mapping[str, Mapping[Key, Share]]) -> dict[str, list[float]]:
    """Return every layer's share, in the order of the layers, by the text of what it is of."""
    keys = next(iter(shares.values()))
    return {key.text(): [values[key].value for values in shares.values()] for key in keys}


def _put(into: dict[str, Any], key: Key, value: Any) -> None:
    if not key.selection:
        into[key.of] = value
    else:
        into.setdefault(key.of, {}).setdefault(key.selection, {})[str(key.k_chunk)] = value


def _over_layers(values: Sequence[float]) -> tuple[float, float | None]:
    error = float(np.std(values, ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else None
    return float(np.mean(values)), error


def _over_tokens(layers: Sequence[Share]) -> float | None:
    """Return the standard error, over stretches of tokens and to first order, of the mean of the shares."""
    stretches = len(layers[0].below)
    if stretches < 2:
        return None
    off = [(share.above - share.value * share.below) / share.below.sum() for share in layers]
    mean = np.mean(off, axis=0)
    return math.sqrt(float(np.square(mean).sum()) * stretches / (stretches - 1))
