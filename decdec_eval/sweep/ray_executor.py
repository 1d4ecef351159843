"""Groups of cells as tasks of a Ray cluster, each with the GPU and the memory that it needs.

The machines of a cluster must share the folder of results; each has a cache of its own. A worker that is lost
costs the cell that it was at a retry: its group goes on elsewhere with what is left of it.
"""

from __future__ import annotations

import os
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from decdec_core.config import DecDECError
from decdec_eval.sweep.cells import Inputs
from decdec_eval.sweep.grid import Cell
from decdec_eval.sweep.run import Outcome, Runner, groups_of, in_order

RETRIES = 2  # of a cell whose worker is lost
_PASSED_ON = ("DECDEC_", "HF_HUB_OFFLINE", "HF_HOME")  # beginnings of names of environment variables
_OVERHEAD = 1 << 30  # bytes of a process: torch, transformers, activations


def require_ray() -> Any:
    """Return the module ray; where it is not installed DecDECError says how to."""
    try:
        import ray
    except ImportError:
        raise DecDECError(
            "executor ray must be with the package ray, got none: pip install 'decdec-eval[ray]'"
        ) from None
    return ray


class Cluster:
    """A Ray cluster while it is used by `with`: the one at `address`, or one of this machine's own."""

    def __init__(self, address: str | None) -> None:
        self.ray = require_ray()
        passed_on = {name: value for name, value in os.environ.items() if name.startswith(_PASSED_ON)}
        try:
            self.ray.init(
                address=address or "local",
                runtime_env={"env_vars": passed_on},
                include_dashboard=None if address else False,
                log_to_driver=False,
            )
        except (ConnectionError, ValueError, RuntimeError) as error:
            first = str(error).strip().partition("\n")[0]
            raise DecDECError(
                f"ray-address must be of a cluster that answers, got {address}: {first}"
            ) from None

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *_error: object) -> None:
        self.ray.shutdown()


class RayRun:
    """A sweep's cells on a cluster. retries: of a cell whose worker is lost."""

    def __init__(
        self, cluster: Cluster, inputs: Inputs, out: Path, command: str, retries: int = RETRIES
    ) -> None:
        self._ray, self._retries = cluster.ray, retries
        self._arguments = (inputs, out.resolve(), command)
        self._inputs = inputs
        # a task that is lost is not Ray's to repeat: what is left of it is asked for anew
        self._remote = self._ray.remote(max_retries=0, num_returns="streaming")(_work)
        self._lost: Counter[Cell] = Counter()
        self._running: dict[Any, list[Cell]] = {}

    def run(self, cells: Sequence[Cell]) -> Iterator[Outcome]:
        """Yield the outcome of each cell as it is there. Groups of a model wait for its full precision."""
        waiting = {group[0].model: deque[list[Cell]]() for group in groups_of(cells)}
        for group in groups_of(cells):
            waiting[group[0].model].append(group)
        for groups in waiting.values():
            self._submit(groups.popleft())
        while self._running:
            (stream,), _ = self._ray.wait(list(self._running), num_returns=1, fetch_local=False)
            left = self._running[stream]
            outcome = self._next(stream)
            if isinstance(outcome, Outcome):
                left.remove(outcome.cell)
                yield outcome
                continue
            del self._running[stream]
            if outcome is not None:
                yield from self._after_loss(left, outcome)
            for ready in list(self._ready(waiting)):
                self._submit(ready)

    def _ready(self, waiting: dict[Any, deque[list[Cell]]]) -> Iterator[list[Cell]]:
        busy = {group[0].model for group in self._running.values() if group and group[0].base is None}
        for model, groups in waiting.items():
            while groups and model not in busy:
                yield groups.popleft()

    def _next(self, stream: Any) -> Outcome | str | None:
        """Return the next outcome of a running group, None at its end, or how its worker was lost."""
        errors = self._ray.exceptions
        try:
            return self._ray.get(next(stream))
        except StopIteration:
            return None
        except errors.RayTaskError as error:
            raise DecDECError(f"a cell must end with a result, got {error.cause!r}") from error
        except errors.RayError as error:
            return type(error).__name__

    def _after_loss(self, left: list[Cell], how: str) -> Iterator[Outcome]:
        """Ask again for what a lost worker left; the cell that it was at fails without retries left."""
        cells = in_order(left)
        if not cells:
            return
        self._lost[cells[0]] += 1
        if self._lost[cells[0]] > self._retries:
            yield Outcome(cells[0], f"its worker was lost {self._lost[cells[0]]} times: {how}")
            cells = cells[1:]
        if cells:
            self._submit(cells)

    def _submit(self, cells: list[Cell]) -> None:
        needs = self._needs(cells)
        stream = self._remote.options(**needs).remote(*self._arguments, cells)
        self._running[stream] = list(cells)

    def _needs(self, cells: Sequence[Cell]) -> dict[str, Any]:
        """Return the resources of a group's task; more than the cluster has raises DecDECError, as Ray would
        wait for ever."""
        folder = self._inputs.source_folder(cells[0].model)
        weights = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        needs = {"num_gpus": int(self._inputs.device == "cuda"), "memory": 2 * weights + _OVERHEAD}
        there = self._ray.cluster_resources()
        for name, resource in (("num_gpus", "GPU"), ("memory", "memory")):
            if needs[name] > there.get(resource, 0):
                raise DecDECError(
                    f"a Ray cluster must have {resource} of {needs[name]:g} for {cells[0].model.name}, "
                    f"got {there.get(resource, 0):g}"
                )
        return needs


def _work(inputs: Inputs, out: Path, command: str, cells: list[Cell]) -> Iterator[Outcome]:
    yield from Runner(inputs, out, command).run(cells)
