"""A build's folder while it is at work: what is done lies in whole files, so that a killed build goes on."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from decdec_core.config import DecDECError
from decdec_core.files import write_json
from decdec_core.shards import (
    FileTensor,
    MemoryTensor,
    TensorFileError,
    TensorSource,
    file_tensors,
    write_tensors,
)

_PLAN, _FINISHED, _ARTIFACT = "plan", "finished", "artifact"


class DamagedWorkError(DecDECError):
    """What a killed build left cannot be read."""


class WorkFolder:
    """Named sets of tensors and JSON values in `folder`, each there whole or not at all."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def has(self, *names: str) -> bool:
        """Return whether all these sets of tensors are there."""
        return all(self.path(name).is_file() for name in names)

    def save(self, name: str, tensors: Mapping[str, Tensor | TensorSource]) -> None:
        """Write a set of tensors, those in memory and those that are made on the way."""
        path = self.path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_tensors(
            path, {key: MemoryTensor(t) if isinstance(t, Tensor) else t for key, t in tensors.items()}
        )

    def rename(self, name: str, to: str) -> None:
        """Give a set of tensors another name, in one step."""
        self.path(name).rename(self.path(to))

    def load(self, name: str) -> dict[str, Tensor]:
        """Return a set of tensors, in memory of their own."""
        return {key: tensor.read() for key, tensor in self.files(name).items()}

    def files(self, name: str) -> dict[str, FileTensor]:
        """Return a set of tensors where it lies; a damaged one raises DamagedWorkError."""
        try:
            return file_tensors(self.path(name))
        except TensorFileError as error:
            raise DamagedWorkError(
                f"work on the way must be whole, got {error}: thrown away, run the same again"
            ) from None

    def drop(self, name: str) -> None:
        """Forget a set of tensors, if it is there."""
        self.path(name).unlink(missing_ok=True)

    def fresh_folder(self) -> Path:
        """Return an empty folder for what is built."""
        folder = self.folder / _ARTIFACT
        if folder.exists():
            shutil.rmtree(folder)
        folder.mkdir()
        return folder

    def note(self, name: str, value: Any) -> None:
        """Write a JSON value."""
        write_json(self.folder / f"{name}.json", value)

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

    plan: everything that determines what is built, as JSON. Work of another plan is thrown away, which is
    said. Only one process at a time; a second one waits or, where `wait` is false, is refused. A refusal
    (DecDECError) before anything was saved leaves nothing. Raises DecDECError also where the folder cannot be
    written.
    """
    folder = _folder_of(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        lock = _locked(folder, target, wait)
    except OSError as error:
        raise DecDECError(
            f"{target} must be in a folder that can be written, got: {error.strerror}"
        ) from None
    work = WorkFolder(folder)
    try:
        stored = _noted(work, _PLAN)
        if folder.exists() and stored != json.loads(json.dumps(plan)):
            if stored is not None:
                print(f"decdec: {folder} held work of other settings: thrown away", file=sys.stderr)
            shutil.rmtree(folder)
        folder.mkdir(exist_ok=True)
        work.note(_PLAN, plan)
        yield work
        if target.exists():
            _forget(folder)
    except DamagedWorkError:
        _forget(folder)
        raise
    except DecDECError:
        if not any(folder.rglob("*.safetensors")):
            _forget(folder)  # the same again would be refused again
        raise
    finally:
        os.close(lock)


def publish(work: WorkFolder, finished: Path, target: Path) -> None:
    """Make the folder `finished`, in the work folder, the target."""
    work.note(_FINISHED, True)
    finished.rename(target)


def forget_finished(target: Path) -> None:
    """Clear away the work folder of a build that was killed after `target` was there, if there is one."""
    folder = _folder_of(target)
    if target.exists() and _noted(WorkFolder(folder), _FINISHED):
        with contextlib.suppress(DecDECError, OSError):
            lock = _locked(folder, target, wait=False)
            if not (folder / _ARTIFACT).exists():  # the target is what was built, and no other folder
                _forget(folder)
            os.close(lock)


def _folder_of(target: Path) -> Path:
    return target.parent / f".{target.name}.building"


def _locked(folder: Path, target: Path, wait: bool) -> int:
    """Return a descriptor of the folder's lock file, locked."""
    path = folder.with_suffix(".lock")
    while True:
        lock = os.open(path, os.O_CREAT | os.O_RDWR)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            # whoever had the lock may have removed its file: then others lock another one
            if path.exists() and os.fstat(lock).st_ino == path.stat().st_ino:
                return lock
        except BlockingIOError:
            os.close(lock)
            raise DecDECError(
                f"{target} must not be built twice at a time, got another process at it"
            ) from None
        os.close(lock)


def _forget(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.with_suffix(".lock").unlink(missing_ok=True)


def _noted(work: WorkFolder, name: str) -> Any:
    try:
        return work.noted(name)
    except ValueError:
        return None
