"""Fidelity: the full model's own answers under each configuration, token by token."""

from __future__ import annotations

import json
import math
import shutil
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from mtbench_models import save_chat, single_threaded
from torch import nn
from transformers import DynamicCache

from decdec_core.commandline import OneLineParser, run_command
from decdec_core.config import DecDECError
from decdec_core.model import state_of
from decdec_eval import reference
from decdec_eval.mtbench import fidelity as module
from decdec_eval.mtbench.adapter import open_model
from decdec_eval.mtbench.answer import answer
from decdec_eval.mtbench.data import Question
from decdec_eval.mtbench.fidelity import (
    Turn,
    add_fidelity,
    answer_states,
    compare,
    fidelity,
    mean_with_error,
    table,
    turns_of,
)

TOKENS = 8
one_thread = pytest.fixture(single_threaded, autouse=True, scope="module")


@pytest.fixture(scope="module")
def full_args(chat_model_dir: Path) -> str:
    return f"pretrained={chat_model_dir},method=full"


@pytest.fixture(scope="module")
def answers(full_args: str, chat_questions: list[Question], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("answers")
    answer(full_args, out, chat_questions, "full", max_new_tokens=TOKENS)
    return out


def one_by_one(model: Any, turn: Turn) -> torch.Tensor:
    """Return the logits (answer tokens, vocabulary) of decoding: the prompt, then a token at a time."""
    cache = DynamicCache(config=model.config)
    parts = [turn.prompt, *([token] for token in turn.answer[:-1])]
    with torch.no_grad():
        rows = [model(torch.tensor([ids]), past_key_values=cache).logits[0, -1] for ids in parts]
    return torch.stack(rows)


@pytest.mark.parametrize("compensate", ["auto", "all"])
@pytest.mark.parametrize("selection", ["none", "static", "random", "dynamic", "exact"])
def test_states_are_those_of_decoding(
    selection: str, compensate: str, chat_artifact: Path, chat_questions: list[Question]
) -> None:
    opened = open_model(
        f"pretrained={chat_artifact},selection={selection},k_chunk=128,compensate={compensate}", "cpu"
    )
    turn = Turn(1, opened.chat.prompt([chat_questions[0].turns[0]]), list(b"A few words."))
    before = state_of(opened.model).compensation
    with torch.no_grad():
        got = opened.model.get_output_embeddings()(answer_states(opened.model, turn))
    # float32 sums in another order, through two blocks
    torch.testing.assert_close(got, one_by_one(opened.model, turn), rtol=1e-4, atol=1e-4)
    assert state_of(opened.model).compensation == before


def test_prompts_are_compensated_with_all_only(chat_artifact: Path, chat_questions: list[Question]) -> None:
    texts = [
        f"pretrained={chat_artifact},selection={more}" for more in ("none", "exact", "exact,compensate=all")
    ]
    opened = [open_model(text, "cpu") for text in texts]
    turn = Turn(1, opened[0].chat.prompt([chat_questions[0].turns[0]]), list(b"abc"))
    none, decode, everything = (answer_states(each.model, turn) for each in opened)
    torch.testing.assert_close(decode[0], none[0])  # predicted from the prompt
    assert not torch.allclose(decode[1:], none[1:])
    assert not torch.allclose(everything[0], none[0])


def test_an_answer_of_one_token_is_predicted_from_the_prompt(chat_artifact: Path) -> None:
    opened = open_model(f"pretrained={chat_artifact}", "cpu")
    longer = answer_states(opened.model, Turn(1, [5, 6], [7, 8]))
    torch.testing.assert_close(answer_states(opened.model, Turn(1, [5, 6], [7])), longer[:1])


def test_compare_is_the_divergence(draw: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    heads = [nn.Linear(8, 50, bias=False) for _ in range(2)]
    for head in heads:
        head.weight.data = torch.randn(50, 8, generator=draw)
    states = torch.randn(11, 8, generator=draw)
    p, q = (head(states).double().softmax(-1) for head in heads)
    wanted = (p * (p / q).log()).sum().item()
    for rows in (256, 4, 1):  # whole, ragged, single
        monkeypatch.setattr(reference, "_ROWS_AT_ONCE", rows)
        kl, top1 = compare(states, heads[0], states, heads[1])
        assert kl == pytest.approx(wanted, rel=1e-5)
        assert top1 == int((p.argmax(-1) == q.argmax(-1)).sum())
    assert compare(states, heads[0], states, heads[0]) == (0.0, 11)


def test_error_is_over_conversations() -> None:
    # of equal lengths: the textbook's error of the mean of the conversations' means
    mean, error = mean_with_error([2.0, 4.0, 9.0], [10, 10, 10])
    assert mean == pytest.approx(0.5)
    assert error == pytest.approx(statistics.stdev([0.2, 0.4, 0.9]) / math.sqrt(3))
    # conversations that agree on the mean have none, whatever their lengths
    assert mean_with_error([1.0, 3.0], [10, 30]) == pytest.approx((0.1, 0.0))
    assert mean_with_error([1.0], [10]) == (0.1, None)


def test_nearer_configurations_diverge_less(
    answers: Path, full_args: str, chat_artifact: Path, chat_questions: list[Question], tmp_path: Path
) -> None:
    out = tmp_path / "fidelity.json"
    configurations = [
        f"pretrained={chat_artifact},selection=none",
        f"pretrained={chat_artifact},selection=exact,k_chunk=1024,compensate=all",
        full_args,
    ]
    result = fidelity(answers, "full", full_args, configurations, out, chat_questions)
    assert json.loads(out.read_text()) == json.loads(json.dumps(result))
    none, everything, full = (run["metrics"] for run in result["runs"])
    tokens = sum(len(turn) for row in rows_of(answers) for turn in row["decdec"]["tokens"])
    assert none["tokens"] == tokens
    assert none["conversations"] == len(chat_questions)
    assert none["kl"] > 3 * everything["kl"] > 0
    assert none["kl_stderr"] > 0
    assert (full["kl"], full["top1"], full["kl_stderr"]) == (0.0, 1.0, 0.0)
    assert none["top1"] <= everything["top1"] <= 1
    stated = result["runs"][0]
    assert stated["configuration"]["artifact_hash"]
    assert stated["environment"]["versions"]["torch"]
    lines = table(result).splitlines()
    assert len(lines) == 7
    assert lines[2].startswith(f"| {configurations[0]} | {none['kl']:.4f} ± {none['kl_stderr']:.4f} | ")
    assert f"| {none['kl']:.4f} ± " in lines[4]  # less by all of it
    assert lines[-1].startswith(f"{len(chat_questions)} conversations, {tokens} tokens of full")


def test_resumes_by_configuration(
    answers: Path,
    full_args: str,
    chat_artifact: Path,
    chat_questions: list[Question],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    configurations = [f"pretrained={chat_artifact},selection={name}" for name in ("none", "static", "random")]
    undisturbed = fidelity(answers, "full", full_args, configurations, tmp_path / "a.json", chat_questions)
    measured: list[str] = []
    measure = module.Full.measure

    def dying(self: Any, opened: Any, label: str) -> Any:
        if len(measured) == 1:
            raise KeyboardInterrupt
        measured.append(label)
        return measure(self, opened, label)

    out = tmp_path / "b.json"
    monkeypatch.setattr(module.Full, "measure", dying)
    with pytest.raises(KeyboardInterrupt):
        fidelity(answers, "full", full_args, configurations, out, chat_questions)
    assert len(json.loads(out.read_text())["runs"]) == 1
    monkeypatch.setattr(
        module.Full,
        "measure",
        lambda self, opened, label: measured.append(label) or measure(self, opened, label),
    )
    resumed = fidelity(answers, "full", full_args, configurations, out, chat_questions)
    assert measured == configurations  # each once, in both runs together
    assert resumed == json.loads(json.dumps(undisturbed))
    fidelity(answers, "full", full_args, [*configurations, configurations[0]], out, chat_questions)
    assert measured == configurations


def rows_of(answers: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (answers / "model_answer" / "full.jsonl").read_text().splitlines()]


def test_turns_are_the_answers_with_their_prompts(
    answers: Path, full_args: str, chat_questions: list[Question]
) -> None:
    opened = open_model(full_args, "cpu")
    chat = opened.chat
    turns = turns_of(answers / "model_answer" / "full.jsonl", chat_questions, chat, opened.ledger["model"])
    assert [turn.question_id for turn in turns] == [q.question_id for q in chat_questions for _ in range(2)]
    first = rows_of(answers)[0]
    said = first["choices"][0]["turns"]
    assert [turn.answer for turn in turns[:2]] == first["decdec"]["tokens"]
    assert turns[1].prompt == chat.prompt([chat_questions[0].turns[0], said[0], chat_questions[0].turns[1]])


def of_another_method(row: dict[str, Any]) -> None:
    row["decdec"]["configuration"]["ledger"]["method"] = "awq"


def without_ours(row: dict[str, Any]) -> None:
    del row["decdec"]


def of_other_questions(row: dict[str, Any]) -> None:
    row["decdec"]["configuration"]["questions_sha256"] = "0"


def of_another_template(row: dict[str, Any]) -> None:
    row["decdec"]["configuration"]["chat"]["example_sha256"] = "0"


def of_other_weights(row: dict[str, Any]) -> None:
    weights = row["decdec"]["configuration"]["ledger"]["model"]["weights"]
    assert all(len(digest) == 64 for digest in weights.values())
    weights["model.safetensors"] = "0" * 64


def with_a_longer_answer(row: dict[str, Any]) -> None:
    row["choices"][0]["turns"][0] += " more"


def test_ends_do_not_matter_to_prompts(
    answers: Path, full_args: str, chat_questions: list[Question], tmp_path: Path
) -> None:
    rows = rows_of(answers)
    for row in rows:
        row["decdec"]["configuration"]["chat"]["stop"] = [1]
    path = tmp_path / "full.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    opened = open_model(full_args, "cpu")
    found = turns_of(path, chat_questions, opened.chat, opened.ledger["model"])
    assert len(found) == 2 * len(chat_questions)


def test_a_misspelt_configuration_is_refused_before_the_full_models_pass(
    answers: Path,
    full_args: str,
    chat_questions: list[Question],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "answer_states", lambda *_: pytest.fail("a pass was taken"))
    with pytest.raises(DecDECError, match="model_args must be pretrained=MODEL"):
        fidelity(answers, "full", full_args, ["pretraind=x"], tmp_path / "f.json", chat_questions)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (of_another_method, "must be answers of method=full"),
        (without_ours, "must be answers of method=full"),
        (of_other_questions, "must be answers to the questions of --data-dir, got those of others"),
        (of_another_template, "must be of the chat template of --full-args, got another"),
        (of_other_weights, "must be answers of the weights of --full-args, got those of others"),
        (with_a_longer_answer, "prompt of question 81, turn 2, must be .* tokens, got"),
    ],
)
def test_refused_answers(
    change: Callable[[dict[str, Any]], None],
    message: str,
    answers: Path,
    full_args: str,
    chat_questions: list[Question],
    tmp_path: Path,
) -> None:
    rows = rows_of(answers)
    change(rows[0])
    path = tmp_path / "full.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    opened = open_model(full_args, "cpu")
    with pytest.raises(DecDECError, match=message) as refused:
        turns_of(path, chat_questions, opened.chat, opened.ledger["model"])
    assert "\n" not in str(refused.value)


def test_no_answers_and_no_file_are_refused(
    full_args: str, chat_questions: list[Question], tmp_path: Path
) -> None:
    out = tmp_path / "f.json"
    with pytest.raises(DecDECError, match="reference must be the name of an answer file, got full: no "):
        fidelity(tmp_path, "full", full_args, [full_args], out, chat_questions)
    path = tmp_path / "model_answer" / "full.jsonl"
    path.parent.mkdir()
    path.write_text("")
    with pytest.raises(DecDECError, match="must hold answers, got none"):
        fidelity(tmp_path, "full", full_args, [full_args], out, chat_questions)
    assert not out.exists()


def test_full_args_of_an_artifact_are_refused(
    answers: Path, chat_artifact: Path, chat_questions: list[Question], tmp_path: Path
) -> None:
    args = f"pretrained={chat_artifact}"
    with pytest.raises(DecDECError, match="full-args must be with method=full, got dynamic selection"):
        fidelity(answers, "full", args, [args], tmp_path / "f.json", chat_questions)


@pytest.mark.parametrize("text", ["{", "[]", '{"task": {"name": "other"}, "runs": []}'])
def test_another_tasks_file_is_refused(
    text: str, answers: Path, full_args: str, chat_questions: list[Question], tmp_path: Path
) -> None:
    out = tmp_path / "f.json"
    out.write_text(text)
    with pytest.raises(DecDECError, match="out must be a new file or one of this task"):
        fidelity(answers, "full", full_args, [full_args], out, chat_questions)
    assert out.read_text() == text


def test_a_model_with_other_tokens_is_refused(
    answers: Path, full_args: str, chat_model_dir: Path, chat_questions: list[Question], tmp_path: Path
) -> None:
    other = shutil.copytree(chat_model_dir, tmp_path / "other")
    save_chat(other, template="{% for m in messages %}{{ m['content'] }}<eos>{% endfor %}")
    args = f"pretrained={other},method=full"
    with pytest.raises(DecDECError, match="must have the full model's tokens and chat template, got others"):
        fidelity(answers, "full", full_args, [args], tmp_path / "f.json", chat_questions)


def test_the_command_line(
    answers: Path,
    full_args: str,
    chat_artifact: Path,
    chat_data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    parser = OneLineParser()
    add_fidelity(parser)
    words = ["--answers", str(answers), "--reference", "full", "--full-args", full_args, "--device", "cpu"]
    words += [
        "--model-args",
        f"pretrained={chat_artifact}",
        "--model-args",
        f"pretrained={chat_artifact},selection=none",
    ]
    words += ["--out", str(tmp_path / "f.json"), "--data-dir", str(chat_data)]
    options = parser.parse_args(words)
    assert run_command(lambda: options.run(options)) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("| configuration | mean KL")
    assert captured.out.count(f"| pretrained={chat_artifact}") == 2
    assert "full precision: 100%" in captured.err
    with pytest.raises(SystemExit):
        parser.parse_args([*words, "--out", str(tmp_path / "no" / "f.json")])
