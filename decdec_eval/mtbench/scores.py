"""Judgments -> scores by category and turn; verdicts of pairs -> win rates; each with its interval.

A question is what is drawn again: its two turns are one conversation and stay together. What a judge did not
rate, or has not judged yet, is counted and takes no part in any mean.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from decdec_core.config import DecDECError, require_int, require_one_of
from decdec_eval.bootstrap import Bootstrap, Estimate
from decdec_eval.mtbench.data import Question

ALL = "all"  # in the place of a category
LOWEST, HIGHEST = 1, 10
TURNS = (1, 2)
Turn = Literal[1, 2, "both"]
SLICES: tuple[Turn, ...] = ("both", 1, 2)
VERDICTS = ("model_1", "model_2", "tie", "error")

_Key = tuple[int, int]  # question, turn


@dataclass(frozen=True)
class Judgment:
    """A score of one answer; nan or a number outside 1..10 where the judge gave no rating."""

    question_id: int
    turn: int
    model: str
    score: float

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Judgment:
        """Return the judgment of a line of FastChat's JUDGE_single.jsonl."""
        question_id, turn = _question_and_turn(row)
        score = _field(row, "score")
        if not isinstance(score, int | float) or isinstance(score, bool):
            raise DecDECError(f"score must be a number, got {score!r}")
        return cls(question_id, turn, _name(row, "model"), score)

    @property
    def rated(self) -> bool:
        return LOWEST <= self.score <= HIGHEST  # False for nan

    @property
    def models(self) -> tuple[str, ...]:
        return (self.model,)


@dataclass(frozen=True)
class Verdict:
    """Which of two answers is better, asked in both orders: g1 shows model_1's first, g2 model_2's."""

    question_id: int
    turn: int
    model_1: str
    model_2: str
    g1_winner: str
    g2_winner: str

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Verdict:
        """Return the verdict of a line of FastChat's JUDGE_pair.jsonl."""
        question_id, turn = _question_and_turn(row)
        models = [_name(row, "model_1"), _name(row, "model_2")]
        if models[0] == models[1]:
            raise DecDECError(f"model_1 and model_2 must be two models, got {models[0]!r} twice")
        winners = [_field(row, "g1_winner"), _field(row, "g2_winner")]
        for key, winner in zip(("g1_winner", "g2_winner"), winners, strict=True):
            require_one_of(key, winner, VERDICTS)
        return cls(question_id, turn, *models, *winners)

    @property
    def rated(self) -> bool:
        return "error" not in (self.g1_winner, self.g2_winner)

    @property
    def models(self) -> tuple[str, ...]:
        return tuple(sorted((self.model_1, self.model_2)))

    def opponent(self, model: str) -> str:
        return self.model_2 if model == self.model_1 else self.model_1

    def points(self, model: str) -> float:
        """Return 1 where both orders name `model`, 0 where both name the other, and a half otherwise."""
        if self.g1_winner != self.g2_winner or self.g1_winner == "tie":
            return 0.5
        return 1.0 if getattr(self, self.g1_winner) == model else 0.0


def _field(row: Mapping[str, Any], key: str) -> Any:
    if key not in row:
        raise DecDECError(f"a judgment must have {key}, got {', '.join(row) or 'nothing'}")
    return row[key]


def _name(row: Mapping[str, Any], key: str) -> str:
    name = _field(row, key)
    if not isinstance(name, str) or not name:
        raise DecDECError(f"{key} must be a model's name, got {name!r}")
    return name


def _question_and_turn(row: Mapping[str, Any]) -> tuple[int, int]:
    require_int("question_id", _field(row, "question_id"), 0, 1 << 31)
    require_one_of("turn", _field(row, "turn"), TURNS)
    return row["question_id"], row["turn"]


def require_consistent(judged: Iterable[Judgment] | Iterable[Verdict], questions: Sequence[Question]) -> None:
    """Raise DecDECError for a question that is none of `questions`, and for one judged twice in a turn of a
    model, or of a pair of models whichever comes first."""
    known = {question.question_id for question in questions}
    seen = set()
    for one in judged:
        if one.question_id not in known:
            raise DecDECError(
                f"question_id must be one of the {len(known)} questions' ids {min(known)}..{max(known)}, "
                f"got {one.question_id}"
            )
        key = (one.question_id, one.turn, one.models)
        if key in seen:
            raise DecDECError(
                f"question {one.question_id}, turn {one.turn} of {' against '.join(one.models)} must be "
                "judged once, got two judgments"
            )
        seen.add(key)


@dataclass(frozen=True)
class ScoreRow:
    """One model's scores in one category (or ALL) and one turn (or both). difference: to the baseline, over
    the answers that were rated for both, paired; None for the baseline itself and where there is none."""

    model: str
    category: str
    turn: Turn
    rated: int
    unrated: int
    missing: int
    score: Estimate | None
    difference: Estimate | None


def score_rows(
    judgments: Sequence[Judgment],
    questions: Sequence[Question],
    models: Sequence[str],
    baseline: str | None,
    bootstrap: Bootstrap,
) -> list[ScoreRow]:
    """Return a row for each of `models`, each category and all of them, each turn and both.

    missing: of the questions' turns, those without a judgment. A baseline without judgments gives no
    differences. See require_consistent for what is refused.
    """
    require_consistent(judgments, questions)
    of_model: dict[str, dict[_Key, Judgment]] = {model: {} for model in [*models, baseline] if model}
    for one in judgments:
        if one.model in of_model:
            of_model[one.model][one.question_id, one.turn] = one
    rows = []
    for model in models:
        other = of_model[baseline] if baseline and baseline != model else {}
        for category, turn, keys in _slices(questions):
            judged = {key: of_model[model][key] for key in keys if key in of_model[model]}
            scores = {key: one.score for key, one in judged.items() if one.rated}
            changes = {
                key: score - other[key].score
                for key, score in scores.items()
                if key in other and other[key].rated
            }
            rows.append(
                ScoreRow(
                    model,
                    category,
                    turn,
                    rated=len(scores),
                    unrated=len(judged) - len(scores),
                    missing=len(keys) - len(judged),
                    score=_estimate(bootstrap, scores),
                    difference=_estimate(bootstrap, changes),
                )
            )
    return rows


def _estimate(bootstrap: Bootstrap, values: Mapping[_Key, float]) -> Estimate | None:
    return bootstrap.estimate((key[0], value) for key, value in values.items())


@dataclass(frozen=True)
class PairRow:
    """One model's verdicts against its opponents in one category (or ALL) and one turn (or both). errors: in
    one order or both the judge named no winner. points: a win is 1, a tie a half, a loss 0; FastChat's
    win_rate_adjusted."""

    model: str
    opponents: tuple[str, ...]
    category: str
    turn: Turn
    wins: int
    ties: int
    losses: int
    errors: int
    missing: int
    win_rate: Estimate | None
    tie_rate: Estimate | None
    loss_rate: Estimate | None
    points: Estimate | None


def pair_rows(
    verdicts: Sequence[Verdict],
    questions: Sequence[Question],
    models: Sequence[str],
    baseline: str | None,
    bootstrap: Bootstrap,
) -> list[PairRow]:
    """Return a row for each of `models`, each category and all of them, each turn and both.

    With a baseline, of verdicts against it only, and none for itself; models that met nobody have no rows.
    missing: turns of questions without a verdict, for each opponent that the model met.
    """
    require_consistent(verdicts, questions)
    if baseline:
        verdicts = [one for one in verdicts if baseline in one.models]
    rows = []
    for model in models:
        own = [one for one in verdicts if model in one.models]
        if not own or model == baseline:
            continue
        opponents = tuple(sorted({one.opponent(model) for one in own}))
        by_key: dict[_Key, list[Verdict]] = {}
        for one in own:
            by_key.setdefault((one.question_id, one.turn), []).append(one)
        for category, turn, keys in _slices(questions):
            judged = [one for key in keys for one in by_key.get(key, ())]
            missing = len(keys) * len(opponents) - len(judged)
            rows.append(_pair_row(model, opponents, category, turn, judged, missing, bootstrap))
    return rows


def _pair_row(
    model: str,
    opponents: tuple[str, ...],
    category: str,
    turn: Turn,
    judged: Sequence[Verdict],
    missing: int,
    bootstrap: Bootstrap,
) -> PairRow:
    points = [(one.question_id, one.points(model)) for one in judged if one.rated]
    values = [value for _, value in points]
    win, tie, loss = (
        bootstrap.estimate((question_id, float(value == outcome)) for question_id, value in points)
        for outcome in (1.0, 0.5, 0.0)
    )
    return PairRow(
        model,
        opponents,
        category,
        turn,
        wins=values.count(1.0),
        ties=values.count(0.5),
        losses=values.count(0.0),
        errors=len(judged) - len(values),
        missing=missing,
        win_rate=win,
        tie_rate=tie,
        loss_rate=loss,
        points=bootstrap.estimate(points),
    )


def categories_of(questions: Iterable[Question]) -> list[str]:
    """Return the categories in the order of the questions."""
    return list(dict.fromkeys(question.category for question in questions))


def _slices(questions: Sequence[Question]) -> Iterator[tuple[str, Turn, Collection[_Key]]]:
    for category in [ALL, *categories_of(questions)]:
        ids = [question.question_id for question in questions if category in (ALL, question.category)]
        for turn in SLICES:
            yield category, turn, [(i, one) for i in ids for one in TURNS if turn in ("both", one)]
