"""judge: a language model rates the answers in DIR, each by itself or against a baseline's.

Judgments are FastChat's JSON Lines in DIR/model_judgment, written as they come. What is there already is not
asked again; a judgment without a rating, or with one outside 1 to 10, is kept as it is, with the score -1.
"""

from __future__ import annotations

import argparse
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

from decdec_core.config import DecDECError, require_int
from decdec_eval.mtbench.data import (
    JudgePrompt,
    Question,
    data_sha256,
    load_answers,
    load_prompts,
    load_questions,
    load_references,
    mt_bench_folder,
)
from decdec_eval.mtbench.judgments import MODES, JudgmentFile, Key, judgment_path
from decdec_eval.mtbench.prompts import filled, needs_reference, prompt_of, rating_of, verdict_of

if TYPE_CHECKING:
    from decdec_eval.mtbench.client import JudgeClient

Answers = Mapping[str, Mapping[int, tuple[str, str]]]  # by model and question_id

# so many judgments in a row not had: the judge is down, and not troubled by some of the questions
_WORST_ROW = 8


@dataclass(frozen=True)
class Match:
    """What is to be judged: one model's answer, or two models' in both orders. users: the judge's prompts."""

    question_id: int
    turn: int
    models: tuple[str, ...]
    prompt: JudgePrompt
    users: tuple[str, ...]

    @property
    def key(self) -> Key:
        """As JudgmentFile's."""
        return (self.question_id, *self.models, self.turn)

    def label(self) -> str:
        return f"question {self.question_id}, turn {self.turn}, {' and '.join(self.models)}"

    def record(self, judge_model: str, judgments: Sequence[str]) -> dict[str, Any]:
        """Return the line that FastChat writes. judgments: one for each of users; `unrated` is ours."""
        judge = [judge_model, self.prompt.name]
        end = {"turn": self.turn, "tstamp": time.time()}
        if len(self.models) == 1:
            rating = rating_of(judgments[0])
            return {
                "question_id": self.question_id,
                "model": self.models[0],
                "judge": judge,
                "user_prompt": self.users[0],
                "judgment": judgments[0],
                "score": rating.score,
                "unrated": rating.unrated,
                **end,
            }
        first, second = map(verdict_of, judgments)
        return {
            "question_id": self.question_id,
            "model_1": self.models[0],
            "model_2": self.models[1],
            "g1_winner": {"A": "model_1", "B": "model_2"}.get(first, first),
            "g2_winner": {"A": "model_2", "B": "model_1"}.get(second, second),
            "judge": judge,
            "g1_user_prompt": self.users[0],
            "g1_judgment": judgments[0],
            "g2_user_prompt": self.users[1],
            "g2_judgment": judgments[1],
            **end,
        }


def read_answers(folder: Path, questions: Sequence[Question]) -> dict[str, dict[int, tuple[str, str]]]:
    """Return every model's answers in folder/model_answer. A model that has not answered all of `questions`
    raises DecDECError."""
    files = sorted((folder / "model_answer").glob("*.jsonl"))
    if not files:
        raise DecDECError(f"answers must be a folder with model_answer/MODEL.jsonl, got {folder} without any")
    answers = {file.name.removesuffix(".jsonl"): load_answers(file) for file in files}
    for model, given in answers.items():
        missing = [question.question_id for question in questions if question.question_id not in given]
        if missing:
            raise DecDECError(
                f"{model} must have answered all {len(questions)} questions, got no answer to "
                f"{len(missing)} of them, {missing[0]} for one: let `answer` go on, or give --limit"
            )
    return answers


def matches_of(
    mode: str,
    questions: Sequence[Question],
    references: Mapping[int, tuple[str, str]],
    prompts: Mapping[str, JudgePrompt],
    answers: Answers,
    baseline: str | None = None,
) -> list[Match]:
    """Return all that is to be judged, question by question. baseline: the model that every other one is
    compared with in mode "pair"."""
    found = []
    for question in questions:
        number = question.question_id
        reference = references.get(number) if needs_reference(question) else None
        if needs_reference(question) and reference is None:
            raise DecDECError(
                f"question {number} ({question.category}) must have a reference answer, got none"
            )
        for model in answers:
            if model == baseline:
                continue
            models = (model,) if baseline is None else (model, baseline)
            given = [answers[name][number] for name in models]
            orders = [given] if baseline is None else [given, given[::-1]]
            for turn in (1, 2):
                prompt = prompt_of(prompts, mode, question, turn)
                users = tuple(filled(prompt, question, order, reference) for order in orders)
                found.append(Match(number, turn, models, prompt, users))
    return found


def open_matches(matches: Sequence[Match], file: JudgmentFile) -> list[Match]:
    """Return the matches that `file` does not have; a judgment of another answer or prompt raises
    DecDECError."""
    asked = file.asked()
    for match in matches:
        if asked.get(match.key, match.users) != match.users:
            raise DecDECError(
                f"{match.label()}: the judgment must be of the present answer and prompt, got one of others: "
                f"move {file.path} away to judge again"
            )
    return [match for match in matches if match.key not in asked]


def judge_all(client: JudgeClient, matches: Sequence[Match], file: JudgmentFile, parallel: int) -> None:
    """Append the judgment of each match to `file`, `parallel` of them asked for at once.

    One that the judge fails to give is left for the next run; several in a row, or a refusal of whatever is
    asked, end this one once the judgments under way are there. All of these raise DecDECError in the end.
    """
    from tqdm import tqdm

    from decdec_eval.mtbench.client import RefusedError

    failures: list[tuple[Match, DecDECError]] = []
    with (
        _Asking(client, matches, parallel) as asking,
        tqdm(total=len(file.records) + len(matches), initial=len(file.records), desc="judgments") as bar,
    ):
        for match, result in asking.results():
            if isinstance(result, Exception):
                if not isinstance(result, DecDECError):
                    raise result
                failures.append((match, result))
            else:
                file.append(match.record(client.model, result))
                bar.update()
    if failures:
        # whatever was waiting for another try when a refusal ended the run failed for that reason alone
        match, error = next((pair for pair in failures if isinstance(pair[1], RefusedError)), failures[0])
        missing = len({match.key for match in matches} - {file.key_of(record) for record in file.records})
        raise DecDECError(f"{match.label()}: {error}; {missing} judgments are missing: run it again for them")


class _Asking:
    """Threads that put matches to a judge. Leaving the `with` block waits for none of them: a request may
    hang for its whole time-out, and Ctrl-C should not."""

    def __init__(self, client: JudgeClient, matches: Sequence[Match], parallel: int) -> None:
        self._client, self._waiting = client, deque(matches)
        self._failures_in_a_row = 0
        self._lock, self._stopped = threading.Lock(), threading.Event()
        self._done: SimpleQueue[tuple[Match, list[str] | Exception] | None] = SimpleQueue()
        self._threads = [threading.Thread(target=self._work, daemon=True) for _ in range(parallel)]

    def __enter__(self) -> _Asking:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Ask nothing more; what is under way still comes."""
        self._waiting.clear()
        self._stopped.set()

    def results(self) -> Iterator[tuple[Match, list[str] | Exception]]:
        """Yield each match with its judgments, or with what went wrong, as they come."""
        working = len(self._threads)
        while working:
            result = self._done.get()
            if result is None:
                working -= 1
            else:
                yield result

    def _work(self) -> None:
        while self._waiting:
            try:
                match = self._waiting.popleft()
            except IndexError:  # another thread was faster
                break
            result = self._judgments_of(match)
            self._stop_after(result)
            self._done.put((match, result))
        self._done.put(None)

    def _judgments_of(self, match: Match) -> list[str] | Exception:
        try:
            return [self._client.ask(match.prompt.system, user, self._stopped) for user in match.users]
        except Exception as error:  # the thread that writes raises it
            return error

    def _stop_after(self, result: list[str] | Exception) -> None:
        """Stop where nothing better is to be had of the next match, before a thread takes it."""
        from decdec_eval.mtbench.client import NoJudgmentError

        failed = isinstance(result, Exception)
        with self._lock:
            self._failures_in_a_row = self._failures_in_a_row + 1 if failed else 0
            down = self._failures_in_a_row >= _WORST_ROW
        if down or (failed and not isinstance(result, NoJudgmentError)):
            self.stop()


def summary(file: JudgmentFile, judge_model: str) -> str:
    """Return one line: how many judgments there are, and how many of them without a rating or verdict."""
    if file.mode == "single":
        words = Counter(rating_of(record["judgment"]).unrated or "rated" for record in file.records)
    else:
        words = Counter(
            "without a verdict"
            if "error" in (record["g1_winner"], record["g2_winner"])
            else "with both verdicts"
            for record in file.records
        )
    counts = ", ".join(f"{count} {word}" for word, count in words.most_common())
    return f"{judge_model}: {len(file.records)} judgments ({counts}) in {file.path}"


def add_judge(parser: argparse.ArgumentParser) -> None:
    """Add the options of `judge`."""
    parser.add_argument(
        "--answers", type=Path, required=True, metavar="DIR", help="with model_answer/*.jsonl"
    )
    parser.add_argument("--judge-model", required=True, metavar="NAME", help="as the judge's server calls it")
    parser.add_argument(
        "--base-url",
        metavar="URL",
        help="of a server of the OpenAI chat protocol, up to /v1 (default OpenAI's)",
    )
    parser.add_argument("--mode", choices=MODES, default="single", help="default single")
    parser.add_argument("--baseline", metavar="MODEL", help="that all others are compared with, of mode pair")
    parser.add_argument("--parallel", type=int, default=4, metavar="N", help="requests at once (default 4)")
    parser.add_argument(
        "--data-dir", type=Path, metavar="DIR", help="default DECDEC_DATA_DIR, or what was fetched"
    )
    parser.add_argument("--limit", type=int, metavar="N", help="the first N questions only")
    parser.add_argument(
        "--timeout", type=float, default=300.0, metavar="S", help="seconds without a byte (default 300)"
    )
    parser.add_argument("--retries", type=int, default=6, metavar="N", help="of one request (default 6)")
    parser.set_defaults(run=_judge, parser=parser)


def _judge(options: argparse.Namespace) -> None:
    _require_sound(options)
    folder = mt_bench_folder(options.data_dir)
    names = (
        "answers",
        "judge_model",
        "base_url",
        "mode",
        "baseline",
        "parallel",
        "limit",
        "timeout",
        "retries",
    )
    file = judge(folder=folder, **{name: getattr(options, name) for name in names})
    print(summary(file, options.judge_model))


def judge(
    answers: Path,
    folder: Path,
    judge_model: str,
    base_url: str | None = None,
    mode: str = "single",
    baseline: str | None = None,
    parallel: int = 4,
    limit: int | None = None,
    timeout: float = 300.0,
    retries: int = 6,
) -> JudgmentFile:
    """Return the judgments of the answers in `answers`, once all of them are there, their file closed again.

    folder: MT-Bench's files. What is there already is not asked again. What is refused, and judgments that
    were not had, raise DecDECError.
    """
    questions = load_questions(folder)[:limit]
    given = read_answers(answers, questions)
    if mode == "pair" and (baseline not in given or len(given) < 2):
        raise DecDECError(
            f"baseline must be one of two or more models, got {baseline!r} of {', '.join(given)}"
        )
    matches = matches_of(mode, questions, load_references(folder), load_prompts(folder), given, baseline)
    # both take seconds to import: not before the arguments are known to be good
    import torch

    from decdec_core.provenance import environment
    from decdec_eval.mtbench.client import MAX_TOKENS, TEMPERATURE, JudgeClient

    client = JudgeClient(judge_model, base_url, timeout, retries)
    pinned = {
        "judge": judge_model,
        "mode": mode,
        "temperature": TEMPERATURE,
        "max_tokens": MAX_TOKENS,
        "data_sha256": data_sha256(folder),
    }
    run = {"base_url": client.shown_url, "environment": environment(torch.device("cpu"), "openai")}
    path = judgment_path(answers, judge_model, mode)
    with JudgmentFile(path, mode) as file:
        file.pin(pinned, run)
        judge_all(client, open_matches(matches, file), file, parallel)
        return file


def _require_sound(options: argparse.Namespace) -> None:
    if not options.judge_model.strip():
        raise DecDECError(f"judge-model must be a name, got {options.judge_model!r}")
    if (options.mode == "pair") != (options.baseline is not None):
        wanted = "given with" if options.mode == "pair" else "absent without"
        raise DecDECError(f"baseline must be {wanted} --mode pair, got {options.baseline}")
    if options.limit is not None:
        require_int("limit", options.limit, 1, 1 << 20)
    require_int("parallel", options.parallel, 1, 256)
    require_int("retries", options.retries, 0, 1000)
    if not 0 < options.timeout <= 86400:
        raise DecDECError(f"timeout must be above 0 and at most 86400 seconds, got {options.timeout}")
