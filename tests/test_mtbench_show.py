"""show: what it reads and refuses, what it prints and writes, and what the radar draws."""

from __future__ import annotations

import json
import logging
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from decdec_core.commandline import OneLineParser, run_command
from decdec_core.config import DecDECError
from decdec_eval.bootstrap import Bootstrap
from decdec_eval.mtbench import figure
from decdec_eval.mtbench.data import Question
from decdec_eval.mtbench.scores import Judgment, score_rows
from decdec_eval.mtbench.show import add_show, read_judgments

CATEGORIES = ("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities")
QUESTIONS = [Question(81 + number, CATEGORIES[number // 2], ("a", "b"), None) for number in range(16)]


def single(question_id: int, turn: int, model: str, score: Any, judge: str = "gpt-4") -> dict[str, Any]:
    """A line as FastChat writes it."""
    return {
        "question_id": question_id,
        "model": model,
        "judge": [judge, "single-v1"],
        "user_prompt": "prompt",
        "judgment": f"Fine. [[{score}]]",
        "score": score,
        "turn": turn,
        "tstamp": 1700000000.5,
    }


def pair(
    question_id: int, turn: int, model: str, winners: tuple[str, str], judge: str = "gpt-4"
) -> dict[str, Any]:
    """A line as FastChat writes it, against "full"."""
    return {
        "question_id": question_id,
        "model_1": model,
        "model_2": "full",
        "g1_winner": winners[0],
        "g2_winner": winners[1],
        "judge": [judge, "pair-v2"],
        "g1_judgment": "[[A]]",
        "g2_judgment": "[[B]]",
        "turn": turn,
        "tstamp": 1700000000.5,
    }


def singles(questions: list[Question] = QUESTIONS, judge: str = "gpt-4") -> list[dict[str, Any]]:
    """Scores of full, dynamic (unrated once) and none (one question missing), in this order of quality."""
    draw = np.random.default_rng(0)
    rows = []
    for question in questions:
        level = int(draw.integers(6, 10))
        for turn in (1, 2):
            rows.append(single(question.question_id, turn, "full", level, judge))
            rows.append(
                single(question.question_id, turn, "dynamic", level - int(draw.integers(0, 2)), judge)
            )
            rows.append(single(question.question_id, turn, "none", level - int(draw.integers(2, 5)), judge))
    rows[1]["score"] = -1
    return [row for row in rows if (row["model"], row["question_id"]) != ("none", questions[-1].question_id)]


def write(answers: Path, name: str, rows: list[dict[str, Any]]) -> Path:
    path = answers / "model_judgment" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A data folder with sixteen questions."""
    rows = [{"question_id": q.question_id, "category": q.category, "turns": q.turns} for q in QUESTIONS]
    (tmp_path / "data" / "mt_bench").mkdir(parents=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "data" / "mt_bench" / "question.jsonl").write_text(text)
    return tmp_path / "data"


@pytest.fixture
def answers(tmp_path: Path) -> Path:
    """A folder in which gpt-4 scored three models and compared two of them with the third."""
    folder = tmp_path / "answers"
    write(folder, "gpt-4_single.jsonl", singles())
    pairs = [pair(q.question_id, t, "none", ("model_2", "model_2")) for q in QUESTIONS for t in (1, 2)]
    pairs += [pair(q.question_id, 1, "dynamic", ("model_1", "model_2")) for q in QUESTIONS]
    pairs[0]["g1_winner"] = "error"
    write(folder, "gpt-4_pair.jsonl", pairs)
    return folder


def run(*arguments: object) -> int:
    parser = OneLineParser(prog="show")
    add_show(parser)
    options, unknown = parser.parse_known_args([str(argument) for argument in arguments])
    parser.refuse(unknown)
    return run_command(lambda: options.run(options))


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Return the one line with which these arguments are refused."""
    assert run(*arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    return printed.err


def cells_of(text: str, model: str) -> list[str]:
    """Return the cells of the first line of a table that begins with `model`."""
    (found, *_) = [line for line in text.splitlines() if line.startswith(f"| {model} |")]
    return [cell.strip() for cell in found.strip("|").split("|")]


def test_everything_is_printed_and_written(
    answers: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = {"temperature": 0, "prompts_sha256": "ab"}
    (answers / "model_judgment" / "gpt-4_single.config.json").write_text(json.dumps(config))
    out = tmp_path / "new" / "out"
    common = (
        "--answers",
        answers,
        "--data-dir",
        data,
        "--baseline",
        "full",
        "--bootstrap",
        300,
        "--out",
        out,
    )
    assert run(*common) == 0
    printed = capsys.readouterr().out
    names = {"table.md", "scores.csv", "scores.json", "radar.png", "pairs.csv"}
    assert {path.name for path in out.iterdir()} == names
    assert (out / "table.md").read_text() in printed
    assert "scores by gpt-4 (1 to 10) on 16 questions, mean of both turns; 1 unrated, 2 missing" in printed

    result = json.loads((out / "scores.json").read_text())
    assert (result["rated"], result["unrated"], result["missing"], result["pair_errors"]) == (93, 1, 2, 1)
    assert result["bootstrap"] == {"samples": 300, "seed": 0, "level": 0.95, "unit": "question"}
    assert result["judge_configurations"] == {"single": config}
    assert result["questions"]["count"] == 16
    assert {"versions", "hardware", "commit"} <= result.keys()
    assert set(result["files"]) == {"gpt-4_single.jsonl", "gpt-4_pair.jsonl"}

    by_hand = [row["score"] for row in singles() if row["model"] == "dynamic" and row["score"] > 0]
    (row,) = [
        row
        for row in result["scores"]
        if (row["model"], row["category"], row["turn"]) == ("dynamic", "all", "both")
    ]
    assert row["score"]["mean"] == pytest.approx(np.mean(by_hand))
    low, high = row["difference"]["low"], row["difference"]["high"]
    assert cells_of(printed, "dynamic")[2] == f"{row['difference']['mean']:+.2f} [{low:+.2f}, {high:+.2f}]"
    assert cells_of(printed, "dynamic")[5:] == ["31", "1", "0"]
    assert cells_of(printed, "full")[2] == "baseline"
    assert cells_of(printed, "none")[5:] == ["30", "0", "2"]

    frame = pd.read_csv(out / "scores.csv")
    assert len(frame) == len(result["scores"]) == 3 * 9 * 3
    for cells, row in zip(frame.to_dict("records"), result["scores"], strict=True):
        assert (cells["model"], cells["category"], cells["turn"]) == (
            row["model"],
            row["category"],
            str(row["turn"]),
        )
        assert (
            cells["score"] == pytest.approx(row["score"]["mean"])
            if row["score"]
            else np.isnan(cells["score"])
        )
    pairs = pd.read_csv(out / "pairs.csv")
    whole = pairs[(pairs.category == "all") & (pairs.turn == "both")].set_index("model")
    assert list(whole.loc["none", ["wins", "ties", "losses", "errors", "missing"]]) == [0, 0, 31, 1, 0]
    assert list(whole.loc["dynamic", ["wins", "ties", "losses", "errors", "missing"]]) == [0, 16, 0, 0, 16]

    first = {name: (out / name).read_bytes() for name in names}
    assert run(*common) == 0
    assert {name: (out / name).read_bytes() for name in names} == first


def test_the_real_questions_have_ten_to_a_category(
    data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [single(number, turn, "m", 1 + number % 10) for number in range(81, 161) for turn in (1, 2)]
    write(tmp_path, "judge_single.jsonl", rows)
    assert run("--answers", tmp_path, "--data-dir", data_dir, "--out", tmp_path) == 0
    frame = pd.read_csv(tmp_path / "scores.csv")
    both = frame[frame.turn == "both"]
    assert list(both.category) == ["all", *CATEGORIES]
    assert list(both.rated) == [160] + [20] * 8
    assert list(both.score) == [5.5] * 9
    assert "5.50 [" in capsys.readouterr().out


def test_models_come_best_first_or_as_named(
    answers: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ("--answers", answers, "--data-dir", data, "--bootstrap", 100)
    heads = []
    for more in ([], ["--models", "none", "full"], ["--models", "none", "--baseline", "dynamic"]):
        assert run(*common, *more) == 0
        heads.append(
            next(text for text in capsys.readouterr().out.splitlines() if text.startswith("| category"))
        )
    assert heads == [
        "| category | full | dynamic | none |",
        "| category | none | full |",
        "| category | dynamic | none |",
    ]


def test_pairs_alone_are_shown_and_nothing_stale_stays(
    answers: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ("--answers", answers, "--data-dir", data, "--bootstrap", 100, "--out", tmp_path / "out")
    assert run(*common) == 0
    (answers / "model_judgment" / "gpt-4_single.jsonl").unlink()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    capsys.readouterr()
    assert run(*common) == 0
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"table.md", "scores.json", "pairs.csv", "notes.txt"}
    printed = capsys.readouterr().out
    assert cells_of(printed, "none")[1] == "0.0% [0.0%, 0.0%]"
    assert "against each other" in printed
    line = refused(capsys, *common, "--figure", tmp_path / "radar.png")
    assert "--figure must have scores of single answers to draw, got pairs only" in line


def test_a_baseline_of_pairs_only_is_said_to_give_no_differences(
    answers: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(answers, "gpt-4_single.jsonl", [row for row in singles() if row["model"] != "full"])
    assert run("--answers", answers, "--data-dir", data, "--bootstrap", 100, "--baseline", "full") == 0
    printed = capsys.readouterr().out
    assert "No answer was rated both for full and for another model: no differences." in printed
    assert "against full, both turns" in printed


@pytest.mark.parametrize("torn", [b'{"question_id": 8', b'{"question_id": 81, "model": "caf\xc3', b"{"])
def test_a_torn_last_line_is_dropped_with_a_warning(
    torn: bytes, answers: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = read_judgments(answers, None)
    path = answers / "model_judgment" / "gpt-4_single.jsonl"
    path.write_bytes(path.read_bytes() + torn)
    with caplog.at_level(logging.WARNING):
        assert read_judgments(answers, None).judgments == whole.judgments
    assert [record.getMessage() for record in caplog.records] == [
        "gpt-4_single.jsonl, line 95, the last, was cut off and is dropped"
    ]


def test_a_whole_last_line_without_its_end_is_kept(answers: Path, caplog: pytest.LogCaptureFixture) -> None:
    whole = read_judgments(answers, None)
    path = answers / "model_judgment" / "gpt-4_single.jsonl"
    path.write_bytes(path.read_bytes().rstrip(b"\n"))
    assert read_judgments(answers, None).judgments == whole.judgments
    assert caplog.records == []


def test_several_judges_must_be_named(answers: Path) -> None:
    write(answers, "org_judge_single.jsonl", singles(judge="org/judge")[:4])
    with pytest.raises(DecDECError, match="must name one of several judges, got none of gpt-4, org/judge"):
        read_judgments(answers, None)
    named = read_judgments(answers, "org/judge")
    assert (named.judge, len(named.judgments), named.verdicts) == ("org/judge", 4, ())
    assert len(read_judgments(answers, "gpt-4").judgments) == 94
    with pytest.raises(DecDECError, match=r"judge-model must be one of gpt-4, org/judge, got 'gpt4'.*gpt-4"):
        read_judgments(answers, "gpt4")


def test_an_empty_file_is_of_the_judge_that_its_name_says(answers: Path) -> None:
    write(answers, "late_pair.jsonl", [])
    assert read_judgments(answers, "late").judgments == ()
    with pytest.raises(DecDECError, match="several judges, got none of gpt-4, late"):
        read_judgments(answers, None)


def test_a_judge_that_has_judged_nothing_is_refused(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, "late_single.jsonl", [])
    line = refused(capsys, "--answers", tmp_path, "--data-dir", data)
    assert "late must have judged something of a model, got none" in line


def test_two_files_of_one_judge_are_refused(answers: Path) -> None:
    write(answers, "copy_single.jsonl", singles())
    with pytest.raises(
        DecDECError, match=r"one file of single judgments, got copy_single\.jsonl and gpt-4_single"
    ):
        read_judgments(answers, None)


def test_a_folder_without_judgments_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DecDECError, match=r"must hold model_judgment/JUDGE_single\.jsonl or .*, got none"):
        read_judgments(tmp_path, None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"half": ', "gpt-4_single.jsonl, line 2 must be JSON, got: "),
        ("[1, 2]", "gpt-4_single.jsonl, line 2 must be an object, got list"),
        ('{"judge": "gpt-4"}', r"line 2: judge must be \[name, prompt name\], got 'gpt-4'"),
        ('{"judge": ["other", "p"]}', "line 2 must be of the file's one judge, gpt-4, got other"),
        (json.dumps(single(81, 2, "m", "8")), "gpt-4_single.jsonl, line 2: score must be a number, got '8'"),
        (json.dumps(single(81, 3, "m", 8)), "gpt-4_single.jsonl, line 2: turn must be one of 1, 2, got 3"),
    ],
)
def test_a_line_that_is_no_judgment_is_refused(text: str, message: str, tmp_path: Path) -> None:
    path = write(tmp_path, "gpt-4_single.jsonl", [single(81, 1, "m", 8)])
    path.write_text(path.read_text() + text + "\n" + json.dumps(single(82, 1, "m", 8)) + "\n")
    with pytest.raises(DecDECError, match=message):
        read_judgments(tmp_path, None)


def test_a_broken_configuration_of_the_judge_is_refused(answers: Path) -> None:
    (answers / "model_judgment" / "gpt-4_pair.config.json").write_text("{")
    with pytest.raises(DecDECError, match=r"gpt-4_pair\.config\.json must be JSON, got"):
        read_judgments(answers, None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--baseline", "ful"],
            "baseline must be one of dynamic, full, none, got 'ful' (did you mean 'full'?)",
        ),
        (["--models", "full", "x"], "model must be one of dynamic, full, none, got 'x'"),
        (["--bootstrap", "5"], "bootstrap must be 100..100000, got 5"),
        (["--seed", "-1"], "seed must be 0.."),
    ],
)
def test_bad_arguments_cost_one_line(
    arguments: list[str], message: str, answers: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in refused(capsys, "--answers", answers, "--data-dir", data, *arguments)


def test_a_judgment_of_another_question_costs_one_line(
    answers: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(answers, "gpt-4_single.jsonl", [*singles(), single(160, 1, "full", 3)])
    line = refused(capsys, "--answers", answers, "--data-dir", data)
    assert "question_id must be one of the 16 questions' ids 81..96, got 160" in line


def test_a_figure_of_no_kind_is_refused(
    answers: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run("--answers", answers, "--figure", tmp_path / "radar.bmp")
    assert "must end in .png, .svg or .pdf" in capsys.readouterr().err


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_the_figure_is_written_where_it_is_asked_for(
    suffix: str, answers: Path, data: Path, tmp_path: Path
) -> None:
    path = tmp_path / f"mine.{suffix}"
    assert run("--answers", answers, "--data-dir", data, "--bootstrap", 100, "--figure", path) == 0
    assert path.read_bytes()[:5] in (b"\x89PNG\r", b"<?xml")
    assert [other.name for other in tmp_path.iterdir() if other.name.endswith(".tmp")] == []


def test_names_cannot_break_a_table(tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, "j_single.jsonl", [single(81, 1, "a|b\nc", 8), single(82, 1, "a|b\nc", 6)])
    assert run("--answers", tmp_path, "--data-dir", data, "--bootstrap", 100) == 0
    printed = capsys.readouterr().out
    assert "\n| a\\|b c | 7.00 [" in printed
    assert "\n| roleplay | none |" in printed


MODELS = {
    "full precision": 9.0,
    "a model with a long name in two lines, awq3-dynamic-k16": 6.5,
    "$none$": 2.0,
}


@pytest.fixture
def radar() -> Any:
    """The figure of three models; the last has no rating in math."""
    judgments = [
        Judgment(q.question_id, turn, model, level + number % 2 - 0.1 * (number // 2))
        for model, level in MODELS.items()
        for number, q in enumerate(QUESTIONS)
        for turn in (1, 2)
        if (model, q.category) != ("$none$", "math")
    ]
    rows = score_rows(judgments, QUESTIONS, list(MODELS), None, Bootstrap(100))
    drawn = figure.radar(
        rows, "MT-Bench, scores by a judge with $ and $ in its name, " + "and more words " * 6
    )
    yield drawn
    plt.close(drawn)


def test_the_radar_has_a_line_for_each_model_through_its_scores(radar: Figure) -> None:
    (axes,) = radar.axes
    lines = axes.get_lines()
    assert len(lines) == 3
    for line, (model, level) in zip(lines, MODELS.items(), strict=True):
        values = np.asarray(line.get_ydata())
        assert len(values) == 9  # closed
        wanted = [level + 0.5 - 0.1 * number for number in range(8)]
        if model == "$none$":
            wanted[CATEGORIES.index("math")] = np.nan  # a gap
        np.testing.assert_allclose(values, [*wanted, wanted[0]])
        np.testing.assert_allclose(line.get_xdata(), np.arange(9) % 8 * np.pi / 4)
    assert len({(line.get_color(), line.get_marker()) for line in lines}) == 3


def test_the_radar_names_categories_rings_and_models(radar: Figure) -> None:
    (axes,) = radar.axes
    assert axes.get_ylim() == (0, 10)
    assert (axes.get_theta_offset(), axes.get_theta_direction()) == (np.pi / 2, -1)  # clockwise from above
    assert list(axes.get_yticks()) == [2, 4, 6, 8, 10]  # the rings
    named = {text.get_text(): text.get_position() for text in axes.texts}
    spokes = ["Writing", "Roleplay", "Reasoning", "Math", "Coding", "Extraction", "STEM", "Humanities"]
    assert list(named)[:8] == spokes
    assert [named[name][0] for name in spokes] == pytest.approx(list(np.arange(8) * np.pi / 4))
    assert {name: named[name][1] for name in list(named)[8:]} == {str(n): n for n in (0, 2, 4, 6, 8, 10)}
    (legend,) = radar.legends
    labels = [text.get_text().replace("\n", " ") for text in legend.get_texts()]
    assert labels == [
        "full precision: 9.15",
        "a model with a long name in two lines, awq3-dynamic-k16: 6.65",
        "$none$: 2.14 (no rating: math)",
    ]
    assert not any(text.get_parse_math() for text in (*legend.get_texts(), *radar.texts))


def test_nothing_in_the_radar_is_cut_off_or_lies_on_another_text(radar: Figure) -> None:
    radar.draw_without_rendering()
    (axes,), (legend,) = radar.axes, radar.legends
    texts = [*axes.texts, *legend.get_texts(), legend.get_title(), *radar.texts]
    boxes = {text.get_text(): text.get_window_extent() for text in texts}
    assert len(boxes) == 8 + 6 + 3 + 2
    for text, box in boxes.items():
        assert box.x0 >= 0, text
        assert box.y0 >= 0, text
        assert box.x1 <= radar.bbox.x1, text
        assert box.y1 <= radar.bbox.y1, text
    for (text, box), (other, other_box) in combinations(boxes.items(), 2):
        assert not box.overlaps(other_box), (text, other)


def test_many_models_are_told_apart() -> None:
    judgments = [Judgment(q.question_id, 1, f"m{n}", 1 + n / 4) for n in range(20) for q in QUESTIONS]
    rows = score_rows(judgments, QUESTIONS, [f"m{n}" for n in range(20)], None, Bootstrap(100))
    drawn = figure.radar(rows, "caption")
    looks = {
        (line.get_color(), line.get_marker(), line.get_linestyle()) for line in drawn.axes[0].get_lines()
    }
    plt.close(drawn)
    assert len(looks) == 20


def test_a_model_without_any_rating_is_in_the_legend_and_not_at_zero() -> None:
    judgments = [Judgment(q.question_id, 1, "m", -1) for q in QUESTIONS]
    drawn = figure.radar(score_rows(judgments, QUESTIONS, ["m"], None, Bootstrap(100)), "caption")
    (line,), (legend,) = drawn.axes[0].get_lines(), drawn.legends
    plt.close(drawn)
    assert np.isnan(np.asarray(line.get_ydata(), dtype=float)).all()
    assert [text.get_text() for text in legend.get_texts()] == ["m: none rated"]
