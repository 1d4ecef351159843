"""python -m decdec_eval.diagnostics ARTIFACT: why compensation does what it does, layer by layer.

By projection kind and k_chunk: how many of exact's channels random, static and dynamic selection find
(recall), and how much of a layer's squared output error each selection leaves. Of one layer: which channels
are outliers at each of many decoding steps. One JSON file in OUT/runs, named by what determines it; what is
there already is not measured again.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from decdec_core.artifact import Quantization
from decdec_core.budget import described
from decdec_core.calibration import FIRST_TOKENS
from decdec_core.commandline import OneLineParser, run_command
from decdec_core.config import Compensation, DecDECError, require_int, require_one_of
from decdec_core.decode import Sampling
from decdec_core.files import write_json
from decdec_core.manifest import read_manifest
from decdec_core.model import compensation_ledger, set_compensation
from decdec_core.provenance import environment, versions
from decdec_core.sources import load_tokenizer, model_files, model_folder
from decdec_core.texts import available_text, load_text
from decdec_eval.channel_errors import SELECTIONS, ChannelErrors, by_kind, by_layer, require_k_chunks
from decdec_eval.originals import Originals
from decdec_eval.outliers import middle_down, outlier_map, require_layer
from decdec_eval.perplexity import windows
from decdec_eval.presentation import line, with_error
from decdec_eval.runs import FORMAT_VERSION, path_of

LENGTH = 512  # tokens of a sequence
_TEMPERATURE = 0.7  # of the decoding steps: greedy, a small model repeats itself


class Diagnostics:
    """What is measured of one artifact, and its file. Refused options raise DecDECError before it is loaded.

    configuration: all that determines the result. path: of its file.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.folder, self.options = Path(options.artifact), options
        config, self.quantization = described(self.folder)
        manifest = read_manifest(self.folder)
        self.layer = options.layer or middle_down(manifest.layers())
        require_layer(self.layer, manifest.layers())
        require_k_chunks(options.k_chunk, (config.hidden_size, config.intermediate_size))
        require_int("seed", options.seed, 0, 2**31 - 1)
        self._require_device()
        text = load_text(available_text("test") if options.text == "auto" else options.text, "test")
        self._token_ids = load_tokenizer(str(self.folder))(text.text, verbose=False).input_ids
        self.ids = evenly(self._token_ids, options.tokens)
        require_int("prompt", options.prompt, 2, len(self._token_ids))
        require_int("steps", options.steps, 1, max(1, config.max_position_embeddings - options.prompt))
        self.source = model_folder(options.model) if options.model else None
        self.configuration = {
            "model": name_of(self.quantization),
            "base": base_of(self.quantization),
            "artifact_hash": manifest.hash,
            "model_files": None,
            "reference": None if self.source is None else model_files(self.source),
            "compensation": None,
            "budget": None,
            "dtype": "float32",
            "device": options.device,
            "task": {
                "kind": "diagnostics",
                "name": "pydoc" if text.name.startswith("pydoc") else "wikitext2",
                "version": 1,
                "data": text.name,
                "data_sha256": text.sha256,
                "limit": None,
                "tokens": options.tokens,
                "length": self.ids.shape[1],
                "skipped_tokens": FIRST_TOKENS,
                "selections": list(SELECTIONS),
                "k_chunk": sorted(set(options.k_chunk)),
                "seed": options.seed,
                "relative_to": "stored residual" if self.source is None else "full-precision weight",
                "inputs": "of the model without compensation",
                "outliers": {"layer": self.layer, "prompt": options.prompt, "steps": options.steps},
            },
            "versions": {name: value for name, value in versions().items() if name != "python"},
        }
        self.path = path_of(options.out, self.configuration)

    def _require_device(self) -> None:
        require_one_of("device", self.options.device, ("cpu", "cuda"))
        if self.options.device == "cuda" and not torch.cuda.is_available():
            raise DecDECError("device must be cpu on a machine without a CUDA device, got 'cuda'")

    def run(self, command: str) -> dict[str, Any]:
        """Return the measured result. command: what a reader would type to have it again."""
        options, start = self.options, time.perf_counter()
        model = AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32)
        model = model.eval().to(options.device)
        original = None if self.source is None else Originals(self.source, model)
        errors = ChannelErrors(model, options.k_chunk, original, options.seed)
        shares = errors.shares(self.ids, FIRST_TOKENS)
        prompt = self._token_ids[: options.prompt]
        sampling = Sampling(temperature=_TEMPERATURE, seed=options.seed)
        most = Compensation("dynamic", max(options.k_chunk), "decode", options.seed)
        outliers, tokens = outlier_map(model, self.layer, prompt, options.steps, sampling, most)
        generated = errors.shares(torch.tensor([[*prompt, *tokens]]), len(prompt))
        set_compensation(model, Compensation("none", seed=options.seed))
        quantization = json.loads((self.folder / "config.json").read_bytes())["quantization_config"]
        # which may have been a folder here
        quantization["provenance"]["source"] = self.configuration["model"]
        return {
            "format_version": FORMAT_VERSION,
            "configuration": self.configuration,
            "quantization": quantization,
            "ledger": compensation_ledger(model),
            "disk_bytes": sum(file.stat().st_size for file in self.folder.iterdir() if file.is_file()),
            "metrics": {},
            "items": {"unit": "layer", "ids": list(shares), "weights": None, "values": by_layer(shares)},
            "layers": by_kind(shares),
            "generated": {"tokens": len(tokens), "layers": by_kind(generated)},
            "outliers": outliers,
            "measured": True,
            "time_s": time.perf_counter() - start,
            "command": command,
            "environment": environment(model.device),
        }


def name_of(quantization: Quantization) -> str:
    """Return the name of the model that an artifact was built from: of a folder its last part."""
    source = str(quantization.provenance.get("source"))
    return source if source.count("/") == 1 and not source.startswith((".", "/", "~")) else Path(source).name


def base_of(quantization: Quantization) -> dict[str, Any]:
    """Return how an artifact was quantized, as a sweep says it: calibration on WikiText-2 is "auto"."""
    text = str((quantization.provenance.get("calibration") or {}).get("text", "auto"))
    known = {"wikitext-2": "auto", "pydoc": "pydoc"}
    return {
        "weight": quantization.weight.to_dict(),
        "residual": quantization.residual.to_dict(),
        "calibration": next((name for start, name in known.items() if text.startswith(start)), text),
    }


def evenly(token_ids: Sequence[int], tokens: int) -> torch.Tensor:
    """Return (sequences, at most 512) int64 with `tokens` tokens together, spread evenly over the text.

    Raises DecDECError for a number that is not up to 512 or a multiple of it, for so few tokens that none is
    measured, and for a text that is too short.
    """
    length = min(LENGTH, tokens)
    if length <= FIRST_TOKENS or tokens % length:
        raise DecDECError(
            f"tokens must be {FIRST_TOKENS + 1}..{LENGTH} or a multiple of {LENGTH}, got {tokens}"
        )
    count, found = tokens // length, windows(token_ids, length)
    if len(found) < count:
        raise DecDECError(f"tokens must be at most {len(found) * length} with this text, got {tokens}")
    return torch.tensor([found[i * len(found) // count] for i in range(count)])


def table(run: dict[str, Any]) -> str:
    """Return the Markdown table of a result, a row for each projection kind and k_chunk, with its caption."""
    task, layers = run["configuration"]["task"], run["layers"]
    head = ["layers", "k_chunk", *(f"recall, {kind}" for kind in SELECTIONS[:-1])]
    head += [*(f"energy left, {kind}" for kind in SELECTIONS), "all channels"]
    lines = [line(head), line(["---"] * len(head))]
    for kind, values in layers.items():
        for k_chunk in map(str, task["k_chunk"]):
            found = [values["recall"][selection][k_chunk] for selection in SELECTIONS[:-1]]
            found += [values["energy_left"][selection][k_chunk] for selection in SELECTIONS]
            numbers = [with_error(*pair) for pair in [*found, values["floor"]]]
            lines.append(line([kind, k_chunk, *numbers]))
    return "\n".join([caption(run), "", *lines, "", outliers_text(run["outliers"])])


def caption(run: dict[str, Any]) -> str:
    """Return the sentences that say what the table is of."""
    configuration, task = run["configuration"], run["configuration"]["task"]
    weight, residual = (configuration["base"][name] for name in ("weight", "residual"))
    return (
        f"{configuration['model']}, {weight['method'].upper()} {weight['bits']}-bit, {residual['bits']}-bit "
        f"residual; {task['tokens']} tokens of {task['data']}, the first {task['skipped_tokens']} of each "
        f"{task['length']} left out; inputs {task['inputs']}. Means over layers ± standard error over "
        f"layers. Recall: share of the channels of exact selection. Energy left: squared output error as a "
        f"share of that without compensation, relative to the {task['relative_to']}; none leaves 1. "
        f"{run['environment']['hardware']}."
    )


def outliers_text(outliers: dict[str, Any]) -> str:
    """Return what the map of outliers comes to, in a sentence."""
    count = len(outliers["top"][0])
    return (
        f"{outliers['layer']}, {outliers['steps']} decoding steps: {outliers['persistent_share']:.1%} of a "
        f"step's {count} largest of {outliers['in_features']} channels are among calibration's {count} "
        f"largest; all steps together have {outliers['distinct']} different ones."
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; a refused input prints one line to standard error and returns 2."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    parser = _parser()
    options, unknown = parser.parse_known_args(given)
    parser.refuse(unknown)
    command = shlex.join(["python", "-m", "decdec_eval.diagnostics", *given])
    return run_command(lambda: _diagnose(options, command), resumes=False)


def _diagnose(options: argparse.Namespace, command: str) -> None:
    diagnostics = Diagnostics(options)
    if diagnostics.path.is_file():
        print(f"kept from {diagnostics.path}", flush=True)
    else:
        diagnostics.path.parent.mkdir(parents=True, exist_ok=True)
        write_json(diagnostics.path, diagnostics.run(command))
    print(table(json.loads(diagnostics.path.read_text("utf-8"))))
    print(f"\nwritten: {diagnostics.path}")


def _parser() -> OneLineParser:
    parser = OneLineParser(prog="python -m decdec_eval.diagnostics", description=__doc__)
    parser.add_argument("artifact", metavar="ARTIFACT", help="the folder of an artifact")
    parser.add_argument(
        "--model", help="the full-precision model it was built from; without it, errors are of the residual"
    )
    parser.add_argument("--k-chunk", nargs="+", type=int, default=[4, 8, 16, 32, 64], metavar="K")
    parser.add_argument("--text", default="auto", help="the text to read: wikitext2 or pydoc")
    parser.add_argument("--tokens", type=int, default=4096, help="of the text (default 4096)")
    parser.add_argument("--steps", type=int, default=100, help="decoding steps of the map of outliers")
    parser.add_argument("--prompt", type=int, default=128, help="tokens before them, the text's first")
    parser.add_argument("--layer", metavar="NAME", help="of that map (default the middle down projection)")
    parser.add_argument("--seed", type=int, default=0, help="of random selection, and of the decoded tokens")
    parser.add_argument("--device", default="cpu", help="cpu (the default) or cuda")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    return parser


if __name__ == "__main__":
    sys.exit(main())
