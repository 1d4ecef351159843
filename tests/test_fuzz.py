"""Damaged artifacts at random: verify and loading end in an ArtifactError of one line, or all is as it was.

The examples are the same every time.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_artifacts import make_consistent, write_tiny
from transformers import AutoConfig, AutoModelForCausalLM

from decdec_core.config import DecDECError, WeightQuant
from decdec_core.errors import ArtifactError
from decdec_core.verify import verify

Bytes = dict[str, bytes]
Draw = Callable[[st.SearchStrategy[Any]], Any]
_KEPT: dict[Path, Bytes] = {}
_SETTINGS: dict[str, Any] = {
    "deadline": None,
    "derandomize": True,
    "database": None,
    "suppress_health_check": list(HealthCheck),
}
WORDS = (
    "",
    ".",
    "..",
    "../x",
    "/etc/passwd",
    "a\nb",
    "\ud800",
    "\0",
    "model.norm.weight",
    "F16",
    "nan",
    "decdec",
)
NUMBERS = (-1, 0, 1, 2, 3, 2.5, 31, 2**31, 2**63, 10**30, float("nan"), float("inf"), True)
VALUES = st.sampled_from([*WORDS, *NUMBERS, None, [], {}, [[]], {"": {}}, [1, 2], ["x"], "9" * 5000])


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Codebooks, mixed bits, several files; what a test changes in it, `_damaged` puts back."""
    folder = tmp_path_factory.mktemp("fuzz") / "artifact"
    write_tiny(folder, WeightQuant("squeezellm", 2.5), [2, 3], shard_bytes=400_000, extras=True)
    _KEPT[folder] = {path.name: path.read_bytes() for path in folder.iterdir()}
    return folder


def _restore(folder: Path) -> None:
    for name, data in _KEPT[folder].items():
        if (folder / name).read_bytes() != data:
            (folder / name).write_bytes(data)


def _names(folder: Path) -> list[str]:
    """The files, those oftener in which there is more to get wrong."""
    names = sorted(_KEPT[folder])
    return [
        *names,
        *(name for name in names if name.endswith(".json") and "token" not in name),
        "manifest.json",
    ]


def _altered_bytes(draw: Draw, data: bytes) -> bytes:
    # damage near the beginning hits headers
    limit = draw(st.sampled_from([len(data), min(len(data), 200)]))
    position = draw(st.integers(0, max(0, limit - 1)))
    kind = draw(st.sampled_from(["flip", "truncate", "insert", "remove", "repeat"]))
    if kind == "flip":
        return (
            data[:position] + bytes([data[position] ^ (1 << draw(st.integers(0, 7)))]) + data[position + 1 :]
        )
    if kind == "truncate":
        return data[:position]
    if kind == "insert":
        return data[:position] + draw(st.binary(min_size=1, max_size=16)) + data[position:]
    if kind == "remove":
        return data[:position] + data[position + draw(st.integers(1, 64)) :]
    return data + data[position:]


def _altered_json(draw: Draw, body: Any) -> Any:
    """Change one place of a JSON value: another value, one less, one more."""
    where, path = body, []
    while isinstance(where, (dict, list)) and len(where) and (not path or draw(st.integers(0, 3))):
        key = draw(st.sampled_from(sorted(where) if isinstance(where, dict) else range(len(where))))
        path.append((where, key))
        where = where[key]
    if not path:
        return draw(VALUES)
    parent, key = path[-1]
    kind = draw(st.sampled_from(["replace", "remove", "add", "rename"]))
    if kind == "remove":
        del parent[key]
    elif kind == "add" and isinstance(parent, dict):
        parent[draw(st.sampled_from(WORDS))] = draw(VALUES)
    elif kind == "rename" and isinstance(parent, dict):
        parent[draw(st.sampled_from([*WORDS, *map(str, parent)]))] = parent.pop(key)
    else:
        parent[key] = draw(VALUES)
    return body


def _altered(draw: Draw, name: str, data: bytes) -> bytes:
    if draw(st.booleans()):
        return _altered_bytes(draw, data)
    if name.endswith(".json"):
        return json.dumps(_altered_json(draw, json.loads(data))).encode()
    length = int.from_bytes(data[:8], "little")
    header = json.dumps(_altered_json(draw, json.loads(data[8 : 8 + length]))).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + data[8 + length :]


def _write(folder: Path, name: str, data: bytes, consistent: bool) -> None:
    (folder / name).write_bytes(data)
    if consistent and name != "manifest.json":
        try:
            make_consistent(folder)
        except DecDECError:  # a safetensors file that cannot be opened has no hashes
            (folder / "manifest.json").write_bytes(_KEPT[folder]["manifest.json"])


def _outcome(folder: Path) -> ArtifactError | None:
    try:
        verify(folder)
    except ArtifactError as error:
        found = error
    else:
        return None
    assert len(str(found).splitlines()) == 1
    str(found).encode()
    return found


@settings(max_examples=200, **_SETTINGS)
@given(data=st.data())
def test_verify_ends_in_its_own_errors(artifact: Path, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(_names(artifact)))
    altered = _altered(data.draw, name, _KEPT[artifact][name])
    consistent = data.draw(st.booleans())
    try:
        _write(artifact, name, altered, consistent)
        error = _outcome(artifact)
        if error is None and not consistent:
            _require_nothing_changed(artifact, name, altered)
    finally:
        _restore(artifact)


def _require_nothing_changed(folder: Path, name: str, altered: bytes) -> None:
    if name != "manifest.json":
        assert altered == _KEPT[folder][name]
        return
    body, kept = json.loads(altered), json.loads(_KEPT[folder][name])
    assert all(body[key] == kept[key] for key in ("tensors", "headers", "files"))


@settings(max_examples=40, **_SETTINGS)
@given(data=st.data())
def test_loading_ends_as_verify_does(artifact: Path, data: st.DataObject) -> None:
    name = data.draw(
        st.sampled_from([n for n in _names(artifact) if "token" not in n and "generation" not in n])
    )
    altered = _altered(data.draw, name, _KEPT[artifact][name])
    consistent = name != "config.json" and data.draw(st.booleans())
    try:
        _write(artifact, name, altered, consistent)
        error = _outcome(artifact)
        if error is None:
            AutoModelForCausalLM.from_pretrained(artifact)
        elif name != "config.json" or _asks_us(artifact):
            with pytest.raises(type(error)) as caught:
                AutoModelForCausalLM.from_pretrained(artifact)
            assert str(caught.value) == str(error)
    finally:
        _restore(artifact)


def _asks_us(folder: Path) -> bool:
    """Return whether transformers can read config.json and finds our quantization in it: else the error is
    its own, or there are no weights that it looks for."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config = AutoConfig.from_pretrained(folder)
    except Exception:
        return False
    quantization = getattr(config, "quantization_config", None)
    return isinstance(quantization, dict) and quantization.get("quant_method") == "decdec"
