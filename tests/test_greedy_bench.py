"""The comparison of decoded tokens with transformers' generate."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from decdec_core import cli, greedy_bench
from decdec_core.config import Compensation
from decdec_core.decode import Decoder, Generation
from decdec_core.greedy_bench import greedy_rows


def test_all_tokens_are_equal(tiny_artifact_dir: Path) -> None:
    compensation = Compensation("dynamic", 128, "decode")
    rows = greedy_rows(tiny_artifact_dir, "cpu", None, compensation, 20, ["one", "another"])
    assert [(row["prompt"], row["dtype"], row["margin"]) for row in rows] == [
        ("one", "float32", None),
        ("another", "float32", None),
    ]
    assert all(0 < row["equal"] == row["tokens"] <= 20 for row in rows)
    assert rows[0]["k_chunk"] == [128, 128, 128, 128]


def test_rules_that_are_not_greedy_are_left_out(
    tiny_artifact_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = AutoModelForCausalLM.from_pretrained

    def with_rules(*arguments: Any, **options: Any) -> Any:
        model = load(*arguments, **options)
        model.generation_config.repetition_penalty = 1.5
        model.generation_config.no_repeat_ngram_size = 2
        return model

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", with_rules)
    (row,) = greedy_rows(tiny_artifact_dir, "cpu", torch.float32, Compensation("none"), 40, ["one"])
    assert 0 < row["equal"] == row["tokens"]


def test_where_they_part_is_told(
    tiny_artifact_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    generate = Decoder.generate

    def other(decoder: Decoder, *arguments: Any, **options: Any) -> Generation:
        done = generate(decoder, *arguments, **options)
        done.tokens[3] = (done.tokens[3] + 1) % 256
        return done

    monkeypatch.setattr(Decoder, "generate", other)
    (row,) = greedy_rows(tiny_artifact_dir, "cpu", torch.float32, Compensation("none"), 10, ["one"])
    assert row["equal"] == 3
    assert row["margin"] > 0
    assert f"| one | 3 of 10 | {row['margin']:.4f} |" in greedy_bench.table([row])


def test_half_precision_is_compared_with_float32(
    tiny_artifact_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compensation, prompts = Compensation("dynamic", 128, "decode"), ["one", "another"]
    generated = greedy_bench._generated
    seen: dict[str, list[list[int]]] = {}

    def keep(model: Any, *arguments: Any) -> Any:
        done = generated(model, *arguments)
        seen.setdefault(str(model.dtype), []).append(done[0])
        return done

    monkeypatch.setattr(greedy_bench, "_generated", keep)
    rows = greedy_rows(tiny_artifact_dir, "cpu", torch.bfloat16, compensation, 20, prompts)
    assert list(map(len, seen.values())) == [2, 2]
    for row, half, full in zip(rows, seen["torch.bfloat16"], seen["torch.float32"], strict=True):
        shared = row["generate_equal_float32"]
        assert half[:shared] == full[:shared]
        assert shared == len(full) or half[shared] != full[shared]
        # ours has the token of generate up to where they part
        least = min(row["equal"], shared)
        assert row["equal_float32"] >= least
        assert row["equal"] == shared or row["equal_float32"] == least
    table = greedy_bench.table(rows).splitlines()
    assert table[0].count("float32") == 2
    assert table[2].endswith(f"| {rows[0]['equal_float32']} | {rows[0]['generate_equal_float32']} |")


def test_the_command(tiny_artifact_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "greedy.json"
    options = ["--device", "cpu", "--tokens", "5", "--k-chunk", "64", "--json", str(out)]
    assert cli.main(["bench", "greedy", str(tiny_artifact_dir), *options]) == 0
    assert "| def fibonacci(n): | 5 of 5 |" in capsys.readouterr().out
    written = json.loads(out.read_text("utf-8"))
    assert len(written["rows"]) == 5
    assert cli.main(["bench", "greedy", str(tmp_path / "none"), "--device", "cpu"]) == 2
    assert "none" in capsys.readouterr().err
