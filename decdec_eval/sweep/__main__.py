"""python -m decdec_eval.sweep SWEEP.yaml: a grid of runs, one JSON file per cell in OUT/runs.

What is there already is not run again: a sweep that was killed goes on where it was with the same command.
SWEEP.yaml is a file, or a bundled one by name: paper.yaml, smollm2.yaml, quick.yaml.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from tqdm import tqdm

from decdec_core.commandline import OneLineParser, run_command
from decdec_core.config import DecDECError
from decdec_eval.sweep.cells import Inputs
from decdec_eval.sweep.grid import Cell, read_sweep
from decdec_eval.sweep.plan import Planned, plan, summary
from decdec_eval.sweep.ray_executor import Cluster, RayRun, require_ray
from decdec_eval.sweep.run import Outcome, Runner, groups_of

EXECUTORS = ("process", "ray")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a sweep; a refused input prints one line to standard error and returns 2."""
    parser = _parser()
    options, unknown = parser.parse_known_args(arguments)
    parser.refuse(unknown)
    return run_command(lambda: _sweep(options))


def _sweep(options: argparse.Namespace) -> None:
    if options.ray_address is not None and options.executor != "ray":
        raise DecDECError(f"ray-address must be with --executor ray, got {options.ray_address} without it")
    if options.executor == "ray":
        require_ray()
    sweep = read_sweep(options.sweep)
    inputs = Inputs.of(sweep)
    planned = plan(sweep.cells(), inputs, options.out)
    if options.dry_run:
        for one in planned:
            print(one.line)
        print(summary(planned))
        return
    _show_left_out(planned)
    runnable = [one.cell for one in planned if one.state in ("done", "to do")]
    done = {one.cell for one in planned if one.state == "done"}
    failed: list[Outcome] = []
    with tqdm(total=len(runnable), initial=len(done), desc="cells", unit="cell") as bar:
        for outcome in _outcomes(options, inputs, _still_needed(runnable, done)):
            if outcome.error is not None:
                failed.append(outcome)
                tqdm.write(f"failed: {outcome.cell.label}: {outcome.error}", file=sys.stderr)
            elif outcome.cell not in done:
                bar.update()
    refused = sum(one.state == "refused" for one in planned)
    if failed or refused:
        raise DecDECError(
            f"all {len(planned)} cells must be there or skipped, got {len(failed)} that failed and {refused} "
            "that were refused, as said above: run it again for them"
        )


def _show_left_out(planned: Sequence[Planned]) -> None:
    for one in planned:
        if one.state in ("skipped", "refused"):
            print(one.line, file=sys.stderr)


def _still_needed(cells: Sequence[Cell], done: set[Cell]) -> list[Cell]:
    """Return the groups with something left to do, whole: a cell may be equal to one that is done."""
    left = [group for group in groups_of(cells) if not done.issuperset(group)]
    return [cell for group in left for cell in group]


def _outcomes(options: argparse.Namespace, inputs: Inputs, cells: Sequence[Cell]) -> Iterator[Outcome]:
    command = f"python -m decdec_eval.sweep {shlex.quote(options.sweep)}"
    if not cells:
        return
    if options.executor == "ray":
        with Cluster(options.ray_address) as cluster:
            yield from RayRun(cluster, inputs, options.out, command).run(cells)
        return
    runner = Runner(inputs, options.out, command)
    for group in groups_of(cells):
        yield from runner.run(group)


def _parser() -> OneLineParser:
    parser = OneLineParser(prog="python -m decdec_eval.sweep", description=__doc__)
    parser.add_argument("sweep", metavar="SWEEP.yaml")
    parser.add_argument("--out", type=Path, default=Path("results"), metavar="DIR", help="default results")
    parser.add_argument(
        "--dry-run", action="store_true", help="print the cells: state, cost, what is skipped"
    )
    parser.add_argument("--executor", choices=EXECUTORS, default="process", help="default process: this one")
    parser.add_argument(
        "--ray-address", metavar="ADDRESS", help="of a cluster (default: one of this machine)"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
