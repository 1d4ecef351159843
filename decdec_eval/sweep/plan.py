"""Which cells there are, which are done, and what the others cost: what --dry-run prints."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from decdec_core.config import DecDECError
from decdec_eval.runs import path_of
from decdec_eval.sweep.cells import Inputs, NoProfileError
from decdec_eval.sweep.grid import Cell, Slowdown

State = Literal["done", "to do", "skipped", "refused"]


@dataclass(frozen=True)
class Planned:
    """A cell before the run. note: why it is skipped or refused, or what comes before it. time_s: what it may
    take, from like cells, None where there are none; what a done cell took."""

    cell: Cell
    state: State
    note: str = ""
    time_s: float | None = None

    @property
    def line(self) -> str:
        time = "" if self.state in ("skipped", "refused") else duration(self.time_s)
        return f"{self.state:8} {time:>9}  {self.cell.label}" + (f": {self.note}" if self.note else "")


class Times:
    """How long the runs of a folder took."""

    def __init__(self, out: Path) -> None:
        self._runs = []
        for path in sorted((out / "runs").glob("*.json")):
            try:
                run = json.loads(path.read_bytes())
                if "equal_to" not in run and run["configuration"].keys() >= {
                    "base",
                    "task",
                    "dtype",
                    "device",
                }:
                    self._runs.append((_traits(run["configuration"]), float(run["time_s"])))
            except (ValueError, LookupError, TypeError, AttributeError):
                continue  # of something else: the report says so

    def of(self, traits: dict[str, Any]) -> float | None:
        """Return the mean time of the runs that are most like these traits, None where none are."""
        for ignored in ((), ("base",), ("base", "selection")):
            wanted = {name: value for name, value in traits.items() if name not in ignored}
            times = [time for found, time in self._runs if wanted.items() <= found.items()]
            if times:
                return statistics.fmean(times)
        return None


def _traits(configuration: dict[str, Any]) -> dict[str, Any]:
    compensation = configuration["compensation"]
    return {
        "model": configuration["model"],
        "full": configuration["base"] is None,
        "base": json.dumps(configuration["base"], sort_keys=True),
        "selection": None if compensation is None else compensation["selection"],
        "task": json.dumps(configuration["task"], sort_keys=True),
        "dtype": configuration["dtype"],
        "device": configuration["device"],
    }


def plan(cells: Sequence[Cell], inputs: Inputs, out: Path) -> list[Planned]:
    """Return the state of every cell. A GPU without profiles raises DecDECError: then all of the sweep waits
    for its description to be mended."""
    for gpu in dict.fromkeys(cell.amount.gpu for cell in cells if isinstance(cell.amount, Slowdown)):
        inputs.profiles(gpu)
    times = Times(out)
    return [_planned(cell, inputs, out, times) for cell in cells]


def _planned(cell: Cell, inputs: Inputs, out: Path, times: Times) -> Planned:
    try:
        configuration = inputs.configuration(cell)
        task = inputs.task(cell)
    except NoProfileError as error:
        return Planned(cell, "skipped", str(error))
    except DecDECError as error:
        return Planned(cell, "refused", str(error))
    traits = {
        "model": cell.model.name,
        "full": cell.base is None,
        "base": json.dumps(None if cell.base is None else cell.base.to_dict(), sort_keys=True),
        "selection": None if cell.base is None else cell.selection,
        "task": json.dumps(task, sort_keys=True),
        "dtype": inputs.dtype,
        "device": inputs.device,
    }
    if configuration is None:
        return Planned(cell, "to do", "its artifact is built first", times.of(traits))
    path = path_of(out, configuration)
    if path.is_file():
        return Planned(cell, "done", time_s=json.loads(path.read_bytes())["time_s"])
    return Planned(cell, "to do", time_s=times.of(traits))


def summary(planned: Iterable[Planned]) -> str:
    """Return one line: how many cells there are in each state, and what is left to do may take."""
    cells = list(planned)
    left = [one for one in cells if one.state == "to do"]
    known = [one.time_s for one in left if one.time_s is not None]
    about = f", {duration(sum(known))} for {len(known)} of them, the others unknown" if left else ""
    if left and len(known) == len(left):
        about = f", {duration(sum(known))}"
    counts = {state: sum(one.state == state for one in cells) for state in ("done", "skipped", "refused")}
    others = ", ".join(f"{count} {state}" for state, count in counts.items())
    return f"{len(cells)} cells: {others}, {len(left)} to do{about}"


def duration(seconds: float | None) -> str:
    """Return "unknown", "4.2 s", "12 min" or "3.4 h"."""
    if seconds is None:
        return "unknown"
    if seconds < 100:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
