"""Plausible run files of a sweep and of diagnostics, made up: for tests of the report only."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from decdec_core.config import PROJECTION_KINDS, Compensation, ResidualQuant, WeightQuant

COMMAND = "python -m decdec_eval.sweep smollm2.yaml --out results"
BITS_LOSS = {3: 0.8, 3.5: 0.35, 4: 0.1}
METHOD_LOSS = {"rtn": 1.5, "awq": 1.0, "squeezellm": 0.8}
GAIN = {"none": 0.0, "random": 0.05, "static": 0.45, "dynamic": 1.0, "exact": 1.01}
TASKS: dict[str, dict[str, Any]] = {
    "perplexity": {"kind": "perplexity", "name": "wikitext2", "data_sha256": "ab" * 32, "limit": None},
    "bbh": {"kind": "lm_eval", "name": "decdec_bbh_mini", "version": "1", "limit": None},
    "fidelity": {"kind": "fidelity", "name": "mt_bench", "reference": "full", "limit": None},
    "mt_bench": {"kind": "mt_bench", "name": "mt_bench", "judge": "a-judge", "limit": None},
}
VERSIONS = {"decdec_eval": "0.1.0", "torch": "2.11.0", "transformers": "5.17.0", "lm_eval": "0.4.13"}


@dataclass(frozen=True)
class Budget:
    gpu: str
    slowdown_percent: float
    predicted: bool

    def to_dict(self) -> dict[str, Any]:
        return {
            "slowdown_percent": self.slowdown_percent,
            "gpu": self.gpu,
            "predicted": self.predicted,
            "expected_percent": round(0.93 * self.slowdown_percent, 2),
        }


def write_grid(
    out: Path,
    bases: Sequence[tuple[str, float]] = (("awq", 3), ("awq", 3.5), ("awq", 4)),
    k_chunks: Sequence[int] = (8, 16, 64),
    budgets: Sequence[Budget] = (),
    tasks: Sequence[str] = ("perplexity",),
    seeds: int = 3,
    items: int = 20,
) -> None:
    """Write out/runs/*.json of a whole grid."""
    for task in tasks:
        write_run(out, run(task, None, None, None, items))
        for base in bases:
            write_run(out, run(task, base, Compensation("none"), None, items))
            for selection in ("random", "static", "dynamic", "exact"):
                for seed in range(seeds if selection == "random" else 1):
                    for k_chunk, budget in _points(k_chunks, budgets):
                        compensation = Compensation(selection, k_chunk, seed=seed)
                        write_run(out, run(task, base, compensation, budget, items))


def _points(k_chunks: Sequence[int], budgets: Sequence[Budget]) -> Iterator[tuple[str, Budget | None]]:
    for k_chunk in k_chunks:
        yield str(k_chunk), None
    for budget in budgets:
        down = max(1, round(3 * budget.slowdown_percent * (0.5 if budget.predicted else 1)))
        yield f"{down}/{down}/{2 * down}/{2 * down}", budget


def run(
    task: str,
    base: tuple[str, float] | None,
    compensation: Compensation | None,
    budget: Budget | None,
    items: int = 20,
) -> dict[str, Any]:
    """Return one made-up run."""
    loss = _loss(base, compensation)
    quantization = None
    if base:
        method, bits = base
        quantization = {
            "weight": WeightQuant(method, bits).to_dict(),
            "residual": ResidualQuant(4).to_dict(),
            "calibration": "auto",
        }
    configuration = {
        "model": "smollm2",
        "base": quantization,
        "artifact_hash": hashlib.sha256(str(base).encode()).hexdigest() if base else None,
        "model_files": None if base else {"model.safetensors": "cd" * 32},
        "compensation": compensation.to_dict() if compensation else None,
        "budget": budget.to_dict() if budget else None,
        "dtype": "float32",
        "device": "cuda",
        "task": dict(TASKS[task]),
        "versions": VERSIONS,
    }
    metrics, values = _MEASURED[task](loss, compensation, items)
    return {
        "format_version": 1,
        "configuration": configuration,
        "quantization": quantization,
        "ledger": _ledger(base, compensation) if base else None,
        "disk_bytes": 150_000_000,
        "metrics": metrics,
        "items": values,
        "measured": True,
        "time_s": 12.5,
        "command": COMMAND,
        "environment": {"versions": VERSIONS, "hardware": "NVIDIA H200", "commit": "0123456789ab"},
    }


def _loss(base: tuple[str, float] | None, compensation: Compensation | None) -> float:
    """Return the nats that quantization costs after compensation."""
    if base is None or compensation is None:
        return 0.0
    lost = BITS_LOSS[base[1]] * METHOD_LOSS[base[0]]
    share = GAIN[compensation.selection] * math.log2(1 + sum(compensation.k_chunk) / 32) * 0.17
    return lost * (1 - share)


def _draw(name: str, loss: float, compensation: Compensation | None) -> np.random.Generator:
    seed = compensation.seed if compensation else 0
    return np.random.default_rng([*name.encode(), round(loss * 1e6), seed])


def _perplexity(loss: float, compensation: Compensation | None, items: int) -> tuple[dict, dict]:
    text = np.random.default_rng(1).normal(3.0, 0.3, items)
    draw = _draw("nll", loss, compensation)
    nll = text + loss + draw.normal(0, 0.02 * (1 + loss), items) * (loss > 0)
    kl = loss * np.exp(np.random.default_rng(2).normal(0, 0.1, items))
    noise = _draw("top1", loss, compensation).normal(0, 0.01, items) * (loss > 0)
    top1 = np.clip(1 - 0.35 * loss + noise, 0, 1)
    metrics = {"mean_nll": _mean(nll), "kl": _mean(kl), "top1": _mean(top1)}
    metrics["token_perplexity"] = (math.exp(metrics["mean_nll"][0]), math.nan)
    metrics["token_perplexity"] = tuple(
        math.exp(metrics["mean_nll"][0]) * x for x in (1, metrics["mean_nll"][1])
    )
    return _flat(metrics), _items("window", items, {"nll": nll, "kl": kl, "top1": top1})


def _bbh(loss: float, compensation: Compensation | None, items: int) -> tuple[dict, dict]:
    hard = np.random.default_rng(4).uniform(0, 1, items * 6)
    right = (hard < 0.34 * math.exp(-0.7 * loss)).astype(float)
    flips = _draw("bbh", loss, compensation).uniform(size=len(hard)) < 0.02 * (loss > 0)
    right = np.where(flips, 1 - right, right)
    metrics = _flat({"exact_match": _mean(right)})
    metrics["groups"] = {"decdec_bbh_mini_navigate": {"exact_match": 0.5, "exact_match_stderr": 0.1}}
    return metrics, _items("question", len(hard), {"exact_match": right})


def _fidelity(loss: float, compensation: Compensation | None, items: int) -> tuple[dict, dict]:
    weights = np.random.default_rng(5).integers(100, 2000, items).astype(float)
    kl = loss * 0.6 * np.exp(_draw("kl", loss, compensation).normal(0, 0.3, items))
    noise = _draw("same", loss, compensation).normal(0, 0.02, items) * (loss > 0)
    top1 = np.clip(1 - 0.18 * loss + noise, 0, 1)
    metrics = _flat({"kl": _mean(kl, weights), "top1": _mean(top1, weights)})
    return metrics, _items("conversation", items, {"kl": kl, "top1": top1}, weights)


def _mt_bench(loss: float, compensation: Compensation | None, items: int) -> tuple[dict, dict]:
    score = np.clip(np.round(np.random.default_rng(8).normal(4 - 2 * loss, 1.5, items), 1), 1, 10)
    return _flat({"score": _mean(score)}) | {"unrated": 0}, _items("question", items, {"score": score})


_MEASURED = {"perplexity": _perplexity, "bbh": _bbh, "fidelity": _fidelity, "mt_bench": _mt_bench}


def _mean(values: np.ndarray, weights: np.ndarray | None = None) -> tuple[float, float]:
    mean = float(np.average(values, weights=weights))
    return mean, float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan


def _flat(metrics: dict[str, tuple[float, float]]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, (value, error) in metrics.items():
        flat |= {name: value, f"{name}_stderr": error}
    return flat


def _items(unit: str, count: int, values: dict[str, np.ndarray], weights: np.ndarray | None = None) -> dict:
    return {
        "unit": unit,
        "ids": list(range(count)),
        "weights": None if weights is None else weights.tolist(),
        "values": {name: each.tolist() for name, each in values.items()},
    }


def _ledger(base: tuple[str, float], compensation: Compensation | None) -> dict[str, Any]:
    bits = base[1] + 0.2
    k = sum(compensation.k_chunk) / 4 if compensation else 0
    return {
        "bits_per_weight": bits,
        "gpu_bytes": round(57e6 + bits * 106e6 / 8),
        "host_bytes": 53_706_240,
        "bytes_per_token": round(51_840 * k),
    }


def diagnostics(k_chunks: Sequence[int] = (4, 8, 16, 32, 64), steps: int = 100) -> dict[str, Any]:
    """Return a made-up run of diagnostics."""
    layers = {}
    for number, kind in enumerate(PROJECTION_KINDS):
        recall, energy = {}, {}
        for selection, level in {"random": 0.0, "static": 0.3, "dynamic": 0.86, "exact": 1.0}.items():
            best = {k: 0.1 * (number + 1) * math.log2(1 + k) * (0.1 + 0.9 * level) * 0.4 for k in k_chunks}
            energy[selection] = {str(k): [1 - best[k], 0.01] for k in k_chunks}
            if selection != "exact":
                recall[selection] = {str(k): [min(1, level + 0.02 * math.log2(k)), 0.01] for k in k_chunks}
        layers[kind] = {"recall": recall, "energy_left": energy}
    draw = np.random.default_rng(9)
    persistent = [7, 311, 640, 903, 1200, 1411]
    top = [
        sorted({*draw.choice(persistent, 4, replace=False).tolist(), *draw.integers(0, 1536, 11).tolist()})
        for _ in range(steps)
    ]
    made = run("perplexity", ("awq", 3), None, None)
    made["configuration"]["task"] = {"kind": "diagnostics", "name": "wikitext2", "tokens": 4096}
    made["metrics"], made["items"] = {}, None
    made["layers"] = layers
    made["outliers"] = {
        "layer": "model.layers.15.mlp.down_proj",
        "steps": steps,
        "in_features": 1536,
        "top": top,
        "persistent_share": 0.27,
    }
    return made


def write_run(out: Path, made: dict[str, Any]) -> Path:
    """Write one run to out/runs under the name that its configuration gives it; return its path."""
    (out / "runs").mkdir(parents=True, exist_ok=True)
    text = json.dumps(made["configuration"], sort_keys=True)
    path = out / "runs" / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"
    path.write_text(json.dumps(made, indent=1) + "\n", "utf-8")
    return path


def write_all(out: Path) -> None:
    """Write what `smollm2.yaml` and diagnostics would: several bases, budgets measured and predicted."""
    measured = [Budget("h200", s, False) for s in (2.5, 5.0, 10.0, 20.0)]
    predicted = [Budget("rtx-4050-mobile", s, True) for s in (2.5, 5.0, 10.0, 20.0)]
    write_grid(
        out,
        bases=[(method, bits) for method in ("awq", "squeezellm") for bits in (3, 3.5, 4)],
        k_chunks=(8, 16, 32, 64),
        budgets=[*measured, *predicted],
        tasks=("perplexity", "bbh", "fidelity"),
    )
    write_run(out, diagnostics())
