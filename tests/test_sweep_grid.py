"""What a sweep's YAML may say, and the cells that it makes."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from decdec_core.config import DecDECError
from decdec_eval.sweep.grid import BUNDLED, FULL, Cell, Slowdown, Sweep, read_sweep, sweep_of
from decdec_eval.sweep.tasks import Fidelity, LmEval, Perplexity

SMALL: dict[str, Any] = {
    "models": ["smollm2"],
    "tasks": [{"kind": "perplexity", "text": "pydoc"}],
    "k_chunk": [8, "8/8/16/16"],
}


def cells(**changes: Any) -> list[Cell]:
    return sweep_of({**SMALL, **changes}).cells()


def test_full_precision_and_none_are_one_cell_and_random_has_seeds() -> None:
    counts = Counter(cell.selection for cell in cells())
    assert counts == {FULL: 1, "none": 1, "random": 6, "static": 2, "exact": 2, "dynamic": 2}
    assert {cell.seed for cell in cells() if cell.selection != "random"} == {0}
    assert {cell.seed for cell in cells() if cell.selection == "random"} == {0, 1, 2}
    assert len(set(cells())) == len(cells())


def test_the_grid_is_the_product() -> None:
    found = cells(
        models=["smollm2", {"source": "./folder", "name": "other"}],
        tasks=[{"kind": "perplexity"}, {"kind": "lm_eval", "name": "decdec_bbh_mini"}, {"kind": "fidelity"}],
        methods=["awq", "squeezellm"],
        bits=[3, 3.5],
        selections=["none", "dynamic"],
        slowdowns=[2.5, 5],
        gpus=["h200", "rtx-4090"],
    )
    # full; four bases, each with none and with two k_chunk and four budgets
    assert len(found) == 2 * 3 * (1 + 4 * (1 + 6))
    assert {cell.model.name for cell in found} == {"smollm2", "other"}
    assert found[0].task == Perplexity()
    assert {type(cell.task) for cell in found} == {Perplexity, LmEval, Fidelity}
    amounts = {cell.amount for cell in found}
    assert amounts >= {None, "8", "8/8/16/16", Slowdown(2.5, "h200"), Slowdown(5.0, "rtx-4090")}
    assert [cell for cell in found if cell.base is None] == [cell for cell in found if cell.selection == FULL]


def test_without_gpus_a_slowdown_is_of_the_gpu_at_hand() -> None:
    found = cells(k_chunk=[], slowdowns=[5], selections=["dynamic"])
    assert {cell.amount for cell in found} == {None, Slowdown(5.0, None)}
    assert "5 % of this GPU" in found[-1].label


def test_only_codebooks_have_a_clustering_and_only_others_groups() -> None:
    found = sweep_of({**SMALL, "methods": ["rtn", "squeezellm"], "group_size": 64, "clustering": "flash1d"})
    weights = {base.weight.method: base.weight for base in found.bases()}
    assert (weights["rtn"].group_size, weights["rtn"].clustering) == (64, None)
    assert (weights["squeezellm"].group_size, weights["squeezellm"].clustering) == (None, "flash1d")


REFUSED = [
    ({"model": ["smollm2"]}, r"got unknown key 'model' \(did you mean 'models'\?\)"),
    ({"models": None}, "models must be a list, got None"),
    ({"models": []}, "models must have at least 1, got none"),
    ({"models": ["a", "a"]}, "models must have each of its values once"),
    ({"models": [3]}, "source of a model must be text, got 3"),
    ({"models": [{"name": "x"}]}, "a model must have source, got {'name': 'x'}"),
    ({"models": [{"source": "x", "nme": "y"}]}, r"unknown key 'nme' \(did you mean 'name'\?\)"),
    ({"methods": ["awk"]}, r"method must be one of .*, got 'awk' \(did you mean 'awq'\?\)"),
    ({"methods": "awq"}, "methods must be a list, got 'awq'"),
    ({"bits": [3, 7]}, "bits must be one of .*, got 7"),
    ({"residual_bits": [3]}, "residual_bits must be one of 2, 4, 8, 16, got 3"),
    ({"selections": ["dynamc"]}, "did you mean 'dynamic'"),
    ({"k_chunk": [2000]}, "k_chunk must be 0..1024, got 2000"),
    ({"k_chunk": []}, "a selection must have k_chunk or slowdowns, got neither"),
    ({"slowdowns": [-1]}, "slowdowns must be 0 to 1000 percent, got -1"),
    ({"slowdowns": [True]}, "slowdowns must be 0 to 1000 percent, got True"),
    ({"gpus": ["h200"]}, "gpus must be with slowdowns, got h200 alone"),
    ({"slowdowns": [5], "gpus": [5]}, "gpus must be names or files of profiles, got 5"),
    ({"seeds": [0, 1]}, "seeds must be at least 3 for random selection, got 2"),
    ({"seeds": [0, 1, -1]}, "seed must be 0.*, got -1"),
    ({"dtype": "float64"}, "dtype must be one of float32, float16, bfloat16, got 'float64'"),
    ({"device": "tpu"}, "device must be one of auto, cpu, cuda, got 'tpu'"),
    ({"calibration": 3}, "calibration must be wikitext2, pydoc or a text file, got 3"),
    ({"tasks": [{"name": "x"}]}, "a task must be a mapping with kind, one of perplexity, lm_eval,"),
    ({"tasks": ["perplexity"]}, "a task must be a mapping with kind"),
    ({"tasks": [{"kind": "perplexty"}]}, r"kind must be .*, got 'perplexty' \(did you mean 'perplexity'\?\)"),
    ({"tasks": [{"kind": "perplexity", "window": 3}]}, r"unknown key 'window' \(did you mean 'windows'\?\)"),
    ({"tasks": [{"kind": "perplexity", "windows": 0}]}, "windows must be 1.*, got 0"),
    (
        {"tasks": [{"kind": "perplexity", "text": "c4"}]},
        "text must be one of auto, wikitext2, pydoc, got 'c4'",
    ),
    ({"tasks": [{"kind": "perplexity", "window_length": 1}]}, "window_length must be 2.*, got 1"),
    ({"tasks": [{"kind": "lm_eval"}]}, "a task of kind lm_eval must have name, got none"),
    ({"tasks": [{"kind": "lm_eval", "name": ""}]}, "name must be a task of lm-eval, got ''"),
    ({"tasks": [{"kind": "lm_eval", "name": "x", "limit": 0.5}]}, "limit must be 1.*, got 0.5"),
    ({"tasks": [{"kind": "lm_eval", "name": "x", "num_fewshot": -1}]}, "num_fewshot must be 0..1000, got -1"),
    ({"tasks": [{"kind": "lm_eval", "name": "x", "batch_size": "many"}]}, "batch_size must be 1..4096"),
    (
        {"tasks": [{"kind": "lm_eval", "name": "x", "apply_chat_template": "yes"}]},
        "apply_chat_template must be one of True, False, got 'yes'",
    ),
    ({"tasks": [{"kind": "lm_eval", "name": "x", "use_cache": "c.db"}]}, "got unknown key 'use_cache'"),
    ({"tasks": [{"kind": "fidelity", "max_new_tokens": 0}]}, "max_new_tokens must be 1.*, got 0"),
    ({"tasks": [{"kind": "fidelity", "seed": -1}]}, "seed must be 0.*, got -1"),
    ({"tasks": [{"kind": "mt_bench"}]}, "a task of kind mt_bench must have judge, got none"),
    ({"tasks": [{"kind": "mt_bench", "judge": " "}]}, "judge must be a model's name, got ' '"),
    ({"tasks": [{"kind": "mt_bench", "judge": "j", "base_url": 3}]}, "base_url must be a URL, got 3"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED)
def test_refused_in_one_line(change: dict[str, Any], message: str) -> None:
    with pytest.raises(DecDECError, match=message) as refused:
        sweep_of({**SMALL, **change})
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("models: [", "must be YAML, got: while parsing"),
        ("- a", "a sweep must be a mapping, got list"),
        ("tasks: []", "a sweep must have models, got none"),
        ("models: []", "a sweep must have tasks, got none"),
    ],
)
def test_a_file_that_is_no_sweep_is_refused(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "s.yaml"
    path.write_text(text)
    with pytest.raises(DecDECError, match=message) as refused:
        read_sweep(str(path))
    assert str(path) in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_missing_file_names_the_bundled_ones() -> None:
    with pytest.raises(DecDECError, match=r"one of paper.yaml, quick.yaml, smollm2.yaml, got papr.yaml"):
        read_sweep("papr.yaml")


def grid_of(sweep: Sweep) -> set[tuple[str, float]]:
    return {(base.weight.method, base.weight.bits) for base in sweep.bases()}


def test_the_bundled_sweeps() -> None:
    assert {path.name for path in BUNDLED.glob("*.yaml")} == {"paper.yaml", "smollm2.yaml", "quick.yaml"}
    paper, small = read_sweep("paper.yaml"), read_sweep("smollm2.yaml")
    wanted = {(method, bits) for method in ("awq", "squeezellm") for bits in (3, 3.5, 4)}
    assert grid_of(paper) == grid_of(small) == wanted
    for sweep in (paper, small):
        assert set(sweep.selections) == {"none", "random", "static", "dynamic", "exact"}
        assert sweep.slowdowns == (2.5, 5, 10, 20)
    assert small.gpus == ("h200", "rtx-4050-mobile")
    assert small.k_chunk == (8, 16, 32, 64)
    assert [task.kind for task in small.tasks] == ["perplexity", "lm_eval", "fidelity"]
    assert small.tasks[0] == Perplexity(windows=None)
    assert read_sweep("quick.yaml").device == "cpu"
