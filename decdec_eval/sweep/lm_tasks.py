"""Tasks of lm-eval: which data and version they are of, and their results as a run file has them."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

from decdec_core.config import DecDECError
from decdec_eval import plugin
from decdec_eval.lm_model import DecDECLM
from decdec_eval.sweep.tasks import LmEval

_NO_METRICS = ("alias", "name", "sample_len", "sample_count")


@lru_cache(maxsize=4)
def manager(name: str, source: str) -> TaskManager:
    """Return the task manager that knows `name`, for a model whose tokenizer is in the folder `source`.

    This package's own tasks are indexed alone: lm-eval's take some ten seconds.
    """
    plugin.install()
    found = TaskManager(
        include_path=plugin.tasks_folder(), include_defaults=False, metadata={"pretrained": source}
    )
    if name not in found.task_index:
        found = TaskManager(metadata={"pretrained": source})
    if name not in found.task_index:
        raise DecDECError(f"name must be a task of lm-eval, got {name!r}")
    return found


@lru_cache(maxsize=32)
def identity(name: str, source: str) -> tuple[str, str]:
    """Return the version of a task or group, and the SHA-256 of all its questions."""
    loaded = _loaded(name, source)
    digest = hashlib.sha256()
    versions = {}
    for task_name, task in sorted(loaded["tasks"].items()):
        versions[task_name] = str(task.VERSION)
        for document in task.eval_docs:
            digest.update(json.dumps([task_name, document], sort_keys=True, default=str).encode())
    group = loaded["groups"].get(name)
    own = str(group.version) if group is not None and group.version is not None else None
    return own or ", ".join(sorted(set(versions.values()))), digest.hexdigest()


def _loaded(name: str, source: str) -> Mapping[str, Any]:
    try:
        return manager(name, source).load([name])
    except DecDECError:
        raise
    except Exception as error:  # of the hub, of data sets, of task files: whatever they raise
        first = str(error).strip().partition("\n")[0]
        raise DecDECError(f"task {name} must be one whose data can be had, got: {first}") from error


def run(task: LmEval, lm: DecDECLM, source: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the metrics and items of a run file. source: the folder with the model's tokenizer."""
    lm.batch_size_per_gpu, lm.batch_sizes = task.batch_size, {}
    results = simple_evaluate(
        model=lm,
        tasks=[task.name],
        task_manager=manager(task.name, source),
        limit=task.limit,
        num_fewshot=task.num_fewshot,
        apply_chat_template=task.apply_chat_template,
        log_samples=True,
    )
    assert results is not None
    return metrics_of(results, task.name), items_of(results)


def metrics_of(results: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return the figures of a task, or of a group with those of its parts under `groups`. A metric is named
    with its filter where it has several, "exact_match,strict-match"."""
    rows = dict(results["results"])
    own = _figures(rows.pop(name, {}))
    return {**own, "groups": {part: _figures(row) for part, row in rows.items()}} if rows else own


def _figures(row: Mapping[str, Any]) -> dict[str, float | None]:
    names = _named(key for key in row if "," in key and key.partition(",")[0] not in _NO_METRICS)
    return {short: row[key] if isinstance(row[key], (int, float)) else None for key, short in names.items()}


def _named(keys: Any) -> dict[str, str]:
    found = list(keys)
    filters = Counter(key.partition(",")[0] for key in found)
    return {key: key.partition(",")[0] if filters[key.partition(",")[0]] == 1 else key for key in found}


def items_of(results: Mapping[str, Any]) -> dict[str, Any]:
    """Return {"unit": "question", "ids": ["task/number", ...], "weights": null, "values": {metric: [...]}}.

    A metric that is no number for every question, or that not all tasks have, is left out.
    """
    table: dict[str, dict[str, float]] = {}
    for task_name, samples in sorted(results["samples"].items()):
        for sample in samples:
            row = table.setdefault(f"{task_name}/{sample['doc_id']}", {})
            for metric in sample["metrics"]:
                if isinstance(sample[metric], (int, float)):
                    row[f"{metric},{sample['filter']}"] = float(sample[metric])
    common = set.intersection(*(set(row) for row in table.values())) if table else set()
    names = _named(sorted(common))
    return {
        "unit": "question",
        "ids": list(table),
        "weights": None,
        "values": {short: [row[key] for row in table.values()] for key, short in names.items()},
    }
