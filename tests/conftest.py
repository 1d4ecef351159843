"""Shared: tiny random models of every supported architecture, a random layer, and where real data is."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from decdec_core import ops
from decdec_core.build import CalibrationSetup, build_artifact
from decdec_core.config import ResidualQuant, WeightQuant, total_channels
from decdec_core.linear import DecLinear
from decdec_core.ops import Selection
from decdec_core.packing import pack_codes
from decdec_core.quantize import CodebookWeight, QuantizedWeight
from decdec_core.quantize.uniform import quantize
from decdec_core.residuals import quantize_residual

_BESIDE = Path(__file__).resolve().parents[2] / "shared" / "data"
if "DECDEC_DATA_DIR" not in os.environ and _BESIDE.is_dir():
    os.environ["DECDEC_DATA_DIR"] = str(_BESIDE)
# tests never ask a model hub: what they need is made here or lies in DECDEC_DATA_DIR
os.environ["HF_HUB_OFFLINE"] = "1"


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a test marked cuda, or cuda(2), where there are fewer GPUs."""
    for marker in item.iter_markers("cuda"):
        wanted = marker.args[0] if marker.args else 1
        if torch.cuda.device_count() < wanted:
            pytest.skip("needs a CUDA device" if wanted == 1 else f"needs {wanted} CUDA devices")


# ragged last group (160 = 128 + 32), ragged chunk (1120 = 1024 + 96), grouped queries
SIZES: dict[str, Any] = {
    "hidden_size": 160,
    "intermediate_size": 1120,
    "num_hidden_layers": 2,
    "num_attention_heads": 5,
    "num_key_value_heads": 5,
    "head_dim": 32,
    "vocab_size": 259,
    "max_position_embeddings": 4096,
    "pad_token_id": 256,
    "bos_token_id": 257,
    "eos_token_id": 258,
}
GROUPED = {**SIZES, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 128}
ARCHITECTURES = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "llama-grouped-tied": lambda: LlamaForCausalLM(LlamaConfig(**GROUPED, tie_word_embeddings=True)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**GROUPED, sliding_window=64)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**{k: v for k, v in SIZES.items() if k != "head_dim"})),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**GROUPED)),
    "phi3": lambda: Phi3ForCausalLM(Phi3Config(**{k: v for k, v in SIZES.items() if k != "head_dim"})),
    "phi3-grouped": lambda: Phi3ForCausalLM(
        Phi3Config(**{k: v for k, v in GROUPED.items() if k != "head_dim"})
    ),
}
CALIBRATION = CalibrationSetup("pydoc", sequences=4, length=64, awq_sequences=2)


def with_checkout_first() -> str:
    """Return a PYTHONPATH for a child process: this checkout, then what there was."""
    return os.pathsep.join([str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH", "")])


def tiny_model(architecture: str, seed: int = 0) -> PreTrainedModel:
    """Return a random model with outlier channels, as real ones have, and non-zero biases."""
    torch.manual_seed(seed)
    model = ARCHITECTURES[architecture]()
    for name, parameter in model.named_parameters():
        if name.endswith("layernorm.weight"):
            parameter.data[::17] *= 8
        elif name.endswith("bias"):
            parameter.data.normal_(0, 0.1)
    return model.eval()


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token per byte, 0..255, and three special ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<pad>", "<bos>", "<eos>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    )


def save_tiny(architecture: str, folder: Path) -> Path:
    """Write a tiny model and its tokenizer to `folder`."""
    tiny_model(architecture).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain Hugging Face folder of a tiny Llama."""
    return save_tiny("llama", tmp_path_factory.mktemp("plain") / "llama")


@pytest.fixture(scope="session")
def tiny_artifact_dir(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its 3-bit AWQ artifact. Shared: a test that alters it copies it first."""
    out = tmp_path_factory.mktemp("artifacts") / "llama-awq3"
    return build_artifact(str(tiny_model_dir), out, WeightQuant("awq", 3), ResidualQuant(4), CALIBRATION)


@pytest.fixture(scope="session")
def chat_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from mtbench_models import save_chat

    return save_chat(tmp_path_factory.mktemp("plain") / "chat")


@pytest.fixture(scope="session")
def chat_artifact(chat_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from mtbench_models import build_chat

    return build_chat(chat_model_dir, tmp_path_factory.mktemp("artifacts") / "chat-rtn3")


@pytest.fixture(scope="session")
def chat_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from mtbench_models import write_questions

    folder = tmp_path_factory.mktemp("data") / "mt_bench"
    write_questions(folder)
    return folder


@pytest.fixture(scope="session")
def chat_questions(chat_data: Path) -> list[Any]:
    from decdec_eval.mtbench.data import load_questions

    return load_questions(chat_data)


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real evaluation data; tests that need it skip where there is none."""
    folder = os.environ.get("DECDEC_DATA_DIR")
    if not folder or not Path(folder).is_dir():
        pytest.skip("needs DECDEC_DATA_DIR: the folder with WikiText-2, BBH and MT-Bench")
    return Path(folder)


@pytest.fixture
def draw() -> torch.Generator:
    """A seeded source of random numbers."""
    return torch.Generator().manual_seed(1234)


def quantize_to(weight: Tensor, config: WeightQuant) -> QuantizedWeight:
    """Return `weight` (out, in) in the format of `config`. Codebooks are quantiles: nothing is clustered."""
    if config.format == "uniform":
        return quantize(weight, config)
    bits = int(config.bits)
    levels = (torch.arange(2**bits) + 0.5) / 2**bits
    table = weight.quantile(levels, dim=1).T.half()
    between = (table[:, 1:].float() + table[:, :-1].float()) / 2
    codes = torch.searchsorted(between, weight).to(torch.uint8)
    return CodebookWeight(pack_codes(codes, bits), table, weight.shape[1], config)


def fill_layer(layer: DecLinear, weight: Tensor, residual_bits: int = 4) -> None:
    """Give a layer `weight` (out, in), which is of plain inputs, its residual and random extras."""
    if layer.input_order is not None:
        layer.input_order = torch.randperm(layer.in_features).int()
        weight = weight[:, layer.input_order.long()]
    if layer.input_scale is not None:
        layer.input_scale = torch.rand(layer.in_features) + 0.5
        weight = weight * layer.input_scale
    for name, tensor in quantize_to(weight, layer.config).tensors().items():
        setattr(layer, name, tensor)
    layer.residual = quantize_residual(weight - layer.dequantize(), ResidualQuant(residual_bits))


def make_layer(
    in_features: int = 576,
    out_features: int = 192,
    bits: int = 3,
    residual_bits: int = 4,
    method: str = "rtn",
    group_size: int | None = None,
    extras: Collection[str] = (),
) -> DecLinear:
    """Return a layer of random weights with its residual and a bias, on the CPU."""
    layer = DecLinear(in_features, out_features, WeightQuant(method, bits, group_size), True, extras)
    fill_layer(layer, torch.randn(out_features, in_features) * 0.05, residual_bits)
    layer.bias = torch.randn(out_features)
    return layer


def selection_of(kind: str, k_chunk: int, x: Tensor) -> Selection:
    """Return a selection with floors for x or, if static, random channels, on x's device."""
    count = total_channels(x.shape[1], k_chunk)
    if kind == "dynamic":
        largest = x.float().abs().sort(1, descending=True).values.amax(0).cpu()
        return Selection(
            kind, k_chunk, floors=ops.bucket_floors(largest[0].item(), largest[count - 1].item())
        )
    if kind == "static":
        return Selection(kind, k_chunk, indices=torch.randperm(x.shape[1])[:count].int()[None].to(x.device))
    return Selection(kind, k_chunk, seed=7)


def relative_error(got: Tensor, wanted: Tensor) -> float:
    """Return the norm of the difference over the norm of what is wanted."""
    return ((got.double() - wanted.double()).norm() / wanted.double().norm()).item()
