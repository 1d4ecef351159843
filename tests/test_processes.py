"""One run of lm-eval over two processes, as accelerate launches it: the figures of one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from conftest import with_checkout_first
from tiny_artifacts import write_tiny

from decdec_eval.processes import as_of_one


def test_rows_are_in_the_order_of_one_process() -> None:
    first = {"task": {("acc", "none"): [0, 2, 4]}, "other": {}}
    second = {"task": {("acc", "none"): [1, 3]}, "other": {}}
    assert as_of_one([first, second]) == {"task": {("acc", "none"): [0, 1, 2, 3, 4]}, "other": {}}


def test_samples_are_ordered_filter_by_filter() -> None:
    def rows(*ids: int) -> list[dict[str, Any]]:
        return [{"doc_id": i, "filter": name} for name in ("strict", "flexible") for i in ids]

    assert as_of_one([{"t": rows(0, 2, 4)}, {"t": rows(1, 3)}]) == {"t": rows(0, 1, 2, 3, 4)}


def test_values_that_are_dictionaries_without_a_document_stay_in_turn() -> None:
    assert as_of_one([{"t": [{"filter": "b"}, {"filter": "a"}]}, {"t": [{"filter": "c"}]}]) == {
        "t": [{"filter": "b"}, {"filter": "c"}, {"filter": "a"}]
    }


TASK = """task: tiny_{name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
doc_to_text: "{{{{question}}}}"
num_fewshot: 0
metadata: {{version: 1.0}}
"""
CHOICE = """output_type: multiple_choice
doc_to_choice: ["red", "green", "blue"]
doc_to_target: "{{answer}}"
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
ROLLING = """output_type: loglikelihood_rolling
doc_to_target: "{{question}}"
metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]
"""
GENERATION = """output_type: generate_until
doc_to_target: "{{answer}}"
generation_kwargs: {until: [], max_gen_toks: 5, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""


def write_tasks(folder: Path) -> None:
    """Write three tasks over the same seven questions: an odd number for two processes."""
    folder.mkdir()
    data = folder / "questions.jsonl"
    rows = [{"question": f"Wall {'abc' * i} is", "answer": i % 3} for i in range(7)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, more in (("choice", CHOICE), ("rolling", ROLLING), ("generation", GENERATION)):
        (folder / f"{name}.yaml").write_text(TASK.format(name=name, data=data) + more)


def run(folder: Path, out: str, launcher: list[str]) -> tuple[dict[str, Any], list[Any]]:
    """Return the figures of a run and its samples, from the one file of each that it wrote."""
    words = [
        "--model",
        "decdec",
        "--model_args",
        f"pretrained={folder / 'artifact'},selection=random,k_chunk=64",
    ]
    words += ["--tasks", "tiny_choice,tiny_rolling,tiny_generation", "--include_path", str(folder / "tasks")]
    words += ["--output_path", str(folder / out), "--log_samples"]
    # what the start-up line of an installed package does
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(folder / "site"), with_checkout_first()]),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    done = subprocess.run(
        [sys.executable, *launcher, "-m", "lm_eval", *words],
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (results,) = (folder / out).rglob("results_*.json")
    samples = [
        [json.loads(line) for line in path.read_text().splitlines()]
        for path in sorted((folder / out).rglob("samples_*.jsonl"))
    ]
    assert len(samples) == 3
    return json.loads(results.read_text())["results"], samples


def test_two_processes_give_the_result_of_one(tmp_path: Path) -> None:
    write_tasks(tmp_path / "tasks")
    write_tiny(tmp_path / "artifact")
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text("from decdec_eval import plugin\nplugin.install()\n")
    one, one_samples = run(tmp_path, "one", [])
    launcher = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    two, two_samples = run(tmp_path, "two", launcher)
    assert one == two  # figures and their standard errors, to the last bit
    for alone, together in zip(one_samples, two_samples, strict=True):
        assert [row["doc_id"] for row in together] == [row["doc_id"] for row in alone] == list(range(7))
        assert [row["filtered_resps"] for row in together] == [row["filtered_resps"] for row in alone]
