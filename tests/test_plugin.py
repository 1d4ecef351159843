"""The import hook: what it adds to lm-eval, and that lm-eval stays whole where it cannot."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pandas
import pytest
from conftest import with_checkout_first
from lm_eval.api.registry import model_registry
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks import TaskManager

from decdec_core.config import DecDECError
from decdec_eval import plugin
from decdec_eval.__main__ import with_model

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def installed() -> None:
    plugin.install()


def run(code: str, **environment: str) -> str:
    """Return what `code` prints in a fresh interpreter that sees this checkout."""
    env = {**os.environ, "PYTHONPATH": with_checkout_first(), **environment}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_start_up_imports_nothing_else() -> None:
    code = (
        "import sys; before = set(sys.modules); import decdec_eval.plugin as p; p.install();"
        "print(*sorted(set(sys.modules) - before))"
    )
    assert set(run(code).split()) <= {"__future__", "decdec_eval", "decdec_eval.plugin"}


@pytest.mark.parametrize(("switch", "count"), [("0", "1"), ("1", "0")])
def test_start_up_line_can_be_switched_off(switch: str, count: str) -> None:
    line = (ROOT / "decdec_eval_hook.pth").read_text("utf-8").strip()
    assert "\n" not in line
    assert line.startswith("import ")
    # in its own process without site's .pth files, where an installed copy would have run already
    code = f"{line}\nimport sys; print(sum(type(f).__name__ == '_AfterImport' for f in sys.meta_path))"
    env = {**os.environ, "PYTHONPATH": with_checkout_first(), "DECDEC_NO_HOOK": switch}
    done = subprocess.run([sys.executable, "-S", "-c", code], env=env, capture_output=True, text=True)
    assert done.stdout.strip() == count, done.stderr


@pytest.fixture
def started(tmp_path: Path) -> dict[str, str]:
    """The environment of an interpreter that runs the start-up line, as one with the wheel installed does."""
    (tmp_path / "sitecustomize.py").write_text((ROOT / "decdec_eval_hook.pth").read_text("utf-8"), "utf-8")
    path = os.pathsep.join([str(tmp_path), with_checkout_first()])
    return {**os.environ, "PYTHONPATH": path, "DECDEC_TRACEBACK": ""}


SCRIPT = str(Path(sysconfig.get_path("scripts")) / "lm_eval")
REFUSED = ["--model", "decdec", "--model_args", "pretrained=absent", "--tasks", "wikitext"]


def refused(command: list[str], environment: dict[str, str]) -> str:
    """Return the standard error of a command that asks for an artifact that is not there."""
    done = subprocess.run([*command, *REFUSED], env=environment, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    return done.stderr.rstrip()


@pytest.mark.parametrize("command", [[SCRIPT], [sys.executable, "-m", "lm_eval"]])
def test_a_refusal_on_the_command_line_is_one_line(command: list[str], started: dict[str, str]) -> None:
    error = refused(command, started)
    assert error.splitlines()[-1].startswith("decdec: error: pretrained must be an artifact's local folder")
    assert "Traceback" not in error


def test_the_whole_trace_on_request(started: dict[str, str]) -> None:
    command = [sys.executable, "-m", "decdec_eval"]
    error = refused(command, {**started, "DECDEC_TRACEBACK": "yes"})
    assert "Traceback" in error
    assert error.splitlines()[-1].startswith("decdec_core.config.DecDECError: pretrained must be")


def test_a_library_keeps_its_users_excepthook() -> None:
    code = (
        "import sys; hook = sys.excepthook; import decdec_eval.plugin as p; p.install();"
        "import lm_eval.evaluator, decdec_eval.lm_model; print(sys.excepthook is hook)"
    )
    assert run(code) == "True"


@pytest.mark.parametrize("trace", ["", "1"])
def test_other_errors_stay_whole(trace: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[type[BaseException]] = []
    monkeypatch.setattr(sys, "excepthook", lambda kind, _error, _trace: shown.append(kind))
    monkeypatch.setenv("DECDEC_TRACEBACK", trace)
    plugin.one_line_errors()
    plugin.one_line_errors()
    for error in (DecDECError("refused"), ValueError("other")):
        sys.excepthook(type(error), error, None)
    assert shown == ([DecDECError, ValueError] if trace else [ValueError])


class Likelihood:
    """A model that refuses one output type, and evaluate()'s record of who was asked."""

    def refuse_uncompensated(self, output_types: set[str]) -> None:
        if "multiple_choice" in output_types:
            raise DecDECError("refused")


def evaluator(ran: list[object]) -> ModuleType:
    module = ModuleType("lm_eval.evaluator")

    def evaluate(lm: object, task_dict: object, limit: int | None = None) -> int | None:
        ran.append(task_dict)
        return limit

    module.evaluate = evaluate  # type: ignore[attr-defined]
    plugin._extend(module)
    return module


GENERATES, CHOOSES = (
    SimpleNamespace(OUTPUT_TYPE="generate_until"),
    SimpleNamespace(OUTPUT_TYPE="multiple_choice"),
)


@pytest.mark.parametrize(
    "tasks",
    [
        {"tasks": {"a": GENERATES, "b": CHOOSES}, "groups": {}, "group_map": {"g": ["a", "b"]}},
        {"a": GENERATES, "group": {"inner": {"b": CHOOSES}}},
        {"group": (None, {"b": CHOOSES})},
    ],
)
def test_tasks_are_refused_before_any_request(tasks: dict[str, Any]) -> None:
    ran: list[object] = []
    module = evaluator(ran)
    with pytest.raises(DecDECError, match="refused"):
        module.evaluate(lm=Likelihood(), task_dict=tasks)
    assert ran == []
    assert module.evaluate(object(), tasks, limit=3) == 3
    assert ran == [tasks]


@pytest.mark.parametrize(
    "tasks", [{"a": GENERATES}, {"a": 5, 6: None}, None, {"a": SimpleNamespace(OUTPUT_TYPE=1)}]
)
def test_unknown_tasks_are_left_to_the_evaluator(tasks: Any) -> None:
    ran: list[object] = []
    assert evaluator(ran).evaluate(Likelihood(), tasks, 2) == 2
    assert ran == [tasks]


def test_both_model_types_are_registered_lazily() -> None:
    code = (
        "import sys; import decdec_eval.plugin as p; p.install(); import lm_eval.models;"
        "from lm_eval.api.registry import model_registry as r;"
        "print('decdec' in r, 'hf' in r, 'decdec_eval.lm_model' in sys.modules)"
    )
    assert run(code) == "True True False"


def test_install_twice_is_install_once() -> None:
    plugin.install()
    assert sum(type(finder).__name__ == "_AfterImport" for finder in sys.meta_path) == 1


def test_an_entry_point_that_came_first_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_registry, "_objs", {"decdec": "elsewhere:Class"})
    plugin._extend(ModuleType("lm_eval.models"))
    assert model_registry._objs == {"decdec": "elsewhere:Class"}


@pytest.mark.parametrize(
    ("name", "contents", "lost"),
    [
        ("lm_eval.tasks.manager", {}, "without --include_path"),
        ("lm_eval.tasks.manager", {"TaskManager": object}, "without --include_path"),
        ("lm_eval.api.task", {"ConfigurableTask": object}, "DECDEC_DATA_DIR"),
        ("lm_eval.evaluator", {}, "before other requests run"),
        ("lm_eval.evaluator", {"evaluate": lambda model, tasks: None}, "before other requests run"),
    ],
)
def test_what_is_missing_is_named_and_nothing_changes(name: str, contents: dict[str, Any], lost: str) -> None:
    module = ModuleType(name)
    vars(module).update(contents)
    before = dict(vars(module))
    with pytest.warns(UserWarning, match=lost):
        plugin._extend(module)
    assert vars(module) == before


def test_tasks_are_found_and_not_twice(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    copy = shutil.copytree(plugin.tasks_folder(), tmp_path / "tasks")
    with caplog.at_level(logging.WARNING):
        manager = TaskManager(include_path=str(copy))
    assert not [record for record in caplog.records if "decdec" in record.getMessage()]
    assert Path(manager.task_index["decdec_wikitext2"].yaml_path).parent == copy
    assert manager.task_index["decdec"].tags == {"decdec_wikitext2"}
    assert "wikitext" in manager.all_tasks


def paths_given(include_path: Any, include_defaults: bool = True) -> Any:
    """Return the include_path that a TaskManager gets once it is extended."""

    class Manager:
        def __init__(
            self, verbosity: Any = None, include_path: Any = None, include_defaults: bool = True
        ) -> None:
            self.include_path = include_path

    module = ModuleType("lm_eval.tasks.manager")
    module.TaskManager = Manager  # type: ignore[attr-defined]
    plugin._extend(module)
    return Manager(include_path=include_path, include_defaults=include_defaults).include_path  # type: ignore[call-arg]


def test_own_tasks_come_before_the_users(tmp_path: Path) -> None:
    own = plugin.tasks_folder()
    assert paths_given(None) == [own]
    assert paths_given(str(tmp_path)) == [own, str(tmp_path)]
    assert paths_given([tmp_path]) == [own, tmp_path]
    assert paths_given(own) == own
    assert paths_given(tmp_path, include_defaults=False) == tmp_path


def wikitext_task(**config: Any) -> ConfigurableTask:
    """Return a task that reads the data set of lm-eval's wikitext task, by its own rules."""
    values = {
        "task": "some_wikitext",
        "dataset_path": "EleutherAI/wikitext_document_level",
        "dataset_name": "wikitext-2-raw-v1",
        "output_type": "loglikelihood_rolling",
        "training_split": "train",
        "test_split": "test",
        "doc_to_text": "",
        "doc_to_target": "{{page}}",
    }
    return ConfigurableTask(config={**values, **config})


@pytest.fixture
def pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "wikitext_document_level"
    folder.mkdir()
    pandas.DataFrame({"page": ["one", "two"]}).to_parquet(folder / "test.parquet")
    monkeypatch.setenv("DECDEC_DATA_DIR", str(tmp_path))
    return folder


@pytest.mark.usefixtures("pages")
def test_known_data_is_read_locally() -> None:
    task = wikitext_task()
    assert list(task.test_docs()) == [{"page": "one"}, {"page": "two"}]
    assert len(task.training_docs()) == 0


def test_missing_test_split_is_named(pages: Path) -> None:
    (pages / "test.parquet").unlink()
    with pytest.raises(DecDECError, match=r"test split in DECDEC_DATA_DIR, got no .*test\.parquet"):
        wikitext_task()


@pytest.mark.usefixtures("pages")
def test_examples_from_a_missing_split_are_refused() -> None:
    with pytest.raises(DecDECError, match=r"train split in DECDEC_DATA_DIR, got no .*train\.parquet"):
        wikitext_task(num_fewshot=2)


def test_other_data_still_comes_from_the_hub(pages: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr("lm_eval.api.task.datasets.load_dataset", lambda path, **_: asked.append(path))
    ConfigurableTask.download(SimpleNamespace(**hub_task("someone/else")))  # type: ignore[arg-type]
    monkeypatch.delenv("DECDEC_DATA_DIR")
    ConfigurableTask.download(SimpleNamespace(**hub_task("SaylorTwift/bbh")))  # type: ignore[arg-type]
    assert asked == ["someone/else", "SaylorTwift/bbh"]


def hub_task(path: str) -> dict[str, Any]:
    return {"DATASET_PATH": path, "DATASET_NAME": "navigate", "config": SimpleNamespace(custom_dataset=None)}


def test_real_data_has_every_row(data_dir: Path) -> None:
    assert len(wikitext_task().test_docs()) == 62
    bbh = {"dataset_path": "SaylorTwift/bbh", "dataset_name": "snarks", "training_split": None}
    task = wikitext_task(**bbh, doc_to_target="{{target}}")
    assert len(task.test_docs()) == 178
    assert set(task.test_docs()[0]) == {"input", "target"}


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (["--tasks", "a"], ["--tasks", "a", "--model", "decdec"]),
        (["run", "--tasks", "a"], ["run", "--tasks", "a", "--model", "decdec"]),
        (["--model", "hf"], ["--model", "hf"]),
        (["--model=hf"], ["--model=hf"]),
        (["--config", "runs.yaml"], ["--config", "runs.yaml"]),
        (["ls", "tasks"], ["ls", "tasks"]),
        ([], []),
    ],
)
def test_module_adds_the_model_type(given: list[str], wanted: list[str]) -> None:
    assert with_model(given) == wanted
