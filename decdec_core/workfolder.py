"""A build's folder while it is at work: what is done lies in whole files, so that a killed build goes on."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from decdec_core.config import DecDECError
from decdec_core.shards import FileTensor, MemoryTensor, file_tensors, write_tensors

_PLAN = "plan.json"


class WorkFolder:
    """Named sets of tensors and JSON values in `folder`, each there whole or not at all."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def has(self, *names: str) -> bool:
        """Return whether all these sets of tensors are there."""
        return all(self.path(name).is_file() for name in names)

    def save(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Write a set of tensors."""
        path = self.path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_tensors(path, {key: MemoryTensor(tensor) for key, tensor in tensors.items()})

    def load(self, name: str) -> dict[str, Tensor]:
        """Return a set of tensors, in memory of their own."""
        return {key: tensor.read() for key, tensor in self.files(name).items()}

    def files(self, name: str) -> dict[str, FileTensor]:
        """Return a set of tensors where it lies."""
        return file_tensors(self.path(name))

    def drop(self, name: str) -> None:
        """Forget a set of tensors, if it is there."""
        self.path(name).unlink(missing_ok=True)

    def fresh_folder(self, name: str) -> Path:
        """Return an empty folder in the work folder."""
        folder = self.folder / name
        if folder.exists():
            shutil.rmtree(folder)
        folder.mkdir()
        return folder

    def note(self, name: str, value: Any) -> None:
        """Write a JSON value."""
        path = self.folder / f"{name}.json"
        temporary = path.with_name(f".{path.name}.tmp")
        temporary.write_text(json.dumps(value, indent=1) + "\n", "utf-8")
        temporary.rename(path)

    def noted(self, name: str) -> Any:
        """Return a JSON value, or None where it is not there."""
        path = self.folder / f"{name}.json"
        return json.loads(path.read_text("utf-8")) if path.is_file() else None

    def path(self, name: str) -> Path:
        """Return where a set of tensors lies, or would."""
        return self.folder / f"{name}.safetensors"


@contextlib.contextmanager
def work_folder(target: Path, plan: Mapping[str, Any], wait: bool = False) -> Iterator[WorkFolder]:
    """Give the work folder of a build of `target`: `.NAME.building` beside it, gone when `target` is there.

    plan: everything that determines what is built, as JSON. Work of another plan is thrown away. Only one
    process at a time; a second one waits or, where `wait` is false, is refused. Raises DecDECError also where
    the folder cannot be written.
    """
    folder = target.parent / f".{target.name}.building"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder.with_suffix(".lock"), os.O_CREAT | os.O_RDWR)
    except OSError as error:
        raise DecDECError(f"{target} must be in a folder that can be written, got {error}") from None
    try:
        _take(lock, target, wait)
    except DecDECError:
        os.close(lock)
        raise
    try:
        work = WorkFolder(folder)
        if folder.exists() and _stored_plan(work) != json.loads(json.dumps(plan)):
            shutil.rmtree(folder)
        folder.mkdir(exist_ok=True)
        work.note(Path(_PLAN).stem, plan)
        yield work
        if target.exists():
            _forget(folder)
    except DecDECError:
        _forget(folder)  # the same again would be refused again
        raise
    finally:
        os.close(lock)


def _forget(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.with_suffix(".lock").unlink(missing_ok=True)


def _take(lock: int, target: Path, wait: bool) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        raise DecDECError(f"{target} must not be built twice at a time, got another process at it") from None


def _stored_plan(work: WorkFolder) -> Any:
    try:
        return work.noted(Path(_PLAN).stem)
    except ValueError:
        return None
