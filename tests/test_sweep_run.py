"""Cells of tiny models, run in this process: what their files hold, and what a second run does."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from judge_server import JudgeServer, says
from mtbench_files import KEY, write_mt_bench
from mtbench_models import single_threaded
from sweep_fixtures import FIDELITY, PERPLEXITY, Place, place, tiny_chat
from transformers import AutoModelForCausalLM

from decdec_core import cli
from decdec_core.config import Compensation, DecDECError
from decdec_core.model import set_compensation
from decdec_core.provenance import versions
from decdec_core.sources import load_tokenizer
from decdec_core.texts import load_text
from decdec_eval import perplexity
from decdec_eval.lm_model import DecDECLM
from decdec_eval.mtbench import client
from decdec_eval.sweep import __main__ as command
from decdec_eval.sweep import lm_tasks, measure
from decdec_eval.sweep.run import Runner, read_configuration

__all__ = ["place", "tiny_chat"]  # fixtures
one_thread = pytest.fixture(single_threaded, autouse=True, scope="module")
Capture = pytest.CaptureFixture[str]


def test_a_cell_holds_what_determines_it_and_what_it_gave(place: Place) -> None:
    assert place.sweep() == 0
    assert len(place.runs()) == 3
    full, none, dynamic = (place.run_of(selection) for selection in (None, "none", "dynamic"))
    for path in (place.out / "runs").glob("*.json"):
        determining = json.dumps(json.loads(path.read_text())["configuration"], sort_keys=True)
        assert path.stem == hashlib.sha256(determining.encode()).hexdigest()[:16]

    for run in (full, none, dynamic):
        configuration, items = run["configuration"], run["items"]
        assert (run["format_version"], run["measured"]) == (1, True)
        assert configuration["model"] == "tiny"
        assert (configuration["dtype"], configuration["device"]) == ("float32", "cpu")
        wanted = {"kind": "perplexity", "name": "pydoc", "limit": 3, "window_length": 64, "version": 1}
        assert wanted.items() <= configuration["task"].items()
        assert configuration["task"]["data_sha256"] == load_text("pydoc", "test").sha256
        assert configuration["versions"].items() <= versions("lm_eval").items()
        assert (items["unit"], items["ids"], items["weights"]) == ("window", [0, 1, 2], None)
        assert {name: len(values) for name, values in items["values"].items()} == dict.fromkeys(
            ("nll", "kl", "top1"), 3
        )
        for name in ("token_perplexity", "mean_nll", "kl", "top1"):
            assert {name, f"{name}_stderr"} <= run["metrics"].keys()
        assert run["disk_bytes"] > 0
        assert run["environment"]["versions"]["torch"] == torch.__version__
        assert run["command"].startswith("python -m decdec_eval.sweep ")
        assert str(place.root / "model") not in json.dumps(run)  # it has a name

    assert full["configuration"]["base"] is full["ledger"] is full["quantization"] is None
    assert set(full["configuration"]["model_files"]) == {"config_sha256", "weights"}
    assert (full["metrics"]["kl"], full["metrics"]["top1"]) == (0.0, 1.0)
    configuration = dynamic["configuration"]
    assert configuration["base"]["weight"] == {
        "method": "rtn",
        "bits": 3,
        "group_size": 128,
        "clustering": None,
    }
    assert configuration["compensation"] == Compensation("dynamic", 64).to_dict()
    assert configuration["artifact_hash"] == dynamic["ledger"]["artifact_hash"]
    assert configuration["reference"] == full["configuration"]["model_files"]
    assert configuration["budget"] is None
    assert dynamic["quantization"]["weight"]["method"] == "rtn"
    assert dynamic["ledger"]["bytes_per_token"] > 0 == none["ledger"]["bytes_per_token"]
    assert none["metrics"]["kl"] > dynamic["metrics"]["kl"] > 0


def artifact_of(place: Place) -> Path:
    (folder,) = (place.root / "cache" / "artifacts").glob("model-rtn3-r4-*")
    return folder


def test_perplexity_and_divergence_are_the_definitions(place: Place) -> None:
    place.sweep()
    token_ids = load_tokenizer(str(place.root / "model"))(load_text("pydoc").text).input_ids
    windows = perplexity.windows(token_ids, 64)[:3]
    full = AutoModelForCausalLM.from_pretrained(place.root / "model", dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(artifact_of(place), dtype=torch.float32)
    set_compensation(model, Compensation("dynamic", 64))
    values = place.run_of("dynamic")["items"]["values"]
    # float32 logits, of slices of tokens there and of all at once here
    wanted = perplexity.window_nll(model, windows, progress=False)
    assert values["nll"] == pytest.approx(wanted, rel=1e-5)
    wanted = perplexity.window_nll(full, windows, progress=False)
    assert place.run_of(None)["items"]["values"]["nll"] == pytest.approx(wanted, rel=1e-5)
    for index, window in enumerate(windows):
        ids = torch.tensor([window])
        with torch.no_grad():
            p, q = (m(ids).logits[0, :-1].double().softmax(-1) for m in (full, model))
        assert values["kl"][index] == pytest.approx((p * (p / q).log()).sum(-1).mean().item(), rel=1e-4)
        same = (p.argmax(-1) == q.argmax(-1)).double().mean().item()
        assert values["top1"][index] == pytest.approx(same)
    metrics = place.run_of("dynamic")["metrics"]
    assert metrics["token_perplexity"] == pytest.approx(math.exp(sum(values["nll"]) / 3))
    assert metrics["kl"] == pytest.approx(sum(values["kl"]) / 3)


def test_random_runs_for_every_seed_and_the_others_for_one(place: Place) -> None:
    assert place.sweep(selections=["none", "random", "static"]) == 0
    found = [run["configuration"]["compensation"] for run in place.runs()]
    seeds = sorted((one["selection"], one["seed"]) if one else ("full", 0) for one in found)
    assert seeds == [("full", 0), ("none", 0), ("random", 0), ("random", 1), ("random", 2), ("static", 0)]
    losses = [place.run_of("random", seed=seed)["metrics"]["mean_nll"] for seed in range(3)]
    assert len(set(losses)) == 3


def test_switching_in_place_is_loading_anew(place: Place) -> None:
    lm = DecDECLM(artifact_of(place), device="cpu", dtype="float32", selection="exact", k_chunk=128)
    ids = torch.arange(40)[None]
    with torch.no_grad():
        wanted = lm.model(ids).logits
        other = DecDECLM(artifact_of(place), device="cpu", dtype="float32", selection="none")
        assert not torch.equal(other.model(ids).logits, wanted)
        other.switch(lm.compensation)
        assert torch.equal(other.model(ids).logits, wanted)
    assert other.compensation == lm.compensation
    assert other.get_model_info()["decdec"]["selection"] == "exact"
    full = DecDECLM(place.root / "model", device="cpu", method="full")
    full.switch(Compensation("none", 0))
    with pytest.raises(DecDECError, match="selection must be absent with method=full"):
        full.switch(Compensation("dynamic", 16))


def test_nothing_is_done_twice(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    assert place.sweep() == 0
    before = {path: path.stat().st_mtime_ns for path in (place.out / "runs").iterdir()}
    with monkeypatch.context() as patch:
        patch.setattr(Runner, "_model", lambda *_a, **_k: pytest.fail("loaded for cells that are there"))
        assert place.sweep() == 0
    assert {path: path.stat().st_mtime_ns for path in (place.out / "runs").iterdir()} == before
    # one more selection loads one model, and measures one cell
    measured: list[Any] = []
    original = measure.perplexity
    monkeypatch.setattr(measure, "perplexity", lambda *a: measured.append(a) or original(*a))
    assert place.sweep(selections=["none", "dynamic", "static"]) == 0
    assert len(measured) == 1
    assert len(place.runs()) == 4
    assert all(path.stat().st_mtime_ns == when for path, when in before.items())


@pytest.mark.parametrize("cells_done", range(3))
def test_a_killed_sweep_goes_on(cells_done: int, place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    original = measure.perplexity
    measured: list[str] = []

    def dying(*arguments: Any) -> Any:
        if len(measured) == cells_done:
            raise KeyboardInterrupt
        measured.append("")
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(measure, "perplexity", dying)
        assert place.sweep() == 130
    assert len(place.runs()) == cells_done
    (place.out / "runs").mkdir(parents=True, exist_ok=True)
    (place.out / "runs" / ".half.json.123.tmp").write_text("{")
    monkeypatch.setattr(measure, "perplexity", lambda *a: measured.append("") or original(*a))
    assert place.sweep() == 0
    assert len(measured) == len(place.runs()) == 3


@pytest.mark.parametrize(
    "change",
    [
        {"tasks": [{**PERPLEXITY, "windows": 2}]},
        {"tasks": [{**PERPLEXITY, "window_length": 65}]},
        {"dtype": "bfloat16"},
        {"k_chunk": [65]},
        {"residual_bits": [8]},
        {"bits": [4]},
    ],
)
def test_another_input_is_another_cell(change: dict[str, Any], place: Place) -> None:
    place.sweep()
    before = {path.name for path in (place.out / "runs").iterdir()}
    assert place.sweep(**change) == 0
    after = {path.name for path in (place.out / "runs").iterdir()}
    assert before < after
    names = {read_configuration(path)["compensation"] is None for path in (place.out / "runs").iterdir()}
    assert names == {True, False}


def test_fidelity_is_of_the_full_models_own_answers(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    assert place.sweep(tasks=[FIDELITY], selections=["none", "exact"], k_chunk=[1024]) == 0
    full, none, exact = (place.run_of(selection) for selection in (None, "none", "exact"))
    (answers,) = (place.out / "answers").glob("*/model_answer/full.jsonl")
    rows = [json.loads(line) for line in answers.read_text().splitlines()]
    tokens = [sum(map(len, row["decdec"]["tokens"])) for row in rows]
    for run in (full, none, exact):
        assert (run["items"]["unit"], run["items"]["ids"]) == ("conversation", [81, 82])
        assert run["items"]["weights"] == tokens
        assert run["metrics"]["tokens"] == sum(tokens)
        mean = sum(w * v for w, v in zip(tokens, run["items"]["values"]["kl"], strict=True)) / sum(tokens)
        assert run["metrics"]["kl"] == pytest.approx(mean)
    assert (full["metrics"]["kl"], full["metrics"]["top1"]) == (0.0, 1.0)
    assert none["metrics"]["kl"] > exact["metrics"]["kl"] > 0
    # the answers and the states are there: another cell needs no pass of the full model
    monkeypatch.setattr(measure, "full_answers", lambda *a: pytest.fail("answered again"))
    monkeypatch.setattr(measure, "keep_turns", lambda *a: pytest.fail("read again"))
    assert place.sweep(tasks=[FIDELITY], selections=["none", "static"], k_chunk=[64]) == 0


@pytest.fixture
def profile(place: Place) -> Path:
    """A profile for the tiny model of a GPU so slow that its products leave time to fetch."""
    place.sweep(selections=["none"], tasks=[{**PERPLEXITY, "windows": 1}])
    shutil.rmtree(place.out)
    out = place.folder / "slow.json"
    numbers = ["--gpu", "slow", "--memory-gb-s", "0.5", "--link-gb-s", "0.1"]
    assert (
        cli.main(["tune", str(artifact_of(place)), *numbers, "--slowdown", "5", "20", "--out", str(out)]) == 0
    )
    return out


def test_budgets_are_stated_and_what_draws_nothing_is_not_measured(
    profile: Path, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[Any] = []
    original = measure.perplexity
    monkeypatch.setattr(measure, "perplexity", lambda *a: measured.append(a) or original(*a))
    budgets = {"k_chunk": [], "slowdowns": [0, 20], "gpus": [str(profile)]}
    assert place.sweep(selections=["none", "random", "dynamic"], **budgets) == 0
    stated = [run for run in place.runs() if run["configuration"]["budget"]]
    assert len(stated) == 2 * (3 + 1)
    for run in stated:
        budget = run["configuration"]["budget"]
        assert (budget["gpu"], budget["predicted"]) == ("slow", True)
        assert budget["expected_percent"] == budget["predicted_percent"]
    nothing = [run for run in stated if run["configuration"]["budget"]["slowdown_percent"] == 0]
    none = place.run_of("none")
    assert all(not any(run["configuration"]["compensation"]["k_chunk"]) for run in nothing)
    assert all(run["items"] == none["items"] for run in nothing)
    # full and none are not there with three windows; random three times and dynamic at 20 %
    assert len(measured) == 2 + 3 + 1
    assert sum("equal_to" in run for run in place.runs()) == len(nothing)


def test_a_budget_without_a_profile_is_skipped_and_said(place: Place, capsys: Capture) -> None:
    budgets = {"slowdowns": [5], "gpus": ["h200"]}
    assert place.sweep(**budgets) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("skipped")]
    assert len(said) == 1
    assert said[0].endswith(
        "perplexity of pydoc: no profile of NVIDIA H200 is of its shapes at 3 bits uniform"
    )
    assert len(place.runs()) == 3
    assert place.sweep("--dry-run", **budgets) == 0
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in printed[:-1]] == ["done", "done", "done", "skipped"]
    assert printed[-1] == "4 cells: 3 done, 1 skipped, 0 refused, 0 to do"


def test_the_dry_run_runs_nothing_and_knows_costs_of_like_cells(place: Place, capsys: Capture) -> None:
    assert place.sweep("--dry-run") == 0
    assert not place.out.exists()
    first = capsys.readouterr().out.splitlines()
    assert first[-1].startswith("3 cells: 0 done, 0 skipped, 0 refused, 3 to do")
    assert "unknown" in first[0]
    place.sweep()
    capsys.readouterr()
    assert place.sweep("--dry-run", k_chunk=[64, 128]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line[:8].strip() for line in lines[:-1]] == ["done", "done", "done", "to do"]
    assert "unknown" not in lines[3]
    assert lines[-1].startswith("4 cells: 3 done, 0 skipped, 0 refused, 1 to do, ")


def test_a_model_that_cannot_be_had_leaves_the_others_alone(place: Place, capsys: Capture) -> None:
    models = [{"source": "./absent", "name": "absent"}, {"source": str(place.root / "model"), "name": "tiny"}]
    assert place.sweep(models=models) == 2
    assert len(place.runs()) == 3
    error = capsys.readouterr().err.splitlines()
    assert sum(line.startswith("refused") and "./absent" in line for line in error) == 3
    assert error[-1].startswith(
        "decdec: error: all 6 cells must be there or skipped, got 0 that failed and 3"
    )


def test_a_cell_that_is_refused_leaves_the_others_alone(place: Place, capsys: Capture) -> None:
    assert place.sweep(tasks=[{**PERPLEXITY, "window_length": 5000, "windows": 1}, PERPLEXITY]) == 2
    assert len(place.runs()) == 3
    error = capsys.readouterr().err
    assert "window_length must be at most 4096 for this model, got 5000" in error
    assert "got 3 that failed and 0 that were refused" in error


def test_a_damaged_run_file_is_refused(place: Place, capsys: Capture) -> None:
    place.sweep()
    path = next((place.out / "runs").glob("*.json"))
    path.write_text('{"configuration": 3}')
    with pytest.raises(DecDECError, match="must be a run's JSON file, got"):
        read_configuration(path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--ray-address", "x:1"], "ray-address must be with --executor ray, got x:1 without it"),
        (["--executor", "slurm"], "invalid choice: 'slurm'"),
        (["--dry"], None),
        (["--use-cache", "x"], "unknown argument --use-cache"),
    ],
)
def test_bad_options_cost_one_line(
    options: list[str], message: str | None, place: Place, capsys: Capture
) -> None:
    try:
        code = place.sweep(*options)
    except SystemExit as end:
        code = int(end.code or 0)
    if message is None:  # argparse knows what is meant
        assert code == 0
        return
    assert code == 2
    assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a CUDA device")
def test_a_gpu_that_is_not_there_is_refused(place: Place, capsys: Capture) -> None:
    assert place.sweep(device="cuda") == 2
    assert "device must be one that is there, got cuda on a machine without a GPU" in capsys.readouterr().err
    assert place.sweep(slowdowns=[5]) == 2
    assert "slowdown must be with gpu=NAME" in capsys.readouterr().err
    assert place.sweep(slowdowns=[5], gpus=["h20"]) == 2
    assert "gpu must be one of" in capsys.readouterr().err


@pytest.fixture
def colours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A group of two small tasks of lm-eval, where this package's own tasks are looked for."""
    write_colours(tmp_path / "tasks")
    monkeypatch.setattr(lm_tasks.plugin, "tasks_folder", lambda: str(tmp_path / "tasks"))
    for cached in (lm_tasks.manager, lm_tasks.identity):
        cached.cache_clear()
    yield "tiny_group"
    for cached in (lm_tasks.manager, lm_tasks.identity):
        cached.cache_clear()


def write_colours(folder: Path) -> None:
    """Write tiny_warm and tiny_cold, of five and of two questions, and their group."""
    folder.mkdir()
    for name, count in (("warm", 5), ("cold", 2)):
        data = folder / f"{name}.jsonl"
        rows = [{"question": f"Wall {37 * i} of {name} is", "answer": i % 3} for i in range(count)]
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / f"{name}.yaml").write_text(
            f"task: tiny_{name}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {data}}}}}\n"
            "output_type: multiple_choice\ntest_split: test\nnum_fewshot: 0\n"
            'doc_to_text: "{{question}}"\ndoc_to_choice: ["red", "green", "blue"]\n'
            'doc_to_target: "{{answer}}"\nmetadata: {version: 1.5}\n'
            "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
        )
    (folder / "group.yaml").write_text(
        "group: tiny_group\ntask: [tiny_warm, tiny_cold]\n"
        "aggregate_metric_list: [{metric: acc, aggregation: mean, weight_by_size: true}]\n"
        "metadata: {version: 2.0}\n"
    )


def test_a_group_of_lm_eval(colours: str, place: Place) -> None:
    assert place.sweep(tasks=[{"kind": "lm_eval", "name": colours}]) == 0
    run = place.run_of("dynamic")
    task = run["configuration"]["task"]
    assert (task["kind"], task["name"], task["version"]) == ("lm_eval", "tiny_group", "2.0")
    assert len(task["data_sha256"]) == 64
    items = run["items"]
    wanted = [f"tiny_cold/{i}" for i in range(2)] + [f"tiny_warm/{i}" for i in range(5)]
    assert (items["unit"], items["ids"], items["weights"]) == ("question", wanted, None)
    values = items["values"]["acc"]
    assert run["metrics"]["acc"] == pytest.approx(sum(values) / 7)
    assert run["metrics"]["acc_stderr"] > 0
    assert run["metrics"]["groups"]["tiny_cold"]["acc"] == pytest.approx(sum(values[:2]) / 2)
    assert set(run["metrics"]["groups"]) == {"tiny_warm", "tiny_cold"}


def test_other_questions_are_another_cell(colours: str, place: Place, tmp_path: Path) -> None:
    source = str(place.root / "model")
    first = lm_tasks.identity(colours, source)
    data = tmp_path / "tasks" / "cold.jsonl"
    data.write_text(data.read_text().replace("Wall 37", "Wall 38"))
    for cached in (lm_tasks.manager, lm_tasks.identity):
        cached.cache_clear()
    second = lm_tasks.identity(colours, source)
    assert first[0] == second[0] == "2.0"
    assert first[1] != second[1]


def test_a_task_that_lm_eval_lacks_is_refused(
    colours: str, place: Place, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Nothing:
        task_index: dict[str, Any] = {}  # noqa: RUF012

        def __init__(self, **_options: Any) -> None: ...

    monkeypatch.setattr(lm_tasks, "TaskManager", Nothing)
    assert place.sweep(tasks=[{"kind": "lm_eval", "name": "tiny_grup"}]) == 2
    assert "name must be a task of lm-eval, got 'tiny_grup'" in capsys.readouterr().err


def test_mt_bench_with_a_judge(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "_FIRST_WAIT_S", 0.01)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("DECDEC_DATA_DIR", str(write_mt_bench(place.folder / "data" / "mt_bench").parent))
    with JudgeServer(lambda asked: says("Rating: [[7]]")) as server:
        task = {"kind": "mt_bench", "judge": "stub", "base_url": server.url, "max_new_tokens": 4}
        assert place.sweep(tasks=[task, PERPLEXITY], selections=["none"]) == 0
    runs = [run for run in place.runs() if run["configuration"]["task"]["kind"] == "mt_bench"]
    assert len(runs) == 2
    for run in runs:
        assert run["metrics"] == {"score": 7.0, "score_stderr": 0.0, "unrated": 0}
        assert run["items"]["ids"] == [81, 101, 151]
        assert run["items"]["weights"] == [2, 2, 2]
        assert KEY not in json.dumps(run)


def test_a_limit_beyond_the_questions_is_refused(place: Place, capsys: Capture) -> None:
    assert place.sweep(tasks=[{**FIDELITY, "limit": 5}]) == 2
    assert "limit must be at most the 4 questions, got 5" in capsys.readouterr().err


def test_the_command_names_the_bundled_sweep(place: Place, capsys: Capture) -> None:
    assert command.main(["quick.yml", "--out", str(place.out)]) == 2
    assert (
        "sweep must be a YAML file or one of paper.yaml, quick.yaml, smollm2.yaml" in capsys.readouterr().err
    )
