"""What a judge is asked, and what its words say: FastChat's prompts, ratings and verdicts."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from decdec_core.config import DecDECError
from decdec_eval.mtbench.data import REFERENCE_CATEGORIES, JudgePrompt, Question

LOWEST, HIGHEST = 1, 10  # ratings
UNRATED_SCORE = -1  # what FastChat writes, and what its show_result leaves out
NO_RATING, OUTSIDE = "no rating", f"outside {LOWEST} to {HIGHEST}"

_NUMBER = r"([0-9]+\.?[0-9]*)"
# the second where the first is nowhere in the judgment, as FastChat does; the first match of each counts
_RATINGS = (re.compile(rf"\[\[{_NUMBER}\]\]"), re.compile(rf"\[{_NUMBER}\]"))
_VERDICTS = {"[[A]]": "A", "[[B]]": "B", "[[C]]": "tie"}  # in the order that FastChat looks for them
_GENERAL = {"single": "single-v1", "pair": "pair-v2"}
_WITH_REFERENCE = {"single": "single-math-v1", "pair": "pair-math-v1"}


@dataclass(frozen=True)
class Rating:
    """A judgment's rating. score: 1 to 10, or -1; unrated: why it is -1 (NO_RATING, OUTSIDE), else None."""

    score: int | float
    unrated: str | None


def needs_reference(question: Question) -> bool:
    """Return whether the judge is shown a reference answer."""
    return question.category in REFERENCE_CATEGORIES


def prompt_of(prompts: Mapping[str, JudgePrompt], mode: str, question: Question, turn: int) -> JudgePrompt:
    """Return the prompt for `mode` ("single" or "pair") and turn 1 or 2; one that is missing, or of another
    type, raises DecDECError."""
    names = _WITH_REFERENCE if needs_reference(question) else _GENERAL
    name = names[mode] + ("-multi-turn" if turn == 2 else "")
    kind = {"single": "single", "pair": "pairwise"}[mode]
    if name not in prompts or prompts[name].type != kind:
        raise DecDECError(f"the judge prompts must have {name} of type {kind}, got {', '.join(prompts)}")
    return prompts[name]


def filled(
    prompt: JudgePrompt,
    question: Question,
    answers: Sequence[tuple[str, str]],
    reference: tuple[str, str] | None,
) -> str:
    """Return the user's message. answers: both turns of the one that is rated, or of A and of B."""
    labels = ("answer",) if len(answers) == 1 else ("answer_a", "answer_b")
    texts = dict(zip(labels, answers, strict=True)) | {"question": question.turns}
    fields = {label: turns[0] for label, turns in texts.items()}
    if reference is not None:
        texts["ref_answer"] = reference
    fields |= {
        f"{label}_{turn}": text for label, turns in texts.items() for turn, text in enumerate(turns, 1)
    }
    try:
        return prompt.template.format(**fields)
    except KeyError as error:
        raise DecDECError(f"prompt {prompt.name} must name {', '.join(fields)}, got {error}") from None


def rating_of(judgment: str) -> Rating:
    """Return the first "[[x]]", or where there is none the first "[x]"."""
    for pattern in _RATINGS:
        found = pattern.search(judgment)
        if found:
            score = float(found[1])  # of any length: int refuses thousands of digits
            if not LOWEST <= score <= HIGHEST:
                return Rating(UNRATED_SCORE, OUTSIDE)
            return Rating(int(score) if found[1].isdigit() else score, None)
    return Rating(UNRATED_SCORE, NO_RATING)


def verdict_of(judgment: str) -> str:
    """Return "A", "B", "tie" or, where the judge gave no verdict, "error"."""
    return next((verdict for word, verdict in _VERDICTS.items() if word in judgment), "error")
