"""RESULTS/runs/*.json -> one frame, a row per run; a file that is no run is refused in one line."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from decdec_core.config import Compensation, DecDECError, ResidualQuant, WeightQuant, require_one_of
from decdec_eval.presentation import METHOD_NAMES
from decdec_eval.runs import FORMAT_VERSION

DIAGNOSTICS = "diagnostics"
KINDS = ("perplexity", "lm_eval", "fidelity", "mt_bench", DIAGNOSTICS)
# what items hold -> the metric that is their mean
MEANS = {"nll": "mean_nll", "kl": "kl", "top1": "top1"}
FULL = "full"
# what makes two runs the same but for their seeds
CELL = ["setting", "base", "selection", "compensate", "n_tb", "axis", "level", "k_chunk", "predicted"]
_KEYS = ("configuration", "metrics", "environment")
_TOLERANCE = 1e-4


def read_runs(out: Path) -> pd.DataFrame:
    """Return one row per file of out/runs, sorted, with the columns of `row_of`.

    A folder without runs, a file that is none, and two runs of one cell and seed raise DecDECError.
    """
    rows = [row_of(path) for path in sorted((out / "runs").glob("*.json"))]
    if not rows:
        raise DecDECError(f"report must be given a folder with runs/*.json, got {out} without any")
    runs = pd.DataFrame(rows)
    for _, same in runs[runs.kind != DIAGNOSTICS].groupby([*CELL, "seed"], dropna=False):
        if len(same) > 1:
            names = " and ".join(same.file)
            raise DecDECError(
                f"runs must differ in more than versions, got two of one cell in {out / 'runs'}: {names}"
            )
    return runs.sort_values([*CELL, "seed", "file"], ignore_index=True)


def read_run(path: Path) -> dict[str, Any]:
    """Return one run; a file that is none raises DecDECError."""
    try:
        run = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise DecDECError(f"{path} must be a run's JSON file, got: {error}") from None
    version = run.get("format_version") if isinstance(run, dict) else None
    if version != FORMAT_VERSION:
        raise DecDECError(f"{path} must be a run of format_version {FORMAT_VERSION}, got {version!r}")
    for key in _KEYS:
        if not isinstance(run.get(key), dict):
            raise DecDECError(f"{path} must be a run with {key}, got {run.get(key)!r}")
    return run


def row_of(path: Path) -> dict[str, Any]:
    """Return a run's row.

    setting: what is compared with each other, as JSON: model, task, dtype and device. base: its name, "full"
    for full precision. axis: "k_chunk", a GPU's name for a slowdown on it, or "" without compensation; level:
    the number on that axis, nan where k_chunk has several. predicted: of the slowdown. metrics and items: as
    in the file. Anything missing or of the wrong kind raises DecDECError.
    """
    run = read_run(path)
    try:
        row = _row(path.name, run)
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise DecDECError(f"{path} must be a whole run, got {type(error).__name__}: {error}") from None
    except DecDECError as error:
        raise DecDECError(f"{path}: {error}") from None
    return row


def _row(file: str, run: Mapping[str, Any]) -> dict[str, Any]:
    configuration, ledger = run["configuration"], run.get("ledger") or {}
    task = configuration["task"]
    require_one_of("task kind", task["kind"], KINDS)
    setting = {key: configuration.get(key) for key in ("model", "task", "dtype", "device")}
    row = {
        "file": file,
        "setting": json.dumps(setting, sort_keys=True),
        "model": str(configuration["model"]),
        "kind": task["kind"],
        "task": str(task.get("name") or task["kind"]),
        "dtype": configuration.get("dtype"),
        "device": configuration.get("device"),
        **_base(configuration),
        **_point(configuration),
        **{
            name: ledger.get(name, math.nan)
            for name in ("bits_per_weight", "gpu_bytes", "host_bytes", "bytes_per_token")
        },
        "disk_bytes": run.get("disk_bytes", math.nan),
        "metrics": run["metrics"],
        "items": _items(run),
        "time_s": run.get("time_s", math.nan),
        "command": str(run.get("command") or ""),
        "hardware": str(run["environment"].get("hardware")),
        "commit": str(run["environment"].get("commit")),
        "versions": json.dumps(run["environment"].get("versions") or {}, sort_keys=True),
        "layers": run.get("layers"),
        "outliers": run.get("outliers"),
    }
    if task["kind"] == DIAGNOSTICS and not isinstance(row["layers"], dict):
        raise DecDECError(f"diagnostics must have layers, got {row['layers']!r}")
    return row


def _base(configuration: Mapping[str, Any]) -> dict[str, Any]:
    base = configuration.get("base")
    if base is None:
        return {"base": FULL, "method": FULL, "bits": math.nan, "artifact_hash": ""}
    weight, residual = WeightQuant.from_dict(base["weight"]), ResidualQuant.from_dict(base["residual"])
    words = [METHOD_NAMES.get(weight.method, weight.method), f"{weight.bits:g} bits"]
    if weight.format == "uniform" and weight.group_size != 128:
        words.append(f"group {weight.group_size}")
    if weight.clustering not in (None, "exact"):
        words.append(str(weight.clustering))
    if residual.bits != 4:
        words.append(f"residual {residual.bits} bits")
    calibration = base.get("calibration", "auto")
    if calibration != "auto":
        words.append(f"calibrated on {calibration}")
    return {
        "base": " ".join(words),
        "method": weight.method,
        "bits": float(weight.bits),
        "artifact_hash": str(configuration.get("artifact_hash") or ""),
    }


def _point(configuration: Mapping[str, Any]) -> dict[str, Any]:
    compensation, budget = configuration.get("compensation"), configuration.get("budget")
    if compensation is None:
        compensated, selection = Compensation("none"), FULL
    else:
        compensated = Compensation.from_dict(compensation)
        selection = compensated.selection
    row: dict[str, Any] = {
        "selection": selection,
        "compensate": compensated.compensate if compensation else "",
        "seed": compensated.seed if selection == "random" else 0,
        "n_tb": compensated.n_tb if compensation else 0,
        "k_chunk": compensated.k_chunk_text(),
        "axis": "k_chunk",
        "level": math.nan,
        "predicted": False,
        "expected_percent": math.nan,
    }
    if selection in (FULL, "none"):
        # a budget changes nothing of what is not compensated
        return {**row, "k_chunk": "", "axis": "", "n_tb": 0, "compensate": ""}
    if budget is not None:
        return {
            **row,
            "axis": str(budget["gpu"]),
            "level": float(budget["slowdown_percent"]),
            "predicted": bool(budget["predicted"]),
            "expected_percent": _number(budget.get("expected_percent")),
        }
    if len(set(compensated.k_chunk)) == 1:
        row["level"] = float(compensated.k_chunk[0])
    return row


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)


def _items(run: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return the items of a run; raise DecDECError where they are not as many as their ids, or where their
    mean is not the metric that it must be."""
    items = run.get("items")
    if items is None:
        return None
    count = len(items["ids"])
    weights = items.get("weights") or [1.0] * count
    for name, values in {**items["values"], "weights": weights}.items():
        if len(values) != count:
            raise DecDECError(f"items' {name} must be {count} like their ids, got {len(values)}")
    for name, metric in MEANS.items():
        values, wanted = items["values"].get(name), run["metrics"].get(metric)
        if values and wanted is not None:
            _require_mean(f"items' mean {name}", values, weights, wanted)
    return items


def _require_mean(which: str, values: Sequence[float], weights: Sequence[float], wanted: float) -> None:
    mean = math.fsum(v * w for v, w in zip(values, weights, strict=True)) / math.fsum(weights)
    if not math.isclose(mean, wanted, rel_tol=_TOLERANCE, abs_tol=_TOLERANCE):
        raise DecDECError(f"{which} must be the metric, {wanted:g}, got {mean:g}")
