"""Ten fixed questions of each BBH subtask, under the prompts and the metric of lm-eval's bbh_cot_fewshot.

questions.json names them. `python questions.py`, with DECDEC_DATA_DIR, draws them again.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lm_eval.tasks
import yaml
from lm_eval.api.task import ConfigurableTask

from decdec_core.config import DecDECError
from decdec_core.files import write_json

QUESTIONS = Path(__file__).with_name("questions.json")
_UPSTREAM = Path(lm_eval.tasks.__file__).parent / "bbh" / "cot_fewshot"
_SEED, _PER_SUBTASK = 1234, 10


class BBHMini(ConfigurableTask):
    """lm-eval's task of one BBH subtask, of which only the questions that questions.json names are asked.

    A data set in which other questions have their numbers raises DecDECError: another version of it, or in
    another order.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        own = {key: value for key, value in config.items() if key != "class"}
        upstream = upstream_config(own["dataset_name"])
        drawn = _read()
        about = {key: drawn[key] for key in ("seed", "per_subtask")}
        versions = {"upstream_version": upstream["metadata"]["version"], **own["metadata"], **about}
        super().__init__(config={**upstream, **own, "metadata": versions})

    def download(self, dataset_kwargs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Load the subtask as lm-eval does and keep the chosen questions, in the order of the set."""
        super().download(dataset_kwargs, **kwargs)
        subtask = self.config.dataset_name
        chosen, test = _read()["subtasks"][subtask], self.dataset["test"]
        asked = [test[number]["input"] for number in chosen["ids"] if number < len(test)]
        if (found := digest(asked)) != chosen["sha256"]:
            raise DecDECError(
                f"questions {chosen['ids']} of BBH's {subtask} must have the digest {chosen['sha256']}, "
                f"got {found}: another version of {self.DATASET_PATH}"
            )
        self.dataset["test"] = test.select(chosen["ids"])


def upstream_config(subtask: str) -> dict[str, Any]:
    """Return the configuration of lm-eval's bbh_cot_fewshot task of `subtask`.

    A version of lm-eval that has it elsewhere raises DecDECError.
    """
    file = _UPSTREAM / f"{subtask}.yaml"
    try:
        own = yaml.safe_load(file.read_text(encoding="utf-8"))
        shared = yaml.safe_load((_UPSTREAM / own.pop("include")).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DecDECError(f"lm-eval must have its task file {file}, got none: {error.filename}") from None
    return {**shared, **own}


def digest(inputs: Sequence[str]) -> str:
    """Return the SHA-256 of the questions' texts, as a JSON list of them."""
    return hashlib.sha256(json.dumps(list(inputs)).encode()).hexdigest()


def draw(inputs: dict[str, Sequence[str]]) -> dict[str, Any]:
    """Return what questions.json holds. inputs: each subtask's questions, in the order of the set.

    Each subtask has a generator of its own, so that no draw depends on another subtask's size.
    """
    subtasks = {}
    for name, questions in sorted(inputs.items()):
        ids = sorted(random.Random(f"{_SEED}:{name}").sample(range(len(questions)), _PER_SUBTASK))
        subtasks[name] = {"ids": ids, "sha256": digest([questions[number] for number in ids])}
    return {"seed": _SEED, "per_subtask": _PER_SUBTASK, "subtasks": subtasks}


def _read() -> dict[str, Any]:
    return json.loads(QUESTIONS.read_text(encoding="utf-8"))


def _main() -> None:
    import pandas

    from decdec_core.texts import data_dir

    folder = data_dir()
    if folder is None:
        raise DecDECError("DECDEC_DATA_DIR must be the folder with bbh/SUBTASK.parquet, got none")
    files = sorted((folder / "bbh").glob("*.parquet"))
    write_json(QUESTIONS, draw({file.stem: pandas.read_parquet(file)["input"].tolist() for file in files}))


if __name__ == "__main__":
    _main()
