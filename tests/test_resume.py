"""A build killed at any moment goes on where it was, and ends in the bytes of an undisturbed one."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CALIBRATION, save_tiny, with_checkout_first

from decdec_core import artifact, workfolder
from decdec_core.build import build_artifact
from decdec_core.config import DecDECError, ResidualQuant, WeightQuant
from decdec_core.verify import verify
from decdec_core.workfolder import DamagedWorkError, WorkFolder, work_folder

RECIPES = {
    "awq": WeightQuant("awq", 3),
    "squeezellm": WeightQuant("squeezellm", 3),
    "two widths": WeightQuant("rtn", 3.5),
    "codebooks of two widths": WeightQuant("squeezellm", 2.5),
}


class Killed(BaseException):
    """Stands for a signal: nothing in the build may catch it."""


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("llama-grouped-tied", tmp_path_factory.mktemp("plain") / "m")


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def build(model_dir: Path, out: Path, recipe: WeightQuant, device: str = "cpu") -> Path:
    return build_artifact(str(model_dir), out, recipe, ResidualQuant(4), CALIBRATION, device=device)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
@pytest.mark.parametrize("after", [False, True], ids=["before the write", "after the write"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_killed_at_every_write(
    recipe: str, after: bool, device: str, model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = contents(build(model_dir, tmp_path / "undisturbed", RECIPES[recipe], device))
    write, kills = workfolder.write_tensors, 0

    def attempt(dies_at: int) -> Path:
        writes = 0

        def dying(path: Path, tensors: Any) -> dict[str, str]:
            nonlocal writes
            writes += 1
            if writes == dies_at and not after:
                raise Killed
            digests = write(path, tensors)
            if writes == dies_at:
                raise Killed
            return digests

        for module in (workfolder, artifact):
            monkeypatch.setattr(module, "write_tensors", dying)
        return build(model_dir, tmp_path / "killed", RECIPES[recipe], device)

    while True:  # each attempt dies one write later than the one before it, counted from where it began
        try:
            out = attempt(kills + 1)
            break
        except Killed:
            kills += 1
        assert kills < 30, "the build makes no progress"
    assert kills > 2
    assert contents(out) == wanted
    assert verify(out).tensors
    assert not [p.name for p in tmp_path.iterdir() if p.name.startswith(".")], "the work folder is gone"


def test_killed_by_a_signal(model_dir: Path, tmp_path: Path) -> None:
    wanted = contents(build(model_dir, tmp_path / "undisturbed", RECIPES["awq"]))
    out = tmp_path / "out"
    options = ["--method", "awq", "--bits", "3", "--calibration", "pydoc", "--out", str(out)]
    options += ["--calibration-sequences", "4", "--calibration-length", "64"]
    child = subprocess.Popen(
        [sys.executable, "-m", "decdec_core.cli", "build", "--model", str(model_dir), *options],
        env={
            **os.environ,
            "PYTHONPATH": with_checkout_first(),
            "OMP_NUM_THREADS": str(torch.get_num_threads()),
        },
        stderr=subprocess.PIPE,
    )
    assert child.stderr is not None
    seen = b""
    while b"1/2" not in seen and (
        more := child.stderr.read1()
    ):  # the progress bar after the first of two blocks
        seen += more
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert not out.exists()
    assert (tmp_path / ".out.building" / "3bit" / "block-00000.safetensors").is_file()
    # awq_sequences is no option of the command line
    setup = type(CALIBRATION)("pydoc", sequences=4, length=64)
    resumed = build_artifact(str(model_dir), out, RECIPES["awq"], ResidualQuant(4), setup)
    undisturbed = build_artifact(str(model_dir), tmp_path / "b", RECIPES["awq"], ResidualQuant(4), setup)
    assert contents(resumed) == contents(undisturbed)
    assert contents(resumed).keys() == wanted.keys()


def test_work_of_other_settings_is_thrown_away(tmp_path: Path) -> None:
    def work(settings: dict[str, int], error: BaseException, see: Callable[[WorkFolder], object]) -> None:
        with work_folder(tmp_path / "out", settings) as folder:
            see(folder)
            raise error

    with pytest.raises(Killed):
        work({"a": 1}, Killed(), lambda folder: folder.save("x", {"t": torch.ones(2)}))
    found: list[object] = []
    with pytest.raises(Killed):
        work({"a": 1}, Killed(), lambda folder: found.append(folder.load("x")["t"].tolist()))
    with pytest.raises(Killed):
        work({"a": 2}, Killed(), lambda folder: found.append(folder.has("x")))
    assert found == [[1, 1], False]
    with pytest.raises(DecDECError, match="refused"):
        work({"a": 2}, DecDECError("refused"), lambda folder: None)
    assert list(tmp_path.iterdir()) == [], "what was refused would be refused again"


def test_one_build_at_a_time(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with work_folder(target, {}):
        with (
            pytest.raises(DecDECError, match="out must not be built twice at a time, got another"),
            work_folder(target, {}),
        ):
            pass
        target.mkdir()
    assert list(tmp_path.iterdir()) == [target]


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(DecDECError, match="must be in a folder that can be written"),
        work_folder(tmp_path / "file" / "x", {}),
    ):
        pass


def test_a_refusal_after_long_work_keeps_it(tmp_path: Path) -> None:
    def work(see: Callable[[WorkFolder], object]) -> None:
        with work_folder(tmp_path / "out", {}) as folder:
            see(folder)
            raise DecDECError("refused")

    with pytest.raises(DecDECError, match="refused"):
        work(lambda folder: folder.save("x", {"t": torch.ones(2)}))
    with pytest.raises(DecDECError, match="refused"):
        work(lambda folder: folder.load("x"))


def test_damaged_work_is_thrown_away_and_the_next_build_is_whole(model_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"

    def dying(*_arguments: object) -> None:
        raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(WorkFolder, "drop", dying)  # after the first block
        with pytest.raises(Killed):
            build(model_dir, out, RECIPES["awq"])
    hidden = tmp_path / ".out.building" / "3bit" / "hidden-00001.safetensors"
    hidden.write_bytes(hidden.read_bytes()[:100])
    with pytest.raises(DamagedWorkError, match="work on the way must be whole"):
        build(model_dir, out, RECIPES["awq"])
    assert contents(build(model_dir, out, RECIPES["awq"])) == contents(
        build(model_dir, tmp_path / "b", RECIPES["awq"])
    )


def test_killed_between_the_last_rename_and_the_end(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dying(*_arguments: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(workfolder, "_forget", dying)
        with pytest.raises(Killed):
            build(model_dir, tmp_path / "out", RECIPES["awq"])
    assert verify(tmp_path / "out").tensors
    assert (tmp_path / ".out.building").is_dir()
    with pytest.raises(DecDECError, match="out must be a folder that does not exist yet"):
        build(model_dir, tmp_path / "out", RECIPES["awq"])
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_waiting_build_does_not_share_the_folder_with_a_newcomer(tmp_path: Path) -> None:
    # the first refuses and removes the lock's file while a second waits for it; then a third comes
    target, inside, most = tmp_path / "out", [0], [0]
    entered, release = threading.Event(), threading.Event()

    def first() -> None:
        with contextlib.suppress(DecDECError), work_folder(target, {}):
            entered.set()
            release.wait(10)
            raise DecDECError("refused")

    def waiting() -> None:
        with work_folder(target, {}, wait=True):
            inside[0] += 1
            most[0] = max(most[0], inside[0])
            time.sleep(0.2)
            inside[0] -= 1

    threads = [threading.Thread(target=first)]
    threads[0].start()
    assert entered.wait(10)
    threads += [threading.Thread(target=waiting) for _ in range(2)]
    threads[1].start()
    time.sleep(0.2)
    release.set()
    threads[2].start()
    for thread in threads:
        thread.join(20)
    assert most == [1]
