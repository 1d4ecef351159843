"""Hooks of the task files: documents that are windows of token ids, scored without a round trip to text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.task import ConfigurableTask

from decdec_core.config import DecDECError
from decdec_core.sources import load_tokenizer
from decdec_core.texts import load_text
from decdec_eval import lm_model, perplexity

# lm-eval calls the method of the model that a request names. `decdec` has its own; this one lets
# `--model hf` score the same windows and gives every other model type one line instead of an AttributeError.
if not hasattr(LM, lm_model.TOKEN_WINDOWS):
    setattr(LM, lm_model.TOKEN_WINDOWS, lm_model.token_windows)


class TokenPerplexity(ConfigurableTask):
    """WikiText-2 test as windows of 2048 token ids. Few-shot and chat templates do not apply.

    The rows are joined by two newlines and tokenized once, as tokenizer(text).input_ids: special tokens are
    those that the tokenizer itself puts around a text, so at most the first window starts with one.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config={key: value for key, value in config.items() if key != "class"})
        # lm-eval pads the requests of this type to equal numbers on every rank
        self.OUTPUT_TYPE = lm_model.TOKEN_WINDOWS

    def download(self, dataset_kwargs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Make the documents {"window": index, "token_ids": [2048 ids]} of the model's tokenizer."""
        metadata = self.config.metadata
        text = load_text("wikitext2", "test")
        tokenizer = load_tokenizer(_tokenizer_source(metadata))
        token_ids = tokenizer(text.text, verbose=False).input_ids
        windows = perplexity.windows(token_ids)
        metadata.update(text=text.name, text_sha256=text.sha256, tokens=len(token_ids), windows=len(windows))
        documents = [{"window": index, "token_ids": window} for index, window in enumerate(windows)]
        self.dataset = datasets.DatasetDict(test=datasets.Dataset.from_list(documents))

    def build_all_requests(self, *, cache_requests: bool = False, **kwargs: Any) -> None:
        """Refuse lm-eval's request cache: it does not tell one tokenizer from another."""
        if cache_requests:
            raise DecDECError(
                f"cache_requests must be off for {self.config.task}, got on: it ignores the tokenizer"
            )
        super().build_all_requests(cache_requests=False, **kwargs)

    def construct_requests(self, doc: dict[str, Any], ctx: str, **kwargs: Any) -> Instance:
        """Return the request to score one window. Its first argument is text, for lm-eval's hashes."""
        return Instance(
            request_type=lm_model.TOKEN_WINDOWS,
            doc=doc,
            arguments=(f"window {doc['window']}", doc["token_ids"]),
            idx=0,
            metadata=kwargs["metadata"],
        )


def process_results(doc: dict[str, Any], results: list[float]) -> dict[str, float]:
    """Return one window's values. lm-eval's perplexity is exp(-mean), hence the sign of the first."""
    (nll,) = results
    return {"token_perplexity": -nll, "mean_nll": nll}


def _tokenizer_source(metadata: dict[str, Any]) -> str:
    """Return where the tokenizer is, from the model's arguments, which lm-eval hands to tasks as metadata."""
    source = metadata.get("tokenizer") or metadata.get("pretrained")
    if not isinstance(source, str):
        raise DecDECError(
            "decdec_wikitext2 must know the tokenizer from model_args or from --metadata pretrained=..., "
            f"got {source!r}"
        )
    if metadata.get("gguf_file") and not metadata.get("tokenizer"):
        return str(Path(source) / metadata["gguf_file"])
    return source
