"""The transformers quantizer "decdec": AutoModelForCausalLM.from_pretrained(DIR) verifies and loads.

transformers itself only warns about missing, extra or altered tensors; the manifest is therefore checked
before a byte is loaded. The residual never enters the model's state dict.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils import cached_file
from transformers.utils.quantization_config import QuantizationConfigMixin

from decdec_core.architectures import require_supported
from decdec_core.artifact import (
    MANIFEST,
    MODEL_FILE,
    QUANT_METHOD,
    RESIDUAL_FILE,
    ArtifactError,
    Manifest,
    load_host_tensors,
    read_manifest,
    require_format_version,
    verify,
)
from decdec_core.config import Compensation, ResidualQuant, WeightQuant
from decdec_core.model import attach, dec_layers, replace_linears


@register_quantization_config(QUANT_METHOD)
class DecDECConfig(QuantizationConfigMixin):
    """config.json's quantization_config. weight, residual: WeightQuant and ResidualQuant as dictionaries.
    provenance: what the artifact was built from."""

    def __init__(
        self,
        format_version: int,
        weight: dict[str, Any],
        residual: dict[str, Any],
        provenance: dict[str, Any] | None = None,
        quant_method: str = QUANT_METHOD,
    ) -> None:
        require_format_version(format_version)
        self.quant_method = quant_method  # type: ignore[assignment]  # transformers takes any string
        self.format_version = format_version
        self.weight = WeightQuant.from_dict(weight).to_dict()
        self.residual = ResidualQuant.from_dict(residual).to_dict()
        self.provenance = provenance or {}


@register_quantizer(QUANT_METHOD)
class DecDECQuantizer(HfQuantizer):
    """Puts DecLinear where the artifact has quantized layers, and gives each its residual."""

    requires_calibration = True
    quantization_config: DecDECConfig

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        require_supported(model.config)
        self._folder = _artifact_folder(model, kwargs.get("checkpoint_files"))
        self._manifest = verify(self._folder)
        weight_quant = WeightQuant.from_dict(self.quantization_config.weight)
        replace_linears(model, weight_quant, self._manifest.layers())
        _require_same_tensors(model, self._manifest)
        return model

    def _process_model_after_weight_loading(self, model: nn.Module, **_kwargs: Any) -> nn.Module:
        residual_quant = ResidualQuant.from_dict(self.quantization_config.residual)
        kept = load_host_tensors(self._folder, self._manifest, residual_quant)
        for name, layer in dec_layers(model).items():
            layer.residual, layer.statistics = kept[name]
            if layer.codes.is_cuda:
                layer.prepare_for_gpu()
        attach(model, Compensation(), self._manifest.hash)
        return model

    def is_serializable(self, *_args: Any, **_kwargs: Any) -> bool:
        """False: save_pretrained would leave the residual out. Copy the artifact's folder instead."""
        return False

    @property
    def is_trainable(self) -> bool:
        return False


def _artifact_folder(model: nn.Module, checkpoint_files: list[str] | None) -> Path:
    """Return the artifact's local folder; from a hub, fetch what transformers itself leaves there."""
    config: Any = model.config
    name = str(config.name_or_path)
    if not checkpoint_files:
        raise ArtifactError(f"artifact {name} must have weight files, got none")
    found = [Path(file).name for file in checkpoint_files]
    if found != [MODEL_FILE]:
        raise ArtifactError(f"artifact {name} must be loaded from {MODEL_FILE}, got {', '.join(found)}")
    folder = Path(checkpoint_files[0]).parent
    if not Path(name).is_dir():
        # CACHE/models--ORG--NAME/snapshots/COMMIT: the rest has to land beside the weights
        where = {"revision": getattr(config, "_commit_hash", None), "cache_dir": folder.parents[2]}
        cached_file(name, MANIFEST, **where)
        for file in (RESIDUAL_FILE, *read_manifest(folder).files):
            cached_file(name, file, **where)
    return folder


def _require_same_tensors(model: nn.Module, manifest: Manifest) -> None:
    """Raise ArtifactError unless the manifest holds exactly what the model will load."""
    host_only = (
        *(".residual.codes", ".residual.scale"),
        *(".calibration.rank_max", ".calibration.mean_square", ".calibration.mean"),
    )
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    for layer in manifest.layers():
        for suffix in host_only:
            if f"{layer}{suffix}" not in manifest.tensors:
                raise ArtifactError(f"tensor {layer}{suffix} must be in the artifact, got none")
    wanted = {name: list(t.shape) for name, t in model.state_dict().items() if name not in tied}
    stored = {
        name: entry["shape"] for name, entry in manifest.tensors.items() if not name.endswith(host_only)
    }
    for name in sorted(wanted.keys() | stored.keys()):
        if name not in stored:
            raise ArtifactError(f"tensor {name} must be in the artifact, got none")
        if name not in wanted:
            raise ArtifactError(f"tensor {name} must be one of the model's, got one that it does not have")
        if wanted[name] != stored[name]:
            raise ArtifactError(f"tensor {name} must have shape {wanted[name]}, got {stored[name]}")
