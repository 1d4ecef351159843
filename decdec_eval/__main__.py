"""`python -m decdec_eval ...`: lm-eval's command line, with `--model decdec` unless a model is named.

A model named inside a `--config` file counts as named: with `--config`, nothing is added.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from decdec_eval import plugin

_OTHER_COMMANDS = ("ls", "validate")
_MODEL_NAMED_BY = ("--model", "-M", "--config", "-C", "-h", "--help")


def with_model(arguments: Sequence[str]) -> list[str]:
    """Return lm-eval's `arguments` with `--model decdec` appended where no model is named."""
    flags = {argument.partition("=")[0] for argument in arguments}
    if not arguments or arguments[0] in _OTHER_COMMANDS or flags.intersection(_MODEL_NAMED_BY):
        return list(arguments)
    return [*arguments, "--model", "decdec"]


def main() -> None:
    """Run lm-eval's command line on sys.argv."""
    plugin.install()
    plugin.one_line_errors()
    sys.argv = ["lm_eval", *with_model(sys.argv[1:])]
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
