"""decdec bench decode on models small enough for a test."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from decdec_core import cli
from decdec_core.config import Compensation, DecDECError, WeightQuant
from decdec_core.decode import Decoder, Generation
from decdec_core.decode_bench import Setup, decode_rows, random_model, step_profile, weight_bytes
from decdec_core.fusing import is_fused
from decdec_core.model import dec_layers, state_of

SMALL = LlamaConfig(
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=300,
)
SETUP = Setup(prompt=8, tokens=6, repeats=2)
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]


def small(weight: WeightQuant | None, device: str) -> Any:
    dtype = torch.float16 if device == "cuda" else torch.float32
    return random_model(SMALL, weight, torch.device(device), dtype)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "weight",
    [None, WeightQuant("rtn", 3), WeightQuant("squeezellm", 4)],
    ids=["plain", "uniform", "codebook"],
)
def test_a_random_model_is_sane(weight: WeightQuant | None, device: str) -> None:
    model = small(weight, device)
    assert is_fused(model)
    assert len(dec_layers(model)) == (0 if weight is None else 8)
    assert not any(t.is_meta for t in (*model.parameters(), *model.buffers()))
    logits = model(torch.arange(40, device=device)[None], use_cache=False).logits.float()
    # a model that says something: neither constant nor overflowing
    assert 0.01 < logits.std() < 100
    assert logits.argmax(-1).unique().numel() > 1
    kept = [layer.dequantize().std().item() for layer in dec_layers(model).values()]
    assert kept == pytest.approx([0.02] * len(kept), rel=0.15)


@pytest.mark.parametrize("device", DEVICES)
def test_a_row_for_every_setting(device: str) -> None:
    grid = [
        Compensation("none"),
        Compensation("dynamic", 64),
        Compensation("dynamic", (0, 0, 128, 0), n_tb=4),
    ]
    rows = decode_rows(small(WeightQuant("rtn", 3), device), "3-bit uniform", grid, SETUP)
    assert [row["how"] for row in rows] == ["captured" if device == "cuda" else "eager"] * 3 + ["generate"]
    assert [row["k_chunk"] for row in rows] == [[0] * 4, [64] * 4, [0, 0, 128, 0], [0] * 4]
    # channels of 256 inputs, a quarter of a chunk: 16 of qkv and of o, 16 of gate_up, 32 of 512 in down
    channels = [[16 * 512 // 2, 16 * 256 // 2, 16 * 1024 // 2, 32 * 256 // 2], [32 * 1024 // 2]]
    assert [row["fetched_bytes"] for row in rows] == [0, 2 * sum(channels[0]), 2 * sum(channels[1]), 0]
    assert rows[0]["slowdown_percent"] == 0
    assert rows[1]["slowdown_percent"] == pytest.approx(
        100 * (rows[1]["median_ms"] / rows[0]["median_ms"] - 1)
    )
    for row in rows:
        assert 0 < row["least"] <= row["tokens_per_second"] <= row["most"]
        assert row["gpu_bytes"] == rows[0]["gpu_bytes"] > 0


def test_slowdown_is_of_the_median_step(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small(WeightQuant("rtn", 3), "cpu")

    def generate(decoder: Decoder, *_arguments: Any, **_options: Any) -> Generation:
        seconds = 0.01 if state_of(decoder.model).compensation.selection == "none" else 0.012
        return Generation([0, 1, 2, 3], 0.5, [seconds, seconds, 1.0])

    monkeypatch.setattr(Decoder, "generate", generate)
    rows = decode_rows(model, "x", [Compensation("none"), Compensation("dynamic", 64)], SETUP, generate=False)
    assert [row["slowdown_percent"] for row in rows] == [0, pytest.approx(20)]
    assert rows[1]["first_ms"] == 500


@pytest.mark.parametrize("device", DEVICES)
def test_a_plain_model_has_one_row_and_generate(device: str) -> None:
    model = small(None, device)
    rows = decode_rows(model, "float16", [Compensation("none")], SETUP)
    assert [row["how"] for row in rows] == ["captured" if device == "cuda" else "eager", "generate"]
    assert rows[0]["selection"] is None
    assert rows[0]["gpu_bytes"] == weight_bytes(model) == sum(p.nbytes for p in model.parameters())


@pytest.mark.cuda
def test_the_profile_sees_the_kernels() -> None:
    model = small(WeightQuant("rtn", 3), "cuda")
    rows = step_profile(Decoder(model, 64), SETUP.ids(300))
    # of two blocks, and nothing of a prompt
    wanted = {"linear_kernel": 8, "attention_kernel": 2, "norm_kernel": 5, "silu_mul_kernel": 2}
    for name, launches in wanted.items():
        assert sum(row["launches"] for row in rows if name in row["kernel"]) == launches
    assert rows[0]["us"] == max(row["us"] for row in rows) > 0


@pytest.mark.parametrize("option", [{"prompt": 0}, {"tokens": 1}, {"repeats": 0}])
def test_refused_setups(option: dict[str, int]) -> None:
    name = next(iter(option))
    with pytest.raises(DecDECError, match=f"{name} must be"):
        Setup(**option)


def test_the_command_times_an_artifact(
    tiny_artifact_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "decode.json"
    options = ["--device", "cpu", "--prompt", "8", "--tokens", "4", "--repeats", "1", "--json", str(out)]
    arguments = ["bench", "decode", str(tiny_artifact_dir), "--k-chunk", "8", "64/0/64/0", *options]
    assert cli.main(arguments) == 0
    rows = json.loads(out.read_text())["rows"]
    assert [row["model"] for row in rows] == [tiny_artifact_dir.name] * 4 + ["float32"] * 2
    assert [row["k_chunk"] for row in rows[:3]] == [[0] * 4, [8] * 4, [64, 0, 64, 0]]
    assert "| tokens/s |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "bench decode must have either DIR or --shapes, got neither"),
        (
            ["x", "--shapes", "llama-3-8b"],
            "bench decode must have either DIR or --shapes, got both",
        ),
        (["--shapes", "llama-3-8"], "shapes must be one of llama-3-8b"),
        (["nowhere"], "got nowhere"),
        (["nowhere", "--format", "codebook"], "--format must be absent with DIR, got codebook"),
        (["nowhere", "--device", "gpu"], "device must be cpu or cuda, got gpu"),
        (["nowhere", "--profile", "x.json"], "a step's profile must be of a GPU, got cpu"),
        (["--shapes", "llama-3-8b", "--k-chunk", "2000"], "k_chunk must be 0..1024, got 2000"),
    ],
)
def test_refused_commands(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "decode", "--device", "cpu", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a CUDA device")
def test_without_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "decode", "--shapes", "llama-3-8b"]) == 2
    assert "must have a CUDA device, got none" in capsys.readouterr().err
