"""BIG-Bench Hard from local files: lm-eval's own tasks and prompts, and the ten questions of each subtask."""

from __future__ import annotations

import functools
import json
import math
import statistics
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import datasets
import lm_eval.tasks
import lm_eval.utils
import pyarrow.parquet
import pytest
import yaml
from lm_eval import simple_evaluate
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import _load_module_with_cache

from decdec_core.config import DecDECError
from decdec_eval import plugin

UPSTREAM = Path(lm_eval.tasks.__file__).parent / "bbh"
GROUPS = {"bbh_cot_fewshot": 3, "bbh_cot_zeroshot": 0, "bbh_fewshot": 3, "bbh_zeroshot": 0}
MINI = Path(plugin.tasks_folder()) / "bbh_mini"
pytestmark = pytest.mark.usefixtures("data_dir", "compiled_once")


@pytest.fixture(autouse=True, scope="module")
def installed() -> None:
    plugin.install()


@pytest.fixture(scope="module")
def compiled_once() -> Iterator[None]:
    """lm-eval compiles a task's templates again for every question: here once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lm_eval.utils.env, "from_string", functools.cache(lm_eval.utils.env.from_string))
        yield


@pytest.fixture(scope="module")
def upstream() -> dict[str, Any]:
    """lm-eval's tasks of all four groups, by name, with the data of DECDEC_DATA_DIR and no hub."""
    manager = TaskManager(include_path=str(UPSTREAM), include_defaults=False)
    return manager.load(list(GROUPS))["tasks"]


@pytest.fixture(scope="module")
def mini() -> dict[str, Any]:
    return TaskManager(include_path=str(MINI), include_defaults=False).load(["decdec_bbh_mini"])["tasks"]


@pytest.fixture(scope="module")
def questions() -> ModuleType:
    return _load_module_with_cache(MINI / "questions.py")


def rows(folder: Path, subtask: str) -> list[dict[str, str]]:
    return pyarrow.parquet.read_table(folder / "bbh" / f"{subtask}.parquet").to_pylist()


class PlainLoader(yaml.SafeLoader):
    """Reads lm-eval's task files without importing the filters that they name."""


PlainLoader.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))


def written(group: str, subtask: str, questions: list[str]) -> list[str]:
    """Return the prompts that a task file describes, without lm-eval and without a template engine."""
    folder = UPSTREAM / group.removeprefix("bbh_")
    own = yaml.load((folder / f"{subtask}.yaml").read_text(), PlainLoader)
    shared = yaml.load((folder / own["include"]).read_text(), PlainLoader)
    template = own["doc_to_text"]
    assert template.count("{{") == template.count("{{input}}") == 1
    examples = own["fewshot_config"]["samples"][: GROUPS[group]] if GROUPS[group] else []
    between = shared.get("target_delimiter", " ")
    solved = [
        template.replace("{{input}}", example["input"]) + between + example["target"] + "\n\n"
        for example in examples
    ]
    before = own["description"] + "".join(solved)
    return [before + template.replace("{{input}}", question) for question in questions]


def prompts(task: Any) -> list[str]:
    return [task.fewshot_context(doc, task.config.num_fewshot) for doc in task.test_docs()]


def test_every_question_of_every_group(upstream: dict[str, Any], data_dir: Path) -> None:
    for group in GROUPS:
        tasks = {name: task for name, task in upstream.items() if name.startswith(f"{group}_")}
        assert len(tasks) == 27
        assert sum(len(task.test_docs()) for task in tasks.values()) == 6511
        assert {task.config.num_fewshot for task in tasks.values()} == {GROUPS[group]}
    task = upstream["bbh_zeroshot_snarks"]
    assert list(task.test_docs()) == rows(data_dir, "snarks")


def test_every_prompt_of_cot_fewshot(upstream: dict[str, Any], data_dir: Path) -> None:
    count = 0
    for name, task in upstream.items():
        if name.startswith("bbh_cot_fewshot_"):
            subtask = name.removeprefix("bbh_cot_fewshot_")
            wanted = written("bbh_cot_fewshot", subtask, [row["input"] for row in rows(data_dir, subtask)])
            assert prompts(task) == wanted
            count += len(wanted)
    assert count == 6511


@pytest.mark.parametrize("group", ["bbh_cot_zeroshot", "bbh_fewshot", "bbh_zeroshot"])
@pytest.mark.parametrize("subtask", ["snarks", "dyck_languages", "word_sorting", "penguins_in_a_table"])
def test_prompts_of_the_other_groups(
    upstream: dict[str, Any], data_dir: Path, group: str, subtask: str
) -> None:
    wanted = written(group, subtask, [row["input"] for row in rows(data_dir, subtask)])
    assert prompts(upstream[f"{group}_{subtask}"]) == wanted


def test_mini_asks_the_committed_questions(
    mini: dict[str, Any], upstream: dict[str, Any], data_dir: Path
) -> None:
    drawn = json.loads((MINI / "questions.json").read_text())
    assert len(mini) == len(drawn["subtasks"]) == 27
    for subtask, chosen in drawn["subtasks"].items():
        task, whole = mini[f"decdec_bbh_mini_{subtask}"], upstream[f"bbh_cot_fewshot_{subtask}"]
        inputs = [rows(data_dir, subtask)[number]["input"] for number in chosen["ids"]]
        assert len(set(chosen["ids"])) == 10
        assert prompts(task) == written("bbh_cot_fewshot", subtask, inputs)
        for field in ("metric_list", "generation_kwargs", "filter_list", "doc_to_target", "num_fewshot"):
            assert getattr(task.config, field) == getattr(whole.config, field), field


def test_the_draw_is_reproduced(questions: ModuleType, data_dir: Path) -> None:
    inputs = {
        file.stem: [row["input"] for row in rows(data_dir, file.stem)]
        for file in (data_dir / "bbh").glob("*.parquet")
    }
    assert questions.draw(inputs) == json.loads((MINI / "questions.json").read_text())


def from_hub(monkeypatch: pytest.MonkeyPatch, test: list[dict[str, str]]) -> None:
    """Make the hub's set hold `test`, and take the local one away."""
    monkeypatch.delenv("DECDEC_DATA_DIR")
    hub = datasets.DatasetDict(test=datasets.Dataset.from_list(test))
    monkeypatch.setattr(datasets, "load_dataset", lambda *_args, **_more: hub)


def test_mini_from_the_hub(
    questions: ModuleType, mini: dict[str, Any], data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from_hub(monkeypatch, rows(data_dir, "snarks"))
    config = {"task": "again", "dataset_name": "snarks", "metadata": {"version": 1.0}}
    assert prompts(questions.BBHMini(config)) == prompts(mini["decdec_bbh_mini_snarks"])


@pytest.mark.parametrize("damage", [lambda test: test[::-1], lambda test: test[:20]])
def test_other_questions_are_refused(
    questions: ModuleType, data_dir: Path, monkeypatch: pytest.MonkeyPatch, damage: Any
) -> None:
    from_hub(monkeypatch, damage(rows(data_dir, "snarks")))
    config = {"task": "again", "dataset_name": "snarks", "metadata": {"version": 1.0}}
    with pytest.raises(DecDECError, match=r"questions \[.*\] of BBH's snarks must have the digest .*, got "):
        questions.BBHMini(config)


def test_a_task_file_that_lm_eval_lacks_is_refused(questions: ModuleType) -> None:
    with pytest.raises(DecDECError, match=r"lm-eval must have its task file .*astrology.yaml, got none"):
        questions.upstream_config("astrology")


class Stub(LM):
    """Answers the first questions of each subtask rightly, the first subtasks more of them."""

    def __init__(self) -> None:
        super().__init__()
        self.right: dict[str, list[bool]] = {}

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        answers = []
        for request in requests:
            seen = self.right.setdefault(request.task_name, [])
            seen.append(len(seen) < len(self.right) % 11)
            answers.append(f"the answer is {request.doc['target'] if seen[-1] else 'unknown'}.")
        return answers

    def loglikelihood(self, *_: Any) -> Any:
        raise NotImplementedError

    loglikelihood_rolling = loglikelihood


def test_the_standard_error_is_that_of_a_stratified_mean() -> None:
    stub = Stub()
    manager = TaskManager(include_path=str(MINI), include_defaults=False)
    results = simple_evaluate(model=stub, tasks=["decdec_bbh_mini"], task_manager=manager)["results"]
    assert [len(right) for right in stub.right.values()] == [10] * 27
    means = [statistics.fmean(right) for right in stub.right.values()]
    squares = [statistics.variance(map(float, right)) / 10 for right in stub.right.values()]
    got = results["decdec_bbh_mini"]
    assert got["exact_match,get-answer"] == pytest.approx(statistics.fmean(means))
    assert got["exact_match_stderr,get-answer"] == pytest.approx(math.sqrt(sum(squares)) / 27)
    # what the group's description says of it: half of each subtask right is the widest that there is
    widest = math.sqrt(27 * statistics.variance([0.0, 1.0] * 5) / 10) / 27
    assert got["exact_match_stderr,get-answer"] < widest < 0.0325
    single = results["decdec_bbh_mini_snarks"]["exact_match_stderr,get-answer"]
    assert single == pytest.approx(squares[list(stub.right).index("decdec_bbh_mini_snarks")] ** 0.5)
