"""A loaded model and a task -> metrics and items, as a run file has them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from decdec_core.architectures import require_supported
from decdec_core.config import DecDECError
from decdec_core.sources import load_tokenizer, model_files
from decdec_core.texts import available_text, load_text
from decdec_eval.lm_model import DecDECLM
from decdec_eval.mtbench.adapter import Opened, chat_format_of, ledger_of
from decdec_eval.mtbench.answer import answer_with, read_answers
from decdec_eval.mtbench.data import Question, load_questions, mt_bench_folder
from decdec_eval.mtbench.fidelity import Turn, answer_states, turns_of
from decdec_eval.mtbench.judge import judge
from decdec_eval.mtbench.scores import Judgment
from decdec_eval.perplexity import states_nll, summary, window_states, windows
from decdec_eval.reference import Reference, mean_with_error, write_reference
from decdec_eval.sweep.tasks import Fidelity, MtBench, Perplexity

ANSWERS_ID = "full"  # of the full model's own answers, whose file is named by it
_MODEL_ID = "model"  # of a cell's answers: the file's folder says whose they are


@dataclass(frozen=True)
class Measured:
    """What a run file has under these names."""

    metrics: dict[str, Any]
    items: dict[str, Any]


def token_windows(task: Perplexity, source: Path) -> list[list[int]]:
    """Return the token ids of the windows that are scored, by the tokenizer in the folder `source`."""
    text = load_text(available_text("test") if task.text == "auto" else task.text, "test")
    token_ids = load_tokenizer(str(source))(text.text, verbose=False).input_ids
    return windows(token_ids, task.window_length)[: task.windows]


def keep_windows(lm: DecDECLM, scored: Sequence[Sequence[int]], path: Path) -> None:
    """Write the reference of the full-precision model on these windows."""
    _require_head_alone(lm)
    bar = tqdm(scored, desc="full precision", unit="window", leave=False)
    write_reference(path, lm.model.get_output_embeddings(), (window_states(lm.model, ids) for ids in bar))


def perplexity(
    lm: DecDECLM, scored: Sequence[Sequence[int]], reference: Reference, is_reference: bool
) -> Measured:
    """Return token perplexity, KL(full || model) in nats a token and the share of equal top tokens, of one
    pass over the windows. is_reference: the model is the full one, whose states are not computed again."""
    longest = max(map(len, scored))
    if lm.max_length < longest:
        raise DecDECError(f"window_length must be at most {lm.max_length} for this model, got {longest}")
    _require_head_alone(lm)
    head = reference.head if is_reference else lm.model.get_output_embeddings()
    device = head.weight.device
    values: dict[str, list[float]] = {"nll": [], "kl": [], "top1": []}
    for index, ids in enumerate(tqdm(scored, desc="windows", unit="window", leave=False)):
        states = reference.states(index).to(device) if is_reference else window_states(lm.model, ids)
        kl, same = (0.0, len(states)) if is_reference else reference.compare(index, states, head)
        values["nll"].append(states_nll(head, states, ids))
        values["kl"].append(kl / len(states))
        values["top1"].append(same / len(states))
    metrics = summary(values["nll"])
    metrics |= _means(values, ("kl", "top1"), [1] * len(scored))
    items = {"unit": "window", "ids": list(range(len(scored))), "weights": None, "values": values}
    return Measured(metrics, items)


def _require_head_alone(lm: DecDECLM) -> None:
    """Raise DecDECError for an architecture whose logits may be more than the head's of the last states."""
    require_supported(lm.model.config)


def _means(values: dict[str, list[float]], names: Iterable[str], weights: Sequence[int]) -> dict[str, Any]:
    metrics: dict[str, Any] = {}
    for name in names:
        sums = [value * weight for value, weight in zip(values[name], weights, strict=True)]
        metrics[name], metrics[f"{name}_stderr"] = mean_with_error(sums, weights)
    return metrics


def questions_of(task: Fidelity | MtBench) -> list[Question]:
    """Return all of MT-Bench's questions; a limit beyond them raises DecDECError."""
    questions = load_questions(mt_bench_folder(None))
    if (task.limit or 0) > len(questions):
        raise DecDECError(f"limit must be at most the {len(questions)} questions, got {task.limit}")
    return questions


def opened(lm: DecDECLM, source: Path, dtype: str, device: str) -> Opened:
    """Return the model as those modules take it that let it talk. source: its folder."""
    ledger = {**ledger_of(lm), "dtype": dtype, "device": device}
    return Opened(lm.model, lm.tokenizer, chat_format_of(f"pretrained={source}"), ledger)


def full_answers(speaker: Opened, task: Fidelity, out: Path) -> None:
    """Write the full model's own answers to `out`; what is there already is kept. Fuses its layers."""
    answer_with(speaker, out, questions_of(task), ANSWERS_ID, task.limit, task.max_new_tokens, task.seed)


def answered(task: Fidelity, out: Path) -> bool:
    """Return whether full_answers has written all answers to `out`."""
    path = _answer_file(out)
    wanted = {question.question_id for question in questions_of(task)[: task.limit]}
    return path.is_file() and wanted <= {row["question_id"] for row in read_answers(path)[0]}


def _answer_file(out: Path) -> Path:
    return out / "model_answer" / f"{ANSWERS_ID}.jsonl"


def digest_of(turns: Sequence[Turn]) -> str:
    """Return what tells these turns from others."""
    return hashlib.sha256(json.dumps([asdict(turn) for turn in turns]).encode()).hexdigest()[:16]


def turns(task: Fidelity, source: Path, out: Path) -> list[Turn]:
    """Return the turns of full_answers' file in `out`. source: the full model's folder."""
    chat = chat_format_of(f"pretrained={source}")
    return turns_of(_answer_file(out), questions_of(task), chat, model_files(source))


def keep_turns(lm: DecDECLM, read: Sequence[Turn], path: Path) -> None:
    """Write the reference of the full-precision model on its own answers."""
    _require_head_alone(lm)
    bar = tqdm(read, desc="full precision", unit="turn", leave=False)
    write_reference(path, lm.model.get_output_embeddings(), (answer_states(lm.model, turn) for turn in bar))


def fidelity(lm: DecDECLM, read: Sequence[Turn], reference: Reference, is_reference: bool) -> Measured:
    """Return KL(full || model) in nats a token of the answers, and the share of equal top tokens. Items are
    conversations, weighted by their tokens."""
    head = lm.model.get_output_embeddings()
    rows: dict[int, list[float]] = {}
    for index, turn in enumerate(tqdm(read, desc="turns", unit="turn", leave=False)):
        kl, same = 0.0, len(turn.answer)
        if not is_reference:
            kl, same = reference.compare(index, answer_states(lm.model, turn), head)
        row = rows.setdefault(turn.question_id, [0, 0.0, 0])
        for place, value in enumerate((len(turn.answer), kl, same)):
            row[place] += value
    weights = [int(tokens) for tokens, _, _ in rows.values()]
    values = {
        name: [row[place] / row[0] for row in rows.values()] for place, name in ((1, "kl"), (2, "top1"))
    }
    metrics = {**_means(values, values, weights), "conversations": len(rows), "tokens": sum(weights)}
    items = {"unit": "conversation", "ids": list(rows), "weights": weights, "values": values}
    return Measured(metrics, items)


def mt_bench(speaker: Opened, task: MtBench, out: Path) -> Measured:
    """Return the judge's mean score of the model's answers. Answers and judgments go to `out`, where those
    that are there are kept. Fuses the model's layers."""
    questions = questions_of(task)
    answer_with(speaker, out, questions, _MODEL_ID, task.limit, task.max_new_tokens, task.seed)
    file = judge(out, mt_bench_folder(None), task.judge, task.base_url, limit=task.limit)
    judged = [Judgment.from_row(record) for record in file.records]
    return scores_of(judged, [question.question_id for question in questions[: task.limit]])


def scores_of(judged: Sequence[Judgment], question_ids: Sequence[int]) -> Measured:
    """Return the mean over rated answers. Items are conversations with rated answers, weighted by these."""
    rated = {
        number: [j.score for j in judged if j.question_id == number and j.rated] for number in question_ids
    }
    rated = {number: scores for number, scores in rated.items() if scores}
    if not rated:
        raise DecDECError("judgments must have a rating in at least one of them, got none")
    weights = [len(scores) for scores in rated.values()]
    values = {"score": [sum(scores) / len(scores) for scores in rated.values()]}
    metrics = _means(values, values, weights)
    metrics["unrated"] = sum(not one.rated for one in judged)
    items = {"unit": "conversation", "ids": list(rated), "weights": weights, "values": values}
    return Measured(metrics, items)
