"""Scores and win rates: FastChat's arithmetic, what intervals hold, what is counted and what refused."""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastchat.llm_judge import show_result

from decdec_core.config import DecDECError
from decdec_eval.bootstrap import Bootstrap
from decdec_eval.mtbench.data import Question
from decdec_eval.mtbench.scores import (
    ALL,
    Judgment,
    PairRow,
    ScoreRow,
    Verdict,
    categories_of,
    pair_rows,
    score_rows,
)

QUESTIONS = [
    Question(81 + number, ("writing", "math", "stem")[number // 4], ("a", "b"), None) for number in range(12)
]
MODELS = ["base", "good", "bad"]
FEW = Bootstrap(samples=200)


def random_scores(seed: int = 0) -> list[Judgment]:
    """Scores of halves, some missing, some unrated: all that FastChat's files hold."""
    draw = np.random.default_rng(seed)
    judgments = []
    for offset, model in enumerate(MODELS):
        for question in QUESTIONS:
            for turn in (1, 2):
                if draw.random() < 0.1:
                    continue
                score = -1.0 if draw.random() < 0.2 else float(draw.integers(2 + offset, 21) / 2)
                judgments.append(Judgment(question.question_id, turn, model, score))
    return judgments


def random_verdicts(seed: int = 0) -> list[Verdict]:
    """Verdicts of all pairs of models, errors and disagreements among them."""
    draw = np.random.default_rng(seed)
    winners = ["model_1", "model_2", "tie", "error"]
    return [
        Verdict(
            question.question_id, turn, *pair, *map(str, draw.choice(winners, 2, p=[0.5, 0.25, 0.15, 0.1]))
        )
        for pair in (("good", "base"), ("bad", "base"), ("good", "bad"))
        for question in QUESTIONS
        for turn in (1, 2)
        if draw.random() > 0.1
    ]


def of(rows: list[Any], model: str, category: str = ALL, turn: int | str = "both") -> Any:
    (row,) = [row for row in rows if (row.model, row.category, row.turn) == (model, category, turn)]
    return row


def score_of(
    values: dict[tuple[int, int], float], models: list[str], baseline: str | None = None
) -> list[ScoreRow]:
    """Return the rows of scores given by (question, turn), the same of every model but the first."""
    judgments = [
        Judgment(question, turn, model, value + (number > 0))
        for number, model in enumerate(models)
        for (question, turn), value in values.items()
    ]
    return score_rows(judgments, QUESTIONS, models, baseline, FEW)


def fastchats(
    rows: list[dict[str, Any]],
    display: Callable[[argparse.Namespace], None],
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    **options: Any,
) -> list[list[str]]:
    """Return the lines, in words, that FastChat's own show_result prints of these rows of a judgment file."""
    path = folder / "judge.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = {"input_file": str(path), "bench_name": "mt_bench", "judge_model": "judge", "model_list": None}
    capsys.readouterr()
    display(argparse.Namespace(**{**given, **options}))
    return [text.split() for text in capsys.readouterr().out.splitlines()]


def test_means_are_fastchats(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    judgments = random_scores()
    rows = score_rows(judgments, QUESTIONS, MODELS, None, FEW)
    printed = fastchats([vars(one) for one in judgments], show_result.display_result_single, tmp_path, capsys)
    by_turn = [words for words in printed if len(words) == 3 and words[0] in MODELS]
    whole = [words for words in printed if len(words) == 2 and words[0] in MODELS]
    assert (len(by_turn), len(whole)) == (6, 3)
    for model, turn, score in by_turn:
        assert of(rows, model, turn=int(turn)).score.mean == pytest.approx(float(score), abs=1e-6)
    for model, score in whole:
        assert of(rows, model).score.mean == pytest.approx(float(score), abs=1e-6)


@pytest.mark.parametrize("baseline", ["base", None])
def test_win_rates_are_fastchats(
    baseline: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    verdicts = random_verdicts()
    rows = pair_rows(verdicts, QUESTIONS, MODELS, baseline, FEW)
    printed = fastchats(
        [vars(one) for one in verdicts],
        show_result.display_result_pairwise,
        tmp_path,
        capsys,
        baseline_model=baseline,
    )
    # pandas breaks wide tables: a model has a line in each part
    numbers = {
        model: [float(w) for words in printed if words and words[0] == model for w in words[1:]]
        for model in MODELS
    }
    shown = {model for model in MODELS if numbers[model]}
    assert shown == set(MODELS) - {baseline}
    assert {row.model for row in rows} == shown
    for model in shown:
        row = of(rows, model)
        ours = [row.wins, row.losses, row.ties, row.win_rate.mean, row.loss_rate.mean, row.points.mean]
        assert numbers[model] == pytest.approx(ours, abs=1e-6)
        assert row.errors > 0


def test_turns_and_categories_are_parts_of_the_whole() -> None:
    rows = score_rows(random_scores(), QUESTIONS, MODELS, "base", FEW)
    assert len(rows) == 3 * 4 * 3  # models, categories and all, both turns and each
    assert categories_of(QUESTIONS) == ["writing", "math", "stem"]
    for model in MODELS:
        for counted in ("rated", "unrated", "missing"):
            whole = getattr(of(rows, model), counted)
            assert whole == sum(getattr(of(rows, model, turn=turn), counted) for turn in (1, 2))
            assert whole == sum(
                getattr(of(rows, model, name), counted) for name in ("writing", "math", "stem")
            )
        assert of(rows, model).rated + of(rows, model).unrated + of(rows, model).missing == 24
    assert sum(of(rows, model).unrated for model in MODELS) > 0
    assert sum(of(rows, model).missing for model in MODELS) > 0


@pytest.mark.parametrize("score", [-1, 0, 0.9, 10.5, 11, 10**400, math.nan, math.inf])
def test_a_score_outside_1_to_10_is_unrated_and_in_no_mean(score: float) -> None:
    judgments = [
        Judgment(81, 1, "m", 4.0),
        Judgment.from_row({**SINGLE, "turn": 2, "score": score}),
        Judgment(82, 1, "m", 5.0),
    ]
    row = of(score_rows(judgments, QUESTIONS, ["m"], None, FEW), "m")
    assert (row.rated, row.unrated, row.missing, row.score.mean) == (2, 1, 21, 4.5)


def test_the_ends_of_the_scale_are_ratings() -> None:
    row = of(score_of({(81, 1): 1.0, (82, 1): 10.0}, ["m"]), "m")
    assert (row.rated, row.score.mean) == (2, 5.5)


def test_nothing_rated_is_no_score() -> None:
    rows = score_of({(81, 1): -1.0, (82, 2): 12.0}, ["m"])
    assert of(rows, "m").score is None
    assert of(rows, "m").unrated == 2
    assert of(rows, "m", "stem").missing == 8


def test_one_question_has_no_interval() -> None:
    row = of(score_of({(81, 1): 3.0, (81, 2): 6.0}, ["m"]), "m")
    assert (row.score.mean, row.score.low, row.score.high, row.score.questions) == (4.5, None, None, 1)


def test_two_turns_of_a_question_stay_together() -> None:
    apart = {(81 + number, turn): 1.0 + 8 * (turn == 2) for number in range(12) for turn in (1, 2)}
    together = {(81 + number, turn): 1.0 + 8 * (number % 2) for number in range(12) for turn in (1, 2)}
    score = of(score_of(apart, ["m"]), "m").score
    assert (score.mean, score.low, score.high) == (5.0, 5.0, 5.0)  # every question's mean is 5
    score = of(score_of(together, ["m"]), "m").score
    assert score.mean == 5.0
    # twelve questions of 1 or 9: 4 / sqrt(12) is a standard error of 1.15; of 24 answers it would be 0.82
    assert 2 * 1.7 < score.high - score.low < 2 * 2.7


def test_a_constant_difference_is_certain_however_far_the_questions_are_apart() -> None:
    values = {(81 + number, turn): 1.0 + number * 0.7 for number in range(12) for turn in (1, 2)}
    rows = score_of(values, ["base", "better"], "base")
    row = of(rows, "better")
    assert row.score.high - row.score.low > 2
    assert (row.difference.mean, row.difference.low, row.difference.high) == pytest.approx((1.0, 1.0, 1.0))
    assert of(rows, "base").difference is None


def test_differences_are_over_answers_rated_for_both() -> None:
    scores = {"base": {81: 2.0, 82: -1.0, 83: 6.0, 84: 4.0}, "m": {81: 3.0, 82: 10.0, 83: 11.0, 84: 4.5}}
    judgments = [Judgment(q, 1, model, score) for model, of_q in scores.items() for q, score in of_q.items()]
    row = of(score_rows(judgments, QUESTIONS, ["m"], "base", FEW), "m")
    assert row.score.mean == pytest.approx((3 + 10 + 4.5) / 3)
    assert (row.difference.mean, row.difference.questions) == (0.75, 2)


def test_a_baseline_without_scores_gives_no_differences() -> None:
    rows = score_of({(81, 1): 3.0, (82, 1): 4.0}, ["m"], "absent")
    assert all(row.difference is None for row in rows)


def test_the_paired_interval_is_the_one_of_resampling_both_models_together() -> None:
    judgments = [one for one in random_scores(3) if one.rated]
    scores = {(one.model, one.question_id, one.turn): one.score for one in judgments}
    both = [(q.question_id, t) for q in QUESTIONS for t in (1, 2)]
    both = [key for key in both if ("good", *key) in scores and ("base", *key) in scores]
    ids = sorted({question_id for question_id, _ in both})
    difference = of(score_rows(judgments, QUESTIONS, ["good"], "base", FEW), "good").difference
    means = []
    for counts in FEW.draws(len(ids)):  # of each draw both models' means, by hand
        drawn = [
            key
            for question_id, n in zip(ids, counts, strict=True)
            for key in both
            if key[0] == question_id
            for _ in range(int(n))
        ]
        of_model = {m: sum(scores[m, *key] for key in drawn) / len(drawn) for m in ("good", "base")}
        means.append(of_model["good"] - of_model["base"])
    assert (difference.low, difference.high) == pytest.approx(tuple(np.quantile(means, [0.025, 0.975])))


def test_the_same_seed_gives_the_same_numbers_in_any_order_and_company() -> None:
    judgments = random_scores()
    rows = score_rows(judgments, QUESTIONS, MODELS, "base", Bootstrap(500, seed=3))
    again = score_rows(judgments[::-1], QUESTIONS, MODELS, "base", Bootstrap(500, seed=3))
    assert rows == again
    alone = [one for one in judgments if one.model in ("good", "base")]
    assert score_rows(alone, QUESTIONS, ["good"], "base", Bootstrap(500, seed=3)) == [
        row for row in rows if row.model == "good"
    ]
    other = score_rows(judgments, QUESTIONS, MODELS, "base", Bootstrap(500, seed=4))
    assert of(other, "good").score.mean == of(rows, "good").score.mean
    assert of(other, "good").score.low != of(rows, "good").score.low


def test_an_estimate_is_the_same_in_any_order_of_questions() -> None:
    values = [(number, float(number % 7)) for number in range(40)]
    assert FEW.estimate(values) == FEW.estimate(values[::-1])


@pytest.mark.parametrize(("questions", "at_least", "at_most"), [(80, 0.92, 0.97), (10, 0.86, 0.93)])
def test_intervals_hold_the_true_mean_as_often_as_the_docstring_says(
    questions: int, at_least: float, at_most: float
) -> None:
    """600 sets of questions: one standard error of the share is 0.009 at 95 % and 0.012 at 90 %."""
    draw, bootstrap, held = np.random.default_rng(5), Bootstrap(1000), 0
    for _ in range(600):
        levels = draw.normal(5, 1.5, questions)  # of a question, which its two turns share
        scores = [(number, level + draw.normal(0, 1)) for number, level in enumerate(levels) for _ in (1, 2)]
        estimate = bootstrap.estimate(scores)
        assert estimate is not None
        held += estimate.low <= 5 <= estimate.high
    assert at_least < held / 600 < at_most


@pytest.mark.parametrize(
    ("g1", "g2", "points"),
    [
        ("model_1", "model_1", 1.0),
        ("model_2", "model_2", 0.0),
        ("tie", "tie", 0.5),
        ("model_1", "model_2", 0.5),
        ("model_2", "model_1", 0.5),
        ("model_1", "tie", 0.5),
        ("tie", "model_2", 0.5),
    ],
)
def test_a_win_needs_both_orders(g1: str, g2: str, points: float) -> None:
    verdict = Verdict(81, 1, "m", "base", g1, g2)
    assert (verdict.points("m"), verdict.points("base")) == (points, 1 - points)
    row = of(pair_rows([verdict], QUESTIONS, ["m"], "base", FEW), "m")
    assert (row.wins, row.ties, row.losses) == (points == 1.0, points == 0.5, points == 0.0)


@pytest.mark.parametrize(("g1", "g2"), [("error", "model_1"), ("tie", "error"), ("error", "error")])
def test_an_error_in_either_order_is_counted_and_in_no_rate(g1: str, g2: str) -> None:
    verdicts = [Verdict(81, 1, "m", "base", g1, g2), Verdict(81, 2, "base", "m", "model_2", "model_2")]
    row: PairRow = of(pair_rows(verdicts, QUESTIONS, ["m", "base"], "base", FEW), "m")
    assert (row.wins, row.ties, row.losses, row.errors, row.missing) == (1, 0, 0, 1, 22)
    assert row.points is not None
    assert row.points.mean == 1.0


def test_pairs_are_of_the_opponents_a_model_met() -> None:
    verdicts = random_verdicts()
    rows = pair_rows(verdicts, QUESTIONS, MODELS, None, FEW)
    good = of(rows, "good")
    assert good.opponents == ("bad", "base")
    assert good.wins + good.ties + good.losses + good.errors + good.missing == 2 * 24
    against = pair_rows(verdicts, QUESTIONS, MODELS, "base", FEW)
    assert of(against, "good").opponents == ("base",)
    assert {row.model for row in against} == {"good", "bad"}


def test_a_models_wins_in_pairs_are_the_others_losses() -> None:
    rows = pair_rows(
        [one for one in random_verdicts() if one.models == ("bad", "good")], QUESTIONS, MODELS, None, FEW
    )
    for category in (ALL, "math"):
        for turn in ("both", 1, 2):
            good, bad = of(rows, "good", category, turn), of(rows, "bad", category, turn)
            assert (good.wins, good.ties, good.losses) == (bad.losses, bad.ties, bad.wins)
            assert good.points.mean + bad.points.mean == pytest.approx(1)


SINGLE = {"question_id": 81, "turn": 1, "model": "m", "score": 7}
PAIR = {"question_id": 81, "turn": 1, "model_1": "m", "model_2": "b", "g1_winner": "tie", "g2_winner": "tie"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"score": "7"}, "score must be a number, got '7'"),
        ({"score": True}, "score must be a number, got True"),
        ({"score": None}, "score must be a number, got None"),
        ({"turn": 3}, "turn must be one of 1, 2, got 3"),
        ({"turn": True}, "turn must be one of 1, 2, got True"),
        ({"question_id": "81"}, "question_id must be 0.."),
        ({"model": ""}, "model must be a model's name, got ''"),
        ({"model": 4}, "model must be a model's name, got 4"),
    ],
)
def test_what_is_no_judgment_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(DecDECError, match=re.escape(message)):
        Judgment.from_row({**SINGLE, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"g1_winner": "A"}, "g1_winner must be one of model_1, model_2, tie, error, got 'A'"),
        ({"g2_winner": None}, "g2_winner must be one of"),
        ({"model_2": "m"}, "model_1 and model_2 must be two models, got 'm' twice"),
    ],
)
def test_what_is_no_verdict_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(DecDECError, match=re.escape(message)):
        Verdict.from_row({**PAIR, **change})


@pytest.mark.parametrize("key", list(SINGLE))
def test_a_judgment_without_a_key_is_refused(key: str) -> None:
    with pytest.raises(DecDECError, match=f"a judgment must have {key}, got"):
        Judgment.from_row({name: value for name, value in SINGLE.items() if name != key})


@pytest.mark.parametrize("key", list(PAIR))
def test_a_verdict_without_a_key_is_refused(key: str) -> None:
    with pytest.raises(DecDECError, match=f"a judgment must have {key}, got"):
        Verdict.from_row({name: value for name, value in PAIR.items() if name != key})


def test_lines_become_what_they_say() -> None:
    assert Judgment.from_row(SINGLE) == Judgment(81, 1, "m", 7.0)
    assert Verdict.from_row(PAIR) == Verdict(81, 1, "m", "b", "tie", "tie")


def test_a_judgment_that_is_there_twice_is_refused() -> None:
    judgments = [Judgment(81, 2, "m", 7.0), Judgment(81, 1, "m", 7.0), Judgment(81, 2, "m", 8.0)]
    with pytest.raises(DecDECError, match="question 81, turn 2 of m must be judged once, got two"):
        score_rows(judgments, QUESTIONS, ["m"], None, FEW)


def test_a_pair_that_is_there_twice_is_refused_whichever_comes_first() -> None:
    verdicts = [Verdict(81, 1, "m", "b", "tie", "tie"), Verdict(81, 1, "b", "m", "tie", "tie")]
    with pytest.raises(DecDECError, match="question 81, turn 1 of b against m must be judged once, got two"):
        pair_rows(verdicts, QUESTIONS, ["m"], None, FEW)


def test_a_question_that_is_none_is_refused() -> None:
    with pytest.raises(DecDECError, match=r"one of the 12 questions' ids 81\.\.92, got 999"):
        score_rows([Judgment(999, 1, "m", 7.0)], QUESTIONS, ["m"], None, FEW)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((99,), "bootstrap must be 100..100000, got 99"),
        ((100, -1), "seed must be 0.."),
        ((100001,), "got 100001"),
    ],
)
def test_draws_that_cannot_be_are_refused(arguments: tuple[int, ...], message: str) -> None:
    with pytest.raises(DecDECError, match=re.escape(message)):
        Bootstrap(*arguments)
