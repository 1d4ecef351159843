"""Batches of generation: the answers of one sequence at a time, whatever shares its batch."""

from __future__ import annotations

import json
import math
import random
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import byte_tokenizer, tiny_model
from lm_eval.api.instance import Instance
from mtbench_models import build_chat
from tiny_artifacts import write_tiny
from transformers import StoppingCriteriaList

from decdec_core.config import DecDECError
from decdec_core.linear import DecLinear
from decdec_core.model import dec_layers, set_compensation
from decdec_eval import batching
from decdec_eval.lm_model import DecDECLM

LENGTHS = (1, 60, 3, 130, 17, 2, 41)
BATCHES = (2, 5, "auto")
TOKENS = 8


def prompts(seed: int = 0) -> list[str]:
    """Return texts of very different lengths, a byte a token."""
    letters = random.Random(seed)
    return ["".join(letters.choices("abcdefghij klmnop", k=length)) for length in LENGTHS]


def load(folder: Path, batch_size: int | str, **arguments: Any) -> DecDECLM:
    chosen = {"k_chunk": 32, "dtype": "float32", **arguments}
    return DecDECLM(folder, device="cpu", batch_size=batch_size, **chosen)


def answers(lm: DecDECLM, texts: list[str], tokens: int = TOKENS, **settings: Any) -> list[str]:
    how = {"until": [], "max_gen_toks": tokens, "do_sample": False, **settings}
    asked = [Instance("generate_until", {}, arguments=(text, how), idx=0) for text in texts]
    return lm.generate_until(asked, disable_tqdm=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("batching") / "llama")


def changed(source: Path, out: Path, file: str, **values: Any) -> Path:
    """Return a copy of an artifact in which a JSON file says `values`, and no manifest vouches for it."""
    shutil.copytree(source, out)
    body = json.loads((out / file).read_text())
    (out / file).write_text(json.dumps({**body, **values}))
    return out


@pytest.mark.parametrize("compensate", ["auto", "all"])
@pytest.mark.parametrize("selection", ["static", "dynamic", "exact", "random"])
def test_answers_do_not_depend_on_the_batch(folder: Path, selection: str, compensate: str) -> None:
    lm = load(folder, 1, selection=selection, compensate=compensate)
    alone = answers(lm, prompts())
    assert len(set(alone)) > 1
    for size in BATCHES:
        lm.batch_size_per_gpu = size
        assert answers(lm, prompts()) == alone, size


@pytest.mark.parametrize("architecture", ["mistral", "phi3", "qwen3"])
def test_other_architectures(architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batching, "_STEPS_AT_ONCE", 4)
    lm = load(write_tiny(tmp_path / "model", architecture=architecture), 1, selection="exact")
    texts, tokens = prompts(), 20
    free = answers(lm, texts, tokens)
    until = [free[0][7], free[3][10]]  # so that they leave the batch one after the other
    alone = answers(lm, texts, tokens, until=until)
    assert len({len(text) for text in alone}) > 1
    lm.batch_size_per_gpu = 7
    assert answers(lm, texts, tokens, until=until) == alone


@pytest.mark.parametrize(
    ("compensate", "compensated"), [("auto", "steps"), ("decode", "steps"), ("all", "everything")]
)
def test_what_a_batch_compensates(
    folder: Path, monkeypatch: pytest.MonkeyPatch, compensate: str, compensated: str
) -> None:
    lm = load(folder, 3, selection="exact", compensate=compensate)
    seen: list[int] = []
    compensate_rows = DecLinear._compensated

    def count(layer: DecLinear, tokens: torch.Tensor, *others: Any) -> torch.Tensor:
        seen.append(tokens.shape[0])
        return compensate_rows(layer, tokens, *others)

    monkeypatch.setattr(DecLinear, "_compensated", count)
    answers(lm, ["abcdefgh", "abc", "a"], tokens=4)
    layers = len(dec_layers(lm.model))
    prompt = [3 * 8] * layers if compensated == "everything" else []
    # the first new token is the prompt's; each of the others takes a step of one token per sequence
    assert seen == prompt + [3] * layers * 3


def test_each_sequence_chooses_its_own_channels(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = load(folder, 3, selection="exact")
    chosen: list[torch.Tensor] = []
    compensate_rows = DecLinear._compensated

    def record(layer: DecLinear, tokens: torch.Tensor, y: torch.Tensor, selection: Any) -> torch.Tensor:
        chosen.append(selection(tokens))
        return compensate_rows(layer, tokens, y, selection)

    monkeypatch.setattr(DecLinear, "_compensated", record)
    answers(lm, prompts()[:3], tokens=2)
    assert all(rows.shape[0] == 3 for rows in chosen)
    assert any(not torch.equal(rows[0], rows[1]) for rows in chosen)


def test_a_stop_ends_its_own_sequence(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = load(folder, 1, selection="dynamic")
    texts = prompts()
    free = answers(lm, texts, tokens=24)
    # each of two sequences meets another text: lm-eval's criteria would wait for both to meet the same one
    pair = [(texts[i], texts[j]) for i in range(7) for j in range(i) if free[i][4] not in free[j]]
    first, second = pair[0]
    one, other = (free[texts.index(text)] for text in (first, second))
    stops = [one[4], next(letter for letter in other[2:] if letter not in one)]
    steps: list[int] = []
    lm.model.register_forward_pre_hook(lambda *_: steps.append(1))
    lm.batch_size_per_gpu = 2
    got = answers(lm, [first, second], tokens=24, until=stops)
    wanted = [min((text.split(stop)[0] for stop in stops), key=len) for text in (one, other)]
    assert got == wanted
    assert len(steps) == max(map(len, wanted)) + 1 < 24


def rows_of_passes(lm: DecDECLM) -> list[int]:
    """Return a list to which every further pass of the model adds how many sequences it has."""
    rows: list[int] = []
    lm.model.base_model.register_forward_pre_hook(
        lambda _module, _args, given: rows.append(given["input_ids"].shape[0]), with_kwargs=True
    )
    return rows


def test_what_has_ended_leaves_the_batch(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batching, "_STEPS_AT_ONCE", 6)
    lm = load(folder, 1, selection="exact")
    texts, tokens = prompts(), 45
    free = answers(lm, texts, tokens)
    # an end token for one of them, a text for another, and both wherever else they turn up
    lm.model.generation_config.eos_token_id = [258, lm.tokenizer(free[3][9]).input_ids[0]]
    until = [free[0][20]]
    alone = answers(lm, texts, tokens, until=until)
    assert len({len(text) for text in alone}) > 2
    rows = rows_of_passes(lm)
    lm.batch_size_per_gpu = 7
    assert answers(lm, texts, tokens, until=until) == alone
    assert rows[0] == 7
    assert sorted(rows, reverse=True) == rows
    # a sequence of n tokens takes as many passes, its stop's included, and those up to the next look
    passes = [min(tokens, 6 * math.ceil((len(text) + (len(text) < tokens)) / 6)) for text in alone]
    assert sum(rows) == sum(passes)


@pytest.mark.parametrize("own", [3, 50])
def test_the_models_own_limit_does_not_count(folder: Path, own: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batching, "_STEPS_AT_ONCE", 4)
    lm = load(folder, 1, selection="none")
    lm.model.generation_config.max_new_tokens = own
    ids = torch.tensor([[40, 41, 42]])
    (new,) = batching.generate(
        lm.model, lm.tokenizer, ids, torch.ones_like(ids), 10, [], {"do_sample": False}
    )
    assert new.shape == (10,)


@pytest.mark.parametrize("name", ["num_beams", "num_return_sequences"])
@pytest.mark.parametrize("own", [False, True])
def test_several_sequences_for_a_prompt_are_refused(folder: Path, name: str, own: bool) -> None:
    lm = load(folder, 1)
    if own:
        setattr(lm.model.generation_config, name, 3)
    with pytest.raises(DecDECError, match=f"{name} must be 1 with --model decdec, got 3"):
        answers(lm, ["a"], **({} if own else {name: 3}))


@pytest.mark.parametrize("where", ["settings", "generation_config"])
def test_what_cannot_be_interrupted_is_not(folder: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    monkeypatch.setattr(batching, "_STEPS_AT_ONCE", 6)
    lm = load(folder, 7, selection="exact")
    texts, settings = prompts(), {"min_new_tokens": 2} if where == "settings" else {}
    free = answers(lm, texts, 20)
    if where == "generation_config":
        lm.model.generation_config.min_new_tokens = 2
    stop = free[0][8]
    rows = rows_of_passes(lm)
    assert answers(lm, texts, 20, until=[stop], **settings) == [text.partition(stop)[0] for text in free]
    assert rows == [7] * len(rows)
    assert any(stop not in text for text in free)


def test_stops_of_several_tokens() -> None:
    tokenizer = byte_tokenizer()
    stops = batching.StopTexts(tokenizer, ["\n\n", "", "Q:"], prompt_tokens=2)
    texts = ["Q:an answer", "..\n\nfurther on", "..no end \n", "..so.\n\n", "..what? Q:"]
    ids = [torch.tensor([tokenizer(text).input_ids]) for text in texts]
    # the prompt's own stop does not count, and one further back than may be new has been seen before
    assert [stops(row, None).item() for row in ids] == [False, False, False, True, True]


def test_the_end_of_one_sequence_is_not_that_of_another(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = load(folder, 1, selection="static")
    texts = prompts()
    free = answers(lm, texts, tokens=16)
    ending = lm.tokenizer(free[3][5]).input_ids[0]
    lm.model.generation_config.eos_token_id = [258, ending]
    alone = answers(lm, texts, tokens=16)
    assert len({len(text) for text in alone}) > 1
    lm.batch_size_per_gpu = 7
    assert answers(lm, texts, tokens=16) == alone


def test_one_prompts_bos_does_not_decide_for_another(folder: Path) -> None:
    lm = load(folder, 2, selection="none", add_bos_token=True)
    ids, mask = lm.tok_batch_encode(["<bos>ab", "abcd", "a"])
    a = ord("a") - 33
    assert ids.tolist() == [[256, 256, 257, a, a + 1], [257, a, a + 1, a + 2, a + 3], [256, 256, 256, 257, a]]
    assert mask.tolist() == [[0, 0, 1, 1, 1], [1] * 5, [0, 0, 0, 1, 1]]


def test_cut_prompts_are_counted(folder: Path) -> None:
    lm = load(folder, 2, selection="none", max_length=64)
    assert lm.get_model_info()["decdec"]["prompts_cut"] == 0
    kept = answers(lm, ["a" * 60 + "bcd", "e" * 54], tokens=10)
    assert lm.get_model_info()["decdec"]["prompts_cut"] == 1
    assert kept[0] == answers(lm, ["a" * 51 + "bcd"], tokens=10)[0]


def test_an_answer_that_leaves_no_room_is_refused(folder: Path) -> None:
    lm = load(folder, 1, selection="none", max_length=64)
    with pytest.raises(DecDECError, match="max_gen_toks must be less than the model's max_length 64, got 64"):
        answers(lm, ["a"], tokens=64)


def test_another_kind_of_model_is_refused(folder: Path) -> None:
    lm = load(folder, 1, selection="none")
    lm.backend = "seq2seq"
    with pytest.raises(DecDECError, match="generation must be of a causal model, got seq2seq"):
        answers(lm, ["a"])


def test_a_penalty_does_not_read_the_padding(folder: Path) -> None:
    lm = load(folder, 1, selection="none")
    # an end that is the padding, as many models have it, and likely: the padding would make it less so
    ending, weight = lm.tokenizer.pad_token_id, lm.model.get_output_embeddings().weight
    likely = lm.model(lm.tok_batch_encode(prompts()[1:2])[0]).logits[0, -1].argmax()
    lm.model.generation_config.eos_token_id = ending
    weight[ending] = weight[likely] * 1.01
    alone = answers(lm, prompts(), tokens=16, repetition_penalty=1.5)
    lm.batch_size_per_gpu = 7
    assert answers(lm, prompts(), tokens=16, repetition_penalty=1.5) == alone
    assert alone != answers(lm, prompts(), tokens=16)


def longrope() -> Any:
    """Return a random model whose rotation changes beyond 64 tokens."""
    model = tiny_model("phi3")
    config = model.config
    half = config.hidden_size // config.num_attention_heads // 2
    config.original_max_position_embeddings = 64
    config.rope_parameters = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 1.0,
        "original_max_position_embeddings": 64,
        "short_factor": [1.0] * half,
        "long_factor": [4.0 + i for i in range(half)],
    }
    rebuilt = type(model)(config)
    rebuilt.load_state_dict(model.state_dict())
    return rebuilt.eval()


def test_a_long_sequence_does_not_turn_a_short_ones_rotation(tmp_path: Path) -> None:
    longrope().save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    lm = DecDECLM(tmp_path, device="cpu", method="full", batch_size=1, dtype="float32")
    short, long = "abcdefgh", "the quick brown fox jumps over the lazy dog, and over it again and again"
    alone = answers(lm, [short, long], tokens=16)
    lm.batch_size_per_gpu = 2
    assert answers(lm, [short, long], tokens=16) == alone
    # and it would: in one batch the short one's answer is another
    encoded = lm.tok_batch_encode([short, long])
    whole = lm.model.generate(encoded[0], attention_mask=encoded[1], max_new_tokens=16, do_sample=False)
    assert lm.tok_decode(whole[0, encoded[0].shape[1] :].tolist()) != alone[0]


def test_what_a_change_of_rotation_reads_again_is_prompt(tmp_path: Path) -> None:
    longrope().save_pretrained(tmp_path / "plain")
    byte_tokenizer().save_pretrained(tmp_path / "plain")
    lm = load(build_chat(tmp_path / "plain", tmp_path / "artifact"), 1, selection="exact", k_chunk=256)
    passes: list[tuple[int, bool]] = []
    lm.model.base_model.register_forward_pre_hook(
        lambda _m, _a, given: passes.append((given["input_ids"].shape[1], lm.model.decdec.scope.active)),
        with_kwargs=True,
    )
    text = "the quick brown fox jumps over the lazy dog, and again"
    got = answers(lm, [text], tokens=16)
    assert passes.pop(0) == (len(text), False)
    # the 65th token is beyond the limit: everything is read again, as a prompt is, then steps go on
    again = 65 - len(text)
    assert passes[again - 1] == (65, False)
    assert passes[: again - 1] + passes[again:] == [(1, True)] * 14
    set_compensation(lm.model, replace(lm.compensation, compensate="decode"))
    assert answers(lm, [text], tokens=16) == got


@pytest.mark.parametrize(
    ("rotation", "tokens", "wanted"),
    [
        (None, 10**6, False),
        ({"rope_type": "llama3", "original_max_position_embeddings": 8}, 100, False),
        ({"rope_type": "longrope", "original_max_position_embeddings": 100}, 100, False),
        ({"rope_type": "longrope", "original_max_position_embeddings": 100}, 101, True),
        ({"rope_type": "dynamic"}, 4097, True),
        ({"full": {"rope_type": "default"}, "sliding": {"rope_type": "dynamic"}}, 4097, True),
    ],
)
def test_when_padding_changes_answers(
    rotation: dict[str, Any] | None, tokens: int, wanted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("llama")
    monkeypatch.setattr(type(model.config), "rope_parameters", rotation, raising=False)
    model.config.__dict__.pop("rope_parameters", None)
    assert batching.padding_changes_answers(model, {}, tokens - 10, 10) is wanted
    assert batching.padding_changes_answers(model, {"repetition_penalty": 1.1}, 1, 1)
    assert not batching.padding_changes_answers(model, {"repetition_penalty": 1.0}, 1, 1)


def test_a_batch_that_does_not_fit_is_generated_in_parts(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = load(folder, 1, selection="dynamic")
    alone = answers(lm, prompts())
    rows: list[int] = []
    generate = type(lm.model).generate

    def of_two_at_most(model: Any, *args: Any, input_ids: torch.Tensor, **others: Any) -> torch.Tensor:
        rows.append(input_ids.shape[0])
        if input_ids.shape[0] > 2:
            raise torch.OutOfMemoryError("no room")
        return generate(model, *args, input_ids=input_ids, **others)

    monkeypatch.setattr(type(lm.model), "generate", of_two_at_most)
    lm.batch_size_per_gpu = "auto"
    assert answers(lm, prompts()) == alone
    assert rows == [7, 4, 2, 2, 2, 1]
    assert answers(lm, prompts()[:4]) == alone[:4]
    assert rows[6:] == [2, 2]
    lm.batch_size_per_gpu = 7  # what was asked for is done or refused
    lm._fitting = None
    with pytest.raises(torch.OutOfMemoryError):
        answers(lm, prompts())


def test_rows_that_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    assert [batching.rows_that_fit(model, 100, 10, most) for most in (1, 5, 64)] == [1, 5, 8]
    row = batching.bytes_of_a_row(model, 100, 10)
    keys_and_values = 2 * 2 * 5 * 32 * 110 * 4  # two blocks, five heads of 32
    assert keys_and_values < row < batching.bytes_of_a_row(model, 200, 10)
    monkeypatch.setattr(type(model), "device", torch.device("cuda:0"))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 3 * row)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 2 * row)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (9 * row + 10, 100 * row))
    assert [batching.rows_that_fit(model, 100, 10, most) for most in (4, 64)] == [4, 8]
    assert batching.rows_that_fit(model, 10**6, 10, 64) == 1


def test_stops_are_criteria_of_transformers() -> None:
    criteria = StoppingCriteriaList([batching.StopTexts(byte_tokenizer(), ["b"], 1)])
    ids = torch.tensor([[65, 65, 65], [65, 65, 66]]) + (ord("b") - 33 - 66)
    assert criteria(ids, None).tolist() == [False, True]
