"""Compensated passes over many tokens on a GPU: the kernel against its twin, the copies ahead, the layer."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_layer, relative_error, selection_of
from test_prefill import KINDS, TOLERANCE, draw_residual, draw_x

from decdec_core import cli, kernels, prefill
from decdec_core.config import DecDECError
from decdec_core.ops import Selection
from decdec_core.prefill import Stage, dequantize_residual, dequantize_residual_ref


class TestOnAGpu:
    pytestmark = pytest.mark.cuda

    @pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
    @pytest.mark.parametrize("place", ["pinned", "device"])
    @pytest.mark.parametrize("bits", [2, 4, 8])
    @pytest.mark.parametrize(("in_features", "out_features"), [(1, 64), (33, 192), (576, 1536), (1032, 4160)])
    def test_the_kernel_is_the_twin(
        self, in_features: int, out_features: int, bits: int, place: str, dtype: torch.dtype
    ) -> None:
        kept = draw_residual(in_features, out_features, bits).pinned()
        codes, scale = kept.codes.cuda() if place == "device" else kept.codes, kept.scale.cuda()
        wanted = dequantize_residual_ref(kept.codes, kept.scale, bits, dtype)
        assert torch.equal(dequantize_residual(codes, scale, bits, dtype).cpu(), wanted)
        channels = torch.randint(0, in_features, (70,), dtype=torch.int32)
        got = dequantize_residual(codes, scale, bits, dtype, channels.cuda())
        assert torch.equal(got.cpu(), wanted[channels.long()])
        if out_features > 128:
            view = codes[:, 128 * bits // 8 :]
            got = dequantize_residual(view, scale[128:], bits, dtype, channels.cuda())
            assert torch.equal(got.cpu(), wanted[channels.long(), 128:])

    @pytest.mark.parametrize("bits", [2, 4, 8])
    def test_the_kernel_writes_all_of_its_output_and_nothing_else(self, bits: int) -> None:
        kept = draw_residual(37, 1088, bits)
        codes, scale = kept.codes.cuda(), kept.scale.cuda()
        kernels.require_cuda(scale.device)
        around = torch.full((39, 1088), torch.nan, dtype=torch.float16, device="cuda")
        torch.ops.decdec.dequantize_residual.default(codes, scale, bits, None, around[1:38])
        wanted = dequantize_residual_ref(kept.codes, kept.scale, bits, torch.float16)
        assert torch.equal(around[1:38].cpu(), wanted)
        assert around[[0, 38]].isnan().all()

    @pytest.mark.parametrize(
        ("changed", "message"),
        [
            ({"codes": "pageable"}, "codes must be on cuda:0 or in pinned host memory, got cpu"),
            ({"codes": "narrow"}, r"codes must be \(in, 96\) or wider, got \(64, 80\)"),
            ({"codes": "odd rows"}, "codes must be in rows a multiple of 16 bytes apart"),
            ({"codes": "odd base"}, "codes must be aligned to 16 bytes"),
            ({"channels": torch.zeros(3)}, "channels must be Int, got Float"),
            ({"channels": torch.zeros(3).int()}, "channels must be on cuda:0, got cpu"),
            ({"out": 180}, "out must be a multiple of 32 on a GPU, got 180"),
            ({"bits": 3}, "bits must be 2, 4 or 8, got 3"),
            ({"dtype": torch.float64}, "dense must be float32, float16 or bfloat16, got Double"),
        ],
    )
    def test_the_kernel_refuses(self, changed: dict[str, Any], message: str) -> None:
        out, bits = changed.get("out", 192), changed.get("bits", 4)
        codes = torch.zeros(64, 112, dtype=torch.uint8, device="cuda")
        codes = {
            "pageable": codes.cpu(),
            "narrow": codes[:, :80],
            "odd rows": torch.zeros(64, 120, dtype=torch.uint8, device="cuda"),
            "odd base": codes[:, 8:],
        }.get(changed.get("codes", ""), codes)
        scale = torch.ones(out, device="cuda")
        with pytest.raises(DecDECError, match=message):
            dequantize_residual(
                codes, scale, bits, changed.get("dtype", torch.float16), changed.get("channels")
            )

    def test_the_op_declares_what_it_does(self) -> None:
        kept = draw_residual(64, 192, 4)
        codes, scale = kept.codes.cuda(), kept.scale.cuda()  # the checks make copies, which are not pinned
        kernels.require_cuda(scale.device)
        for channels in (None, torch.arange(9, dtype=torch.int32, device="cuda")):
            rows = 64 if channels is None else 9
            dense = torch.zeros(rows, 192, dtype=torch.float16, device="cuda")
            torch.library.opcheck(
                torch.ops.decdec.dequantize_residual.default,
                (codes, scale, 4, channels, dense),
                test_utils=("test_schema", "test_faketensor"),
            )

    @pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("tokens", [9, 100, 2100])
    def test_the_layer_is_the_cpus(self, tokens: int, kind: str, dtype: torch.dtype) -> None:
        layer, x = make_layer(), draw_x(tokens, 576, dtype)
        layer.selection = selection_of(kind, 16, x)
        wanted = layer(x.float())
        assert relative_error(layer.cuda()(x.cuda()).cpu(), wanted) < TOLERANCE[dtype]

    @pytest.mark.parametrize("residual_bits", [2, 8, 16])
    @pytest.mark.parametrize("kind", ["static", "exact"])
    @pytest.mark.parametrize("tokens", [3, 9, 100])
    def test_other_residuals(self, tokens: int, kind: str, residual_bits: int) -> None:
        layer, x = make_layer(residual_bits=residual_bits), draw_x(tokens, 576, torch.float16)
        layer.selection = selection_of(kind, 16, x)
        wanted = layer(x.float())
        assert relative_error(layer.cuda()(x.cuda()).cpu(), wanted) < TOLERANCE[torch.float16]

    def test_slabs_and_parts_of_tokens(self, monkeypatch: pytest.MonkeyPatch) -> None:
        layer, x = make_layer(), draw_x(300, 576, torch.float32)
        layer.selection = selection_of("exact", 64, x)
        wanted = layer(x)
        layer.cuda()
        monkeypatch.setattr(prefill, "_DECODED_AT_ONCE", 576 * 128)
        monkeypatch.setattr(prefill, "_MASKED_AT_ONCE", 100 * 576)
        assert relative_error(layer(x.cuda()).cpu(), wanted) < TOLERANCE[torch.float32]

    def test_layers_that_share_a_stage(self) -> None:
        shapes = [(576, 1536), (1536, 2080), (2080, 576)]
        layers = torch.nn.Sequential(*(make_layer(*shape) for shape in shapes)).cuda()
        for layer in layers:
            layer.selection = Selection("exact", 64)
        inputs = [draw_x(tokens, 576, torch.float16).cuda() for tokens in (100, 2100, 300)]
        wanted = [layers(x) for x in inputs]
        torch.cuda.synchronize()
        stage = Stage()
        for layer in layers:
            layer.stage = stage
        before = torch.cuda.memory_allocated()
        for turn in range(30):
            stage.reset()
            assert torch.equal(layers(inputs[turn % 3]), wanted[turn % 3])
        assert not stage._here.ahead
        assert torch.cuda.memory_allocated() == before
        twins = copy.deepcopy(layers)
        assert torch.equal(twins(inputs[0]), wanted[0])

    def test_two_streams_share_a_stage(self) -> None:
        layers = torch.nn.Sequential(make_layer(576, 2080), make_layer(2080, 576)).cuda()
        stage = Stage()
        for layer in layers:
            layer.selection, layer.stage = Selection("exact", 64), stage
        inputs = [draw_x(500, 576, torch.float16).cuda() for _ in range(2)]
        wanted = [layers(x) for x in inputs]
        torch.cuda.synchronize()
        streams, got = [torch.cuda.Stream() for _ in inputs], []
        for turn in range(40):
            with torch.cuda.stream(streams[turn % 2]):
                got.append(layers(inputs[turn % 2]))
        torch.cuda.synchronize()
        for turn, y in enumerate(got):
            assert relative_error(y, wanted[turn % 2]) < TOLERANCE[torch.float16]

    @pytest.mark.parametrize("kind", ["static", "dynamic"])
    def test_a_graph_replayed_with_other_inputs_is_eager(self, kind: str) -> None:
        layer, x = make_layer().cuda(), draw_x(100, 576, torch.float16).cuda()
        layer.selection = selection_of(kind, 16, x)
        layer(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = layer(x)
        for _ in range(100):
            x.copy_(draw_x(100, 576, torch.float16))
            y.fill_(torch.nan)
            graph.replay()
            assert relative_error(y, layer(x)) < TOLERANCE[torch.float16]

    @pytest.mark.parametrize("kind", ["static", "dynamic"])
    @pytest.mark.parametrize("tokens", [9, 100])
    def test_compiled_whole(self, tokens: int, kind: str) -> None:
        layer, x = make_layer().cuda(), draw_x(tokens, 576, torch.float16).cuda()
        layer.selection = selection_of(kind, 16, x)
        wanted = layer(x)
        assert relative_error(torch.compile(layer, fullgraph=True)(x), wanted) < TOLERANCE[torch.float16]

    def test_the_benchmark_says_what_its_rows_are(self, tmp_path: Path) -> None:
        out = tmp_path / "prefill.json"
        options = ["--shapes", "4096,4096", "--tokens", "256", "--blocks", "2", "--json", str(out)]
        assert cli.main(["bench", "prefill", *options]) == 0
        rows = json.loads(out.read_text())["rows"]
        assert [row["selection"] for row in rows] == ["none", "static", "dynamic", "exact"]
        assert rows[0]["speed_of_none"] == 1
        assert all(row["ms_per_block"] > 0 for row in rows)
