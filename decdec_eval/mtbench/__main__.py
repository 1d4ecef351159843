"""python -m decdec_eval.mtbench answer | judge | show | fidelity | fetch: from questions to scores."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from decdec_core.commandline import OneLineParser, run_command
from decdec_eval.mtbench.answer import add_answer
from decdec_eval.mtbench.data import add_fetch
from decdec_eval.mtbench.fidelity import add_fidelity
from decdec_eval.mtbench.judge import add_judge
from decdec_eval.mtbench.show import add_show

_RESUME = ("answer", "judge", "fidelity")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; a refused input prints one line to standard error and returns 2."""
    parser = OneLineParser(prog="python -m decdec_eval.mtbench", description=__doc__)
    commands = parser.add_subparsers(
        title="commands", required=True, dest="command", parser_class=OneLineParser
    )
    add_answer(commands.add_parser("answer", help="both turns of the 80 questions, FastChat's answer file"))
    add_judge(commands.add_parser("judge", help="ratings or verdicts of a judge, FastChat's judgment file"))
    add_show(commands.add_parser("show", help="scores by category and turn, with intervals; table and radar"))
    add_fidelity(
        commands.add_parser("fidelity", help="how near configurations are to full precision; no judge")
    )
    add_fetch(commands.add_parser("fetch", help="questions, references and judge prompts from their source"))
    options = parser.parse_args(arguments)
    return run_command(lambda: options.run(options), resumes=options.command in _RESUME)


if __name__ == "__main__":
    sys.exit(main())
