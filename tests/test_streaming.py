"""A model whose blocks come from disk one at a time computes what the whole one computes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import ARCHITECTURES, save_tiny, tiny_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from decdec_core.config import DecDECError
from decdec_core.shards import TensorFileError
from decdec_core.streaming import StreamedModel

CPU = torch.device("cpu")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.no_grad()
def test_blocks_one_by_one_give_what_the_model_gives(
    architecture: str, tmp_path: Path, draw: torch.Generator
) -> None:
    whole = tiny_model(architecture)
    whole.save_pretrained(tmp_path, max_shard_size="300KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    model = StreamedModel(tmp_path, AutoConfig.from_pretrained(tmp_path), CPU)
    ids = torch.randint(0, 256, (3, 100), generator=draw)  # longer than mistral's window of 64
    wanted = whole(ids, output_hidden_states=True)
    hidden = torch.cat(list(model.embed(ids)))
    for index in range(len(model.blocks)):
        assert torch.equal(hidden, wanted.hidden_states[index])
        with model.block(index) as block:
            hidden = model.run(index, block, hidden, batch=2)
    with model.head() as head:
        assert torch.allclose(head(hidden), wanted.logits, atol=1e-5)
    plain = set(model.plain_names())
    assert model.embedding_name in plain
    assert ("lm_head.weight" in plain) == (not whole.config.tie_word_embeddings)


def test_a_block_is_gone_when_its_turn_is_over(tiny_model_dir: Path) -> None:
    model = StreamedModel(tiny_model_dir, AutoConfig.from_pretrained(tiny_model_dir), CPU)
    with model.block(1) as block:
        assert all(p.device == CPU and p.dtype == torch.float32 for p in block.parameters())
    assert all(p.is_meta for p in block.parameters())
    assert all(p.is_meta for p in model.model.parameters())


def test_files_that_are_not_the_model_are_named(tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path)
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    save_file({**tensors, name: torch.ones(3, 4)}, folder / "model.safetensors", metadata={"format": "pt"})
    model = StreamedModel(folder, AutoConfig.from_pretrained(folder), CPU)
    with (
        pytest.raises(DecDECError, match=r"up_proj\.weight must be \(1120, 160\) by the model's config"),
        model.block(1),
    ):
        pass
    del tensors[name]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    model = StreamedModel(folder, AutoConfig.from_pretrained(folder), CPU)
    with (
        pytest.raises(TensorFileError, match=r"tensor model\.layers\.1\.mlp\.up_proj\.weight must be in"),
        model.block(1),
    ):
        pass
    (folder / "model.safetensors").unlink()
    with pytest.raises(
        TensorFileError, match=r"must hold model\.safetensors or model\.safetensors\.index\.json"
    ):
        StreamedModel(folder, AutoConfig.from_pretrained(folder), CPU)
