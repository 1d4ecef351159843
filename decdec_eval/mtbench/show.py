"""show: judgments -> a table, CSV, JSON and the radar figure."""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd
import torch

from decdec_core.commandline import picture_file
from decdec_core.config import DecDECError, require_one_of
from decdec_core.files import write_json, write_text
from decdec_core.provenance import environment
from decdec_eval.bootstrap import LEVEL, Bootstrap, Estimate
from decdec_eval.mtbench import figure
from decdec_eval.mtbench.data import Question, load_questions, mt_bench_folder
from decdec_eval.mtbench.scores import (
    ALL,
    SLICES,
    Judgment,
    PairRow,
    ScoreRow,
    Turn,
    Verdict,
    categories_of,
    pair_rows,
    score_rows,
)
from decdec_eval.presentation import line

_KINDS = ("single", "pair")
_TURN_NAMES: dict[Turn, str] = {"both": "both turns", 1: "first turn", 2: "second turn"}
_log = logging.getLogger(__name__)
_One = TypeVar("_One", Judgment, Verdict)
_Row = TypeVar("_Row", ScoreRow, PairRow)
_ESTIMATES = ("score", "difference", "points", "win_rate", "tie_rate", "loss_rate")


def add_show(parser: argparse.ArgumentParser) -> None:
    """Add the options of show."""
    parser.add_argument(
        "--answers", type=Path, required=True, metavar="DIR", help="the folder with model_judgment"
    )
    parser.add_argument("--judge-model", metavar="NAME", help="whose judgments, where there are several's")
    parser.add_argument("--baseline", metavar="MODEL", help="what the others are compared with")
    parser.add_argument("--models", nargs="+", metavar="MODEL", help="these, in this order (default all)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write table, CSV, JSON and figure there")
    parser.add_argument("--figure", type=picture_file, metavar="FILE", help="draw the radar there")
    parser.add_argument("--data-dir", type=Path, metavar="DIR", help="where MT-Bench's questions are")
    parser.add_argument("--bootstrap", type=int, default=10000, metavar="N", help="draws (default 10000)")
    parser.add_argument("--seed", type=int, default=0, help="of the draws")
    parser.set_defaults(run=_show, parser=parser)


def _show(options: argparse.Namespace) -> None:
    bootstrap = Bootstrap(options.bootstrap, options.seed)
    folder = mt_bench_folder(options.data_dir)
    judged = read_judgments(options.answers, options.judge_model)
    shown = show(judged, load_questions(folder), bootstrap, options.baseline, options.models)
    if options.figure is not None and not shown.scores:
        raise DecDECError("--figure must have scores of single answers to draw, got pairs only")
    print(shown.markdown())
    written = []
    if options.out is not None:
        written += shown.write(options.out, _sha256(folder / "question.jsonl"))
    if options.figure is not None:
        figure.draw(shown.scores, shown.caption(), options.figure)
        written.append(options.figure)
    if written:
        print(f"\nwritten: {', '.join(map(str, written))}")


@dataclass(frozen=True)
class Judged:
    """All that one judge wrote. files: sha256 by name; configurations: of JUDGE_KIND.config.json, by kind."""

    judge: str
    judgments: tuple[Judgment, ...]
    verdicts: tuple[Verdict, ...]
    files: dict[str, str]
    configurations: dict[str, Any]

    def models(self) -> list[str]:
        """Return every model that was judged, in the order of their names."""
        return sorted({model for one in (*self.judgments, *self.verdicts) for model in one.models})


def read_judgments(answers: Path, judge: str | None) -> Judged:
    """Return what `judge` wrote to answers/model_judgment; it may be None where there is one judge only.

    A last line that was cut off, as a killed judge leaves it, is dropped with a warning; any other line that
    is no judgment raises DecDECError.
    """
    folder = answers / "model_judgment"
    paths = {kind: sorted(folder.glob(f"*_{kind}.jsonl")) for kind in _KINDS}
    judges = sorted({_judge_of(path, kind) for kind in _KINDS for path in paths[kind]})
    if not judges:
        raise DecDECError(
            f"{answers} must hold model_judgment/JUDGE_single.jsonl or JUDGE_pair.jsonl, got none"
        )
    if judge is None:
        if len(judges) > 1:
            raise DecDECError(
                f"--judge-model must name one of several judges, got none of {', '.join(judges)}"
            )
        judge = judges[0]
    require_one_of("judge-model", judge, judges)
    own = {kind: [p for p in paths[kind] if _judge_of(p, kind) == judge] for kind in _KINDS}
    for kind in _KINDS:
        if len(own[kind]) > 1:
            names = " and ".join(path.name for path in own[kind])
            raise DecDECError(f"{judge} must have one file of {kind} judgments, got {names}")
    files = [path for kind in _KINDS for path in own[kind]]
    return Judged(
        judge,
        tuple(one for path in own["single"] for one in _read(path, judge, Judgment.from_row)),
        tuple(one for path in own["pair"] for one in _read(path, judge, Verdict.from_row)),
        {path.name: _sha256(path) for path in files},
        {kind: found for kind in _KINDS for path in own[kind] if (found := _configuration(path)) is not None},
    )


def _judge_of(path: Path, kind: str) -> str:
    """Return the judge that the file's first line names; where there is none, the one of the file's name."""
    for _, row in _rows(path, warn=False):
        return row["judge"][0]
    return path.name.removesuffix(f"_{kind}.jsonl")


def _read(path: Path, judge: str, make: Callable[[dict[str, Any]], _One]) -> Iterator[_One]:
    for where, row in _rows(path):
        if row["judge"][0] != judge:
            raise DecDECError(f"{where} must be of the file's one judge, {judge}, got {row['judge'][0]}")
        try:
            yield make(row)
        except DecDECError as error:
            raise DecDECError(f"{where}: {error}") from None


def _rows(path: Path, warn: bool = True) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield where each line is and its object, which names a judge; no blank lines, and no last one that was
    cut off."""
    lines = path.read_bytes().split(b"\n")
    for number, text in enumerate(lines, 1):
        where = f"{path.name}, line {number}"
        if not text.strip():
            continue
        try:
            row = json.loads(text)
        except ValueError as error:  # of JSON or of UTF-8
            if number == len(lines):  # no line end after it
                if warn:
                    _log.warning("%s, the last, was cut off and is dropped", where)
                return
            raise DecDECError(f"{where} must be JSON, got: {error}") from None
        if not isinstance(row, dict):
            raise DecDECError(f"{where} must be an object, got {type(row).__name__}")
        judge = row.get("judge")
        if not isinstance(judge, list) or not judge or not isinstance(judge[0], str):
            raise DecDECError(f"{where}: judge must be [name, prompt name], got {judge!r}")
        yield where, row


def _configuration(path: Path) -> Any:
    """Return what the judge says of itself beside its judgments, or None; FastChat's own says nothing."""
    beside = path.with_name(f"{path.stem}.config.json")
    if not beside.is_file():
        return None
    try:
        return json.loads(beside.read_text("utf-8"))
    except ValueError as error:
        raise DecDECError(f"{beside.name} must be JSON, got: {error}") from None


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@dataclass(frozen=True)
class Shown:
    """The scores and win rates of models, and how they are said."""

    judged: Judged
    questions: tuple[Question, ...]
    bootstrap: Bootstrap
    baseline: str | None
    scores: list[ScoreRow]
    pairs: list[PairRow]

    def caption(self) -> str:
        """Return the sentence that says what the scores are of."""
        whole = _of(self.scores, ALL)
        unrated, missing = sum(row.unrated for row in whole), sum(row.missing for row in whole)
        return (
            f"MT-Bench, scores by {self.judged.judge} (1 to 10) on {len(self.questions)} questions, mean of "
            f"both turns; {unrated} unrated, {missing} missing"
        )

    def markdown(self) -> str:
        """Return all tables, for people."""
        parts = [*self._score_parts(), *self._pair_parts(), self._note()]
        return "\n\n".join(parts)

    def _score_parts(self) -> Iterator[str]:
        if not self.scores:
            return
        yield self.caption()
        head = ["model", "score", "first turn", "second turn", "rated", "unrated", "missing"]
        compared = any(row.difference for row in self.scores)
        if compared:
            head.insert(2, f"difference from {self.baseline}")
        elif self.baseline:
            yield f"No answer was rated both for {self.baseline} and for another model: no differences."
        by_model = {turn: {row.model: row for row in _of(self.scores, ALL, turn)} for turn in SLICES}
        lines = []
        for model, row in by_model["both"].items():
            cells = [model, _cell(row.score), *(_cell(by_model[turn][model].score) for turn in (1, 2))]
            if compared:
                cells.insert(2, "baseline" if model == self.baseline else _cell(row.difference, "+.2f"))
            lines.append([*cells, str(row.rated), str(row.unrated), str(row.missing)])
        yield _table(head, lines)
        for turn in SLICES:
            yield f"Score by category, {_TURN_NAMES[turn]}:\n\n" + self._by_category(turn, "score", ".2f")
        if compared:
            title = f"Difference from {self.baseline} by category, both turns:"
            yield f"{title}\n\n" + self._by_category("both", "difference", "+.2f")

    def _by_category(self, turn: Turn, what: str, digits: str) -> str:
        models = list(dict.fromkeys(row.model for row in self.scores))
        if what == "difference":
            models = [model for model in models if model != self.baseline]
        lines = []
        for category in [*categories_of(self.questions), ALL]:
            by_model = {row.model: row for row in _of(self.scores, category, turn)}
            lines.append([category, *(_cell(getattr(by_model[m], what), digits) for m in models)])
        return _table(["category", *models], lines)

    def _pair_parts(self) -> Iterator[str]:
        if not self.pairs:
            return
        against = f"against {self.baseline}" if self.baseline else "against each other"
        yield f"MT-Bench, pairs judged by {self.judged.judge} in both orders, {against}, both turns:"
        head = ["model", "points", "win", "tie", "loss", "wins", "ties", "losses", "errors", "missing"]
        lines = []
        for row in _of(self.pairs, ALL):
            rates = (row.points, row.win_rate, row.tie_rate, row.loss_rate)
            counts = (row.wins, row.ties, row.losses, row.errors, row.missing)
            lines.append([row.model, *(_cell(rate, ".1%") for rate in rates), *map(str, counts)])
        yield _table(head, lines)
        yield (
            "A win or a loss needs both orders to agree, anything else is a tie; points count a tie as a "
            "half. Errors, where an order has no verdict, and missing pairs take no part in the rates."
        )

    def _note(self) -> str:
        note = (
            f"In brackets the {LEVEL:.0%} interval: percentiles of {self.bootstrap.samples} bootstrap draws "
            f"of questions, both turns together, seed {self.bootstrap.seed}. Of few questions, such as the "
            "10 of a category, it is too narrow. Unrated and missing answers take no part in any mean."
        )
        if any(row.difference for row in self.scores):
            note += (
                " Differences are over the answers rated for both models, the same draws for both: of "
                "all questions an interval without 0 is a difference that they carry, though of twenty "
                "such intervals about one misses the true value; of a category's 10 more do, and where all "
                "ten agree the interval has no width and says nothing."
            )
        return note

    def write(self, out: Path, questions_sha256: str) -> list[Path]:
        """Write table.md, scores.json and, of scores, scores.csv and radar.png, of pairs, pairs.csv to the
        folder `out`; return what was written. What an earlier call left of the others is removed."""
        out.mkdir(parents=True, exist_ok=True)
        write_text(out / "table.md", self.markdown() + "\n")
        write_json(out / "scores.json", self.result(questions_sha256))
        names = ["table.md", "scores.json"]
        if self.scores:
            write_text(out / "scores.csv", _frame(self.scores).to_csv(index=False))
            figure.draw(self.scores, self.caption(), out / "radar.png")
            names += ["scores.csv", "radar.png"]
        if self.pairs:
            write_text(out / "pairs.csv", _frame(self.pairs).to_csv(index=False))
            names.append("pairs.csv")
        for stale in {"scores.csv", "radar.png", "pairs.csv"} - set(names):
            (out / stale).unlink(missing_ok=True)
        return [out / name for name in names]

    def result(self, questions_sha256: str) -> dict[str, Any]:
        """Return everything as scores.json holds it."""
        whole = _of(self.scores, ALL)
        return {
            "judge": self.judged.judge,
            "judge_configurations": self.judged.configurations,
            "files": self.judged.files,
            "questions": {"count": len(self.questions), "sha256": questions_sha256},
            "baseline": self.baseline,
            "bootstrap": {
                "samples": self.bootstrap.samples,
                "seed": self.bootstrap.seed,
                "level": LEVEL,
                "unit": "question",
            },
            "rated": sum(row.rated for row in whole),
            "unrated": sum(row.unrated for row in whole),
            "missing": sum(row.missing for row in whole),
            "pair_errors": sum(row.errors for row in _of(self.pairs, ALL)),
            "scores": [asdict(row) for row in self.scores],
            "pairs": [asdict(row) for row in self.pairs],
            "measured": True,
            **environment(torch.device("cpu"), "numpy", "matplotlib"),
        }


def show(
    judged: Judged,
    questions: Sequence[Question],
    bootstrap: Bootstrap,
    baseline: str | None = None,
    models: Sequence[str] | None = None,
) -> Shown:
    """Return the scores and win rates of `models` in their order; by default of all, the best first.

    A baseline that is none of `models` is shown before them. Unknown models raise DecDECError.
    """
    known = judged.models()
    for which, name in [("baseline", baseline), *(("model", model) for model in models or ())]:
        if name is not None:
            require_one_of(which, name, known)
    chosen = list(models or known)
    if baseline is not None and baseline not in chosen:
        chosen.insert(0, baseline)
    chosen = list(dict.fromkeys(chosen))
    scored = {one.model for one in judged.judgments}
    names = [model for model in chosen if model in scored]
    scores = score_rows(judged.judgments, questions, names, baseline, bootstrap)
    pairs = pair_rows(judged.verdicts, questions, chosen, baseline, bootstrap)
    if not scores and not pairs:
        raise DecDECError(
            f"{judged.judge} must have judged something of {', '.join(chosen) or 'a model'}, got none"
        )
    if models is None:
        scores = _best_first(scores, {row.model: row.score for row in _of(scores, ALL)})
        pairs = _best_first(pairs, {row.model: row.points for row in _of(pairs, ALL)})
    return Shown(judged, tuple(questions), bootstrap, baseline, scores, pairs)


def _best_first(rows: list[_Row], means: dict[str, Estimate | None]) -> list[_Row]:
    return sorted(rows, key=lambda row: -one.mean if (one := means[row.model]) else math.inf)


def _of(rows: Sequence[_Row], category: str, turn: Turn = "both") -> list[_Row]:
    return [row for row in rows if row.category == category and row.turn == turn]


def _cell(estimate: Estimate | None, digits: str = ".2f") -> str:
    """Return "6.35 [5.98, 6.71]", without brackets where there is no interval."""
    if estimate is None:
        return "none"
    if estimate.low is None:
        return f"{estimate.mean:{digits}}"
    return f"{estimate.mean:{digits}} [{estimate.low:{digits}}, {estimate.high:{digits}}]"


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    # names of models are anybody's
    return "\n".join(line(" ".join(cell.split()).replace("|", "\\|") for cell in row) for row in rows)


def _frame(rows: Sequence[ScoreRow] | Sequence[PairRow]) -> pd.DataFrame:
    """Return one row each, an estimate as columns NAME, NAME_low, NAME_high and NAME_questions."""
    flat = []
    for row in rows:
        cells: dict[str, Any] = {}
        for one in fields(row):
            value = getattr(row, one.name)
            if one.name in _ESTIMATES:
                cells[one.name] = value.mean if value else None
                for part in ("low", "high", "questions"):
                    cells[f"{one.name}_{part}"] = getattr(value, part) if value else None
            else:
                cells[one.name] = " ".join(value) if isinstance(value, tuple) else value
        flat.append(cells)
    return pd.DataFrame(flat).convert_dtypes()
