"""The messages of a conversation -> token ids, and where an answer ends.

A tokenizer's own chat template comes first. FastChat's conversation serves only models that were released
with it and without a template, such as Vicuna: for any model that it does not know it has a fallback
(`one_shot`), and it takes the base models of some families for chat models. What has neither is refused.
"""

from __future__ import annotations

import bisect
import hashlib
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from fastchat.conversation import Conversation
from fastchat.model.model_adapter import get_conversation_template
from jinja2 import TemplateError

from decdec_core.config import DecDECError

CHAT_TEMPLATE = "chat template"
_ROLES = ("user", "assistant")
# FastChat's conversations by a name that only chat models bear, ...
_OF_CHAT_MODELS = {
    "airoboros_v1",
    "airoboros_v2",
    "airoboros_v3",
    "alpaca",
    "baize",
    "dolphin-2.2.1-mistral-7b",
    "koala_v1",
    "manticore",
    "metamath",
    "mistral-7b-openorca",
    "oasst_llama",
    "open-orca",
    "openbuddy",
    "openchat_3.5",
    "OpenHermes-2.5-Mistral-7B",
    "orca-2",
    "stable-vicuna",
    "tenyxchat",
    "tulu",
    "vicuna_v1.1",
    "zephyr",
}
# ... and those by a name that base models bear as well, which must then say what it is
_OF_FAMILIES = {"deepseek-chat", "llama-2", "mistral", "solar", "TinyLlama", "Yi-34b-chat"}
_SAYS_CHAT = re.compile(r"chat|instruct", re.IGNORECASE)
_MARK = "ANSWER"
# in the place of today's date, which a template may write: answers of another day have the same prompts.
# A macro, because transformers hands a template no function of its user's.
_ONE_DATE = "{%- macro strftime_now(form) -%}26 Jul 2024{%- endmacro -%}"


@dataclass(frozen=True)
class ChatFormat:
    """How a conversation becomes a prompt, and where an answer ends.

    conversation: FastChat's, or None for the tokenizer's own template. stop: tokens that end an answer.
    Messages alternate between user and assistant; an odd number asks for an answer.
    """

    tokenizer: Any
    conversation: Conversation | None
    stop: tuple[int, ...]

    def text(self, messages: Sequence[str], system: str = "") -> str:
        """Return the conversation as the model is to read it; system: a message in the template's place."""
        if self.conversation is None:
            return _rendered(self.tokenizer, messages, system)
        conversation = self.conversation.copy()
        if system:
            conversation.set_system_message(system)
        answer = [None] if len(messages) % 2 else []
        for number, message in enumerate([*messages, *answer]):
            conversation.append_message(conversation.roles[number % 2], message)
        return conversation.get_prompt()

    def prompt(self, messages: Sequence[str]) -> list[int]:
        """Return the conversation as token ids. A template says itself what comes first; before FastChat's
        conversation comes what the tokenizer adds."""
        added = self.conversation is not None
        return self.tokenizer(self.text(messages), add_special_tokens=added, verbose=False).input_ids

    def answer(self, tokens: Sequence[int]) -> str:
        """Return the text of generated `tokens` up to the first that ends an answer, without special tokens
        and white space around it."""
        last = next((i for i, token in enumerate(tokens) if token in self.stop), len(tokens))
        text = self.tokenizer.decode(list(tokens[:last]), skip_special_tokens=True)
        for stop in self._stop_texts():
            text = text.partition(stop)[0]
        return text.strip()

    def until_stop(self, tokens: Sequence[int]) -> list[int]:
        """Return generated `tokens` up to the one with which a stop text is whole; without one, all."""

        def whole(count: int) -> bool:
            text = self.tokenizer.decode(list(tokens[:count]), skip_special_tokens=True)
            return any(stop in text for stop in self._stop_texts())

        if not whole(len(tokens)):
            return list(tokens)
        return list(tokens[: bisect.bisect_left(range(len(tokens)), True, key=whole)])

    def stopped(self, tokens: Sequence[int]) -> bool:
        """Return whether the model ended its answer itself."""
        text = self.tokenizer.decode(list(tokens), skip_special_tokens=True)
        return not set(self.stop).isdisjoint(tokens) or any(stop in text for stop in self._stop_texts())

    def describe(self) -> dict[str, Any]:
        """Return what a result says of it: name, stop tokens, and a hash of an example's token ids."""
        name = CHAT_TEMPLATE if self.conversation is None else f"FastChat's {self.conversation.name}"
        example = str(self.prompt(["question", "answer", "question"])).encode()
        return {
            "name": name,
            "stop": list(self.stop),
            "example_sha256": hashlib.sha256(example).hexdigest(),
        }

    def _stop_texts(self) -> list[str]:
        return [] if self.conversation is None else _stop_texts(self.conversation)


def chat_format(tokenizer: Any, eos: int | Collection[int] | None, name: str) -> ChatFormat:
    """Return how to talk with a model.

    eos: the end tokens of its generation_config. name: what the model was called where it came from, a hub id
    or a path. Raises DecDECError for a model without a template of which FastChat knows no conversation.
    """
    ends = {eos} if isinstance(eos, int) else set(eos or ())
    if tokenizer.eos_token_id is not None:
        ends.add(tokenizer.eos_token_id)
    conversation = None
    if tokenizer.chat_template:
        ends |= _ends_of_turn(tokenizer)
    else:
        conversation = fastchat_conversation(name)
        ends |= set(conversation.stop_token_ids or ())
        # a stop text that is a token of its own is seen even where special tokens are left out of a text
        alone = [tokenizer(text, add_special_tokens=False).input_ids for text in _stop_texts(conversation)]
        ends |= {ids[0] for ids in alone if len(ids) == 1}
    return ChatFormat(tokenizer, conversation, tuple(sorted(ends)))


def fastchat_conversation(name: str) -> Conversation:
    """Return FastChat's conversation for the model called `name`, a hub id or a path; raise DecDECError where
    it has none that is certainly a chat model's."""
    base = re.split(r"[/\\]", name.rstrip("/\\"))[-1]
    found = get_conversation_template(base)
    right = found.name in _OF_CHAT_MODELS or (found.name in _OF_FAMILIES and _SAYS_CHAT.search(base))
    if not right:
        raise DecDECError(
            f"model {name} must have a tokenizer with a chat template or be a chat model that FastChat knows "
            "by name, got neither: a base model cannot answer MT-Bench"
        )
    return found


def _stop_texts(conversation: Conversation) -> list[str]:
    stop = conversation.stop_str
    return [stop] if isinstance(stop, str) else list(stop or [])


def _rendered(tokenizer: Any, messages: Sequence[str], system: str = "") -> str:
    turns = [{"role": _ROLES[i % 2], "content": message} for i, message in enumerate(messages)]
    first = [{"role": "system", "content": system}] if system else []
    options: dict[str, Any] = {"tokenize": False, "add_generation_prompt": len(messages) % 2 == 1}
    try:
        template = tokenizer.get_chat_template()
        if "strftime_now" in template:
            options["chat_template"] = _ONE_DATE + template
        return tokenizer.apply_chat_template([*first, *turns], **options)
    except (TemplateError, ValueError) as error:
        raise DecDECError(f"chat template must render user and assistant turns, got {error}") from None


def _ends_of_turn(tokenizer: Any) -> set[int]:
    """Return the special token with which the template closes an assistant's turn, if there is one."""
    after = _rendered(tokenizer, ["question", _MARK]).rpartition(_MARK)[2]
    special = set(tokenizer.all_special_ids)
    special |= {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    ids = tokenizer(after.lstrip(), add_special_tokens=False).input_ids
    return {ids[0]} & special if ids else set()
