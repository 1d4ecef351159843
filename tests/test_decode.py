"""Generation with a static cache, against transformers' own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from decdec_core.config import Compensation, DecDECError
from decdec_core.decode import Decoder, Generation, Sampling
from decdec_core.fusing import fuse
from decdec_core.model import set_compensation

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]
# float32 is transformers' arithmetic anywhere; half precision on a GPU is that of the kernels
PLACES = [
    ("cpu", torch.float32),
    pytest.param("cuda", torch.float32, marks=pytest.mark.cuda),
    pytest.param("cuda", torch.float16, marks=pytest.mark.cuda),
]


@pytest.fixture
def ids(draw: torch.Generator) -> Tensor:
    return torch.randint(0, 256, (24,), generator=draw)


def load(folder: Path, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device)


def greedy(model: Any, ids: Tensor, count: int) -> tuple[list[int], Tensor]:
    """Return what transformers' generate appends, and the logits (count, vocabulary) of each."""
    prompt = ids[None].to(model.device)
    options = {"max_new_tokens": count, "do_sample": False, "pad_token_id": 0}
    options |= {"output_logits": True, "return_dict_in_generate": True}
    done = model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
    return done.sequences[0, ids.shape[0] :].tolist(), torch.cat(done.logits).float()


def require_greedy(got: list[int], wanted: list[int], logits: Tensor) -> None:
    """Assert that tokens are those of `greedy` or, in half precision, part from them at a near tie: there
    fused operations round anew, and other channels may be chosen."""
    assert len(got) == len(wanted)
    parted = next((i for i, pair in enumerate(zip(got, wanted, strict=True)) if pair[0] != pair[1]), None)
    if parted is not None:
        at = logits[parted]
        assert (at[wanted[parted]] - at[got[parted]]).item() <= 1e-2 * at.abs().max().item()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("fused", [False, True], ids=["apart", "fused"])
@pytest.mark.parametrize("selection", ["none", "static", "dynamic", "exact"])
def test_greedy_tokens_are_those_of_generate(
    selection: str, fused: bool, device: str, tiny_artifact_dir: Path, ids: Tensor
) -> None:
    model = load(tiny_artifact_dir, device)
    set_compensation(model, Compensation(selection, 128, "decode"))
    wanted, _ = greedy(model, ids, 40)
    if fused:
        assert fuse(model) == 2 * 5  # q, k, v, gate and up of two blocks
    decoder = Decoder(model, 80)
    for _ in range(2):  # the second time with what the first left in the cache
        assert decoder.generate(ids, 40, stop=()).tokens == wanted
    assert decoder.generate(ids, 20, stop=()).tokens == wanted[:20]


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("selection", ["none", "static", "dynamic", "exact"])
def test_greedy_tokens_in_half_precision(
    selection: str, dtype: torch.dtype, tiny_artifact_dir: Path, ids: Tensor
) -> None:
    model = load(tiny_artifact_dir, "cuda", dtype)
    set_compensation(model, Compensation(selection, 128, "decode"))
    wanted, logits = greedy(model, ids, 40)
    fuse(model)
    decoder = Decoder(model, 80)
    got = decoder.generate(ids, 40, stop=()).tokens
    require_greedy(got, wanted, logits)
    assert decoder.generate(ids, 40, stop=()).tokens == got  # whatever the cache held


def fresh(
    folder: Path, device: str, dtype: torch.dtype, compensation: Compensation, ids: Tensor
) -> list[int]:
    """Return 30 tokens of a model and a Decoder that have done nothing before."""
    model = load(folder, device, dtype)
    fuse(model)
    set_compensation(model, compensation)
    decoder = Decoder(model, 80)
    assert decoder.step.has_kernels == (dtype == torch.float16)
    return decoder.generate(ids, 30, stop=()).tokens


@pytest.mark.parametrize(("device", "dtype"), PLACES)
def test_what_is_compensated_may_change_between_calls(
    device: str, dtype: torch.dtype, tiny_artifact_dir: Path, ids: Tensor
) -> None:
    model = load(tiny_artifact_dir, device, dtype)
    fuse(model)
    decoder, found = Decoder(model, 80), []
    grid = [
        Compensation("none"),
        Compensation("exact", 1024),
        Compensation("dynamic", (8, 0, 64, 200)),
        Compensation("static", 256),
        Compensation("static", 1024, n_tb=4),
    ]
    for compensation in [*grid, *grid]:
        set_compensation(model, compensation)
        found.append(decoder.generate(ids, 30, stop=()).tokens)
        assert found[-1] == fresh(tiny_artifact_dir, device, dtype, compensation, ids)
        if dtype == torch.float32:
            assert found[-1] == greedy(model, ids, 30)[0]
    assert found[0] != found[1]
    assert found[3] != found[4]


@pytest.mark.parametrize(("device", "dtype"), PLACES)
def test_decoders_of_one_model_take_turns(
    device: str, dtype: torch.dtype, tiny_artifact_dir: Path, ids: Tensor
) -> None:
    model = load(tiny_artifact_dir, device, dtype)
    fuse(model)
    for k_chunk in (64, 512):
        compensation = Compensation("exact", k_chunk)
        set_compensation(model, compensation)
        wanted = fresh(tiny_artifact_dir, device, dtype, compensation, ids)
        decoders = [Decoder(model, max_length) for max_length in (60, 80)]
        for _ in range(2):
            assert all(decoder.generate(ids, 30, stop=()).tokens == wanted for decoder in decoders)
        del decoders  # and what they hold of the device's memory, for the next two


@pytest.mark.parametrize("device", DEVICES)
def test_a_plain_model_generates_too(device: str, ids: Tensor) -> None:
    model = tiny_model("llama").to(device)
    wanted, _ = greedy(model, ids, 20)
    fuse(model)
    assert Decoder(model, 60).generate(ids, 20, stop=()).tokens == wanted


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("architecture", ["mistral", "phi3"])
def test_attention_with_a_window(architecture: str, device: str, ids: Tensor) -> None:
    model = tiny_model(architecture).to(device)
    model.config.sliding_window = 64
    wanted, _ = greedy(model, ids, 40)
    assert Decoder(model, 64).generate(ids, 40, stop=()).tokens == wanted
    with pytest.raises(DecDECError, match="max_length must be at most the attention's window of 64, got 65"):
        Decoder(model, 65)


@pytest.mark.parametrize(("device", "dtype"), PLACES)
def test_a_model_may_be_fused_under_a_decoder(
    device: str, dtype: torch.dtype, tiny_artifact_dir: Path, ids: Tensor
) -> None:
    model = load(tiny_artifact_dir, device, dtype)
    decoder = Decoder(model, 80)
    set_compensation(model, Compensation("static", 128))
    before = decoder.generate(ids, 30, stop=()).tokens
    fuse(model)
    assert decoder.generate(ids, 30, stop=()).tokens == before
    other = Compensation("exact", 1024)
    set_compensation(model, other)
    assert decoder.generate(ids, 30, stop=()).tokens == fresh(tiny_artifact_dir, device, dtype, other, ids)


@pytest.mark.parametrize(("device", "dtype"), PLACES)
def test_a_stop_token_ends_it(device: str, dtype: torch.dtype, tiny_artifact_dir: Path, ids: Tensor) -> None:
    model = load(tiny_artifact_dir, device, dtype)
    decoder = Decoder(model, 100)
    whole = decoder.generate(ids, 60, stop=()).tokens
    stop = whole[37]
    ended = decoder.generate(ids, 60, stop=[stop])
    assert ended.tokens == whole[: whole.index(stop) + 1]
    model.generation_config.eos_token_id = [stop]
    assert decoder.generate(ids, 60).tokens == ended.tokens
    assert decoder.generate(ids, 60, stop=whole[:1]).tokens == whole[:1]


@pytest.mark.parametrize(("device", "dtype"), PLACES)
def test_sampling_is_a_function_of_its_seed(
    device: str, dtype: torch.dtype, tiny_artifact_dir: Path, ids: Tensor
) -> None:
    model = load(tiny_artifact_dir, device, dtype)
    first, second = (Decoder(model, 80, Sampling(1.0, seed=seed)) for seed in (1, 2))
    tokens = first.generate(ids, 30, stop=()).tokens
    assert first.generate(ids, 30, stop=()).tokens == tokens
    assert second.generate(ids, 30, stop=()).tokens != tokens


def test_what_sampling_leaves_out() -> None:
    logits = torch.tensor([0.5, 0.2, 0.15, 0.1, 0.05]).log().expand(4000, 5)
    draw = torch.Generator().manual_seed(0)

    def shares(sampling: Sampling) -> list[float]:
        return (torch.bincount(sampling.choose(logits, draw), minlength=5) / 4000).tolist()

    assert shares(Sampling()) == [1, 0, 0, 0, 0]
    # a share of 0.5 of 4000 draws has a standard deviation of 0.008
    assert shares(Sampling(1.0)) == pytest.approx([0.5, 0.2, 0.15, 0.1, 0.05], abs=0.03)
    assert shares(Sampling(1.0, top_k=2)) == pytest.approx([0.5 / 0.7, 0.2 / 0.7, 0, 0, 0], abs=0.03)
    # 0.5 and 0.2 do not reach 0.75: the third stays too
    kept = shares(Sampling(1.0, top_p=0.75))
    assert kept == pytest.approx([0.5 / 0.85, 0.2 / 0.85, 0.15 / 0.85, 0, 0], abs=0.03)
    assert shares(Sampling(1.0, top_p=0.01)) == [1, 0, 0, 0, 0]
    flat = shares(Sampling(2.0))
    assert flat[0] == pytest.approx(0.5**0.5 / sum(p**0.5 for p in (0.5, 0.2, 0.15, 0.1, 0.05)), abs=0.03)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "temperature must be 0 or more, got -1.0"),
        ({"temperature": "hot"}, "temperature must be a number, got 'hot'"),
        ({"temperature": float("nan")}, "temperature must be 0 or more, got nan"),
        ({"top_k": -1}, "top_k must be 0..1048576, got -1"),
        ({"top_p": 0.0}, "top_p must be above 0 and at most 1, got 0.0"),
        ({"seed": -1}, "seed must be 0..2147483647, got -1"),
    ],
)
def test_refused_sampling(options: dict[str, Any], message: str) -> None:
    with pytest.raises(DecDECError, match=message):
        Sampling(**options)


def test_refused_prompts(tiny_artifact_dir: Path, ids: Tensor) -> None:
    decoder = Decoder(load(tiny_artifact_dir), 40)
    assert len(decoder.generate(ids, 16, stop=()).tokens) == 16
    for prompt, count, message in (
        (ids, 17, "prompt must be 1..23 tokens for 17 more in a cache of 40, got 24"),
        (ids[:0], 1, "prompt must be 1..39 tokens for 1 more in a cache of 40, got 0"),
        (ids, 0, "max_new_tokens must be 1..39, got 0"),
        (ids, 1000, "max_new_tokens must be 1..39, got 1000"),
        (ids.expand(2, -1), 4, r"prompt must be one sequence of token ids, got \(2, 24\) of torch.int64"),
        (ids.float(), 4, r"prompt must be one sequence of token ids, got \(24,\) of torch.float32"),
        ("hello", 4, "prompt must be token ids, got str"),
        ([-1, 3], 4, "prompt must be tokens 0..258, got -1..3"),
        ([3, 10**6], 4, "prompt must be tokens 0..258, got 3..1000000"),
    ):
        with pytest.raises(DecDECError, match=message):
            decoder.generate(prompt, count)
    for stop, message in (
        (260, "got 260"),
        ("ab", "got 'ab'"),
        (["a"], "stop token must be 0"),
        ([-1], "got -1"),
    ):
        with pytest.raises(DecDECError, match=message):
            decoder.generate(ids, 4, stop=stop)
    for model in (None, torch.nn.Linear(2, 2)):
        with pytest.raises(DecDECError, match="model must be a causal language model, got"):
            Decoder(model, 8)
    with pytest.raises(DecDECError, match="max_length must be 2"):
        Decoder(decoder.model, 1)


def test_speed_is_of_the_steps_alone() -> None:
    done = Generation([1, 2, 3, 4], 9.0, [0.1, 0.2, 0.3])
    assert done.tokens_per_second == pytest.approx(5)
    assert done.spread()["median_s"] == 0.2
    assert done.spread()["p10_s"] == pytest.approx(0.12)
    assert Generation([1], 9.0, []).tokens_per_second == 0
    assert Generation([1, 2], 9.0, [0.5]).spread() == {"median_s": 0.5, "p10_s": 0.5, "p90_s": 0.5}


@pytest.mark.parametrize("vocabulary", [1, 5, 64, 300, 1000, 32003, 32064])
def test_the_most_likely_is_the_first_of_equals(vocabulary: int) -> None:
    for highest in (1, 3, 1000):  # nearly all equal; nearly none
        logits = torch.randint(0, highest, (2, vocabulary)).float()
        wanted = [row.index(max(row)) for row in logits.tolist()]
        assert Sampling().choose(logits, torch.Generator()).tolist() == wanted
