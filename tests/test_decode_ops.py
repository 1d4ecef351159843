"""What stands between a decoding step's matrices: twins and kernels against oracles."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import relative_error
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from decdec_core.config import DecDECError
from decdec_core.decode_ops import (
    Heads,
    add_norm,
    add_norm_ref,
    decode_attention,
    decode_attention_ref,
    has_kernels,
    silu_mul,
    silu_mul_ref,
)

HALVES = [torch.float16, torch.bfloat16]
DTYPES = [torch.float32, *HALVES]
# outputs of half precision are rounded, and before them what is normed and rotated: scores move by that
TOLERANCE = {torch.float32: 1e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}
# query heads, key heads, d, rotary: groups of 1 to 12; narrow, odd and wide heads, some turned in part
SHAPES = [
    *((32, 8, 128, 128), (9, 3, 64, 64), (28, 4, 128, 128), (5, 5, 32, 32), (12, 1, 96, 48)),
    *((8, 1, 16, 16), (4, 2, 256, 192), (1, 1, 104, 16)),
]
# capacity, position: the first token, ends of splits and of rows, the middle, the last place
PLACES = [(1, 0), (40, 0), (40, 17), (129, 128), (1000, 255), (1000, 999), (5000, 4321)]
Case = tuple[Tensor, Tensor, Tensor, Tensor, Heads]


def drawn(
    shape: tuple[int, int, int, int],
    place: tuple[int, int],
    dtype: torch.dtype,
    device: str = "cpu",
    normed: bool = False,
    spread: float = 1.0,
) -> Case:
    """Return arguments of decode_attention, whose scores have about this `spread`; what the cache holds from
    the position on is NaN."""
    query_heads, shared, d, rotary = shape
    capacity, position = place
    qkv = torch.randn(1, (query_heads + 2 * shared) * d)
    keys, values = (torch.randn(shared, capacity, d) for _ in range(2))
    keys[:, position:], values[:, position:] = torch.nan, torch.nan
    angles = torch.rand(capacity, rotary // 2).repeat(1, 2) * 6
    norms = [1 + torch.rand(d) for _ in range(2)] if normed else []
    tensors = [t.to(device, dtype) for t in (qkv, keys, values, angles.cos(), angles.sin(), *norms)]
    heads = Heads(spread / d**0.5, *tensors[3:5], *tensors[5:], eps=1e-3)
    return *tensors[:3], torch.tensor([position], device=device), heads


def oracle(qkv: Tensor, keys: Tensor, values: Tensor, position: Tensor, heads: Heads) -> tuple[Tensor, ...]:
    """Return the attention, and the token's key and value, in float64: rotation as complex numbers, torch's
    attention over keys repeated for every query head."""
    shared, _, d = keys.shape
    at = int(position)
    query, key, value = qkv.cpu().double().view(-1, d).tensor_split([-2 * shared, -shared])
    pairs = heads.cosines.shape[1] // 2
    turn = torch.complex(heads.cosines[at, :pairs].cpu().double(), heads.sines[at, :pairs].cpu().double())

    def prepared(x: Tensor, weight: Tensor | None) -> Tensor:
        if weight is not None:
            x = F.rms_norm(x, (d,), weight.cpu().double(), heads.eps)
        turned = torch.complex(x[:, :pairs], x[:, pairs : 2 * pairs]) * turn
        return torch.cat([turned.real, turned.imag, x[:, 2 * pairs :]], dim=1)

    query, key = prepared(query, heads.query_norm), prepared(key, heads.key_norm)
    all_keys, all_values = (
        torch.cat([kept[:, :at].cpu().double(), new.unsqueeze(1)], dim=1).repeat_interleave(
            query.shape[0] // shared, dim=0
        )
        for kept, new in ((keys, key), (values, value))
    )
    out = F.scaled_dot_product_attention(query[:, None], all_keys, all_values, scale=heads.scaling)
    return out.reshape(1, -1), key, value


def require_equal(got: Tensor, made: Case, wanted: tuple[Tensor, ...], dtype: torch.dtype) -> None:
    """Assert the attention and what is now in the cache."""
    _, keys, values, position, _ = made
    at = int(position)
    assert got.dtype == dtype
    assert relative_error(got.cpu(), wanted[0]) < TOLERANCE[dtype]
    assert relative_error(keys[:, at].cpu(), wanted[1]) < TOLERANCE[dtype]
    assert torch.equal(values[:, at].cpu().double(), wanted[2])
    assert keys[:, at + 1 :].isnan().all() or not keys[:, at + 1 :].any()


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_twin_is_the_oracle(shape: tuple[int, int, int, int], dtype: torch.dtype, normed: bool) -> None:
    made = drawn(shape, (40, 17), dtype, normed=normed)
    made[1][:, 17:], made[2][:, 17:] = 0, 0
    wanted = oracle(*made)
    require_equal(decode_attention(*made), made, wanted, dtype)


@pytest.mark.cuda
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_kernel_is_the_oracle(
    shape: tuple[int, int, int, int], place: tuple[int, int], dtype: torch.dtype, normed: bool
) -> None:
    for spread in (0.5, 3.0):  # even weights; most on few tokens
        made = drawn(shape, place, dtype, "cuda", normed, spread)
        wanted = oracle(*made)
        got = decode_attention(*made)
        require_equal(got, made, wanted, dtype)
        # sums in a fixed order, the workspace as it was, the cache's newest entry overwritten with itself
        assert torch.equal(decode_attention(*made), got)


@pytest.mark.cuda
def test_a_captured_call_reads_everything_anew() -> None:
    qkv, keys, values, position, heads = drawn((32, 8, 128, 128), (700, 699), torch.float16, "cuda")
    keys.normal_()
    values.normal_()
    decode_attention(qkv, keys, values, position, heads)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = decode_attention(qkv, keys, values, position, heads)
    for place in (0, 1, 15, 16, 300, 699):
        position.fill_(place)
        qkv.normal_()
        wanted = decode_attention(qkv, keys, values, position, heads)
        got.fill_(torch.nan)
        for _ in range(20):
            graph.replay()
        assert torch.equal(got, wanted)


@pytest.mark.cuda
def test_many_streams_at_once() -> None:
    made = [drawn((32, 8, 128, 128), (900, 100 * i), torch.float16, "cuda") for i in range(4)]
    wanted = [decode_attention(*one) for one in made]
    streams = [torch.cuda.Stream() for _ in made]
    torch.cuda.synchronize()
    for _ in range(50):
        got = []
        for one, stream in zip(made, streams, strict=True):
            with torch.cuda.stream(stream):
                torch.cuda._sleep(1_000_000)  # so that all have been launched when the first begins
                got.append(decode_attention(*one))
        torch.cuda.synchronize()
        assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [8, 576, 1000, 4096, 14336])
def test_the_twin_norms_as_transformers(size: int, dtype: torch.dtype) -> None:
    norm = LlamaRMSNorm(size, eps=1e-5).to(dtype)
    norm.weight.data.uniform_(-2, 2)
    hidden, added = (torch.randn(1, size).to(dtype) for _ in range(2))
    total = hidden + added
    assert torch.equal(add_norm(hidden.clone(), None, norm.weight, 1e-5), norm(hidden))
    assert torch.equal(add_norm(hidden, added, norm.weight, 1e-5), norm(total))
    assert torch.equal(hidden, total)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("size", [8, 576, 1000, 4096, 14336, 40000])
def test_the_norm_kernel_is_the_twin(size: int, dtype: torch.dtype) -> None:
    hidden, added, weight = (torch.randn(1, size, device="cuda").to(dtype) for _ in range(3))
    for addend in (None, added):
        mine, theirs = hidden.clone(), hidden.clone()
        got = add_norm(mine, addend, weight[0], 1e-5)
        wanted = add_norm_ref(theirs, addend, weight[0], 1e-5)
        assert torch.equal(mine, theirs)
        assert relative_error(got, wanted) < TOLERANCE[dtype]


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("size", [8, 1000, 1536, 14336])
def test_the_gate_kernel_is_the_twin(size: int, dtype: torch.dtype) -> None:
    gate_up = 5 * torch.randn(1, 2 * size, device="cuda").to(dtype)
    gate_up[0, :6] = torch.tensor([0.0, -0.0, 300.0, -300.0, torch.inf, -20.0], device="cuda").to(dtype)
    got, wanted = silu_mul(gate_up), silu_mul_ref(gate_up)
    assert torch.allclose(got, wanted, rtol=TOLERANCE[dtype], atol=1e-6, equal_nan=True)


def test_the_gate_is_transformers() -> None:
    gate_up = torch.randn(1, 200)
    assert torch.equal(silu_mul(gate_up), F.silu(gate_up[:, :100]) * gate_up[:, 100:])


@pytest.mark.cuda
def test_the_ops_are_well_formed() -> None:
    qkv, keys, values, position, heads = drawn((9, 3, 64, 64), (40, 17), torch.float16, "cuda", normed=True)
    out = decode_attention(qkv, keys, values, position, heads)  # compiles
    tables = (heads.cosines, heads.sines, heads.query_norm, heads.key_norm)
    arguments = (qkv, keys.nan_to_num(), values.nan_to_num(), position, *tables, 1e-5, 0.1, out)
    torch.library.opcheck(torch.ops.decdec.decode_attention.default, arguments)
    hidden, weight = torch.randn(2, 1, 64, device="cuda").half()
    norm_arguments = (hidden.clone(), hidden, weight[0], 1e-5, torch.empty_like(hidden))
    torch.library.opcheck(torch.ops.decdec.add_norm.default, norm_arguments)
    torch.library.opcheck(torch.ops.decdec.silu_mul.default, (hidden, torch.empty_like(hidden[:, :32])))


def zeros(*shape: int) -> Tensor:
    return torch.zeros(*shape).half()


REFUSED: dict[str, dict[str, Any]] = {
    "qkv must be a multiple of 4 query heads .* got 960 values": {"qkv": zeros(1, 960)},
    "qkv must be a multiple of 4 query heads .* got 500 values": {"qkv": zeros(1, 500)},
    r"qkv must be \(1, 1024\) and not empty, got \(2, 1024\)": {"qkv": zeros(2, 1024)},
    r"keys must be \(key heads, capacity, d\), got \(64,\)": {"keys": zeros(64)},
    r"keys must be \(4, 0, 64\) and not empty": {"keys": zeros(4, 0, 64)},
    r"values must be \(4, 40, 64\) and not empty, got \(4, 41, 64\)": {"values": zeros(4, 41, 64)},
    "values must be torch.float16, got torch.bfloat16": {"values": zeros(4, 40, 64).bfloat16()},
    r"position must be \(1,\) int64, got \(1,\) torch.int32": {"position": torch.zeros(1, dtype=torch.int32)},
    r"position must be \(1,\) int64, got \(2,\)": {"position": torch.zeros(2, dtype=torch.int64)},
    r"cosines must be \(40, rotary\) .* got \(39, 64\)": {"cosines": zeros(39, 64)},
    r"cosines must be \(40, rotary\) .* got \(40, 66\)": {"cosines": zeros(40, 66)},
    r"sines must be \(40, 64\) and not empty, got \(40, 32\)": {"sines": zeros(40, 32)},
    r"query_norm must be \(64,\) and not empty, got \(32,\)": {"query_norm": zeros(32)},
}
# what the kernel refuses besides
REFUSED_ON_A_GPU: dict[str, dict[str, Any]] = {
    "qkv must be float16 or bfloat16": {
        "qkv": torch.zeros(1, 1024),
        **{name: torch.zeros(40, 64) for name in ("cosines", "sines")},
        **{name: torch.zeros(4, 40, 64) for name in ("keys", "values")},
    },
    "d must be a multiple of 8": {
        "qkv": zeros(1, 960),
        **{name: zeros(4, 40, 60) for name in ("keys", "values")},
        **{name: zeros(40, 32) for name in ("cosines", "sines")},
    },
    "d must be a multiple of 8, at most 256": {
        "qkv": zeros(1, 16 * 264),
        **{name: zeros(4, 40, 264) for name in ("keys", "values")},
    },
    "rotary must be a multiple of 16, at most 64": {name: zeros(40, 24) for name in ("cosines", "sines")},
    "keys must be contiguous": {"keys": zeros(4, 64, 40).transpose(1, 2)},
}


def require_refused(message: str, changes: dict[str, Any], device: str) -> None:
    """Assert that arguments of decode_attention with these `changes` are refused."""
    qkv, keys, values, position, heads = drawn((8, 4, 64, 64), (40, 17), torch.float16)
    good = {"qkv": qkv, "keys": keys, "values": values, "position": position}
    good |= {"cosines": heads.cosines, "sines": heads.sines, **changes}
    there: dict[str, Any] = {name: tensor.to(device) for name, tensor in good.items()}
    tables = {name: there.pop(name) for name in ("cosines", "sines", "query_norm") if name in there}
    with pytest.raises(DecDECError, match=message):
        decode_attention(**there, heads=replace(heads, **tables))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
@pytest.mark.parametrize("message", REFUSED)
def test_refused_attention(message: str, device: str) -> None:
    require_refused(message, REFUSED[message], device)


@pytest.mark.cuda
@pytest.mark.parametrize("message", REFUSED_ON_A_GPU)
def test_attention_that_the_kernel_refuses(message: str) -> None:
    require_refused(message, REFUSED_ON_A_GPU[message], "cuda")


@pytest.mark.cuda
@pytest.mark.parametrize("position", [-1, 40, 1 << 40])
def test_a_position_outside_the_cache_is_seen_and_does_no_harm(position: int) -> None:
    qkv, keys, values, _, heads = drawn((8, 4, 64, 64), (40, 39), torch.float16, "cuda")
    keys.zero_()
    values.zero_()
    outside = torch.tensor([position], device="cuda")
    assert decode_attention(qkv, keys, values, outside, heads).isnan().all()
    assert not keys.any()
    assert not values.any()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def test_refused_norms_and_gates(device: str) -> None:
    hidden, added, weight = torch.zeros(3, 1, 64, device=device).half()
    with pytest.raises(DecDECError, match=r"hidden must be \(1, 64\) and not empty, got \(2, 64\)"):
        add_norm(torch.zeros(2, 64, device=device).half(), None, weight[0], 1e-5)
    with pytest.raises(DecDECError, match=r"added must be \(1, 64\) and not empty, got \(1, 1\)"):
        add_norm(hidden, added[:, :1], weight[0], 1e-5)
    with pytest.raises(DecDECError, match=r"weight must be \(64,\) and not empty, got \(1,\)"):
        add_norm(hidden, added, weight[0, :1], 1e-5)
    with pytest.raises(DecDECError, match=r"weight must be torch\.float16, got torch\.bfloat16"):
        add_norm(hidden, added, weight[0].bfloat16(), 1e-5)
    with pytest.raises(DecDECError, match=r"gate_up must be \(1, 64\) and not empty, got \(1, 65\)"):
        silu_mul(torch.zeros(1, 65, device=device).half())


@pytest.mark.cuda
def test_norms_and_gates_that_the_kernels_refuse() -> None:
    hidden = torch.zeros(1, 64, device="cuda").half()
    with pytest.raises(DecDECError, match="hidden must be float16 or bfloat16"):
        add_norm(hidden.float(), None, hidden[0].float(), 1e-5)
    with pytest.raises(DecDECError, match="size must be a positive multiple of 8"):
        add_norm(hidden[:, :60], None, hidden[0, :60], 1e-5)
    with pytest.raises(DecDECError, match="gate_up must be float16 or bfloat16"):
        silu_mul(hidden.float())


@pytest.mark.parametrize(
    ("dtype", "sizes", "d", "rotary", "wanted"),
    [
        (torch.float16, (576, 1536), 64, 64, True),
        (torch.bfloat16, (5120, 17920), 128, 128, True),
        (torch.float32, (576, 1536), 64, 64, False),
        (torch.float16, (580, 1536), 64, 64, False),
        (torch.float16, (576, 1536), 60, 32, False),
        (torch.float16, (576, 1536), 512, 64, False),
        (torch.float16, (576, 1536), 64, 24, False),
    ],
)
def test_what_the_kernels_take(
    dtype: torch.dtype, sizes: tuple[int, ...], d: int, rotary: int, wanted: bool
) -> None:
    assert has_kernels(dtype, sizes, d, rotary) == wanted


def test_the_twin_adds_to_the_cache_only_at_the_position() -> None:
    made = drawn((8, 4, 64, 64), (40, 17), torch.float32)
    made[1][:, 17:], made[2][:, 17:] = 0, 0
    keys, values = made[1].clone(), made[2].clone()
    decode_attention_ref(*made)
    for now, before in ((made[1], keys), (made[2], values)):
        changed = (now != before).any(-1).any(0).nonzero().flatten().tolist()
        assert changed == [17]
