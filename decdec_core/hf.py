"""The transformers quantizer "decdec": AutoModelForCausalLM.from_pretrained(DIR) verifies and loads.

transformers itself only warns about missing, extra or altered tensors; the whole folder is therefore verified
before it opens a file. The residual never enters the model's state dict.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from torch import nn
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils import cached_file
from transformers.utils.quantization_config import QuantizationConfigMixin

from decdec_core.architectures import require_supported
from decdec_core.artifact import Quantization, is_host_tensor, load_host_tensors
from decdec_core.config import Compensation, DecDECError
from decdec_core.errors import ArtifactError, ConfigError
from decdec_core.manifest import (
    CONFIG,
    HOST_STEM,
    MANIFEST,
    MODEL_STEM,
    QUANT_METHOD,
    Manifest,
    read_manifest,
)
from decdec_core.model import attach, dec_layers, replace_linears
from decdec_core.saving import save_pretrained
from decdec_core.verify import require_same_tensors, verify


@register_quantization_config(QUANT_METHOD)
class DecDECConfig(QuantizationConfigMixin):
    """config.json's quantization_config as it stands there: artifact.Quantization says what it holds. It is
    made before the folder is verified, and so refuses nothing."""

    def __init__(self, **values: Any) -> None:
        self.quant_method = QUANT_METHOD  # type: ignore[assignment]  # transformers takes any string
        self.values = copy.deepcopy({**values, "quant_method": QUANT_METHOD})

    def to_dict(self) -> dict[str, Any]:
        return copy.deepcopy(self.values)


@register_quantizer(QUANT_METHOD)
class DecDECQuantizer(HfQuantizer):
    """Puts DecLinear where the artifact has quantized layers, and gives each its residual."""

    requires_calibration = True
    quantization_config: DecDECConfig
    folder: Path | None = None
    manifest: Manifest
    quantization: Quantization

    # the hook that is given the config before weight files are looked for, in transformers 5.23 and in 5.17

    def update_attn_implementation(self, config: Any) -> Any:
        return self._verified_and_named(config)

    def update_tp_plan(self, config: Any) -> Any:
        return self._verified_and_named(config)

    def _verified_and_named(self, config: Any) -> Any:
        """Verify a local artifact and tell transformers the name of its weights."""
        name = str(config.name_or_path or "")
        if Path(name).is_dir() and name:
            self._verify(Path(name))
        config.transformers_weights = Quantization.from_dict(self.quantization_config.values).weights_file
        return config

    def _verify(self, folder: Path) -> None:
        with torch.device("cpu"):  # transformers may be making the model, with the meta device as default
            self.folder, self.manifest = folder, verify(folder)
        stored = json.loads((folder / CONFIG).read_bytes())["quantization_config"]
        if stored != self.quantization_config.values:
            raise ConfigError(f"quantization_config must be that of {folder}, got another")
        self.quantization = Quantization.from_dict(stored)

    def validate_environment(self, *_args: Any, device_map: Any = None, **_kwargs: Any) -> None:
        """Refuse what would move a layer's weight behind its back: to a disk, or from the CPU to a GPU."""
        if isinstance(device_map, dict):
            places = {str(place) for place in device_map.values()}
            if "disk" in places or ("cpu" in places and len(places) > 1):
                raise DecDECError(
                    "device_map must place a decdec model on GPUs or on the CPU, without offloading, "
                    f"got {', '.join(sorted(places))}"
                )

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        config: Any = model.config
        require_supported(config)
        if getattr(config, "distributed_config", None) is not None:
            raise DecDECError("a decdec model must be loaded without tensor parallelism, got a plan for it")
        self._take(str(config.name_or_path), kwargs.get("checkpoint_files") or [])
        replace_linears(model, self.quantization.weight, self.manifest.layers(), self.quantization.block_bits)
        tied = set(getattr(model, "all_tied_weights_keys", None) or {})
        wanted = {name: t.shape for name, t in model.state_dict().items() if name not in tied}
        entries = self.manifest.tensors.items()
        stored = {name: entry["shape"] for name, entry in entries if not is_host_tensor(name)}
        require_same_tensors(str(self.folder), wanted, stored)
        return model

    def _take(self, name: str, checkpoint_files: list[str]) -> None:
        """Verify what is not yet: a hub's artifact, and one whose class was named instead of AutoModel, which
        gives the config no path. Refuse files of another folder."""
        parents = {Path(file).parent for file in checkpoint_files}
        if len(parents) != 1:
            raise ArtifactError(f"artifact {name} must be loaded from one folder, got {len(parents)}")
        folder = parents.pop()
        if self.folder is None:
            self._verify(folder if Path(name).is_dir() else _fetched(name, folder))
        assert self.folder is not None
        found = sorted(Path(file).name for file in checkpoint_files)
        wanted = self.manifest.shards(MODEL_STEM)
        if folder.resolve() != self.folder.resolve() or found != wanted:
            raise ArtifactError(
                f"artifact {name} must be loaded from {', '.join(wanted)} in {self.folder}, "
                f"got {', '.join(found)} in {folder}"
            )

    def _process_model_after_weight_loading(self, model: nn.Module, **_kwargs: Any) -> nn.Module:
        assert self.folder is not None
        kept = load_host_tensors(self.folder, self.manifest, self.quantization.residual)
        for name, layer in dec_layers(model).items():
            layer.residual, layer.statistics = kept[name]
            if layer.codes.is_cuda:
                layer.prepare_for_gpu()
        attach(model, Compensation(), self.manifest.hash)
        # transformers' own would leave the residual out; a copy of the model gets a method of its own
        model.save_pretrained = MethodType(save_pretrained, model)  # type: ignore[assignment]
        return model

    def is_serializable(self, *_args: Any, **_kwargs: Any) -> bool:
        """False: of transformers' own save_pretrained, in whose place the loaded model has another."""
        return False

    @property
    def is_trainable(self) -> bool:
        return False


def _fetched(name: str, snapshot: Path) -> Path:
    """Return the folder of an artifact from a hub, where transformers leaves only the weights, complete."""
    # CACHE/models--ORG--NAME/snapshots/COMMIT: the rest has to land beside the weights
    if snapshot.parent.name != "snapshots":
        raise ArtifactError(f"artifact {name} must be the whole of a repository, got {snapshot}")
    where = {"revision": snapshot.name, "cache_dir": snapshot.parents[2]}
    cached_file(name, MANIFEST, **where)
    manifest = read_manifest(snapshot)
    for file in (*manifest.shards(HOST_STEM), *manifest.files):
        cached_file(name, file, **where)
    return snapshot
