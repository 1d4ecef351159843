"""Makes lm-eval find the model type `decdec`, its tasks and local data, without changing a file of it.

A line in decdec_eval_hook.pth calls install() at interpreter start, so this module imports nothing that
costs time: it waits for these modules of lm-eval to be imported and then adds

    lm_eval.models              the name "decdec", as a string target that nothing has loaded yet
    lm_eval.models.huggingface  transformers' quantizer "decdec": without it, `--model hf` would load an
                                artifact as random weights
    lm_eval.tasks.manager       this package's tasks folder
    lm_eval.api.task            data sets read from $DECDEC_DATA_DIR instead of the hub
    lm_eval.evaluator           a refusal of tasks that the model cannot score, before hours of others
    lm_eval._cli                refused arguments as one line

Where a version of lm-eval lacks what is to be extended, it stays as it is and a warning says what is lost.
"""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False  # typing's own costs 10 ms to import
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from importlib.machinery import ModuleSpec
    from types import ModuleType, TracebackType
    from typing import Any

MODEL_NAME = "decdec"
MODEL_TARGET = "decdec_eval.lm_model:DecDECLM"
_BBH = "SaylorTwift/bbh"  # its configurations are the subtasks, one file each
_FOLDER_OF = {
    ("EleutherAI/wikitext_document_level", "wikitext-2-raw-v1"): "wikitext_document_level",
    ("Salesforce/wikitext", "wikitext-2-raw-v1"): "wikitext-2-raw-v1",
}


def install() -> None:
    """Extend lm-eval as soon as it is imported, or now where it already is. Safe to call twice."""
    if any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        return
    sys.meta_path.insert(0, _AfterImport())
    for name in _EXTENSIONS:
        if name in sys.modules:
            _extend(sys.modules[name])


class _AfterImport:
    """A finder that finds what the others find, and extends the module once it has run."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name not in _EXTENSIONS:
            return None
        specs = (f.find_spec(name, path, target) for f in sys.meta_path if f is not self)
        spec = next((found for found in specs if found is not None), None)
        if spec is None or spec.loader is None:
            return spec
        run_module = spec.loader.exec_module

        def run_and_extend(module: ModuleType) -> None:
            run_module(module)
            _extend(module)

        # on the instance: the loader's type stays, and with it getsource and resources
        spec.loader.exec_module = run_and_extend  # type: ignore[method-assign]
        return spec


def _extend(module: ModuleType) -> None:
    what, extend = _EXTENSIONS[module.__name__]
    try:
        extend(module)
    except (AttributeError, ImportError, LookupError) as error:
        import warnings

        warnings.warn(f"decdec: {what} does not work with this lm-eval: {error}", stacklevel=2)


def _register_model(models: ModuleType) -> None:
    from lm_eval.api.registry import model_registry

    # a newer lm-eval has read our entry point by now
    if MODEL_NAME not in model_registry:
        model_registry.register(MODEL_NAME, target=MODEL_TARGET)


def _register_quantizer(huggingface: ModuleType) -> None:
    import decdec_core.hf  # noqa: F401  importing it registers


def tasks_folder() -> str:
    """Return the folder of this package's task files: inside the wheel, or beside it in a checkout."""
    here = os.path.dirname(os.path.abspath(__file__))
    inside = os.path.join(here, "tasks")
    return inside if os.path.isdir(inside) else os.path.join(os.path.dirname(here), "tasks")


def _find_tasks(manager: ModuleType) -> None:
    import functools
    import inspect

    original = manager.TaskManager.__init__
    if getattr(original, "_decdec", False):
        return
    signature = inspect.signature(original)
    signature.parameters["include_path"], signature.parameters["include_defaults"]

    @functools.wraps(original)
    def with_own_tasks(*args: Any, **kwargs: Any) -> None:
        call = signature.bind(*args, **kwargs)
        call.apply_defaults()
        given = call.arguments["include_path"] or []
        paths = [given] if isinstance(given, (str, os.PathLike)) else list(given)
        if call.arguments["include_defaults"] and not _has_own_tasks(paths):
            # first, so that a user's task of the same name overrides ours as it overrides lm-eval's
            call.arguments["include_path"] = [tasks_folder(), *paths]
        original(*call.args, **call.kwargs)

    with_own_tasks._decdec = True  # type: ignore[attr-defined]
    manager.TaskManager.__init__ = with_own_tasks


def _has_own_tasks(paths: Iterable[str | os.PathLike[str]]) -> bool:
    """Whether our task files, or a copy of them, are under `paths`: lm-eval warns about every duplicate."""
    from pathlib import Path

    own = {file.name for file in Path(tasks_folder()).rglob("*.yaml")}
    given = {file.name for path in paths for file in Path(path).rglob("*.yaml")}
    return own <= given


def _read_local_data(task: ModuleType) -> None:
    import functools

    original = task.ConfigurableTask.download
    if getattr(original, "_decdec", False):
        return

    @functools.wraps(original)
    def download(self: Any, *args: Any, **kwargs: Any) -> None:
        dataset = None if callable(self.config.custom_dataset) else _local_dataset(self)
        if dataset is None:
            original(self, *args, **kwargs)
        else:
            self.dataset = dataset

    download._decdec = True  # type: ignore[attr-defined]
    task.ConfigurableTask.download = download


def _local_dataset(task: Any) -> Any:
    """Return the task's data set read from $DECDEC_DATA_DIR, or None if it is not one we know.

    A missing file raises DecDECError where the task evaluates on it or takes examples from it. lm-eval lists
    the training split of every task that names one, even with zero examples: an absent one is empty then.
    """
    if not os.environ.get("DECDEC_DATA_DIR"):
        return None
    files = _local_files(task.DATASET_PATH, task.DATASET_NAME)
    if files is None:
        return None
    import datasets
    import pandas

    from decdec_core.config import DecDECError

    config = task.config
    examples_from = config.fewshot_split or config.training_split or config.validation_split
    needed = {config.test_split or config.validation_split}
    if config.num_fewshot:
        needed.add(examples_from)
    splits = {}
    for split, file in files.items():
        if os.path.isfile(file):
            splits[split] = datasets.Dataset.from_pandas(pandas.read_parquet(file), preserve_index=False)
        elif split in needed:
            raise DecDECError(
                f"{task.DATASET_PATH} must have its {split} split in DECDEC_DATA_DIR, got no {file}"
            )
    if examples_from not in splits and examples_from in files:
        splits[examples_from] = next(iter(splits.values())).select([])
    return datasets.DatasetDict(splits)


def _local_files(path: str | None, name: str | None) -> dict[str, str] | None:
    """Return split -> file of a known data set, or None."""
    from decdec_core.texts import data_dir

    root = str(data_dir())
    if path == _BBH:
        return {"test": os.path.join(root, "bbh", f"{name}.parquet")}
    folder = _FOLDER_OF.get((path or "", name or ""))
    if folder is None:
        return None
    return {
        split: os.path.join(root, folder, f"{split}.parquet") for split in ("test", "validation", "train")
    }


def _refuse_before_requests(evaluator: ModuleType) -> None:
    import functools
    import inspect

    original = evaluator.evaluate
    if getattr(original, "_decdec", False):
        return
    signature = inspect.signature(original)
    signature.parameters["lm"], signature.parameters["task_dict"]

    @functools.wraps(original)
    def evaluate(*args: Any, **kwargs: Any) -> Any:
        call = signature.bind(*args, **kwargs)
        refuse = getattr(type(call.arguments["lm"]), "refuse_uncompensated", None)
        if refuse is not None:
            refuse(call.arguments["lm"], set(_output_types(call.arguments["task_dict"])))
        return original(*args, **kwargs)

    evaluate._decdec = True  # type: ignore[attr-defined]
    evaluator.evaluate = evaluate


def _output_types(tasks: object) -> Iterator[str]:
    """Yield the output type of every task in `tasks`, however nested; what else is there yields nothing."""
    if isinstance(tasks, dict):
        tasks = list(tasks.values())
    if isinstance(tasks, (list, tuple)):
        for task in tasks:
            yield from _output_types(task)
    elif isinstance(kind := getattr(tasks, "OUTPUT_TYPE", None), str):
        yield kind


def one_line_errors() -> None:
    """Make an uncaught DecDECError one line on standard error; the exit code stays 1. Safe to call twice.

    For a program's start only: a library that replaced its user's excepthook would be rude.
    """
    otherwise = sys.excepthook
    if getattr(otherwise, "_decdec", False):
        return

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        # not imported here: an error of this type can only come from where it has been
        config = sys.modules.get("decdec_core.config")
        refused = config is not None and isinstance(error, config.DecDECError)
        if refused and not os.environ.get("DECDEC_TRACEBACK"):
            print(f"decdec: error: {error}", file=sys.stderr)
        else:
            otherwise(kind, error, trace)

    hook._decdec = True  # type: ignore[attr-defined]
    sys.excepthook = hook


_EXTENSIONS: dict[str, tuple[str, Callable[[ModuleType], None]]] = {
    "lm_eval.models": ("--model decdec", _register_model),
    "lm_eval.models.huggingface": ("loading an artifact with --model hf", _register_quantizer),
    "lm_eval.tasks.manager": ("finding decdec's tasks without --include_path", _find_tasks),
    "lm_eval.api.task": ("reading data sets from DECDEC_DATA_DIR", _read_local_data),
    "lm_eval.evaluator": ("refusing likelihood tasks before other requests run", _refuse_before_requests),
    "lm_eval._cli": ("refusing arguments in one line", lambda _cli: one_line_errors()),
}
