"""The command line of MT-Bench."""

from __future__ import annotations

from pathlib import Path

import pytest

from decdec_eval.mtbench.__main__ import main


@pytest.mark.parametrize("command", ["answer", "judge", "show", "fidelity", "fetch"])
def test_each_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    assert f"usage: python -m decdec_eval.mtbench {command}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: command"),
        (["ansver"], "invalid choice: 'ansver'"),
        (["show", "--answers"], "--answers"),
        (["show", "--answers", "none"], "none"),
    ],
)
def test_refusals_are_one_line(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    try:
        code = main(arguments)
    except SystemExit as ended:
        code = int(ended.code or 0)
    assert code == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert error.count("\n") == 0
