"""How a model is talked with, and FastChat's own functions on an artifact."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import byte_tokenizer
from fastchat.model import model_adapter
from fastchat.serve.inference import generate_stream
from mtbench_models import EOS, TEMPLATE, build_chat, save_chat, single_threaded
from tokenizers.processors import TemplateProcessing

from decdec_core.config import DecDECError
from decdec_core.model import state_of
from decdec_eval.mtbench.adapter import TemplateConversation, chat_format_of, open_model
from decdec_eval.mtbench.answer import Speaker
from decdec_eval.mtbench.conversation import chat_format, fastchat_conversation

one_thread = pytest.fixture(single_threaded, autouse=True, scope="module")


@pytest.fixture(scope="module")
def artifact(chat_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    # a name by which FastChat opens a plain Mistral, with Mistral's template
    return build_chat(chat_model_dir, tmp_path_factory.mktemp("artifacts") / "mistral-rtn3")


def tokenizer_with(template: str | None, adds_bos: bool = False) -> Any:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    if adds_bos:
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", 257)]
        )
    return tokenizer


def test_the_chat_template_comes_first() -> None:
    chat = chat_format(tokenizer_with(TEMPLATE), None, "lmsys/vicuna-7b-v1.5")
    assert chat.conversation is None
    wanted = "<bos>user\nHi<eos>\n<bos>assistant\nYes.<eos>\n<bos>user\nWhy?<eos>\n<bos>assistant\n"
    assert chat.text(["Hi", "Yes.", "Why?"]) == wanted
    ids = chat.prompt(["Hi", "Yes.", "Why?"])
    assert ids[0] == 257
    assert ids.count(EOS) == 3
    assert chat.tokenizer.decode(ids) == wanted


def test_vicuna_has_fastchats_conversation() -> None:
    chat = chat_format(tokenizer_with(None), 2, "lmsys/vicuna-7b-v1.5")
    assert chat.describe()["name"] == "FastChat's vicuna_v1.1"
    text = chat.text(["Hi", "Yes.", "Why?"])
    assert text.endswith("USER: Hi ASSISTANT: Yes.</s>USER: Why? ASSISTANT:")
    assert chat.text(["Hi"], system="Be kind.").startswith("Be kind. USER: Hi")
    assert chat.stop == (2, EOS)


@pytest.mark.parametrize(
    "name",
    [
        "meta-llama/Meta-Llama-3-8B",  # FastChat's fallback
        "meta-llama/Llama-2-7b-hf",  # a base model with FastChat's template of Llama-2-chat
        "mistralai/Mistral-7B-v0.1",
        "lmsys/vicuna-7b-v0",
        "/models/vicuna-7b/base",  # the folder above says nothing
        "smollm2",
    ],
)
def test_a_base_model_is_refused(name: str) -> None:
    with pytest.raises(DecDECError, match="a base model cannot answer MT-Bench") as refused:
        chat_format(tokenizer_with(None), None, name)
    assert name in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("meta-llama/Llama-2-7b-chat-hf", "llama-2"),
        ("mistralai/Mistral-7B-Instruct-v0.1/", "mistral"),
        ("HuggingFaceH4/zephyr-7b-beta", "zephyr"),
        ("WizardLM/WizardLM-13B-V1.2", "vicuna_v1.1"),
    ],
)
def test_fastchats_conversation_by_name(name: str, wanted: str) -> None:
    assert fastchat_conversation(name).name == wanted


def test_a_template_that_refuses_is_one_line() -> None:
    with pytest.raises(DecDECError, match="chat template must render user and assistant turns, got no"):
        chat_format(tokenizer_with("{{ raise_exception('no') }}"), None, "x")


def test_stop_tokens_are_the_models_the_tokenizers_and_the_templates() -> None:
    template = TEMPLATE.replace("<eos>", "<pad>")
    chat = chat_format(tokenizer_with(template), [7, 9], "x")
    assert chat.stop == (7, 9, 256, EOS)
    plain = chat_format(tokenizer_with(TEMPLATE.replace("<eos>", "")), None, "x")
    assert plain.stop == (EOS,)


def test_an_answer_ends_at_its_first_stop_token() -> None:
    chat = chat_format(tokenizer_with(TEMPLATE), None, "x")
    said = chat.tokenizer(" Hé\n<bos>", add_special_tokens=False).input_ids
    assert chat.answer([*said, EOS, *said]) == "Hé"
    assert chat.stopped([*said, EOS])
    assert not chat.stopped(said)


def test_an_answer_ends_before_a_stop_text() -> None:
    chat = chat_format(tokenizer_with(None), None, "lmsys/vicuna-7b-v1.5")
    conversation = chat.conversation
    assert conversation is not None
    conversation.stop_str = ["USER:", "###"]
    said = chat.tokenizer("Yes. ### USER: no", add_special_tokens=False).input_ids
    assert chat.answer(said) == "Yes."
    assert chat.stopped(said)


def test_a_stop_text_that_is_a_token_ends_an_answer() -> None:
    tokenizer = tokenizer_with(None)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    chat = chat_format(tokenizer, None, "Open-Orca/orca-2")
    assert chat.conversation is not None
    assert chat.conversation.stop_str == "<|im_end|>"
    (end,) = tokenizer("<|im_end|>", add_special_tokens=False).input_ids
    assert end in chat.stop
    said = tokenizer("Paris.<|im_end|><|im_start|>user:More?", add_special_tokens=False).input_ids
    assert chat.answer(said) == "Paris."
    assert chat.stopped(said)


def test_tokens_end_with_a_stop_text() -> None:
    chat = chat_format(tokenizer_with(None), None, "lmsys/vicuna-7b-v1.5")
    assert chat.conversation is not None
    chat.conversation.stop_str = ["USER:"]
    said = chat.tokenizer("Yes. USER: no", add_special_tokens=False).input_ids
    assert chat.until_stop(said) == said[: len("Yes. USER:")]
    assert chat.until_stop(said[:6]) == said[:6]
    assert chat.answer(chat.until_stop(said)) == "Yes."


@pytest.mark.parametrize(
    "date", ["{{ strftime_now('%d %B %Y') }}", "{{ date_string | default(strftime_now('%d %b %Y')) }}"]
)
def test_a_template_that_writes_the_date_gives_one_prompt_on_all_days(date: str) -> None:
    chat = chat_format(tokenizer_with(date + TEMPLATE), None, "x")
    assert "26 Jul" in chat.text(["question"])
    assert "2024" in chat.text(["question"])


def test_fastchats_prompt_has_one_bos_where_the_tokenizer_adds_it() -> None:
    chat = chat_format(tokenizer_with(TEMPLATE, adds_bos=True), None, "x")
    conversation = TemplateConversation(name="x", roles=("user", "assistant"), messages=[], format=chat)
    conversation.append_message("user", "Hi")
    conversation.append_message("assistant", None)
    assert chat.tokenizer(conversation.get_prompt()).input_ids == chat.prompt(["Hi"])
    plain = chat_format(tokenizer_with(TEMPLATE), None, "x")
    conversation.format = plain
    assert plain.tokenizer(conversation.get_prompt()).input_ids == plain.prompt(["Hi"])


def test_fastchat_opens_an_artifact(artifact: Path) -> None:
    conversation = model_adapter.get_conversation_template(str(artifact))
    conversation.append_message(conversation.roles[0], "Hi")
    copied = conversation.copy()
    copied.append_message(copied.roles[1], None)
    assert copied.get_prompt() == "<bos>user\nHi<eos>\n<bos>assistant\n"
    assert len(conversation.messages) == 1
    assert conversation.stop_token_ids == [EOS]
    model, tokenizer = model_adapter.load_model(str(artifact), device="cpu")
    assert model.dtype == torch.float32
    assert tokenizer.chat_template == TEMPLATE
    # FastChat reads a prompt without a cache, which "auto" would compensate
    assert state_of(model).compensation.compensate == "decode"
    assert state_of(model).compensation.selection == "dynamic"


@pytest.mark.parametrize("compensate", ["auto", "all"])
def test_fastchat_generates_what_answer_says(compensate: str, artifact: Path) -> None:
    path = f"pretrained={artifact},selection=exact,k_chunk=64,compensate={compensate}"
    model, tokenizer = model_adapter.load_model(path, device="cpu")
    conversation = model_adapter.get_conversation_template(path)
    conversation.append_message(conversation.roles[0], "Tell me of rivers.")
    conversation.append_message(conversation.roles[1], None)
    asked = {"prompt": conversation.get_prompt(), "temperature": 0.0, "max_new_tokens": 12, "echo": False}
    asked["stop_token_ids"] = conversation.stop_token_ids
    *_, last = generate_stream(model, tokenizer, asked, "cpu", 4096)
    opened = open_model(path, "cpu")
    speaker = Speaker(opened, 512)
    assert speaker.way == "decoder"
    tokens = speaker.speak(opened.chat.prompt(["Tell me of rivers."]), 12, 0.0, 0)
    assert len(tokens) > 4
    assert last["text"].strip() == opened.chat.answer(tokens)


def test_an_unquantized_model_opens_alike(chat_model_dir: Path) -> None:
    opened = open_model(f"pretrained={chat_model_dir},method=full,dtype=bfloat16", "cpu")
    assert opened.model.dtype == torch.bfloat16
    assert not hasattr(opened.model, "decdec")
    assert opened.ledger["method"] == "full"
    assert opened.ledger["dtype"] == "bfloat16"
    assert len(opened.ledger["model"]["config_sha256"]) == 64


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is there")
def test_a_gpu_that_is_not_there_is_refused(artifact: Path) -> None:
    with pytest.raises(DecDECError, match="device must be cpu where there is no CUDA device, got cuda"):
        open_model(f"pretrained={artifact}", "cuda")


def test_other_models_are_still_fastchats() -> None:
    assert isinstance(model_adapter.get_model_adapter("lmsys/vicuna-7b-v1.5"), model_adapter.VicunaAdapter)


def test_a_base_artifact_is_named_by_its_source(tmp_path: Path) -> None:
    base = save_chat(tmp_path / "base", template=None)
    # the artifact's own name is the user's choice, and no evidence
    artifact = build_chat(base, tmp_path / "vicuna-rtn3")
    with pytest.raises(DecDECError, match=f"model {base} must have a tokenizer with a chat template"):
        open_model(f"pretrained={artifact}", "cpu")
    vicuna = save_chat(tmp_path / "vicuna-7b-v1.5", template=None)
    chat = chat_format_of(f"pretrained={vicuna},method=full")
    assert chat.describe()["name"] == "FastChat's vicuna_v1.1"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (",device=cuda", "device must be given to FastChat"),
        (",kchunk=3", r"got 'kchunk' \(did you mean 'k_chunk'\?\)"),
        (",selection=dynamc", r"selection must be one of .*, got 'dynamc'"),
        (",slowdown=5", "slowdown must be with gpu="),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="a slowdown is then of the GPU at hand")
def test_refused_model_args(more: str, message: str, artifact: Path) -> None:
    with pytest.raises(DecDECError, match=message) as refused:
        open_model(f"pretrained={artifact}{more}", "cpu")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("text", ["selection=none", "no/such/artifact", ""])
def test_model_args_without_a_model_are_refused(text: str) -> None:
    with pytest.raises(DecDECError, match="model_args must be pretrained=MODEL"):
        open_model(text, "cpu")


def test_what_fastchat_would_do_to_the_weights_is_refused(artifact: Path) -> None:
    with pytest.raises(DecDECError, match="load_8bit must be off for a decdec model"):
        model_adapter.load_model(str(artifact), device="cpu", load_8bit=True)
    adapter = model_adapter.get_model_adapter(str(artifact))
    with pytest.raises(DecDECError, match="onto one device as it is, got device_map"):
        adapter.load_model(str(artifact), {"torch_dtype": torch.float32, "device_map": "auto"})
