"""A FastChat model adapter: fschat's own load_model and get_conversation_template open a decdec artifact.

Importing this module registers it. What FastChat calls a model path is an artifact's folder, or the arguments
of `--model decdec` as text, "pretrained=DIR,selection=static,k_chunk=16".
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from fastchat.conversation import Conversation
from fastchat.model import model_adapter
from lm_eval.utils import simple_parse_args_string
from torch import nn
from transformers import GenerationConfig

from decdec_core.artifact import is_artifact
from decdec_core.budget import described
from decdec_core.config import DecDECError
from decdec_core.model import compensation_ledger, set_compensation
from decdec_core.sources import load_tokenizer, model_files, model_folder
from decdec_eval.lm_model import FULL, DecDECLM
from decdec_eval.mtbench.conversation import ChatFormat, chat_format

_FROM_FASTCHAT = ("torch_dtype", "revision")  # that an artifact can be loaded with
_ledgers: WeakKeyDictionary[nn.Module, dict[str, Any]] = WeakKeyDictionary()


@dataclass
class TemplateConversation(Conversation):
    """FastChat's Conversation with the prompt of the tokenizer's own chat template."""

    format: ChatFormat | None = None

    def get_prompt(self) -> str:
        """Return the prompt as text. FastChat lets the tokenizer add what it adds, so that a first token that
        both would write is left out."""
        assert self.format is not None
        messages = [message for _role, message in self.messages if message is not None]
        text, tokenizer = self.format.text(messages, self.system_message), self.format.tokenizer
        bos = tokenizer.bos_token
        if bos and text.startswith(bos):
            plain = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
            if tokenizer(text, verbose=False).input_ids[: len(plain)] != plain:
                return text[len(bos) :]
        return text

    def copy(self) -> TemplateConversation:
        """Return the same with messages of its own."""
        return dataclasses.replace(self, messages=[list(pair) for pair in self.messages])


class DecDECAdapter(model_adapter.BaseModelAdapter):
    """Opens artifacts, and plain models with a recipe or with method=full, as `--model decdec` does.

    Of `compensate` auto, generation takes decode: FastChat's streaming reads a prompt without a key-value
    cache, which alone would count as likelihood. dtype: what the arguments name, else FastChat's (float32 on
    a CPU, float16 on a GPU).
    """

    def match(self, model_path: str) -> bool:
        return "pretrained=" in model_path or is_artifact(model_path)

    def load_model(self, model_path: str, from_pretrained_kwargs: dict[str, Any]) -> tuple[Any, Any]:
        for name in from_pretrained_kwargs:
            if name not in _FROM_FASTCHAT:
                raise DecDECError(f"FastChat must load a decdec model onto one device as it is, got {name}")
        arguments = arguments_of(model_path)
        if "device" in arguments:
            raise DecDECError(
                f"device must be given to FastChat (--device), got device={arguments['device']} in model_args"
            )
        dtype = from_pretrained_kwargs.get("torch_dtype", "auto")
        lm = DecDECLM.create_from_arg_obj(arguments, {"device": "cpu", "dtype": dtype, "batch_size": 1})
        _ledgers[lm.model] = ledger_of(lm)
        return lm.model, lm.tokenizer

    def load_compress_model(self, model_path: str, *_args: Any, **_kwargs: Any) -> None:
        raise DecDECError(f"load_8bit must be off for a decdec model, got it for {model_path}")

    def get_default_conv_template(self, model_path: str) -> Conversation:
        chat = chat_format_of(model_path)
        if chat.conversation is not None:
            return chat.conversation.copy()
        return TemplateConversation(
            name="decdec",
            roles=("user", "assistant"),
            messages=[],
            stop_token_ids=list(chat.stop),
            format=chat,
        )


@dataclass(frozen=True)
class Opened:
    """A loaded model. ledger: what a result must say of it."""

    model: Any
    tokenizer: Any
    chat: ChatFormat
    ledger: dict[str, Any]


def open_model(model_args: str, device: str) -> Opened:
    """Return the model of `--model decdec` arguments, loaded by FastChat's load_model onto "cpu" or "cuda".
    What is refused raises DecDECError."""
    if device == "cuda" and not torch.cuda.is_available():
        raise DecDECError("device must be cpu where there is no CUDA device, got cuda")
    chat = chat_format_of(model_args)  # first: what cannot answer need not be loaded
    model, tokenizer = model_adapter.load_model(model_args, device=device)
    model.eval()
    ledger = {**_ledgers[model], "dtype": str(model.dtype).removeprefix("torch."), "device": device}
    return Opened(model, tokenizer, chat, ledger)


def arguments_of(model_path: str) -> dict[str, Any]:
    """Return the arguments of `--model decdec` that a model path of FastChat stands for; text that names no
    model raises DecDECError."""
    if is_artifact(model_path):
        return {"pretrained": model_path}
    arguments = simple_parse_args_string(model_path)
    if not arguments.get("pretrained"):
        raise DecDECError(f"model_args must be pretrained=MODEL,name=value,..., got {model_path!r}")
    return arguments


@lru_cache(maxsize=8)  # FastChat asks for every question
def chat_format_of(model_path: str) -> ChatFormat:
    """Return how to talk with the model of a path; a base model raises DecDECError."""
    arguments = arguments_of(model_path)
    pretrained = str(arguments["pretrained"])
    folder = Path(pretrained) if is_artifact(pretrained) else model_folder(pretrained)
    tokenizer = load_tokenizer(str(arguments.get("tokenizer") or folder))
    name = pretrained
    if is_artifact(folder):
        name = str(described(folder)[1].provenance.get("source", pretrained))
    has_ends = (folder / "generation_config.json").is_file()
    ends = GenerationConfig.from_pretrained(folder).eos_token_id if has_ends else None
    return chat_format(tokenizer, ends, name)


def ledger_of(lm: DecDECLM) -> dict[str, Any]:
    """Return what was loaded: artifact, compensation and budget, or the files of an unquantized model. Makes
    `decode` of the model's `auto`, which is what generation means by it."""
    if not hasattr(lm.model, "decdec"):
        return {"method": FULL, "selection": "none", "model": model_files(Path(lm.model.config.name_or_path))}
    if lm.compensation.compensate == "auto":
        set_compensation(lm.model, dataclasses.replace(lm.compensation, compensate="decode"))
    budget = {} if lm.budget is None else {"budget": lm.budget.ledger()}
    return {**compensation_ledger(lm.model), **budget}


def _register() -> None:
    """Register the adapter, and let it be asked first.

    FastChat asks all adapters about the last part of a path before it asks any about the whole, so that a
    folder named mistral-awq3 would be opened as a plain Mistral.
    """
    model_adapter.register_model_adapter(DecDECAdapter)
    own = model_adapter.model_adapters[-1]
    others: Callable[[str], Any] = model_adapter.get_model_adapter
    model_adapter.get_model_adapter = lambda model_path: own if own.match(model_path) else others(model_path)


_register()
