"""What optimal clustering gains over the heuristic one: the weighted error of both on a real model's rows."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch

from decdec_core import sources
from decdec_core.calibration import sequences
from decdec_core.config import CLUSTERINGS, WeightQuant
from decdec_core.quantize.awq import linear_of
from decdec_core.quantize.squeezellm import quantize_codebook, weighted_error
from decdec_core.streaming import StreamedModel
from decdec_core.sweeps import fisher_blocks
from decdec_core.texts import available_text, load_text
from decdec_core.workfolder import work_folder


def clustering_gain(
    source: str, bits: int, calibration: str, count: int, length: int, device: str = "cpu"
) -> list[dict[str, Any]]:
    """Return a row per linear layer: the Fisher-weighted squared error of its exact codebooks, summed over
    its rows, and that of the heuristic's as a multiple of it, of the sum and of the worst row.

    calibration: as in build.CalibrationSetup; count sequences of `length` tokens.
    """
    text = load_text(available_text("calibration") if calibration == "auto" else calibration, "calibration")
    token_ids = sequences(sources.load_tokenizer(source)(text.text, verbose=False).input_ids, count, length)
    folder, config = sources.model_folder(source), sources.load_config(source)
    model = StreamedModel(folder, config, torch.device(device))
    rows = []
    with tempfile.TemporaryDirectory() as temporary, work_folder(Path(temporary) / "x", {}) as work:
        for seen in fisher_blocks(model, work, token_ids):
            prefix = model.blocks[seen.index]
            for name, fisher in seen.fisher.items():
                weight = linear_of(seen.block, name.removeprefix(f"{prefix}.")).weight.data.cpu()
                errors = {}
                for clustering in CLUSTERINGS:
                    quant = WeightQuant("squeezellm", bits, clustering=clustering)
                    quantized = quantize_codebook(weight, fisher.cpu(), quant)
                    errors[clustering] = weighted_error(weight, fisher.cpu(), quantized)
                exact, heuristic = (errors[clustering] for clustering in CLUSTERINGS)
                rows.append(
                    {
                        "layer": name,
                        "bits": bits,
                        "rows": len(exact),
                        "exact_error": exact.sum().item(),
                        "flash1d_to_exact": (heuristic.sum() / exact.sum()).item(),
                        "flash1d_to_exact_mean_row": (heuristic / exact).mean().item(),
                        "flash1d_to_exact_worst_row": (heuristic / exact).max().item(),
                    }
                )
    return rows
