"""Both turns of MT-Bench's questions, answered by one model and appended to a file question by question.

DIR/model_answer/MODEL.jsonl is FastChat's answer file; what this package adds stands under `decdec`. Each
turn draws from a seed of its own, so that a run that was killed and resumed gives the same answers as one
that was left alone.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import AutoConfig

from decdec_core.config import DecDECError, require_int
from decdec_core.decode import Decoder, Sampling
from decdec_core.files import lock
from decdec_core.fusing import fuse
from decdec_core.provenance import environment
from decdec_core.sources import model_folder
from decdec_eval.mtbench.adapter import Opened, arguments_of, open_model
from decdec_eval.mtbench.conversation import ChatFormat
from decdec_eval.mtbench.data import Question, load_questions, mt_bench_folder

# FastChat's, of llm_judge.common
TEMPERATURES = {
    "writing": 0.7,
    "roleplay": 0.7,
    "extraction": 0.0,
    "math": 0.0,
    "coding": 0.0,
    "reasoning": 0.0,
    "stem": 0.1,
    "humanities": 0.1,
}
_OTHERWISE = 0.7  # FastChat's, for a category of somebody's own
# the whole vocabulary as the temperature weighs it, whatever top-k, top-p and penalty a model's
# generation_config and transformers' defaults (50, in FastChat's run) would bring along
_DRAWN_FROM = {"top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0}
# in max_new_tokens: the second answer, and the first as it is read back: a token that is no whole character
# becomes three, a replacement character's bytes
_ROOM = 4


@dataclass(frozen=True)
class Settings:
    """seed: of all draws. max_new_tokens: of a turn. max_length: tokens of prompt and answer together."""

    seed: int
    max_new_tokens: int
    max_length: int


class Speaker:
    """Answers prompts with a model, one token after another.

    By Decoder, made once for a temperature and for max_length tokens, where the model allows it, and else by
    transformers' generate (`way` says which, and why). Fuses the model's layers.
    """

    def __init__(self, opened: Opened, max_length: int) -> None:
        self.model, self.stop, self.max_length = opened.model, opened.chat.stop, max_length
        self._decoder: Decoder | None = None
        self.way = "decoder"
        try:
            fuse(self.model)
            self._decoder = Decoder(self.model, max_length)
        except DecDECError as error:  # an architecture or a length that is not a decoder's
            self.way = f"generate: {error}"

    def speak(self, prompt: Sequence[int], max_new_tokens: int, temperature: float, seed: int) -> list[int]:
        """Return the tokens after `prompt`, the one that ended the answer included. Of a temperature above 0
        all of the vocabulary is drawn from."""
        sampling = Sampling(temperature=temperature, seed=seed)
        if self._decoder is None:
            return self._generate(prompt, max_new_tokens, sampling)
        if self._decoder.sampling.temperature != temperature:
            self._decoder = None  # its cache and its graph, into which the temperature was captured, go first
            self._decoder = Decoder(self.model, self.max_length, sampling)
        self._decoder.sampling = sampling
        return self._decoder.generate(prompt, max_new_tokens, self.stop).tokens

    def _generate(self, prompt: Sequence[int], max_new_tokens: int, sampling: Sampling) -> list[int]:
        torch.manual_seed(sampling.seed)
        ids = torch.tensor([list(prompt)], device=self.model.device)
        options: dict[str, Any] = {"do_sample": False}
        if sampling.temperature > 0:
            options = {"do_sample": True, "temperature": sampling.temperature, **_DRAWN_FROM}
        ends: dict[str, Any] = (
            {"eos_token_id": list(self.stop), "pad_token_id": self.stop[0]} if self.stop else {}
        )
        penalty = _DRAWN_FROM["repetition_penalty"]
        options |= {"max_new_tokens": max_new_tokens, "repetition_penalty": penalty, **ends}
        done = self.model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        return done[0, len(prompt) :].tolist()


def turn_seed(seed: int, question_id: int, turn: int) -> int:
    """Return the seed of a turn's draws (turn 0 or 1): of these numbers alone, so that neither order nor what
    was answered before matters."""
    digest = hashlib.sha256(f"{seed}:{question_id}:{turn}".encode()).digest()
    return int.from_bytes(digest[:4], "big") & 0x7FFFFFFF


def room_for(chat: ChatFormat, questions: Sequence[Question], max_new_tokens: int, config: Any) -> int:
    """Return max_length: what the longest of `questions` may need with its answers, at most the model's
    context. Raises DecDECError where that leaves no room for a prompt."""
    context = int(config.max_position_embeddings)
    require_int("max-new-tokens", max_new_tokens, 1, context - 1)
    longest = max(len(chat.prompt([question.turns[0], "", question.turns[1]])) for question in questions)
    return min(context, longest + _ROOM * max_new_tokens)


def answer_question(
    speaker: Speaker, chat: ChatFormat, question: Question, settings: Settings
) -> dict[str, Any]:
    """Return {"turns", "tokens", "prompt_tokens", "cut_tokens", "finish", "seeds", "temperature", "time_s"},
    a list of two but for the temperature.

    A prompt that leaves no room for max_new_tokens is cut at its beginning: cut_tokens says by how many
    tokens. finish: "stop" where the model ended its answer, else "length".
    """
    temperature = TEMPERATURES.get(question.category, _OTHERWISE)
    messages: list[str] = []
    rows: list[dict[str, Any]] = []
    for turn, asked in enumerate(question.turns):
        messages.append(asked)
        prompt = chat.prompt(messages)
        kept = prompt[-(settings.max_length - settings.max_new_tokens) :]
        seed = turn_seed(settings.seed, question.question_id, turn)
        start = time.perf_counter()
        tokens = chat.until_stop(speaker.speak(kept, settings.max_new_tokens, temperature, seed))
        messages.append(chat.answer(tokens))
        rows.append(
            {
                "turns": messages[-1],
                "tokens": tokens,
                "prompt_tokens": len(kept),
                "cut_tokens": len(prompt) - len(kept),
                "finish": "stop" if chat.stopped(tokens) else "length",
                "seeds": seed,
                "time_s": round(time.perf_counter() - start, 3),
            }
        )
    return {**{name: [row[name] for row in rows] for name in rows[0]}, "temperature": temperature}


class AnswerFile:
    """FastChat's answer file of one model in one configuration, open for appending.

    What a killed run left of a line is dropped; another configuration's answers, and a second run at the same
    time, raise DecDECError. `answered`: the question_ids that are there.
    """

    def __init__(
        self, path: Path, model_id: str, configuration: dict[str, Any], stated: dict[str, Any]
    ) -> None:
        self.path, self.model_id = path, model_id
        # as JSON gives it back
        self.configuration = json.loads(json.dumps(configuration))
        self.stated = stated
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("ab")
        try:
            lock(self._file, path)
            rows, length = read_answers(path)
            for row in rows:
                _require_same(path, self.configuration, row.get("decdec", {}).get("configuration"))
            self._file.truncate(length)
        except BaseException:
            self._file.close()
            raise
        self.answered = {row["question_id"] for row in rows}

    def append(self, question: Question, answered: dict[str, Any]) -> None:
        """Write one question's answers as a line, and hand it to the system."""
        turns = answered.pop("turns")
        row = {
            "question_id": question.question_id,
            "answer_id": _digest([self.configuration, question.question_id])[:22],
            "model_id": self.model_id,
            "choices": [{"index": 0, "turns": turns}],
            "tstamp": time.time(),
            "decdec": {"configuration": self.configuration, **self.stated, **answered},
        }
        self._file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
        self._file.flush()
        self.answered.add(question.question_id)

    def close(self) -> None:
        """Close the file, which lets another run have it."""
        self._file.close()


def read_answers(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Return the answers of a file and what they take of it, in bytes: what follows the last line end was
    being written when its run was killed. A line that is no answer raises DecDECError."""
    data = path.read_bytes()
    length = data.rfind(b"\n") + 1
    rows = []
    for number, line in enumerate(data[:length].splitlines(), 1):
        try:
            row = json.loads(line)
            _ = row["question_id"], row["choices"][0]["turns"]
        except (ValueError, LookupError, TypeError):
            raise DecDECError(f"{path}: line {number} must be an answer in JSON, got {line[:40]!r}") from None
        rows.append(row)
    return rows, length


def _require_same(path: Path, wanted: dict[str, Any], got: Any) -> None:
    if got == wanted:
        return
    differing = [name for name in wanted if not isinstance(got, dict) or got.get(name) != wanted[name]]
    raise DecDECError(
        f"{path} must be of this configuration, got another {', '.join(differing) or 'set of settings'}: "
        "give another --model-id or --out"
    )


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def questions_sha256(questions: Sequence[Question]) -> str:
    """Return the hash of all questions that there are to answer."""
    return _digest([asdict(question) for question in questions])


def default_model_id(model_args: str) -> str:
    """Return a name for a model and what it compensates, such as smollm2-awq3-dynamic-k16."""
    arguments = arguments_of(model_args)
    words = [re.split(r"[/\\]", str(arguments["pretrained"]).rstrip("/\\"))[-1].removesuffix(".gguf")]
    method, bits = arguments.get("method"), arguments.get("bits", 3)
    if method is not None:
        words.append(method if method == "full" else f"{method}{bits}")
    if method != "full":
        selection = arguments.get("selection", "dynamic") or "none"  # lm-eval's parser makes None of the word
        words.append(str(selection))
        if selection != "none":
            slowdown = arguments.get("slowdown")
            words.append(f"k{arguments.get('k_chunk', 16)}" if slowdown is None else f"slowdown{slowdown}")
        if arguments.get("compensate") == "all":
            words.append("all")
    return re.sub(r"[^A-Za-z0-9._+-]", "-", "-".join(words))


def answer(
    model_args: str,
    out: Path,
    questions: Sequence[Question],
    model_id: str | None = None,
    limit: int | None = None,
    max_new_tokens: int = 1024,
    seed: int = 0,
    device: str = "cpu",
) -> Path:
    """Return the answer file of a model in OUT/model_answer, with the first `limit` of `questions` answered.

    questions: all there are, so that max_length is the same for any limit. What the file has already is not
    answered again. What is refused raises DecDECError, before the model is loaded where it can.
    """
    _require_sound(questions, limit, seed)
    model_id = default_model_id(model_args) if model_id is None else model_id
    if not re.fullmatch(r"[A-Za-z0-9_+][A-Za-z0-9._+-]*", model_id):
        raise DecDECError(f"model-id must be letters, digits, '.', '_', '+' and '-', got {model_id!r}")
    config = AutoConfig.from_pretrained(model_folder(str(arguments_of(model_args)["pretrained"])))
    require_int("max-new-tokens", max_new_tokens, 1, config.max_position_embeddings - 1)
    if out.exists() and not out.is_dir():
        raise DecDECError(f"out must be a folder, got the file {out}")
    return answer_with(open_model(model_args, device), out, questions, model_id, limit, max_new_tokens, seed)


def _require_sound(questions: Sequence[Question], limit: int | None, seed: int) -> None:
    require_int("seed", seed, 0, 2**31 - 1)
    require_int("limit", len(questions) if limit is None else limit, 1, len(questions))


def answer_with(
    opened: Opened,
    out: Path,
    questions: Sequence[Question],
    model_id: str,
    limit: int | None,
    max_new_tokens: int,
    seed: int,
) -> Path:
    """Return what `answer` does, of a model that is loaded already; fuses its layers."""
    _require_sound(questions, limit, seed)
    max_length = room_for(opened.chat, questions, max_new_tokens, opened.model.config)
    settings = Settings(seed, max_new_tokens, max_length)
    speaker = Speaker(opened, max_length)
    configuration = {
        "ledger": opened.ledger,
        "chat": opened.chat.describe(),
        "settings": asdict(settings),
        "drawn_from": _DRAWN_FROM,
        "way": speaker.way,
        "questions_sha256": questions_sha256(questions),
    }
    path = out / "model_answer" / f"{model_id}.jsonl"
    stated = environment(opened.model.device, "fschat", "lm_eval")
    file = AnswerFile(path, model_id, configuration, stated)
    try:
        wanted = questions[:limit]
        left = [question for question in wanted if question.question_id not in file.answered]
        with tqdm(total=len(wanted), initial=len(wanted) - len(left), desc="answers", unit="question") as bar:
            for question in left:
                file.append(question, answer_question(speaker, opened.chat, question, settings))
                bar.update()
    finally:
        file.close()
    return path


def add_answer(parser: argparse.ArgumentParser) -> None:
    """Add the options of `answer`."""
    add_model(parser)
    parser.add_argument("--model-args", required=True, metavar="ARGS", help="as of lm_eval --model decdec")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="answers go to DIR/model_answer"
    )
    parser.add_argument("--model-id", metavar="NAME", help="of the file (default: made of model-args)")
    parser.add_argument("--limit", type=int, metavar="N", help="the first N questions (default: all)")
    parser.add_argument(
        "--max-new-tokens", type=int, default=1024, metavar="N", help="of a turn (default 1024)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of sampling (default 0)")
    parser.set_defaults(run=_answer, parser=parser)


def add_model(parser: argparse.ArgumentParser) -> None:
    """Add where a model runs and where MT-Bench is."""
    parser.add_argument("--data-dir", type=Path, metavar="DIR", help="MT-Bench (default: DECDEC_DATA_DIR)")
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=default, choices=("cpu", "cuda"), help=f"default here: {default}")


def _answer(options: argparse.Namespace) -> None:
    names = ("model_args", "out", "model_id", "limit", "max_new_tokens", "seed", "device")
    questions = load_questions(mt_bench_folder(options.data_dir))
    print(answer(questions=questions, **{name: getattr(options, name) for name in names}))
