"""Profiles as files, the bundled ones, and their picture."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig, MistralConfig, Phi3Config, Qwen2Config, Qwen3Config

from decdec_core import cli, profiles
from decdec_core.config import PROJECTION_KINDS, DecDECError
from decdec_core.latency import GPUS, Gpu, knee
from decdec_core.profiles import (
    Budget,
    Profile,
    bundled,
    choice_for,
    fitting,
    key_of,
    predicted_profile,
    read_bundled,
    read_profile,
    read_profiles,
    shapes_of_model,
    write_predicted,
    write_profile,
    write_profiles,
)
from decdec_core.shapes import config_of, matrices_of
from decdec_core.tune_figure import draw
from decdec_core.tuner import search

LLAMA = matrices_of(config_of("llama-3-8b"))
PAPER = ["rtx-4050-mobile", "rtx-4070-mobile", "rtx-4070s", "rtx-4080s", "rtx-4090"]


@pytest.fixture
def profile() -> Profile:
    """A measured profile: every k_chunk of every kind costs 0.1 of 40 us."""
    rows = [{"kind": k, "n_tb": 0, "k_chunk": 0, "time_us": 10.0} for k in PROJECTION_KINDS]
    rows += [
        {"kind": kind, "n_tb": 8, "k_chunk": k, "time_us": 10 + 0.1 * k}
        for kind in PROJECTION_KINDS
        for k in (1, 20)
    ]
    return Profile(
        gpu="NVIDIA H200",
        gpu_key="h200",
        driver="580.95",
        model="llama-3-8b",
        shapes=LLAMA,
        blocks=32,
        bits=3,
        format="codebook",
        selection="dynamic",
        predicted=False,
        base_us=dict.fromkeys(PROJECTION_KINDS, 10.0),
        rows=rows,
        choices=[Budget(5.0, 8, (9, 9, 9, 9), 9.0, 4.8), Budget(5.0, 8, (1, 2, 9, 9), 5.25, 5.1, "quality")],
        environment={"hardware": "NVIDIA H200", "commit": "0123abc"},
    )


# ---- files


def test_a_profile_comes_back_from_its_file(profile: Profile, tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    write_profile(path, profile)
    assert read_profile(path) == profile
    body = json.loads(path.read_text("utf-8"))
    assert list(body)[:3] == ["format_version", "gpu", "gpu_key"]
    assert body["shapes"]["down"] == [14336, 4096]
    assert body["choices"][0] == {
        "target_percent": 5.0,
        "n_tb": 8,
        "k_chunk": [9, 9, 9, 9],
        "predicted_percent": 9.0,
        "measured_percent": 4.8,
        "objective": "speed",
        "tokens_per_second": None,
        "baseline_tokens_per_second": None,
        "gpu_bytes": None,
        "baseline_gpu_bytes": None,
    }
    # a line for each row
    assert path.read_text("utf-8").count("\n") < len(profile.rows) + 25


def test_a_file_may_hold_several(profile: Profile, tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    other = replace(profile, bits=4, model_bits=4)
    write_profiles(path, [profile, other])
    assert read_profiles(path) == [profile, other]
    with pytest.raises(DecDECError, match=r"mine\.json must hold one profile, got 2"):
        read_profile(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "must be JSON, got"),
        ("[]", "a profile must be a JSON object, got list"),
        ("{}", "a profile must have gpu, .*, got no gpu"),
        ('{"gpus": 1}', r"a profile takes .*, got unknown key 'gpus' \(did you mean 'gpu'\?\)"),
        ('{"format_version": 2, "profiles": []}', "format_version must be one of 1, got 2"),
        ('{"format_version": 1, "profiles": [3]}', "a profile must be a JSON object, got int"),
        ('{"profiles": []}', "a file of profiles must have format_version, profiles, got no format_version"),
        ('{"format_version": 1, "profiles": 3}', "profiles must be a list, got 3"),
    ],
)
def test_files_that_hold_no_profile_are_refused(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(text, "utf-8")
    with pytest.raises(DecDECError, match=f"profile .*mine.json.* {message}") as refused:
        read_profiles(path)
    assert "\n" not in str(refused.value)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DecDECError, match=r"profile .*none\.json must be a file, got none"):
        read_profile(tmp_path / "none.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 2}, "format_version must be 1, got 2"),
        ({"gpu": ""}, "gpu must be a name, got ''"),
        ({"driver": 580}, "driver must be a name or null, got 580"),
        ({"environment": []}, r"environment must be an object or null, got \[\]"),
        ({"blocks": 0}, r"blocks must be 1\.\.10000, got 0"),
        ({"bits": 5}, "bits must be one of 2, 3, 4, got 5"),
        ({"format": "awq"}, "format must be one of uniform, codebook, got 'awq'"),
        ({"selection": "dynamc"}, "did you mean 'dynamic'"),
        ({"predicted": 1}, "predicted must be one of True, False, got 1"),
        ({"shapes": {"o": [1, 1]}}, "shapes must be of qkv, o, gate_up, down, got o"),
        ({"shapes": {**LLAMA, "o": [4096]}}, r"shapes of o must be in and out, got \[4096\]"),
        ({"shapes": {**LLAMA, "o": [4096, 0]}}, "shapes of o must be 1.*, got 0"),
        ({"shapes": []}, r"shapes must be an object, got \[\]"),
        ({"rows": {}}, "rows must be a list, got {}"),
        ({"rows": [8]}, "a timing row must be an object of kind, n_tb, k_chunk, time_us, got 8"),
        ({"rows": [{"kind": "o", "ntb": 8}]}, r"unknown key 'ntb' \(did you mean 'n_tb'\?\)"),
        ({"rows": []}, "rows must have n_tb 0 and k_chunk 0 of qkv, got none"),
        ({"base_us": dict.fromkeys(PROJECTION_KINDS, 9.0)}, "base_us must be as in the rows"),
        ({"choices": [8]}, "a choice must be an object of target_percent, .*, got 8"),
        (
            {"choices": [{"target": 5}]},
            r"a choice takes .* unknown key 'target' \(did you mean 'target_percent'",
        ),
        ({"choices": [{"target_percent": 5}]}, "a choice must have .*, got no n_tb"),
    ],
)
def test_profiles_that_are_none_are_refused(
    change: dict[str, Any], message: str, profile: Profile, tmp_path: Path
) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({**profile.to_dict(), **change}), "utf-8")
    with pytest.raises(DecDECError, match=message):
        read_profile(path)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: replace(p, choices=[p.choices[0]] * 2), "choices must be one for a target and objective"),
        (
            lambda p: replace(p, choices=[Budget(5, 16, (1, 1, 1, 1), 1.0)]),
            r"n_tb of the choice for 5 % must be in the rows, one of 8, got 16",
        ),
        (
            lambda p: replace(p, choices=[Budget(5, 8, (21, 1, 1, 1), 1.0)]),
            r"k_chunk .* must be in the rows, 0\.\.20 of qkv, got 21",
        ),
        (lambda p: Budget(-1, 8, (1, 1, 1, 1), 1.0), "target_percent must be 0 or more, got -1"),
        (lambda p: Budget(5, 8, (1, 1, 1, 1), 1.0, "5"), "measured_percent must be a finite number, got '5'"),
        (lambda p: Budget(5, 0, (1, 1, 1, 1), 1.0), "n_tb must be 0 exactly where every k_chunk is, got 0"),
    ],
)
def test_budgets_that_are_none_are_refused(
    make: Callable[[Profile], object], message: str, profile: Profile
) -> None:
    with pytest.raises(DecDECError, match=message):
        make(profile)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k_chunk": (99, 99, 99, 99)}, "must be in the rows, 0..20 of qkv, got 99"),
        ({"n_tb": 12}, "must be in the rows, one of 8, got 12"),
        ({"k_chunk": (10, 9, 9, 9)}, "for 5 % must be 9.250, as in the rows, got 9.0"),
        ({"n_tb": 0, "k_chunk": (0, 0, 0, 0)}, "for 5 % must be 0.000, as in the rows, got 9.0"),
    ],
)
def test_a_choice_that_the_rows_do_not_give_is_refused(
    changes: dict[str, Any], message: str, profile: Profile
) -> None:
    with pytest.raises(DecDECError, match=re.escape(message)):
        replace(profile, choices=[replace(profile.choices[0], **changes)])


@pytest.mark.parametrize("changes", [{"environment": None}, {"predicted": True}])
def test_a_measurement_of_nowhere_is_refused(changes: dict[str, Any], profile: Profile) -> None:
    with pytest.raises(DecDECError, match="measured_percent must be in a measured profile with its environm"):
        replace(profile, **changes)


# ---- what is chosen


def test_a_stored_target_is_taken_as_it_stands(profile: Profile) -> None:
    assert choice_for(profile, 5) == profile.choices[0]
    assert choice_for(replace(profile, choices=profile.choices[1:]), 5).objective == "quality"


def test_another_target_is_searched_for_in_the_rows(profile: Profile) -> None:
    budget = choice_for(profile, 10)
    # 4 us of 40 pay for 40 increases of 0.1
    assert (budget.n_tb, budget.k_chunk, budget.measured_percent) == (8, (10, 10, 10, 10), None)
    assert budget.predicted_percent == 10.0


# ---- the bundled ones


def find(gpu: str, shapes: Mapping[str, tuple[int, int]], bits: int, format: str) -> Profile:
    return fitting(read_bundled(key_of(gpu)), shapes, bits, format)


def test_the_bundled_predictions_are_what_the_model_says_today(tmp_path: Path) -> None:
    write_predicted(tmp_path)
    assert sorted(path.stem for path in tmp_path.glob("*.json")) == PAPER
    for path in tmp_path.glob("*.json"):
        predicted = [profile for profile in read_bundled(path.stem) if profile.predicted]
        assert predicted == read_profiles(path), "write_predicted() writes them anew"


def test_every_bundled_file_can_be_read_and_is_small() -> None:
    assert set(PAPER) <= set(bundled())
    for key in bundled():
        found = read_bundled(key)
        # some 350 times measured for each model, bits and format, at 60 bytes
        assert (Path(profiles.__file__).parent / f"{key}.json").stat().st_size < 25_000 * len(found)
        for profile in found:
            assert profile.gpu_key == key
            for budget in profile.choices:
                assert budget.predicted_percent <= budget.target_percent + 1e-3 or not profile.predicted


@pytest.mark.parametrize("key", PAPER)
def test_predictions_offer_what_the_paper_found_for_large_models(key: str) -> None:
    # with data sheets not reached and launches not free, what 10 % buys is somewhat less than the knee
    for model in ("llama-3-8b", "phi-3-medium"):
        profile = find(key, matrices_of(config_of(model)), 3, "codebook")
        assert profile.predicted
        assert [budget.measured_percent for budget in profile.choices] == [None] * 4
        budget = choice_for(profile, 10)
        assert 0.6 * knee(GPUS[key], 3) < min(budget.k_chunk) < knee(GPUS[key], 3)


def test_a_small_models_launches_leave_no_room_on_a_fast_gpu() -> None:
    # selection alone takes as long as the product
    profile = find("rtx-4090", matrices_of(config_of("smollm2-135m")), 3, "codebook")
    assert choice_for(profile, 5) == Budget(5.0, 0, (0, 0, 0, 0), 0.0)


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("NVIDIA GeForce RTX 4050 Laptop GPU", "rtx-4050-mobile"),
        ("NVIDIA GeForce RTX 4070 Laptop GPU", "rtx-4070-mobile"),
        ("NVIDIA GeForce RTX 4070 SUPER", "rtx-4070s"),
        ("NVIDIA GeForce RTX 4080 SUPER", "rtx-4080s"),
        ("NVIDIA GeForce RTX 4090", "rtx-4090"),
        ("NVIDIA H200", "h200"),
        ("rtx-4050-mobile", "rtx-4050-mobile"),
        # others, whatever they resemble
        ("NVIDIA GeForce RTX 4070", "rtx-4070"),
        ("NVIDIA GeForce RTX 4070 Ti SUPER", "rtx-4070-tis"),
        ("NVIDIA H200 NVL", "h200-nvl"),
    ],
)
def test_a_devices_name_says_its_key(name: str, key: str) -> None:
    assert key_of(name) == key


def test_a_measured_profile_goes_before_a_predicted_one(
    profile: Profile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    predicted = predicted_profile("h200", "llama-3-8b", LLAMA, 32, 3, "codebook")
    write_profiles(tmp_path / "h200.json", [predicted, profile])
    monkeypatch.setattr(profiles, "_FOLDER", tmp_path)
    assert find("NVIDIA H200", LLAMA, 3, "codebook") == profile
    with pytest.raises(DecDECError, match=r"must be one of h200, got 'rtx-4090'"):
        find("rtx-4090", LLAMA, 3, "codebook")


def test_what_is_not_bundled_is_refused_with_what_is() -> None:
    with pytest.raises(DecDECError, match=r"gpu must be one of .*rtx-4090, got 'rtx-4091' \(did you mean"):
        find("rtx-4091", LLAMA, 3, "codebook")
    with pytest.raises(
        DecDECError,
        match=r"a profile of rtx-4090 must be one of llama-3-8b 3 bits uniform predicted, .*"
        r"got qkv 4096x6144, .* at 2 bits uniform",
    ):
        find("rtx-4090", LLAMA, 2, "uniform")
    with pytest.raises(DecDECError, match="got qkv 64x6144, "):
        find("rtx-4090", {**LLAMA, "qkv": (64, 6144)}, 3, "uniform")


def test_a_prediction_of_ones_own_gpu_and_targets() -> None:
    gpu = Gpu("mine", 300, 25)
    profile = predicted_profile("mine", "llama-3-8b", LLAMA, 32, 4, "uniform", (1, 50), gpu)
    assert (profile.gpu, profile.predicted, profile.driver, profile.environment) == ("mine", True, None, None)
    assert [budget.target_percent for budget in profile.choices] == [1, 50]
    assert choice_for(profile, 50).k_chunk == search(profile.table(), 50).k_chunk
    with pytest.raises(DecDECError, match=r"gpu must be one of .*, got 'mine'"):
        predicted_profile("mine", "llama-3-8b", LLAMA, 32, 4, "uniform")


# ---- a model's shapes


@pytest.mark.parametrize("kind", [LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config, Phi3Config])
def test_shapes_of_every_supported_architecture(kind: type) -> None:
    sizes = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "vocab_size": 64}
    config = kind(**sizes, num_key_value_heads=3, head_dim=64, pad_token_id=0)
    assert shapes_of_model(config) == {
        "qkv": (576, 960),
        "o": (576, 576),
        "gate_up": (576, 3072),
        "down": (1536, 576),
    }


def test_a_head_may_be_wider_than_its_share() -> None:
    config = Qwen3Config(
        hidden_size=512, intermediate_size=1024, num_attention_heads=8, num_key_value_heads=2, head_dim=128
    )
    assert shapes_of_model(config)["qkv"] == (512, (8 + 2 * 2) * 128)
    assert shapes_of_model(config)["o"] == (8 * 128, 512)


def test_shapes_of_another_architecture_are_refused() -> None:
    class Other:
        model_type = "lama"

    with pytest.raises(DecDECError, match=r"model_type must be one of llama, .*did you mean 'llama'"):
        shapes_of_model(Other())


# ---- the picture


def test_a_picture_of_each_kind_of_profile(profile: Profile, tmp_path: Path) -> None:
    import matplotlib.image

    bare = replace(profile, choices=[], gpu_key="unknown")
    for number, shown in enumerate((profile, bare, find("rtx-4090", LLAMA, 3, "uniform"))):
        path = tmp_path / f"{number}.png"
        draw(shown, path)
        height, width, _ = matplotlib.image.imread(path).shape
        assert width > 2 * height > 1000
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["0.png", "1.png", "2.png"]


def test_profiles_of_one_gpu_become_one_file(
    profile: Profile, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two, out, rows = (tmp_path / f"{name}.json" for name in ("one", "two", "out", "rows"))
    other = replace(profile, bits=4, model_bits=4)
    write_profile(one, other)
    write_profile(two, profile)
    assert cli.main(["profiles", str(one), str(two), "--out", str(out), "--json", str(rows)]) == 0
    assert read_profiles(out) == [profile, other]
    written = json.loads(rows.read_text("utf-8"))
    assert [row["bits"] for row in written["rows"]] == [3] * len(profile.choices) + [4] * len(profile.choices)
    assert {row["commit"] for row in written["rows"]} == {profile.environment["commit"]}
    assert written["hardware"] == profile.gpu
    # their own output is an input like any other, which doubles them here
    assert cli.main(["profiles", str(out), str(two), "--out", str(tmp_path / "x.json")]) == 2
    assert "profiles must be of different shapes, bits or format" in capsys.readouterr().err
    write_profile(one, replace(profile, gpu_key="another"))
    assert cli.main(["profiles", str(one), str(two), "--out", str(out)]) == 2
    assert "profiles must be of one GPU, got another, " in capsys.readouterr().err
    assert read_profiles(out) == [profile, other]
    assert cli.main(["profiles", str(two), "--out", str(out), "--json", str(out)]) == 2
    assert "--out and --json must be different files" in capsys.readouterr().err
