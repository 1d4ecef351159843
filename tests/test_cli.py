from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config

from decdec_core import workfolder
from decdec_core.cli import main
from decdec_core.config import DecDECError

SMALL = ["--calibration", "pydoc", "--calibration-sequences", "2", "--calibration-length", "64"]


def _refused(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    """Return the one line that a refused command prints."""
    capsys.readouterr()
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    line = captured.err.strip()
    assert line.startswith("decdec: error: ")
    assert "\n" not in line
    return line


def test_build_verify_dequantize(
    tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "artifact"
    build = [
        "build",
        "--model",
        str(tiny_model_dir),
        "--method",
        "rtn",
        "--bits",
        "4",
        "--out",
        str(out),
        *SMALL,
    ]
    assert main(build) == 0
    assert "14 quantized layers" in capsys.readouterr().out
    assert main(["verify", str(out)]) == 0
    assert str(out) in capsys.readouterr().out
    assert main(["dequantize", str(out), "--out", str(tmp_path / "dense")]) == 0
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32)
    assert not hasattr(dense.config, "quantization_config")
    assert "must be a folder that does not exist yet" in _refused(capsys, build)
    assert not list(tmp_path.glob("**/*.tmp"))


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--group-size", "1"], "group_size must be 8..65536, got 1"),
        (["--calibration", "absent.txt"], "absent.txt"),
        (["--calibration-sequences", "0"], "calibration sequences must be 1..1048576, got 0"),
        (
            ["--calibration", "pydoc", "--calibration-sequences", "900000"],
            "calibration text must hold 900000 sequences",
        ),
    ],
)
def test_bad_options_cost_one_line(
    option: list[str], message: str, tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = _refused(capsys, ["build", "--model", str(tiny_model_dir), "--out", str(tmp_path / "x"), *option])
    assert message in line
    assert not (tmp_path / "x").exists()


def test_a_missing_folder_and_an_unsupported_architecture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["--out", str(tmp_path / "x"), *SMALL]
    absent = str(tmp_path / "absent")
    assert "must be a folder with a config.json" in _refused(capsys, ["build", "--model", absent, *out])
    assert "must be a file that exists" in _refused(capsys, ["build", "--model", "absent.gguf", *out])
    GPT2Config().save_pretrained(tmp_path / "gpt2")
    line = _refused(capsys, ["build", "--model", str(tmp_path / "gpt2"), *out])
    assert "model_type must be one of llama, mistral, qwen2, qwen3, phi3, got 'gpt2'" in line


def test_an_unknown_option_is_refused_with_a_suggestion(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["build", "--model", "x", "--out", "y", "--calibraton-length", "5"])
    assert stop.value.code == 2
    assert "did you mean '--calibration-length'?" in capsys.readouterr().err


def test_verify_says_what_is_wrong(
    tiny_artifact_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = Path(shutil.copytree(tiny_artifact_dir, tmp_path / "copy"))
    manifest = json.loads((copy / "manifest.json").read_text())
    name = next(iter(manifest["tensors"]))
    manifest["tensors"][name]["sha256"] = "0" * 64
    (copy / "manifest.json").write_text(json.dumps(manifest))
    assert f"{copy}: tensor {name}: sha256 must be {'0' * 64}, got " in _refused(
        capsys, ["verify", str(copy)]
    )


def test_traceback_on_request(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DECDEC_TRACEBACK", "1")
    with pytest.raises(DecDECError, match="artifact must be a folder"):
        main(["verify", str(tmp_path / "absent")])


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--bits", "inf"], "must be one of 2, 2.5, 3, 3.5, 4, 4.5, 5, got 'inf'"),
        (["--bits", "3,5"], "must be one of 2, 2.5, 3, 3.5, 4, 4.5, 5, got '3,5'"),
    ],
)
def test_bits_that_are_none_cost_one_line(
    option: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["build", "--model", "x", "--out", "y", *option])
    assert ended.value.code == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert len(error.splitlines()) == 1


def test_no_tokenizer_a_full_disk_and_an_interruption_cost_one_line(
    tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = shutil.copytree(tiny_model_dir, tmp_path / "plain")
    (plain / "tokenizer.json").write_text("{")
    build = ["build", "--out", str(tmp_path / "x"), *SMALL, "--model"]
    assert "model must be one that can be loaded" in _refused(capsys, [*build, str(plain)])

    def fail(error: BaseException) -> Callable[..., object]:
        def raising(*_arguments: object) -> object:
            raise error

        return raising

    monkeypatch.setattr(workfolder, "write_tensors", fail(OSError(28, "No space left on device")))
    assert "No space left on device" in _refused(capsys, [*build, str(tiny_model_dir)])
    monkeypatch.setattr(workfolder, "write_tensors", fail(KeyboardInterrupt()))
    assert main([*build, str(tiny_model_dir)]) == 130
    assert "interrupted: the same command goes on" in capsys.readouterr().err


def test_a_device_is_not_replaced_by_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["bench", "kernels", "--json", "/dev/null"])
    assert "must be a file in a folder that exists, got '/dev/null'" in capsys.readouterr().err
    assert not Path("/dev/null").is_file()
