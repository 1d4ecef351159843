"""Compensation of many tokens: the twin, the stage, the layer's ways; on a GPU the kernel and the streams."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
from conftest import make_layer, relative_error, selection_of
from torch import Tensor

from decdec_core import cli, prefill, residuals
from decdec_core.config import DecDECError, ResidualQuant
from decdec_core.prefill import Stage, dequantize_residual
from decdec_core.residuals import QuantizedResidual, quantize_residual

KINDS = ("static", "random", "dynamic", "exact")
# the products are summed in float32; weight, residual and, twice, y are rounded to the activations' dtype
TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 1e-2, torch.float32: 1e-5}


def draw_residual(in_features: int, out_features: int, bits: int) -> QuantizedResidual:
    return quantize_residual(torch.randn(out_features, in_features) * 0.01, ResidualQuant(bits))


def draw_x(tokens: int, in_features: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return activations with channels that stand out."""
    return (torch.randn(tokens, in_features) * torch.randn(in_features).exp()).to(dtype)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("bits", [2, 4, 8, 16])
@pytest.mark.parametrize(("in_features", "out_features"), [(1, 1), (33, 77), (576, 192), (1032, 1000)])
def test_rows_are_the_residuals(in_features: int, out_features: int, bits: int, dtype: torch.dtype) -> None:
    kept = draw_residual(in_features, out_features, bits)
    wanted = residuals.dequantize_residual(kept).T.to(dtype)
    got = dequantize_residual(kept.codes, kept.scale, bits, dtype)
    assert got.dtype == dtype
    assert torch.equal(got, wanted)
    channels = torch.randint(0, in_features, (5,), dtype=torch.int32)
    assert torch.equal(
        dequantize_residual(kept.codes, kept.scale, bits, dtype, channels), wanted[channels.long()]
    )


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"bits": 3}, "bits must be one of 2, 4, 8, 16, got 3"),
        ({"bits": 16}, r"codes must be torch\.float16, got torch\.uint8"),
        ({"codes": torch.zeros(32, 31, dtype=torch.uint8)}, r"codes must be \(in, 32\), got \(32, 31\)"),
        ({"codes": torch.zeros(32, 32)}, r"codes must be torch\.uint8, got torch\.float32"),
        ({"scale": torch.ones(64).half()}, r"scale must be \(out,\) torch\.float32, got"),
        ({"dtype": torch.float64}, "dtype must be float32, float16 or bfloat16, got"),
        ({"channels": torch.tensor([0, 32]).int()}, "channels must be 0..31, got 32"),
        ({"channels": torch.tensor([-1, 3]).int()}, "channels must be 0..31, got -1"),
        ({"channels": torch.tensor([3])}, r"channels must be \(rows,\) torch\.int32, got \(1,\)"),
    ],
)
def test_rows_refuse(changed: dict[str, Any], message: str) -> None:
    arguments = {
        "codes": torch.zeros(32, 32, dtype=torch.uint8),
        "scale": torch.ones(64),
        "bits": 4,
        "dtype": torch.float16,
    }
    with pytest.raises(DecDECError, match=message):
        dequantize_residual(**{**arguments, **changed})


@pytest.mark.parametrize("rows", [0, 1, 64, 4096, 14336, 1 << 20])
@pytest.mark.parametrize("out_features", [0, 1, 192, 4096, 28672])
def test_slabs_cover_the_columns_and_stay_small(rows: int, out_features: int) -> None:
    runs = prefill.slabs(rows, out_features)
    assert [column for run in runs for column in range(*run)] == list(range(out_features))
    for first, end in runs:
        assert first % 128 == 0
        assert (end - first) * rows <= prefill._DECODED_AT_ONCE or end - first <= 128


def test_masked_keeps_what_each_token_chose() -> None:
    x = draw_x(3, 8)
    x[0, 2] = torch.inf
    each = torch.tensor([[2, 5], [0, 1], [7, 3]], dtype=torch.int32)
    for chosen in (each, each[:1]):
        kept = prefill.masked(x, chosen)
        for token, row in enumerate(chosen.long().expand(3, -1)):
            assert torch.equal(kept[token, row], x[token, row])
            assert kept[token].count_nonzero() == 2


@pytest.mark.parametrize("bits", [2, 4, 8, 16])
def test_slabs_add_up(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = draw_residual(40, 300, bits)
    x, y = draw_x(7, 40), torch.randn(7, 300)
    wanted = y + x @ residuals.dequantize_residual(kept).T
    monkeypatch.setattr(prefill, "_DECODED_AT_ONCE", 40 * 128)
    assert len(prefill.slabs(40, 300)) == 3
    prefill.add_rows(y, x, kept.codes, kept.scale, bits)
    assert torch.allclose(y, wanted, atol=1e-5)


class FakeLayer:
    """A layer that wants its whole residual, or not."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.residual = draw_residual(1, 2, 8)
        self.wants = True

    def copied_whole(self, tokens: int, dtype: torch.dtype) -> QuantizedResidual | None:
        return self.residual if self.wants else None


class FakeStage(Stage):
    """A stage without streams, that tells what it copied."""

    def __init__(self) -> None:
        super().__init__()
        self.log: list[QuantizedResidual] = []

    def _start(self, layer: Any, residual: QuantizedResidual) -> Any:
        self.log.append(residual)
        return prefill._Copy(weakref.ref(layer), residual, residual.codes.clone(), residual.scale, None)

    def _wait_for(self, copy: Any, device: torch.device) -> None:
        pass

    def _release(self, device: torch.device) -> None:
        pass


@pytest.fixture
def one_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the stage copy one residual ahead, not several."""
    monkeypatch.setattr(prefill, "_AHEAD_BYTES", 3)


def pass_over(stage: FakeStage, layers: list[FakeLayer]) -> list[list[int]]:
    """Run a pass; return, for each layer, the numbers of the layers whose copy started by its end."""
    stage.reset()
    numbers, started = {id(layer.residual): i for i, layer in enumerate(layers)}, []
    for layer in layers:
        stage.log.clear()
        stage.begin(layer, layer.residual)
        with stage.resident(layer, 9, torch.float16) as (codes, _):
            assert torch.equal(codes, layer.residual.codes)
        started.append([numbers[id(residual)] for residual in stage.log])
    return started


def test_the_stage_learns_the_order_and_ends_with_the_pass(one_ahead: None) -> None:
    stage, layers = FakeStage(), [FakeLayer() for _ in range(3)]
    assert pass_over(stage, layers) == [[0], [1], [2]]
    for _ in range(2):
        assert pass_over(stage, layers) == [[0, 1], [2], []]
        assert not stage._here.ahead


def test_the_stage_copies_ahead_as_many_as_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    stage, layers = FakeStage(), [FakeLayer() for _ in range(5)]  # two bytes each
    monkeypatch.setattr(prefill, "_AHEAD_BYTES", 4)
    pass_over(stage, layers)
    assert pass_over(stage, layers) == [[0, 1, 2], [3], [4], [], []]
    layers[2].residual = draw_residual(1, 20, 8)
    assert pass_over(stage, layers) == [[0, 1], [2], [3, 4], [], []]


def test_the_stage_follows_a_new_order_and_what_layers_want(one_ahead: None) -> None:
    stage, layers = FakeStage(), [FakeLayer() for _ in range(3)]
    pass_over(stage, layers)
    assert pass_over(stage, layers[::-1]) == [[0], [1, 0], [2, 1]]  # learning as it goes
    pass_over(stage, layers[::-1])
    assert pass_over(stage, layers[::-1]) == [[0, 1], [2], []]
    layers[1].wants = False
    assert pass_over(stage, layers[::-1]) == [[0], [1, 2], []]


def test_a_residual_that_the_pass_did_not_use_is_dropped(one_ahead: None) -> None:
    stage, layers = FakeStage(), [FakeLayer() for _ in range(3)]
    pass_over(stage, layers)
    stage.reset()
    stage.begin(layers[0], layers[0].residual)
    with stage.resident(layers[0], 9, torch.float16):
        assert stage._here.ahead
    stage.reset()
    assert not stage._here.ahead
    # another residual in the layer's place is not taken for the one copied
    pass_over(stage, layers)
    layers[1].residual = draw_residual(1, 2, 8)
    assert pass_over(stage, layers) == [[0, 1], [2], []]


def test_a_layer_that_moved_is_not_copied_to_where_it_was(one_ahead: None) -> None:
    stage, layers = FakeStage(), [FakeLayer() for _ in range(3)]
    pass_over(stage, layers)
    layers[1].device = torch.device("meta")
    stage.log.clear()
    stage.reset()
    stage.begin(layers[0], layers[0].residual)
    with stage.resident(layers[0], 9, torch.float16):
        assert not stage._here.ahead
    layers[1].device = torch.device("cpu")
    stage.begin(layers[1], layers[1].residual)
    layers[1].device = torch.device("meta")
    stage.begin(layers[1], layers[1].residual)
    assert stage.log[-1] is layers[1].residual
    assert len(stage.log) == 3  # once for its place before, once for the new one


def test_no_memory_for_a_copy_ahead_is_no_error() -> None:
    class Full(FakeStage):
        def _start(self, layer: Any, residual: QuantizedResidual) -> Any:
            if self._here.previous is not None and self._here.previous() is not layer:
                raise torch.OutOfMemoryError("full")
            return super()._start(layer, residual)

    stage, layers = Full(), [FakeLayer() for _ in range(3)]
    for _ in range(2):
        assert pass_over(stage, layers) == [[0], [1], [2]]


def test_an_error_in_a_pass_leaves_the_stage_usable() -> None:
    stage, layers = FakeStage(), [FakeLayer() for _ in range(3)]
    pass_over(stage, layers)
    stage.reset()
    stage.begin(layers[0], layers[0].residual)
    with pytest.raises(KeyError), stage.resident(layers[0], 9, torch.float16):
        raise KeyError
    assert pass_over(stage, layers) == [[0], [1, 2], []]


def test_a_layer_alone_has_no_next() -> None:
    stage, layer = FakeStage(), FakeLayer()
    for _ in range(3):
        stage.begin(layer, layer.residual)
        with stage.resident(layer, 9, torch.float16):
            assert not stage._here.ahead


def test_the_stage_keeps_no_layer_and_copies_are_fresh() -> None:
    stage, layers = Stage(), [make_layer() for _ in range(2)]
    for layer in layers:
        layer.stage = stage
    twins = copy.deepcopy(layers)
    assert twins[0].stage is twins[1].stage
    assert twins[0].stage is not stage
    fake, fakes = FakeStage(), [FakeLayer() for _ in range(2)]
    pass_over(fake, fakes)
    gone = weakref.ref(fakes[1])
    fakes.clear()
    gc.collect()
    assert gone() is None
    assert not fake._next


@pytest.fixture
def on_twins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a CPU layer go the GPU's ways, on the twins, with a stage."""
    monkeypatch.setattr(prefill, "may_copy_ahead", lambda device: not torch.compiler.is_compiling())


@pytest.mark.parametrize("residual_bits", [4, 16])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", [1, 9, 100])
def test_every_way_through_the_layer_on_the_twins(
    tokens: int, kind: str, residual_bits: int, on_twins: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefill, "_MASKED_AT_ONCE", 20 * 576)
    layer, x = make_layer(residual_bits=residual_bits), draw_x(tokens, 576)
    layer.selection, layer.stage = selection_of(kind, 16, x), FakeStage()
    wanted = layer(x)
    layer._pinned = layer.residual
    assert relative_error(layer._on_gpu(x, layer.selection), wanted) < 1e-5
    assert layer._on_gpu(x[:0], layer.selection).shape == (0, 192)
    assert torch.equal(layer._on_gpu(x.requires_grad_(), layer.selection), layer._on_gpu(x, layer.selection))


# not static: its twin looks at the channels, which the kernel does not
@pytest.mark.parametrize("kind", ["random", "dynamic", "exact"])
@pytest.mark.parametrize("tokens", [9, 100])
def test_the_ways_of_many_tokens_trace_whole(tokens: int, kind: str) -> None:
    layer, x = make_layer(), draw_x(tokens, 576)
    layer.selection = selection_of(kind, 16, x)
    layer._pinned = layer.residual
    wanted = layer._on_gpu(x, layer.selection)
    traced = torch.compile(lambda x: layer._on_gpu(x, layer.selection), fullgraph=True, backend="aot_eager")
    assert torch.allclose(traced(x), wanted, atol=1e-5)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a CUDA device")
def test_the_benchmark_without_a_gpu_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "prefill"]) == 2
    assert capsys.readouterr().err == "decdec: error: bench prefill must have a CUDA device, got none\n"
