"""How near each configuration stays to the full-precision model, token by token and without a judge.

The full model's own answers to MT-Bench are read again by every configuration (teacher forcing), and what it
predicts at each token of an answer is compared with what the full model does: mean KL(full || configuration),
and how often both have the same most likely token.

As decoding computes it: a turn's prompt is one pass, compensated only with compensate=all, and all tokens of
the answer are a second one after it, each compensated with channels of its own. What is kept of the full
model are its last hidden states; logits are made of them a few tokens at a time.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import DynamicCache

from decdec_core.architectures import require_supported
from decdec_core.commandline import json_file
from decdec_core.config import DecDECError
from decdec_core.files import write_json
from decdec_core.model import set_compensation, state_of
from decdec_core.provenance import environment
from decdec_eval.lm_model import FULL
from decdec_eval.mtbench.adapter import Opened, chat_format_of, open_model
from decdec_eval.mtbench.answer import add_model, questions_sha256, read_answers
from decdec_eval.mtbench.conversation import ChatFormat
from decdec_eval.mtbench.data import Question, load_questions, mt_bench_folder
from decdec_eval.reference import compare, mean_with_error

COMPARED = ("kl", "top1")


@dataclass(frozen=True)
class Turn:
    """A prompt and the full model's answer to it, as token ids; the last of the answer may end it."""

    question_id: int
    prompt: list[int]
    answer: list[int]


def turns_of(
    path: Path, questions: Sequence[Question], chat: ChatFormat, model: dict[str, Any]
) -> list[Turn]:
    """Return the turns of an answer file of this package, their prompts as they were when they were answered.

    model: the files of the full-precision model (sources.model_files). Raises DecDECError for answers that
    are not of its weights, that hold no tokens, that are of other questions, and whose prompts `chat` makes
    otherwise.
    """
    rows, _ = read_answers(path)
    by_id = {question.question_id: question for question in questions}
    turns = []
    for row in rows:
        kept, question_id = row.get("decdec", {}), row["question_id"]
        if kept.get("configuration", {}).get("ledger", {}).get("method") != FULL:
            raise DecDECError(f"{path} must be answers of method=full, as `answer` writes them, got others")
        if kept["configuration"]["questions_sha256"] != questions_sha256(questions):
            raise DecDECError(f"{path} must be answers to the questions of --data-dir, got those of others")
        wrote = kept["configuration"]["ledger"].get("model", {})
        if wrote.get("weights", wrote) != model.get("weights", model):
            raise DecDECError(f"{path} must be answers of the weights of --full-args, got those of others")
        if not _same_prompts(kept["configuration"]["chat"], chat.describe()):
            raise DecDECError(f"{path} must be of the chat template of --full-args, got another")
        said, asked = row["choices"][0]["turns"], by_id[question_id].turns
        for turn, messages in enumerate(([asked[0]], [asked[0], said[0], asked[1]])):
            prompt = chat.prompt(messages)[kept["cut_tokens"][turn] :]
            if len(prompt) != kept["prompt_tokens"][turn]:
                raise DecDECError(
                    f"{path}: prompt of question {question_id}, turn {turn + 1}, must be "
                    f"{kept['prompt_tokens'][turn]} tokens, got {len(prompt)}"
                )
            turns.append(Turn(question_id, prompt, kept["tokens"][turn]))
    if not turns:
        raise DecDECError(f"{path} must hold answers, got none")
    return turns


def _same_prompts(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Return whether two chat formats make the same prompts. Where answers end does not matter to their
    tokens, and versions of transformers differ in what they call an end."""
    return all(one.get(name) == other.get(name) for name in ("name", "example_sha256"))


@torch.inference_mode()
def answer_states(model: Any, turn: Turn) -> Tensor:
    """Return the last hidden states (answer tokens, hidden) from which the answer's tokens are predicted."""
    device = model.get_input_embeddings().weight.device
    prompt, answer = (torch.tensor([ids], device=device) for ids in (turn.prompt, turn.answer[:-1]))
    cache = DynamicCache(config=model.config)
    read = model.base_model(prompt, past_key_values=cache, use_cache=True).last_hidden_state[0, -1:]
    if not answer.shape[1]:
        return read
    with _all_compensated(model):
        rest = model.base_model(answer, past_key_values=cache, use_cache=True).last_hidden_state[0]
    return torch.cat([read, rest])


@contextmanager
def _all_compensated(model: Any) -> Iterator[None]:
    """Within the block every token of a pass counts as a decoding step: what follows a prompt is that."""
    if not hasattr(model, "decdec"):
        yield
        return
    compensation = state_of(model).compensation
    set_compensation(model, replace(compensation, compensate="all"))
    try:
        yield
    finally:
        set_compensation(model, compensation)


def summary(conversations: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the metrics of rows {"question_id", "tokens", "kl", "top1"}, whose kl and top1 are sums."""
    counts = [row["tokens"] for row in conversations]
    metrics: dict[str, Any] = {"conversations": len(counts), "tokens": sum(counts)}
    for name in COMPARED:
        metrics[name], metrics[f"{name}_stderr"] = mean_with_error(
            [row[name] for row in conversations], counts
        )
    return metrics


class Full:
    """What is kept of the full-precision model: its head and, in host memory, the hidden states of all turns.

    The model itself is let go once it has read them.
    """

    def __init__(self, opened: Opened, path: Path, questions: Sequence[Question]) -> None:
        if opened.ledger.get("method") != FULL:
            raise DecDECError(
                f"full-args must be with method=full, got {opened.ledger['selection']} selection"
            )
        require_supported(opened.model.config)  # of which logits are the head's of the last hidden state
        self.chat, self.ledger = opened.chat, opened.ledger
        self.turns = turns_of(path, questions, opened.chat, opened.ledger["model"])
        self.head = opened.model.get_output_embeddings()
        self._model: Any = opened.model
        self._states: list[Tensor] = []

    def states(self) -> list[Tensor]:
        """Return the hidden states of each turn; the first call takes a pass over all of them."""
        if self._model is not None:
            bar = tqdm(self.turns, desc="full precision", unit="turn")
            self._states = [answer_states(self._model, turn).cpu() for turn in bar]
            self._model = None
        return self._states

    def measure(self, opened: Opened, label: str) -> list[dict[str, Any]]:
        """Return a row for each conversation; another vocabulary or template raises DecDECError."""
        head, chat, states = opened.model.get_output_embeddings(), opened.chat.describe(), self.states()
        if not _same_prompts(chat, self.chat.describe()) or head.weight.shape[0] != self.head.weight.shape[0]:
            raise DecDECError(f"{label} must have the full model's tokens and chat template, got others")
        rows: dict[int, dict[str, Any]] = {}
        bar = tqdm(zip(self.turns, states, strict=True), total=len(states), desc=label, unit="turn")
        for turn, full in bar:
            kl, top1 = compare(full, self.head, answer_states(opened.model, turn), head)
            empty = {"question_id": turn.question_id, "tokens": 0, "kl": 0.0, "top1": 0}
            row = rows.setdefault(turn.question_id, empty)
            row["tokens"] += len(turn.answer)
            row["kl"] += kl
            row["top1"] += top1
        return list(rows.values())


def fidelity(
    answers: Path,
    reference: str,
    full_args: str,
    model_args: Sequence[str],
    out: Path,
    questions: Sequence[Question],
    device: str = "cpu",
) -> dict[str, Any]:
    """Return the result of every configuration in `model_args`, written to `out` as each is done.

    answers: the folder of `answer`; reference: the model-id of the full-precision model's. A configuration
    that `out` holds already is not measured again; another task's file raises DecDECError.
    """
    path = answers / "model_answer" / f"{reference}.jsonl"
    if not path.is_file():
        raise DecDECError(f"reference must be the name of an answer file, got {reference}: no {path}")
    for args in model_args:
        chat_format_of(args)  # what is no model is refused before the long pass
    full = Full(open_model(full_args, device), path, questions)
    turns = json.dumps([asdict(turn) for turn in full.turns])
    task = {
        "name": "mt_bench fidelity",
        "reference": reference,
        "turns_sha256": hashlib.sha256(turns.encode()).hexdigest(),
        "full": full.ledger,
    }
    result = _begun(out, task)
    full.states()  # before another model is in memory
    for args in model_args:
        run = _run(full, args, device, [run["configuration"] for run in result["runs"]])
        if run is not None:
            result["runs"].append(run)
            write_json(out, result)
    return result


def _run(full: Full, args: str, device: str, known: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Return one configuration's run, None where it is among the `known`. Its model is let go."""
    opened = open_model(args, device)
    if opened.ledger in known:
        return None
    rows = full.measure(opened, args)
    return {
        "model_args": args,
        "configuration": opened.ledger,
        "metrics": summary(rows),
        "conversations": rows,
        "environment": environment(opened.model.device, "fschat", "lm_eval"),
    }


def _begun(out: Path, task: dict[str, Any]) -> dict[str, Any]:
    """Return what `out` holds of this task; another task's file raises DecDECError."""
    task = json.loads(json.dumps(task))
    if not out.is_file():
        return {"task": task, "measured": True, "runs": []}
    try:
        found = json.loads(out.read_text("utf-8"))
        same = found["task"] == task and isinstance(found["runs"], list)
    except (ValueError, LookupError, TypeError):
        same = False
    if not same:
        raise DecDECError(f"out must be a new file or one of this task (answers, full model), got {out}")
    return found


def table(result: dict[str, Any]) -> str:
    """Return the Markdown table of a result, a row for a configuration; its last column is paired: the same
    conversations, their differences first and the error after."""
    lines = [
        "| configuration | mean KL, nats per token | same top token, % | KL less than the first's |",
        "| --- | --- | --- | --- |",
    ]
    first = result["runs"][0]["conversations"]
    for number, run in enumerate(result["runs"]):
        metrics, rows = run["metrics"], run["conversations"]
        less = [one["kl"] - other["kl"] for one, other in zip(first, rows, strict=True)]
        difference = mean_with_error(less, [row["tokens"] for row in rows])
        cells = [
            run["model_args"],
            _with_error(metrics["kl"], metrics["kl_stderr"], 4),
            _with_error(100 * metrics["top1"], metrics["top1_stderr"] and 100 * metrics["top1_stderr"], 2),
            _with_error(*difference, 4) if number else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    metrics = result["runs"][0]["metrics"]
    turns = f"{metrics['conversations']} conversations, {metrics['tokens']} tokens"
    return "\n".join(
        [*lines, "", f"{turns} of {result['task']['reference']}; ± one standard error over them"]
    )


def _with_error(value: float, error: float | None, digits: int) -> str:
    return f"{value:.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")


def add_fidelity(parser: argparse.ArgumentParser) -> None:
    """Add the options of `fidelity`."""
    add_model(parser)
    parser.add_argument("--answers", type=Path, required=True, metavar="DIR", help="the folder of `answer`")
    parser.add_argument("--reference", required=True, metavar="MODEL", help="whose answers: of method=full")
    parser.add_argument("--full-args", required=True, metavar="ARGS", help="pretrained=...,method=full")
    parser.add_argument(
        "--model-args",
        required=True,
        action="append",
        metavar="ARGS",
        help="may be repeated",
    )
    parser.add_argument("--out", type=json_file, required=True, metavar="FILE", help="the result, as JSON")
    parser.set_defaults(run=_fidelity, parser=parser)


def _fidelity(options: argparse.Namespace) -> None:
    names = ("answers", "reference", "full_args", "model_args", "out", "device")
    questions = load_questions(mt_bench_folder(options.data_dir))
    print(table(fidelity(questions=questions, **{name: getattr(options, name) for name in names})))
