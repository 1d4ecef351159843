"""decdec_wikitext2 through lm-eval's evaluator, against the same arithmetic without it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager
from lm_eval.utils import simple_parse_args_string
from transformers import AutoModelForCausalLM, AutoTokenizer

from decdec_core.config import Compensation, DecDECError
from decdec_core.dense import write_dense
from decdec_core.model import set_compensation
from decdec_core.texts import load_text
from decdec_eval import plugin
from decdec_eval.lm_model import DecDECLM
from decdec_eval.perplexity import summary, window_nll, windows

TASK = "decdec_wikitext2"
pytestmark = pytest.mark.usefixtures("data_dir")


@pytest.fixture(autouse=True)
def installed() -> None:
    plugin.install()


def evaluate(model: str, model_args: dict[str, Any] | str, **options: Any) -> dict[str, Any]:
    """Return lm-eval's results of the task, indexing this package's tasks only: lm-eval's take seconds."""
    metadata = simple_parse_args_string(model_args) if isinstance(model_args, str) else model_args
    manager = TaskManager(include_path=plugin.tasks_folder(), include_defaults=False, metadata=metadata)
    arguments = {"tasks": [TASK], "task_manager": manager, "device": "cpu", "limit": 2, **options}
    return simple_evaluate(model=model, model_args=model_args, **arguments)


def expected(model: Any, folder: Path, count: int = 2) -> dict[str, Any]:
    token_ids = AutoTokenizer.from_pretrained(folder)(load_text("wikitext2").text, verbose=False).input_ids
    return summary(window_nll(model, windows(token_ids)[:count], progress=False))


def test_decdec(tiny_artifact_dir: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_artifact_dir)
    set_compensation(model, Compensation("static", 32))
    wanted = expected(model, tiny_artifact_dir)
    results = evaluate("decdec", {"pretrained": str(tiny_artifact_dir), "selection": "static", "k_chunk": 32})
    got = results["results"][TASK]
    assert got["mean_nll,none"] == pytest.approx(wanted["mean_nll"], abs=1e-12)
    assert got["mean_nll_stderr,none"] == pytest.approx(wanted["mean_nll_stderr"])
    assert got["token_perplexity,none"] == pytest.approx(wanted["token_perplexity"])
    # lm-eval bootstraps perplexity, which divides by n where the summary divides by n - 1
    assert got["token_perplexity_stderr,none"] == pytest.approx(
        wanted["token_perplexity_stderr"] / 2**0.5, rel=0.05
    )
    assert results["n-samples"][TASK]["effective"] == 2
    assert results["config"]["decdec"]["selection"] == "static"
    stated = results["configs"][TASK]["metadata"]
    assert stated["text"] == "wikitext-2-raw-v1 test"
    assert stated["windows"] == results["n-samples"][TASK]["original"]
    samples = results["samples"][TASK]
    assert [sample["doc"]["window"] for sample in samples] == [0, 1]
    assert len(json.loads(json.dumps(samples[1]))["doc"]["token_ids"]) == 2048


def test_hf_scores_the_dequantized_model_alike(tiny_artifact_dir: Path, tmp_path: Path) -> None:
    dense = write_dense(tiny_artifact_dir, tmp_path / "dense")
    got = [
        evaluate(model, f"pretrained={folder},dtype=float32{more}", limit=1)["results"][TASK]["mean_nll,none"]
        for model, folder, more in (("hf", dense, ""), ("decdec", tiny_artifact_dir, ",selection=none"))
    ]
    # the same float32 weights, multiplied in another order where an input scale is kept
    assert got[1] == pytest.approx(got[0], rel=1e-6)
    compensated = f"pretrained={tiny_artifact_dir},dtype=float32,selection=exact"
    other = evaluate("decdec", compensated, limit=1)["results"][TASK]["mean_nll,none"]
    assert abs(other - got[0]) > 100 * abs(got[1] - got[0])


def test_likelihood_under_decode_is_refused_before_any_request(
    tiny_artifact_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(DecDECLM, "token_windows", lambda _lm, requests: asked.append("token_windows"))
    with pytest.raises(DecDECError, match="compensate must be auto or all for a likelihood request"):
        evaluate("decdec", f"pretrained={tiny_artifact_dir},compensate=decode", limit=1)
    assert asked == []


def test_hf_scores_the_same_windows(tiny_model_dir: Path) -> None:
    wanted = expected(AutoModelForCausalLM.from_pretrained(tiny_model_dir), tiny_model_dir, count=1)
    for model, arguments in (("hf", {}), ("decdec", {"method": "full"})):
        results = evaluate(model, {"pretrained": str(tiny_model_dir), **arguments}, limit=1)
        assert results["results"][TASK]["mean_nll,none"] == pytest.approx(wanted["mean_nll"], abs=1e-12)
        assert results["results"][TASK]["token_perplexity_stderr,none"] == "N/A"


def test_another_model_type_is_refused(tiny_model_dir: Path) -> None:
    with pytest.raises(DecDECError, match=r"token windows must be scored by --model decdec .*, got DummyLM"):
        evaluate("dummy", {"pretrained": str(tiny_model_dir)})


def test_a_context_shorter_than_a_window_is_refused(tiny_model_dir: Path) -> None:
    with pytest.raises(DecDECError, match="max_length must be at least 2048 for token windows, got 1024"):
        evaluate("decdec", {"pretrained": str(tiny_model_dir), "method": "full", "max_length": 1024})


def test_without_model_args_the_tokenizer_is_unknown() -> None:
    with pytest.raises(DecDECError, match=r"must know the tokenizer from model_args or .*, got None"):
        evaluate("dummy", {})


def test_request_cache_is_refused(tiny_model_dir: Path) -> None:
    with pytest.raises(DecDECError, match="cache_requests must be off for decdec_wikitext2"):
        evaluate("decdec", {"pretrained": str(tiny_model_dir), "method": "full"}, cache_requests=True)
