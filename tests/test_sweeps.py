from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import save_tiny
from transformers import AutoConfig, AutoModelForCausalLM

from decdec_core.architectures import input_groups
from decdec_core.calibration import FIRST_TOKENS
from decdec_core.streaming import StreamedModel
from decdec_core.sweeps import fisher_blocks
from decdec_core.workfolder import work_folder


@pytest.mark.parametrize("architecture", ["llama", "llama-grouped-tied", "phi3"])
def test_fisher_block_by_block_is_that_of_the_whole_model(
    architecture: str, tmp_path: Path, draw: torch.Generator
) -> None:
    folder = save_tiny(architecture, tmp_path / "m")
    ids = torch.randint(0, 256, (3, 40), generator=draw)
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    wanted = {name: torch.zeros_like(p) for name, p in whole.named_parameters()}
    squares: list[torch.Tensor] = []
    handle = whole.model.layers[1].mlp.down_proj.register_forward_pre_hook(
        lambda _m, args: squares.append(args[0][:, FIRST_TOKENS:].detach().square().mean((0, 1)))
    )
    for row in ids:
        whole.zero_grad()
        F.cross_entropy(whole(row[None]).logits[0, :-1], row[1:]).backward()
        for name, parameter in whole.named_parameters():
            wanted[name] += parameter.grad.square() / len(ids)
    handle.remove()
    model = StreamedModel(folder, AutoConfig.from_pretrained(folder), torch.device("cpu"))
    seen = []
    with work_folder(tmp_path / "out", {}) as work:
        for found in fisher_blocks(model, work, ids):
            seen.append(found.index)
            names = [n for group in input_groups(model.config) for n in group.linears]
            assert found.fisher.keys() == {f"{model.blocks[found.index]}.{n}" for n in names}
            for name, fisher in found.fisher.items():
                full = wanted[f"{name}.weight"]
                # the same sums in another order
                assert torch.allclose(fisher, full, rtol=1e-3, atol=1e-4 * full.max().item()), name
            if found.index == 1:
                statistics = found.statistics["down"].mean_square
                assert torch.allclose(statistics, torch.stack(squares).mean(0), rtol=1e-4)
    assert seen == [1, 0]
