"""The model type `decdec`: what it refuses before loading, what it scores, what it states."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import CachingLM
from lm_eval.api.registry import get_model
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM

from decdec_core import cli
from decdec_core.config import DecDECError
from decdec_core.model import compensation_ledger, set_compensation, state_of
from decdec_core.profiles import choice_for, read_profile
from decdec_eval import lm_model, plugin
from decdec_eval.lm_model import DecDECLM

TEXT = "The quick brown fox jumps over the lazy dog."


def requests(kind: str, *arguments: tuple[Any, ...]) -> list[Instance]:
    return [Instance(kind, {}, arguments=given, idx=0) for given in arguments]


def load(folder: Path, **arguments: Any) -> DecDECLM:
    """Return the model type as lm-eval's command line makes it on a machine without a GPU."""
    return DecDECLM.create_from_arg_obj(
        {"pretrained": str(folder), **arguments}, {"batch_size": 1, "device": "cuda:0" if no_gpu() else "cpu"}
    )


def no_gpu() -> bool:
    return not torch.cuda.is_available()


@pytest.fixture(scope="module")
def dynamic(tiny_artifact_dir: Path) -> DecDECLM:
    return load(tiny_artifact_dir, selection="dynamic", k_chunk=64)


@pytest.fixture
def nothing_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_args: object, **_kwargs: object) -> None:
        raise AssertionError("loaded or built before the arguments were checked")

    for step in ("_get_config", "_create_tokenizer", "_create_model"):
        monkeypatch.setattr(HFLM, step, fail)
    monkeypatch.setattr(lm_model, "cached_artifact", fail)
    monkeypatch.setattr(lm_model, "materialize", fail)


REFUSED = [
    ({"k_chunk": 2000}, "k_chunk must be 0..1024, got 2000"),
    ({"k_chunk": "8/8/16"}, "k_chunk must be one number or four as qkv/o/gate_up/down, got '8/8/16'"),
    ({"k_chunk": "8/8/16/x"}, "k_chunk must be 0..1024, got 'x'"),
    ({"selection": "dynamc"}, r"selection must be one of .*, got 'dynamc' \(did you mean 'dynamic'\?\)"),
    ({"slowdown": -1, "gpu": "rtx-4090"}, "slowdown must be 0 to 1000 percent, got -1"),
    ({"slowdown": "much", "gpu": "rtx-4090"}, "slowdown must be 0 to 1000 percent, got 'much'"),
    ({"slowdown": True, "gpu": "rtx-4090"}, "slowdown must be 0 to 1000 percent, got True"),
    (
        {"slowdown": 5, "gpu": "rtx-4091"},
        r"gpu must be one of .*, got 'rtx-4091' \(did you mean 'rtx-4090'\?\)",
    ),
    ({"slowdown": 5, "gpu": "no/where.json"}, "profile no/where.json must be a file, got none"),
    ({"slowdown": 5, "gpu": "rtx-4090", "method": "rtn", "bits": 5}, "bits of a model with a budget must be"),
    ({"gpu": "rtx-4090"}, "gpu must be with slowdown, got gpu=rtx-4090 alone"),
    ({"dtype": "float8"}, "dtype must be auto, float32, bfloat16 or float16, got 'float8'"),
    ({"dtype": "nn"}, "dtype must be auto, float32, bfloat16 or float16, got 'nn'"),
    ({"slowdown": 5, "gpu": "rtx-4090", "k_chunk": 8}, "k_chunk must be absent with slowdown"),
    ({"slowdown": 5, "gpu": "rtx-4090", "n_tb": 8}, "n_tb must be absent with slowdown"),
    ({"slowdown": 5, "gpu": "rtx-4090", "selection": "none"}, "selection must compensate something at a"),
    ({"compensate": "some"}, "compensate must be one of all, decode, auto, got 'some'"),
    ({"seed": -1}, "seed must be 0.*, got -1"),
    ({"kchunk": 8}, r"got 'kchunk' \(did you mean 'k_chunk'\?\)"),
    ({"batchsize": 8}, r"got 'batchsize' \(did you mean 'batch_size'\?\)"),
    ({"load_in_4bit": True}, "model_args must be pretrained, selection, .*, got 'load_in_4bit'"),
    ({"gptqmodel": True}, "gptqmodel must be absent with --model decdec, got True"),
    *[
        ({name: "x"}, f"model_args must be pretrained, .*, got '{name}'")
        for name in ("variant", "use_safetensors", "cache_dir", "token")
    ],
    (
        {"method": "awq", "bits": 3},
        "plain model where method=awq, bits=3 is given, got the artifact .*llama-awq3",
    ),
]


@pytest.mark.parametrize(("arguments", "message"), REFUSED)
@pytest.mark.usefixtures("nothing_loads")
def test_refused_before_loading(tiny_artifact_dir: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(DecDECError, match=message) as refused:
        load(tiny_artifact_dir, **arguments)
    assert "\n" not in str(refused.value)


REFUSED_FOR_A_PLAIN_MODEL = [
    ({}, "plain model with method=awq, rtn or full: .* is a folder without an artifact"),
    ({"method": "gptq"}, "method must be one of rtn, awq, squeezellm, full, got 'gptq'"),
    ({"method": "awq", "bits": 7}, "bits must be one of 2, 2.5, 3, 3.5, 4, 4.5, 5, got 7"),
    ({"method": "awq", "residual_bits": 3}, "residual_bits must be one of 2, 4, 8, 16, got 3"),
    ({"method": "awq", "revision": "v2"}, "revision must be absent with method=awq, got 'v2'"),
    (
        {"method": "full", "selection": "dynamic"},
        "selection must be absent with method=full.*, got 'dynamic'",
    ),
    ({"method": "full", "bits": 3}, "bits must be absent with method=full.*, got 3"),
    ({"method": "full", "k_chunk": 8}, "k_chunk must be absent with method=full.*, got 8"),
]


@pytest.mark.parametrize(("arguments", "message"), REFUSED_FOR_A_PLAIN_MODEL)
@pytest.mark.usefixtures("nothing_loads")
def test_plain_model_refused(tiny_model_dir: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(DecDECError, match=message):
        load(tiny_model_dir, **arguments)


@pytest.mark.usefixtures("nothing_loads")
def test_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DecDECError, match=r"an artifact's local folder.*none is no folder here"):
        load(tmp_path / "none")
    with pytest.raises(DecDECError, match=r"local folder.*someone/artifact is no folder.*none is fetched"):
        load(Path("someone/artifact"))
    with pytest.raises(DecDECError, match="pretrained must be an artifact folder or a plain model, got None"):
        DecDECLM()


@pytest.mark.parametrize("method", ["awq", "full"])
@pytest.mark.parametrize("source", ["./absent", "someone/absent"])
def test_a_missing_plain_model_is_one_line(source: str, method: str) -> None:
    with pytest.raises(DecDECError, match=f"must be .*, got {source}") as refused:
        DecDECLM(source, device="cpu", method=method)
    assert "\n" not in str(refused.value)


class LoadedError(Exception):
    """HFLM was asked to load. device: where to."""

    def __init__(self, device: str) -> None:
        self.device = device


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU as far as anybody asks, and loading that ends with LoadedError."""

    def load_nothing(self: HFLM, pretrained: str, device: str, **_arguments: Any) -> None:
        raise LoadedError(device)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(HFLM, "__init__", load_nothing)
    known = ("backend", "batch_size", "device", "parallelize", "revision", "tp_plan")
    monkeypatch.setattr(lm_model, "_FROM_PRETRAINED", (*lm_model._FROM_PRETRAINED, *known))


@pytest.mark.usefixtures("gpu")
def test_the_gpu_is_used(
    tiny_artifact_dir: Path, tiny_model_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for folder, arguments in (
        (tiny_artifact_dir, {"selection": "none"}),
        (tiny_artifact_dir, {"selection": "exact"}),
        (tiny_model_dir, {"method": "full"}),
    ):
        with pytest.raises(LoadedError) as loaded:
            DecDECLM(folder, device="cuda:0", parallelize=True, **arguments)
        assert loaded.value.device == "cuda:0"
    assert not caplog.records


@pytest.mark.cuda
@pytest.mark.skipif(no_gpu(), reason="needs a CUDA device")
def test_on_a_gpu(tiny_artifact_dir: Path) -> None:
    request = requests("loglikelihood_rolling", (TEXT,))
    for selection in ("none", "static", "exact", "dynamic", "random"):
        text = f"pretrained={tiny_artifact_dir},selection={selection},dtype=float32"
        lm = DecDECLM.create_from_arg_string(text, {"batch_size": 1, "device": "cuda:0"})
        assert lm.model.device.type == "cuda"
        here = load(tiny_artifact_dir, selection=selection).loglikelihood_rolling(request, disable_tqdm=True)
        there = lm.loglikelihood_rolling(request, disable_tqdm=True)
        assert there == pytest.approx(here, rel=1e-3)


def test_hflm_arguments_are_known(tiny_artifact_dir: Path, recwarn: pytest.WarningsRecorder) -> None:
    lm = load(
        tiny_artifact_dir, max_length=128, dtype="float32", attn_implementation="eager", parallelize=False
    )
    assert lm.max_length == 128
    assert lm.model.dtype == torch.float32
    assert lm.model.config._attn_implementation == "eager"
    assert not [warning for warning in recwarn if "quantization_config" in str(warning.message)]


def test_the_name_decdec_is_this_class() -> None:
    plugin.install()
    assert get_model("decdec") is DecDECLM


def test_arguments_of_the_command_line(tiny_artifact_dir: Path) -> None:
    text = (
        f"pretrained={tiny_artifact_dir},selection=exact,k_chunk=8/8/16/16,compensate=all,seed=3,device=cpu"
    )
    lm = DecDECLM.create_from_arg_string(text)
    ledger = lm.get_model_info()["decdec"]
    assert ledger["selection"] == "exact"
    assert ledger["k_chunk"] == [8, 8, 16, 16]
    assert (ledger["compensate"], ledger["seed"]) == ("all", 3)


@pytest.mark.parametrize("word", ["none", "None"])
def test_the_word_none_is_a_selection(tiny_artifact_dir: Path, word: str) -> None:
    lm = DecDECLM.create_from_arg_string(f"pretrained={tiny_artifact_dir},selection={word},device=cpu")
    assert lm.get_model_info()["decdec"]["selection"] == "none"


def test_model_args_come_before_options(tiny_artifact_dir: Path) -> None:
    options = {"batch_size": 1, "max_batch_size": None, "device": "cuda:0"}
    text = f"pretrained={tiny_artifact_dir},selection=none,device=cpu,batch_size=2"
    given = {"pretrained": str(tiny_artifact_dir), "selection": "none", "device": "cpu", "batch_size": 2}
    for lm in (
        DecDECLM.create_from_arg_string(text, options),
        DecDECLM.create_from_arg_obj(given, options),
    ):
        assert (lm.device.type, lm.batch_size) == ("cpu", 2)


def test_ledger(dynamic: DecDECLM) -> None:
    info = dynamic.get_model_info()
    ledger = info["decdec"]
    assert compensation_ledger(dynamic.model).items() <= ledger.items()
    assert ledger["channels_per_token"] > 0
    assert len(ledger["artifact_hash"]) == 64
    assert ledger["bos"]["tok_encode_adds_bos"] is False
    assert ledger["bos"]["prefix_token_id_of_empty_contexts"] == 257
    assert ledger["versions"]["torch"] == torch.__version__
    assert ledger["hardware"]
    assert info["model_num_parameters"] == dynamic.model.num_parameters()


@pytest.fixture(scope="module")
def profile_file(tiny_artifact_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("profile") / "mine.json"
    # a memory so slow that even this model's products leave time to fetch
    numbers = ["--gpu", "slow", "--memory-gb-s", "0.5", "--link-gb-s", "0.1"]
    arguments = [*numbers, "--slowdown", "5", "20", "--out", str(out)]
    assert cli.main(["tune", str(tiny_artifact_dir), *arguments]) == 0
    return out


@pytest.mark.parametrize("slowdown", [5, 20, 12.5])
def test_a_slowdown_takes_the_budget_of_a_profile(
    slowdown: float, tiny_artifact_dir: Path, profile_file: Path
) -> None:
    lm = load(tiny_artifact_dir, slowdown=slowdown, gpu=str(profile_file), selection="exact", seed=3)
    budget = choice_for(read_profile(profile_file), slowdown)
    assert any(budget.k_chunk)
    compensation = state_of(lm.model).compensation
    assert compensation == lm.compensation
    assert compensation.k_chunk == budget.k_chunk
    assert (compensation.selection, compensation.seed) == ("exact", 3)
    assert compensation.n_tb == (budget.n_tb or 16)
    ledger = lm.get_model_info()["decdec"]
    assert ledger["k_chunk"] == list(budget.k_chunk)
    assert ledger["budget"] == {
        "slowdown_percent": slowdown,
        "profile_gpu": "slow",
        "profile_model": tiny_artifact_dir.name,
        "profile_bits": 3,
        "profile_format": "uniform",
        "profile_selection": "dynamic",
        "profile_times": "predicted",
        "slowdown": "predicted",
        "predicted_percent": budget.predicted_percent,
        "measured_percent": None,
        "objective": "speed",
    }


def test_a_slowdown_without_a_profile_of_the_model_is_refused(tiny_artifact_dir: Path) -> None:
    message = "a profile of rtx-4090 must be one of llama-3-8b 3 bits uniform predicted, .*, got qkv 160x480"
    with pytest.raises(DecDECError, match=message):
        load(tiny_artifact_dir, slowdown=5, gpu="rtx-4090")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a CUDA device")
def test_a_slowdown_needs_a_gpus_name_where_there_is_none(tiny_artifact_dir: Path) -> None:
    with pytest.raises(DecDECError, match="slowdown must be with gpu=NAME, or gpu=FILE of `decdec tune`"):
        load(tiny_artifact_dir, slowdown=5)


def test_bos_is_stated_as_it_happens(tiny_artifact_dir: Path) -> None:
    lm = load(tiny_artifact_dir, add_bos_token=True)
    assert lm.get_model_info()["decdec"]["bos"] == {
        "bos_token_id": 257,
        "add_bos_token": True,
        "tok_encode_adds_bos": True,
        "first_token_window_starts_with_bos": True,
        "prefix_token_id_of_empty_contexts": 257,
    }
    assert lm.tok_encode("a") == [257, 64]


def test_selection_changes_the_likelihood(dynamic: DecDECLM, tiny_artifact_dir: Path) -> None:
    request = requests("loglikelihood_rolling", (TEXT,))
    none = load(tiny_artifact_dir, selection="none").loglikelihood_rolling(request, disable_tqdm=True)
    assert dynamic.loglikelihood_rolling(request, disable_tqdm=True) != none


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        ("loglikelihood", (TEXT, " Yes")),
        ("loglikelihood_rolling", (TEXT,)),
        ("token_windows", ("window 0", list(range(16)))),
    ],
)
def test_likelihood_under_decode_is_refused(
    tiny_artifact_dir: Path, kind: str, arguments: tuple[Any, ...]
) -> None:
    lm = load(tiny_artifact_dir, compensate="decode")
    with pytest.raises(
        DecDECError, match="compensate must be auto or all for a likelihood request, got 'decode'"
    ):
        getattr(lm, kind)(requests(kind, arguments))


def answers(lm: DecDECLM, *prompts: str) -> list[str]:
    asked = requests("generate_until", *((prompt, {"until": [], "max_gen_toks": 24}) for prompt in prompts))
    return lm.generate_until(asked, disable_tqdm=True)


def test_generation_under_decode(tiny_artifact_dir: Path) -> None:
    def under(**compensation: Any) -> list[str]:
        return answers(load(tiny_artifact_dir, k_chunk=256, **compensation), TEXT, TEXT[:9])

    decode = under(compensate="decode", selection="exact")
    assert decode == under(compensate="auto", selection="exact")
    assert decode != under(selection="none")
    assert decode != under(compensate="all", selection="exact")


@pytest.mark.parametrize("selection", ["static", "exact", "dynamic"])
def test_answers_do_not_depend_on_the_batch(tiny_artifact_dir: Path, selection: str) -> None:
    prompts = ("T", TEXT, TEXT[:7], "Th")
    alone, together = (
        DecDECLM(tiny_artifact_dir, device="cpu", selection=selection, k_chunk=64, batch_size=size)
        for size in (1, 3)
    )
    assert alone.tok_encode(prompts[0]) == [ord("T") - 33]
    assert answers(alone, *prompts) == answers(together, *prompts)


def test_response_cache_is_refused(dynamic: DecDECLM, tmp_path: Path) -> None:
    with pytest.raises(DecDECError, match="use_cache must be off with --model decdec"):
        CachingLM(dynamic, str(tmp_path / "cache.db"))


def test_automatic_batch_size_on_a_cpu(tiny_artifact_dir: Path) -> None:
    lm = DecDECLM(pretrained=tiny_artifact_dir, device="cpu", batch_size="auto", selection="none")
    one = load(tiny_artifact_dir, selection="none")
    both = requests("loglikelihood", (TEXT, " Yes"), (TEXT, " No"))
    got, wanted = (model.loglikelihood(both, disable_tqdm=True) for model in (lm, one))
    assert [value for value, _ in got] == pytest.approx([value for value, _ in wanted], rel=1e-5)


def test_a_plain_model_is_quantized_once(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DECDEC_CACHE_DIR", str(tmp_path))
    calibration = tmp_path / "own.txt"
    calibration.write_text(TEXT * 800, encoding="utf-8")
    arguments = {"method": "rtn", "bits": 3, "residual_bits": 16, "calibration": str(calibration)}
    first = load(tiny_model_dir, k_chunk=1024, **arguments)
    monkeypatch.setattr("decdec_core.build.build_artifact", None)
    second = load(tiny_model_dir, selection="none", **arguments)
    assert first.pretrained == second.pretrained
    assert Path(first.pretrained).is_relative_to(tmp_path)
    full = load(tiny_model_dir, method="full")
    request = requests("loglikelihood_rolling", (TEXT,))
    scores = [lm.loglikelihood_rolling(request, disable_tqdm=True)[0] for lm in (first, full, second)]
    # every channel of a float16 residual: what is left is float16 rounding of the residual, 5e-4 relative
    assert scores[0] == pytest.approx(scores[1], rel=1e-4)
    assert abs(scores[2] - scores[1]) > 10 * abs(scores[0] - scores[1])


def test_full_is_the_plain_model(tiny_model_dir: Path) -> None:
    lm = load(tiny_model_dir, method="full")
    plain = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=lm.model.dtype)
    ids = torch.arange(40)[None]
    with torch.no_grad():
        assert torch.equal(lm.model(ids).logits, plain(ids).logits)
    ledger = lm.get_model_info()["decdec"]
    assert (ledger["method"], ledger["selection"]) == ("full", "none")


def test_none_is_the_artifact_without_compensation(tiny_artifact_dir: Path) -> None:
    lm = load(tiny_artifact_dir, selection="none")
    model = AutoModelForCausalLM.from_pretrained(tiny_artifact_dir)
    set_compensation(model, lm.compensation)
    ids = torch.arange(40)[None]
    with torch.no_grad():
        assert torch.equal(lm.model(ids).logits, model(ids).logits)
