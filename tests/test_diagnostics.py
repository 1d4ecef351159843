"""Diagnostics against a brute-force computation: one token, one layer, one channel set at a time."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import CALIBRATION, save_tiny
from tiny_artifacts import write_tiny
from torch import Tensor
from transformers import AutoModelForCausalLM

from decdec_core.architectures import kind_of
from decdec_core.budget import described
from decdec_core.build import build_artifact
from decdec_core.calibration import FIRST_TOKENS
from decdec_core.config import PROJECTION_KINDS, Compensation, DecDECError, ResidualQuant, WeightQuant
from decdec_core.decode import Decoder, Sampling
from decdec_core.model import dec_layers, set_compensation, state_of
from decdec_core.residuals import dequantize_residual
from decdec_eval import channel_errors, diagnostics
from decdec_eval.channel_errors import SELECTIONS, ChannelErrors, Key, Share, by_kind, by_layer, recall
from decdec_eval.originals import Originals, stored_weight
from decdec_eval.outliers import middle_down, outlier_map
from decdec_eval.runs import key_of

K_CHUNKS = (16, 128)
STRETCH = 4


@pytest.fixture
def ids(draw: torch.Generator) -> Tensor:
    return torch.randint(0, 256, (3, 15), generator=draw)


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channel_errors, "STRETCH", STRETCH)
    monkeypatch.setattr(channel_errors, "_AT_ONCE", 2)
    monkeypatch.setattr(channel_errors, "_TOKENS", 9)


@pytest.fixture(scope="module")
def with_extras(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact of which one layer has an input order, and one an input scale."""
    return write_tiny(tmp_path_factory.mktemp("tiny") / "extras", extras=True)


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def tokens_of(model: Any, ids: Tensor, skipped: int) -> dict[str, list[Tensor]]:
    """Return each layer's inputs as it sees them, token by token, of the uncompensated model."""
    set_compensation(model, Compensation("none"))
    seen: dict[str, list[Tensor]] = {name: [] for name in dec_layers(model)}
    hooks = [
        layer.register_forward_hook(
            lambda layer, x, _y, name=name: seen[name].extend(layer.seen(x[0])[0, skipped:])
        )
        for name, layer in dec_layers(model).items()
    ]
    for sequence in ids:
        model(sequence[None], use_cache=False)
    for hook in hooks:
        hook.remove()
    return seen


def brute_force(
    model: Any, seen: dict[str, list[Tensor]], original: Originals | None, seed: int
) -> dict[str, dict[Key, tuple[list[float], list[float]]]]:
    """Return, of each layer and key, what is above and below the line of every token, in float64."""
    found: dict[str, dict[Key, tuple[list[float], list[float]]]] = {}
    channels: dict[tuple[str, int], dict[str, list[set[int]]]] = {}
    for kind in SELECTIONS:
        for k_chunk in K_CHUNKS:
            set_compensation(model, Compensation(kind, k_chunk, seed=seed))
            channels[kind, k_chunk] = {
                name: [set(layer.selection(x[None])[0].tolist()) for x in seen[name]]
                for name, layer in dec_layers(model).items()
            }
    for name, layer in dec_layers(model).items():
        residual, low_bit = dequantize_residual(layer.residual).double(), layer.dequantize().double()
        whole = low_bit + residual if original is None else original.weight(name).double()
        values: dict[Key, tuple[list[float], list[float]]] = defaultdict(lambda: ([], []))
        for token, x in enumerate(seen[name]):
            sets = {key: channels[key][name][token] for key in channels}
            for key, above, below in numbers_of(x.double(), whole, low_bit, residual, sets):
                values[key][0].append(above)
                values[key][1].append(below)
        found[name] = values
    return found


def numbers_of(
    x: Tensor, whole: Tensor, low_bit: Tensor, residual: Tensor, sets: dict[tuple[str, int], set[int]]
) -> Iterator[tuple[Key, float, float]]:
    """Give what is above and below the line of one token, by the channels that each selection chose."""

    y, wanted = low_bit @ x, whole @ x
    without = float((wanted - y).square().sum())

    def left(chosen: Iterable[int]) -> float:
        these = list(chosen)
        return float((wanted - (y + residual[:, these] @ x[these])).square().sum())

    yield Key("floor"), left(range(len(x))), without
    for (kind, k_chunk), chosen in sets.items():
        exact = sets["exact", k_chunk]
        yield Key("energy_left", kind, k_chunk), left(chosen), without
        if kind != "exact":
            yield Key("recall", kind, k_chunk), len(chosen & exact) / len(exact), 1.0


def near(value: float) -> Any:
    # float32 sums over up to 1120 channels against float64; a floor is a difference of nearly equal numbers
    return pytest.approx(value, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("relative_to_original", [True, False])
@pytest.mark.parametrize("extras", [True, False])
def test_shares_are_those_of_every_token_and_channel_by_itself(
    extras: bool,
    relative_to_original: bool,
    with_extras: Path,
    tiny_artifact_dir: Path,
    tiny_model_dir: Path,
    ids: Tensor,
) -> None:
    model = load(with_extras if extras else tiny_artifact_dir)
    original = Originals(tiny_model_dir, model) if relative_to_original else None
    kept = Compensation("static", 8)
    set_compensation(model, kept)
    shares = ChannelErrors(model, K_CHUNKS, original, seed=3).shares(ids, FIRST_TOKENS)
    assert state_of(model).compensation == kept
    wanted = brute_force(model, tokens_of(model, ids, FIRST_TOKENS), original, seed=3)
    assert shares.keys() == wanted.keys()
    by_name, kinds = by_layer(shares), by_kind(shares)
    rates: dict[str, dict[Key, float]] = {}
    for number, (name, values) in enumerate(wanted.items()):
        assert shares[name].keys() == values.keys()
        rates[name] = {key: sum(above) / sum(below) for key, (above, below) in values.items()}
        for key, rate in rates[name].items():
            assert shares[name][key].value == near(rate)
            assert by_name[key.text()][number] == near(rate)
    for kind in PROJECTION_KINDS:
        names = [name for name in rates if kind_of(name) == kind]
        assert kinds[kind]["count"] == len(names)
        for key in rates[names[0]]:
            mine = [rates[name][key] for name in names]
            got = kinds[kind][key.of]
            got = got if key.of == "floor" else got[key.selection][str(key.k_chunk)]
            assert got[0] == near(np.mean(mine))
            assert got[1] == pytest.approx(np.std(mine, ddof=1) / math.sqrt(len(mine)), rel=2e-2, abs=1e-6)
        if original is None:
            assert kinds[kind]["floor"] == [0.0, 0.0]
        else:
            assert kinds[kind]["floor"][0] > 0
        for k_chunk in map(str, K_CHUNKS):
            left = {selection: kinds[kind]["energy_left"][selection][k_chunk][0] for selection in SELECTIONS}
            assert left["exact"] < left["random"]
            assert kinds[kind]["recall"]["dynamic"][k_chunk][0] > kinds[kind]["recall"]["random"][k_chunk][0]


def test_error_over_tokens_is_that_of_stretches_left_out_one_by_one(
    tiny_artifact_dir: Path, ids: Tensor
) -> None:
    model = load(tiny_artifact_dir)
    shares = ChannelErrors(model, K_CHUNKS).shares(ids, FIRST_TOKENS)
    wanted = brute_force(model, tokens_of(model, ids, FIRST_TOKENS), None, seed=0)
    # 11 tokens of each of 3 sequences: stretches of 4, 4 and 3
    stretches = np.array([3 * (t // 11) + (t % 11) // STRETCH for t in range(33)])
    key = Key("energy_left", "dynamic", 16)
    names = [name for name in wanted if kind_of(name) == "down"]
    means = []
    for out in range(9):
        some = stretches != out
        pairs = [
            (np.array(wanted[name][key][0])[some], np.array(wanted[name][key][1])[some]) for name in names
        ]
        means.append(np.mean([above.sum() / below.sum() for above, below in pairs]))
    jackknife = math.sqrt(8 / 9 * np.square(np.array(means) - np.mean(means)).sum())
    got = by_kind(shares)["down"]["token_stderr"]
    # first-order beside the jackknife: alike while the share's denominator varies little
    assert got["energy_left"]["dynamic"]["16"] == pytest.approx(jackknife, rel=0.15)
    assert got["recall"]["static"]["16"] > 0
    assert got["floor"] == 0


def test_of_known_sums_the_errors_are_textbook() -> None:
    one = {Key("recall", "static", 8): Share(np.array([1.0, 2.0, 3.0]), np.array([4.0, 4.0, 4.0]))}
    other = {Key("recall", "static", 8): Share(np.array([3.0, 3.0, 3.0]), np.array([4.0, 4.0, 4.0]))}
    shares = {
        f"model.layers.{block}.{leaf}": values
        for leaf in ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")
        for block, values in enumerate((one, other))
    }
    for kind in PROJECTION_KINDS:
        found = by_kind(shares)[kind]
        # over layers: of 0.5 and 0.75; over tokens: of the means 0.5, 0.625 and 0.75
        assert found["recall"]["static"]["8"] == pytest.approx([0.625, 0.125])
        assert found["token_stderr"]["recall"]["static"]["8"] == pytest.approx(0.125 / math.sqrt(3))
    alone = {name: values for name, values in shares.items() if ".0." in name}
    assert by_kind(alone)["o"]["recall"]["static"]["8"] == [0.5, None]
    single = {key: Share(share.above[:1], share.below[:1]) for key, share in one.items()}
    assert by_kind(dict.fromkeys(shares, single))["o"]["token_stderr"]["recall"]["static"]["8"] is None


def test_recall_counts_shared_and_own_channels() -> None:
    exact = torch.tensor([[0, 1, 2, 3], [4, 5, 6, 7]], dtype=torch.int32)
    shared = torch.tensor([[3, 4, 5, 9]], dtype=torch.int32)
    assert recall(shared, exact, 10).tolist() == [0.25, 0.5]
    assert recall(exact, exact, 10).tolist() == [1.0, 1.0]
    assert recall(exact.flip(0), exact, 10).tolist() == [0.0, 0.0]


def test_with_all_channels_nothing_is_left(tiny_artifact_dir: Path, ids: Tensor) -> None:
    shares = ChannelErrors(load(tiny_artifact_dir), [1024]).shares(ids, FIRST_TOKENS)
    for values in shares.values():
        for kind in SELECTIONS:
            assert values[Key("energy_left", kind, 1024)].value == pytest.approx(0, abs=1e-10)
            assert kind == "exact" or values[Key("recall", kind, 1024)].value == 1


@pytest.mark.parametrize("architecture", ["llama", "llama-grouped-tied", "phi3"])
def test_original_weights_are_in_the_space_of_the_layers(architecture: str, tmp_path: Path) -> None:
    source = save_tiny(architecture, tmp_path / "plain")
    quants = (WeightQuant("awq", 3), ResidualQuant(16))  # which keeps the residual as it is
    model = load(build_artifact(str(source), tmp_path / "artifact", *quants, CALIBRATION))
    originals, plain_model = Originals(source, model), AutoModelForCausalLM.from_pretrained(source)
    moved = 0
    for name, layer in dec_layers(model).items():
        plain = plain_model.get_submodule(name).weight
        wanted, got = stored_weight(layer), originals.weight(name)
        assert (got - wanted).norm() / wanted.norm() < 1e-3
        moved += bool((plain - wanted).norm() / wanted.norm() > 0.05)
    assert moved > len(dec_layers(model)) / 2  # the scales were really elsewhere


def test_original_of_another_model_is_refused(tiny_artifact_dir: Path, tmp_path: Path) -> None:
    model = load(tiny_artifact_dir)
    other = Originals(save_tiny("llama-grouped-tied", tmp_path / "narrow"), model)
    name = "model.layers.0.mlp.down_proj"
    with pytest.raises(DecDECError, match=rf"layer {name} of the model must be \(160, 1120\), got \(128, 1"):
        other.weight(name)
    torch.manual_seed(5)
    plain = AutoModelForCausalLM.from_pretrained(save_tiny("llama", tmp_path / "same"))
    for parameter in plain.parameters():
        parameter.data.normal_()
    plain.save_pretrained(tmp_path / "random")
    with pytest.raises(DecDECError, match="must be a quantization of the original's weight to 3 bits"):
        Originals(tmp_path / "random", model).weight(name)


def test_sequences_without_a_measured_token_are_refused(tiny_artifact_dir: Path) -> None:
    errors = ChannelErrors(load(tiny_artifact_dir), [16])
    with pytest.raises(DecDECError, match=r"ids must be \(sequences, more than 4 tokens\), got \(2, 4\)"):
        errors.shares(torch.zeros(2, 4, dtype=torch.int64), 4)


def test_a_layer_without_error_is_refused(tiny_artifact_dir: Path, ids: Tensor) -> None:
    model = load(tiny_artifact_dir)
    name = "model.layers.1.mlp.up_proj"
    dec_layers(model)[name].residual.scale.zero_()
    with pytest.raises(DecDECError, match=f"layer {name} must have an output error, got 0.0"):
        ChannelErrors(model, [16]).shares(ids, 4)


@torch.no_grad()
def test_outliers_are_of_the_compensated_models_own_tokens(with_extras: Path) -> None:
    model = load(with_extras)
    prompt, compensation = list(range(40, 60)), Compensation("dynamic", 64, "decode")
    name = "model.layers.1.self_attn.o_proj"  # the one with an input order
    found, tokens = outlier_map(model, name, prompt, 12, Sampling(), compensation)
    assert state_of(model).compensation == Compensation()
    assert (found["layer"], found["steps"], found["in_features"]) == (name, 12, 160)
    set_compensation(model, compensation)
    # the tokens of the decoder that everything else generates with
    assert tokens == Decoder(model, 64).generate(prompt, 12, stop=[]).tokens
    layer = dec_layers(model)[name]
    assert len(found["top"]) == 12
    known = layer.statistics.mean_square.argsort(descending=True)[:1].tolist()
    assert found["calibration_top"] == known
    shares = [len(set(channels) & set(known)) for channels in found["top"]]
    assert found["persistent_share"] == pytest.approx(sum(shares) / 12)
    assert found["distinct"] == len({channel for channels in found["top"] for channel in channels})


@torch.no_grad()
def test_each_step_has_the_largest_hundredth(tiny_artifact_dir: Path) -> None:
    model = load(tiny_artifact_dir)
    name, prompt = "model.layers.1.mlp.down_proj", [1, 2, 3, 4, 5]
    found, tokens = outlier_map(model, name, prompt, 9, Sampling(1.0, seed=2), Compensation("none"))
    # without compensation one pass over all tokens has the steps' inputs, to rounding
    seen = torch.stack(tokens_of(model, torch.tensor([[*prompt, *tokens]]), len(prompt))[name]).abs()
    assert len(seen) == len(found["top"]) == 9
    for x, channels in zip(seen, found["top"], strict=True):
        assert len(channels) == 1120 // 100
        assert channels == sorted(channels)
        assert channels == sorted(np.argsort(-x.numpy())[:11].tolist())
    assert 258 not in tokens  # the end of a text is not drawn
    again = outlier_map(model, name, prompt, 9, Sampling(1.0, seed=2), Compensation("none"))
    assert again == (found, tokens)
    assert outlier_map(model, name, prompt, 9, Sampling(1.0, seed=3), Compensation("none"))[1] != tokens


@pytest.mark.parametrize(
    ("layer", "prompt", "steps", "message"),
    [
        ("model.layers.1.mlp.down_prj", [1, 2], 5, "did you mean 'model.layers.1.mlp.down_proj'"),
        ("middle", [1, 2], 5, "got 'middle', such as model.layers.1.mlp.down_proj"),
        (None, [1], 5, "prompt must be 2..4095 tokens, got 1"),
        (None, [1] * 4096, 5, "prompt must be 2..4095 tokens, got 4096"),
        (None, [1, 2], 0, "steps must be 1..4094, got 0"),
        (None, [1, 2], 5000, "steps must be 1..4094, got 5000"),
    ],
)
def test_bad_maps_are_refused(
    layer: str | None, prompt: list[int], steps: int, message: str, tiny_artifact_dir: Path
) -> None:
    model = load(tiny_artifact_dir)
    layer = layer or middle_down(dec_layers(model))
    with pytest.raises(DecDECError) as refused:
        outlier_map(model, layer, prompt, steps, Sampling(), Compensation("none"))
    assert message in str(refused.value)


@pytest.fixture
def arguments(tiny_artifact_dir: Path, tmp_path: Path) -> list[str]:
    words = f"{tiny_artifact_dir} --k-chunk 64 16 --text pydoc --tokens 32 --steps 6 --prompt 8"
    return [*words.split(), "--out", str(tmp_path / "out")]


def test_command_writes_one_file_and_keeps_it(
    arguments: list[str],
    tiny_model_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert diagnostics.main(arguments) == 0
    (path,) = (tmp_path / "out" / "runs").iterdir()
    run = json.loads(path.read_text())
    assert path.stem == key_of(run["configuration"])
    assert len(path.stem) == 16
    task = run["configuration"]["task"]
    assert (task["kind"], task["name"], task["k_chunk"]) == ("diagnostics", "pydoc", [16, 64])
    assert task["relative_to"] == "stored residual"
    assert run["configuration"]["artifact_hash"] == run["ledger"]["artifact_hash"]
    assert run["configuration"]["base"]["weight"]["method"] == "awq"
    assert run["configuration"]["base"]["calibration"] == "pydoc"
    assert run["configuration"]["model"] == run["quantization"]["provenance"]["source"] == "llama"
    assert run["measured"] is True
    assert {"versions", "hardware", "commit"} <= run["environment"].keys()
    assert run["command"].startswith("python -m decdec_eval.diagnostics ")
    assert len(run["outliers"]["top"]) == 6
    assert run["outliers"]["layer"] == "model.layers.1.mlp.down_proj"
    assert run["generated"]["tokens"] == 6
    for layers in (run["layers"], run["generated"]["layers"]):
        assert list(layers) == list(PROJECTION_KINDS)
        for values in layers.values():
            assert list(values["recall"]) == ["random", "static", "dynamic"]
            assert list(values["energy_left"]) == list(SELECTIONS)
            for pairs in (*values["recall"].values(), *values["energy_left"].values()):
                assert list(pairs) == ["16", "64"]
    assert all(len(values) == len(run["items"]["ids"]) for values in run["items"]["values"].values())
    printed = capsys.readouterr().out
    assert "| down | 64 |" in printed
    assert "relative to the stored residual" in printed
    written = path.read_bytes()

    monkeypatch.setattr(diagnostics.Diagnostics, "run", lambda *a: pytest.fail("it was measured again"))
    assert diagnostics.main(arguments) == 0
    assert "kept from" in capsys.readouterr().out
    assert path.read_bytes() == written
    monkeypatch.undo()
    assert diagnostics.main([*arguments, "--model", str(tiny_model_dir)]) == 0
    (other,) = set((tmp_path / "out" / "runs").iterdir()) - {path}
    run = json.loads(other.read_text())
    assert run["configuration"]["task"]["relative_to"] == "full-precision weight"
    assert run["configuration"]["reference"]["weights"]
    assert run["layers"]["down"]["floor"][0] > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--k-chunk", "2000"], "k_chunk must be 1..1024, got 2000"),
        (["--k-chunk", "0"], "k_chunk must be 1..1024, got 0"),
        (["--k-chunk", "4"], "k_chunk must choose channels of every layer, got 4, which is none of 160"),
        (["--tokens", "4"], "tokens must be 5..512 or a multiple of 512, got 4"),
        (["--tokens", "700"], "tokens must be 5..512 or a multiple of 512, got 700"),
        (["--tokens", str(512 << 20)], "with this text, got"),
        (["--steps", "0"], "steps must be 1..4088, got 0"),
        (["--prompt", "1"], "prompt must be 2.."),
        (["--seed", "-1"], "seed must be 0..2147483647, got -1"),
        (["--layer", "model.layers.7.mlp.down_proj"], "layer must be the full name of one of the artifact's"),
        (["--device", "gpu"], "device must be one of cpu, cuda, got 'gpu'"),
        (["--text", "absent.txt"], "absent.txt"),
        (["--model", "./absent"], "model must be a folder with a config.json"),
    ],
)
def test_bad_arguments_cost_one_line(
    change: list[str], message: str, arguments: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert diagnostics.main([*arguments, *change]) == 2
    line = capsys.readouterr().err.strip()
    assert message in line
    assert "\n" not in line
    assert not (tmp_path / "out").exists()


def test_a_gpu_that_is_not_there_is_refused(
    arguments: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert diagnostics.main([*arguments, "--device", "cuda"]) == 2
    assert "device must be cpu on a machine without a CUDA device" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("source", "text", "name", "calibration"),
    [
        ("smollm2", "wikitext-2-raw-v1 train, first 9 %", "smollm2", "auto"),
        ("org/model", None, "org/model", "auto"),
        ("/data/models/llama", "notes.txt", "llama", "notes.txt"),
        ("./models/llama.gguf", "pydoc_data.topics of CPython 3.11, calibration half", "llama.gguf", "pydoc"),
    ],
)
def test_names_are_those_of_a_sweep_and_no_paths(
    source: str, text: str | None, name: str, calibration: str, tiny_artifact_dir: Path
) -> None:
    provenance = {"source": source, **({} if text is None else {"calibration": {"text": text}})}
    quantization = replace(described(tiny_artifact_dir)[1], provenance=provenance)
    assert diagnostics.name_of(quantization) == name
    assert diagnostics.base_of(quantization)["calibration"] == calibration


def test_no_artifact_is_refused(
    tiny_model_dir: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert diagnostics.main([str(tiny_model_dir), *arguments[1:]]) == 2
    assert "artifact" in capsys.readouterr().err


@pytest.mark.cuda
def test_a_gpu_measures_what_a_cpu_does(tiny_artifact_dir: Path, tiny_model_dir: Path, ids: Tensor) -> None:
    model = load(tiny_artifact_dir)
    found = []
    for device in ("cpu", "cuda"):
        model.to(device)
        errors = ChannelErrors(model, K_CHUNKS, Originals(tiny_model_dir, model))
        found.append(by_layer(errors.shares(ids, FIRST_TOKENS)))
    for key, values in found[0].items():
        # other orders of the model's own sums; a channel of equals may be chosen otherwise
        assert found[1][key] == pytest.approx(values, rel=2e-2, abs=1e-4)
    found_map, _ = outlier_map(
        model, "model.layers.1.mlp.down_proj", [1, 2, 3], 5, Sampling(), Compensation("dynamic", 16, "decode")
    )
    assert [len(channels) for channels in found_map["top"]] == [11] * 5
