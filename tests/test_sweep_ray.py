"""Cells on a Ray cluster of this machine: several workers at once, and one that is killed."""

from __future__ import annotations

import builtins
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import with_checkout_first
from sweep_fixtures import PERPLEXITY, Place, place, tiny_chat

from decdec_core.config import DecDECError
from decdec_eval.sweep.cells import Inputs
from decdec_eval.sweep.grid import read_sweep
from decdec_eval.sweep.ray_executor import RayRun, require_ray
from decdec_eval.sweep.run import Outcome, groups_of

__all__ = ["place", "tiny_chat"]  # fixtures
ray = pytest.importorskip("ray")
MANY = {**PERPLEXITY, "windows": 300}  # long enough to be killed in


def start(place: Place, *options: str, **changes: Any) -> subprocess.Popen[str]:
    """Start the sweep on Ray in a process of its own."""
    words = ["-m", "decdec_eval.sweep", str(place.write(**changes)), "--out", str(place.out)]
    environment = {**os.environ, "PYTHONPATH": with_checkout_first(), "RAY_USAGE_STATS_ENABLED": "0"}
    return subprocess.Popen(
        [sys.executable, *words, "--executor", "ray", *options],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def workers(parent: int) -> list[int]:
    """Return the pids of a driver's workers that are at a task: Ray names them by it."""
    found = []
    for folder in Path("/proc").iterdir():
        try:
            name = (folder / "cmdline").read_bytes()
            if name.startswith(b"ray::_work") and is_below(int(folder.name), parent):
                found.append(int(folder.name))
        except (OSError, ValueError):  # no process, or one that has ended
            continue
    return found


def is_below(pid: int, ancestor: int) -> bool:
    while pid > 1:
        if pid == ancestor:
            return True
        pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return False


def until(condition: Any, seconds: float = 240) -> Any:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        value = condition()
        if value:
            return value
        time.sleep(0.05)
    pytest.fail(f"not within {seconds} s")


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs /proc")
def test_a_killed_worker_costs_its_cell_a_retry(place: Place) -> None:
    source = str(place.root / "model")
    grid: dict[str, Any] = {
        "models": [{"source": source, "name": "one"}, {"source": source, "name": "two"}],
        "tasks": [MANY],
        "selections": ["none", "static"],
    }
    running = start(place, **grid)
    try:
        # the full precision of both models, at once
        both = until(lambda: (pids := workers(running.pid))[1:] and pids)
        os.kill(both[0], signal.SIGKILL)
        output, _ = running.communicate(timeout=400)
    finally:
        running.kill()
    assert running.returncode == 0, output
    assert "failed" not in output
    found = [(run["configuration"]["model"], run["configuration"]["base"] is None) for run in place.runs()]
    assert sorted(found) == [(name, full) for name in ("one", "two") for full in (False, False, True)]
    for name in ("nll", "kl"):  # the same model by two names: on two workers, as on one
        values = {json.dumps(run["items"]["values"][name]) for run in place.runs()}
        assert len(values) == 3
    # again: nothing is left to do, and Ray is not started
    assert place.sweep("--executor", "ray", **grid) == 0


class FakeRay:
    """As much of Ray as RayRun needs: a worker that is lost at chosen tasks."""

    class exceptions:
        class RayError(Exception):
            pass

        class RayTaskError(RayError):
            def __init__(self, cause: Exception) -> None:
                self.cause = cause

    def __init__(self, lost: dict[str, int], gpus: int = 0, memory: float = 1e12) -> None:
        self.lost, self.asked = dict(lost), []
        self._resources = {"GPU": gpus, "memory": memory}

    def remote(self, **_options: Any) -> Any:
        return lambda work: self

    def options(self, **needs: Any) -> FakeRay:
        self.asked.append(needs)
        return self

    def remote_call(self, cells: list[Any]) -> Iterator[Any]:
        for cell in cells:
            if self.lost.get(cell.selection, 0):
                self.lost[cell.selection] -= 1
                raise self.exceptions.RayError
            yield Outcome(cell)

    def wait(self, streams: list[Any], **_options: Any) -> Any:
        return streams[:1], streams[1:]

    def get(self, outcome: Any) -> Any:
        return outcome

    def cluster_resources(self) -> dict[str, float]:
        return self._resources


class FakeCluster:
    def __init__(self, **options: Any) -> None:
        self.ray = FakeRay(**options)
        # an instance's remote(...) makes the task of cells
        ray = self.ray
        made = ray.remote

        def remote(*arguments: Any, **options: Any) -> Any:
            return ray.remote_call(arguments[3]) if arguments else made(**options)

        ray.remote = remote  # type: ignore[method-assign]


def outcomes(place: Place, retries: int = 2, **options: Any) -> tuple[list[Outcome], FakeRay]:
    cells = read_sweep(str(place.write(selections=["none", "static", "dynamic"]))).cells()
    cluster = FakeCluster(**options)
    run = RayRun(cluster, Inputs("float32", "cpu"), place.out, "", retries)  # type: ignore[arg-type]
    return list(run.run(cells)), cluster.ray


def test_a_cell_whose_worker_is_lost_again_and_again_fails_alone(place: Place) -> None:
    found, asked = outcomes(place, lost={"static": 3})
    errors = {outcome.cell.selection: outcome.error for outcome in found}
    assert errors == {
        "full": None,
        "none": None,
        "static": "its worker was lost 3 times: RayError",
        "dynamic": None,
    }
    assert len(asked.asked) == 2 + 3
    found, _ = outcomes(place, lost={"static": 2})
    assert all(outcome.error is None for outcome in found)


def test_tasks_ask_for_memory_and_no_gpu_on_a_cpu(place: Place) -> None:
    _, asked = outcomes(place, lost={})
    weights = sum(path.stat().st_size for path in (place.root / "model").glob("*.safetensors"))
    assert all(needs == {"num_gpus": 0, "memory": 2 * weights + (1 << 30)} for needs in asked.asked)


def test_more_than_the_cluster_has_is_refused(place: Place) -> None:
    with pytest.raises(DecDECError, match=r"a Ray cluster must have memory of .* for tiny, got 5"):
        outcomes(place, lost={}, memory=5)


def test_groups_wait_for_full_precision(place: Place) -> None:
    cells = read_sweep(str(place.write(bits=[3, 4]))).cells()
    assert [group[0].base is None for group in groups_of(cells)] == [True, False, False]
    found, _ = outcomes(place, lost={})
    assert found[0].cell.base is None


def test_without_ray_the_executor_is_refused(
    place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original = builtins.__import__

    def without_ray(name: str, *others: Any, **more: Any) -> Any:
        if name == "ray":
            raise ImportError(name)
        return original(name, *others, **more)

    monkeypatch.setattr(builtins, "__import__", without_ray)
    with pytest.raises(
        DecDECError, match=r"executor ray must be with the package ray, got none: pip install"
    ):
        require_ray()
    assert place.sweep("--executor", "ray") == 2
    assert not place.out.exists()
