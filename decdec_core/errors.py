"""What can be wrong with an artifact, one class for each cause, all of them DecDECErrors of one line."""

from __future__ import annotations

from decdec_core.config import DecDECError


class ArtifactError(DecDECError):
    """A folder that is no artifact, or one that cannot be loaded as asked."""

    def __init__(self, message: str) -> None:
        # names come from files that may hold anything, line ends and lone surrogates included
        line = "\\n".join(message.splitlines())
        super().__init__(line.encode("utf-8", "backslashreplace").decode())


class FormatVersionError(ArtifactError):
    """An artifact of a format that this release does not read."""


class ManifestError(ArtifactError):
    """manifest.json is missing, is not what the format says, or is another artifact's."""


class ConfigError(ArtifactError):
    """config.json is missing, cannot be a model's, or its quantization_config is not what the format says."""


class UnsafePathError(ArtifactError):
    """A name or a link that leads out of the folder."""


class UnsafeFileError(ArtifactError):
    """A file that runs code when it is loaded: a pickle."""


class MissingFileError(ArtifactError):
    """A file of the manifest that is not in the folder."""


class ExtraFileError(ArtifactError):
    """A file that is not in the manifest: a loader might read it (a template, an adapter, other weights)."""


class BrokenFileError(ArtifactError):
    """A safetensors file that is cut short, or whose header is none."""


class ChecksumError(ArtifactError):
    """Bytes that are not those of the manifest."""


class MissingTensorError(ArtifactError):
    """A tensor that must be there is not."""


class ExtraTensorError(ArtifactError):
    """A tensor that is not the manifest's or not the model's."""


class WrongDtypeError(ArtifactError):
    """A tensor of another dtype."""


class WrongShapeError(ArtifactError):
    """A tensor of another shape."""


class BadValueError(ArtifactError):
    """A tensor with a value that it cannot have: NaN, a scale of zero, an order that is no permutation."""
