"""Attention of one token over a static cache: twin, kernel, and a model that attends by it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from conftest import relative_error, tiny_model
from torch import Tensor

from decdec_core.attention import attend, attending, decode_attention, decode_attention_ref, static_cache
from decdec_core.config import DecDECError

# heads, key heads, d: grouped by 1, 3, 4, 7, 8, 12; narrow, odd and wide heads
SHAPES = [
    (32, 8, 128),
    (9, 3, 64),
    (28, 4, 128),
    (5, 5, 32),
    (12, 1, 96),
    (8, 1, 8),
    (4, 2, 256),
    (64, 8, 128),
]
# a position in the first token, at ends of splits and rows, in the middle and at the end
PLACES = [(1, 0), (40, 0), (40, 17), (129, 128), (1000, 255), (1000, 999), (5000, 4321)]
TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 1.5e-2}  # the output's rounding


def drawn(
    shape: tuple[int, int, int], capacity: int, position: int, dtype: torch.dtype, device: str = "cpu"
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return query, keys and values, NaN beyond the position, and the position."""
    heads, key_heads, d = shape
    query = torch.randn(heads, d).to(dtype)
    keys, values = (torch.randn(key_heads, capacity, d).to(dtype) for _ in range(2))
    keys[:, position + 1 :], values[:, position + 1 :] = torch.nan, torch.nan
    return query.to(device), keys.to(device), values.to(device), torch.tensor([position], device=device)


def oracle(query: Tensor, keys: Tensor, values: Tensor, position: Tensor, scaling: float) -> Tensor:
    """Return the attention in float64 by torch's own function."""
    n = int(position) + 1
    q, k, v = (t.cpu().double() for t in (query[:, None], keys[:, :n], values[:, :n]))
    shared = query.shape[0] // keys.shape[0]
    k, v = (t.repeat_interleave(shared, dim=0) for t in (k, v))
    return F.scaled_dot_product_attention(q, k, v, scale=scaling)[:, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_twin_is_the_oracle(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    query, keys, values, position = drawn(shape, 40, 17, dtype)
    values[:, 18:] = 0
    got = decode_attention(query, keys, values, position, 0.2)
    assert got.dtype == dtype
    tolerance = {torch.float32: 1e-6, **TOLERANCE}[dtype]
    assert relative_error(got, oracle(query, keys, values, position, 0.2)) < tolerance


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_kernel_is_the_oracle(
    shape: tuple[int, int, int], place: tuple[int, int], dtype: torch.dtype
) -> None:
    made = drawn(shape, *place, dtype, "cuda")
    for scaling in (0.1, 3.0):  # even weights; nearly all on one token
        wanted = oracle(*made, scaling)
        first, second = (decode_attention(*made, scaling) for _ in range(2))
        assert relative_error(first.cpu(), wanted) < TOLERANCE[dtype]
        assert torch.equal(first, second)  # sums in a fixed order, the workspace as it was


@pytest.mark.cuda
def test_a_captured_call_reads_position_and_cache_anew() -> None:
    query, keys, values, position = drawn((32, 8, 128), 700, 699, torch.float16, "cuda")
    decode_attention(query, keys, values, position, 0.1)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = decode_attention(query, keys, values, position, 0.1)
    for place in (0, 1, 15, 16, 300, 699):
        position.fill_(place)
        query.normal_()
        keys[:, place].normal_()
        wanted = decode_attention(query, keys, values, position, 0.1)
        got.fill_(torch.nan)
        for _ in range(20):
            graph.replay()
        assert torch.equal(got, wanted)


@pytest.mark.cuda
def test_two_streams_at_once() -> None:
    made = [drawn((32, 8, 128), 900, 100 * i, torch.float16, "cuda") for i in range(4)]
    wanted = [decode_attention(*one, 0.1) for one in made]
    streams = [torch.cuda.Stream() for _ in made]
    torch.cuda.synchronize()
    for _ in range(50):
        got = []
        for one, stream in zip(made, streams, strict=True):
            with torch.cuda.stream(stream):
                got.append(decode_attention(*one, 0.1))
        torch.cuda.synchronize()
        assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


@pytest.mark.cuda
def test_the_op_is_well_formed() -> None:
    query, keys, values, position = drawn((9, 3, 64), 40, 17, torch.float16, "cuda")
    decode_attention(query, keys, values, position, 0.1)  # compiles
    arguments = (query, keys, values, position, 0.1, torch.empty_like(query))
    torch.library.opcheck(torch.ops.decdec.decode_attention.default, arguments)


REFUSED = {
    "query must be float16 or bfloat16": {"query": torch.zeros(8, 64)},
    r"query must be \(heads, d\)": {"query": torch.zeros(1, 8, 64).half()},
    "d must be a multiple of 8": {"query": torch.zeros(8, 60).half(), "keys": torch.zeros(4, 40, 60).half()},
    "d must be a multiple of 8, at most 256": {"query": torch.zeros(8, 512).half()},
    "d of keys must be 64, got 32": {"keys": torch.zeros(4, 40, 32).half()},
    "heads must be a multiple of 3, got 8": {"keys": torch.zeros(3, 40, 64).half()},
    r"values must be \(4, 40, 64\)": {"values": torch.zeros(4, 41, 64).half()},
    "values must be Half, got BFloat16": {"values": torch.zeros(4, 40, 64).bfloat16()},
    "keys must be contiguous": {"keys": torch.zeros(4, 64, 40).half().transpose(1, 2)},
    "position must be Long": {"position": torch.zeros(1, dtype=torch.int32)},
    "position must be of one number": {"position": torch.zeros(2, dtype=torch.int64)},
}


@pytest.mark.cuda
@pytest.mark.parametrize("message", REFUSED)
def test_what_the_kernel_cannot_take_is_refused(message: str) -> None:
    good = {
        "query": torch.zeros(8, 64).half(),
        "keys": torch.zeros(4, 40, 64).half(),
        "values": torch.zeros(4, 40, 64).half(),
        "position": torch.zeros(1, dtype=torch.int64),
    }
    there = {name: tensor.cuda() for name, tensor in {**good, **REFUSED[message]}.items()}
    with pytest.raises(DecDECError, match=message):
        decode_attention(**there, scaling=1.0)


@torch.no_grad()
@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2", "qwen3", "phi3"])
def test_a_model_attends_by_it(architecture: str, draw: torch.Generator) -> None:
    """A prompt, then token by token, against a pass over all of it with the model's own attention."""
    model = tiny_model(architecture).eval()
    before = model.config._attn_implementation
    ids = torch.randint(0, 256, (1, 30), generator=draw)
    wanted = model(ids, use_cache=False).logits
    length = torch.zeros(1, dtype=torch.int64)
    cache, got = static_cache(model.config.num_hidden_layers, 40, length), []
    with attending(model):
        for part in ids.split([20] + [1] * 10, dim=1):
            places = torch.arange(part.shape[1])[None] + length
            got.append(model(part, position_ids=places, past_key_values=cache, use_cache=True).logits)
            length += part.shape[1]
    assert torch.allclose(torch.cat(got, dim=1), wanted, atol=1e-4)
    assert model.config._attn_implementation == before
    assert torch.equal(model(ids, use_cache=False).logits, wanted)


def test_the_model_attends_as_before_after_an_error() -> None:
    model = tiny_model("llama")
    before = model.config._attn_implementation
    with pytest.raises(RuntimeError, match="stop"), attending(model):
        raise RuntimeError("stop")
    assert model.config._attn_implementation == before


@pytest.mark.cuda
def test_other_dtypes_take_the_twin_on_a_gpu() -> None:
    query, keys, values, position = drawn((8, 4, 64), 40, 17, torch.float32, "cuda")
    values[:, 18:] = 0
    states = (query[None, :, None], keys[None], values[None])
    got, _ = attend(None, *states, None, 0.1, position[None])
    assert torch.equal(got.view(8, 64), decode_attention_ref(query, keys, values, position, 0.1))
    assert relative_error(got.view(8, 64).cpu(), oracle(query, keys, values, position, 0.1)) < 1e-5
