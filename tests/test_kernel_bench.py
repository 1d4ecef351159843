"""The kernel benchmark's edges; its times are a command's, not a test's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from decdec_core import cli, kernel_bench
from decdec_core.config import DecDECError


def test_shapes_are_a_models_or_ones_own() -> None:
    assert kernel_bench.shapes_of("llama-3-8b")["down"] == (14336, 4096)
    assert kernel_bench.shapes_of("576,1536") == {"matrix": (576, 1536)}
    for text in ("llama-3-8", "576", "576,x"):
        with pytest.raises(DecDECError, match=f"shapes must be .* or IN,OUT, got {text}"):
            kernel_bench.shapes_of(text)


def test_the_table_sums_over_the_matrices() -> None:
    about = {"bits": 3, "format": "uniform", "n_tb": 8, "selection": "dynamic"}
    rows = [{**about, "matrix": m, "k_chunk": k, "time_us": t} for m, k, t in (("o", 0, 4.0), ("o", 8, 5.0))]
    rows += [
        {**about, "matrix": m, "k_chunk": k, "time_us": t} for m, k, t in (("qkv", 0, 6.0), ("qkv", 8, 7.5))
    ]
    lines = kernel_bench.table(rows).splitlines()
    assert lines[0] == "|  | o | qkv | sum |"
    assert lines[2:] == [
        "| 3-bit uniform | 4.00 | 6.00 | 10.00 |",
        "| 3-bit uniform, dynamic k_chunk 8, n_tb 8 | 5.00 | 7.50 | 12.50 |",
    ]


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a CUDA device")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "kernels"]) == 2
    assert capsys.readouterr().err == "decdec: error: bench kernels must have a CUDA device, got none\n"


@pytest.mark.cuda
def test_rows_say_what_they_are(tmp_path: Path) -> None:
    out, figure = tmp_path / "kernels.json", tmp_path / "kernels.png"
    options = ["--shapes", "4096,4096", "--bits", "3", "--formats", "uniform", "--k-chunk", "8", "16"]
    assert cli.main(["bench", "kernels", *options, "--json", str(out), "--plot", str(figure)]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert len(rows) == 1 + 1 + 2 * 2 + 2
    assert all(row["time_us"] > 0 for row in rows)
    assert [row["format"] for row in rows].count("fp16") == 1
    assert figure.stat().st_size > 1000
