"""Compiling csrc: once, whoever asks; and what is left where it cannot be done."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import with_checkout_first

# computes something with each op and reports it with what served
CHILD = """
import json, os, sys, warnings
import torch
from decdec_core import kernels, ops
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    source = torch.Generator().manual_seed(0)
    x = torch.randn(5, 1032, generator=source)
    floors = ops.bucket_floors(4.0, 1.5)
    chosen = [ops.select_topk(x, 16), ops.select_buckets(x, floors, 16), ops.select_random(x, 1, 16)]
    codes = torch.randint(0, 256, (1032, 4), generator=source, dtype=torch.uint8)
    y = torch.zeros(5, 7)
    ops.compensate(x, chosen[0], codes, torch.ones(7), 4, y)
maps = open("/proc/self/maps").read().split() if os.path.exists("/proc/self/maps") else []
print(json.dumps({
    "kernel": kernels.in_use(),
    "indices": [c.tolist() for c in chosen],
    "y": y.tolist(),
    "warnings": [str(w.message) for w in caught if "decdec" in str(w.message)],
    "imported_builder": "torch.utils.cpp_extension" in sys.modules,
    "openmp": sorted({m for m in maps if any(name in m for name in ("libgomp", "libiomp", "libomp"))}),
}))
"""


def start(cache: Path, **variables: str) -> subprocess.Popen[str]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("DECDEC_")}
    environment |= {"PYTHONPATH": with_checkout_first(), "DECDEC_BUILD_DIR": str(cache)} | variables
    return subprocess.Popen(
        [sys.executable, "-c", CHILD],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> tuple[dict[str, Any], str]:
    """Return what the child reports, and its stderr."""
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return json.loads(out), err


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[tuple[dict[str, Any], str]]]:
    """A cache that two processes found empty at the same time, and what they report."""
    cache = tmp_path_factory.mktemp("cache")
    started = [start(cache), start(cache)]
    return cache, [finish(process) for process in started]


@pytest.fixture(scope="module")
def report(built: tuple[Path, list[tuple[dict[str, Any], str]]]) -> dict[str, Any]:
    """What a process reports that finds the cache filled."""
    reported, err = finish(start(built[0]))
    assert "compiling" not in err
    return reported


def test_two_processes_make_one_build(built: tuple[Path, list[tuple[dict[str, Any], str]]]) -> None:
    cache, reports = built
    assert [r["kernel"] for r, _ in reports] == ["compiled", "compiled"]
    assert sum(err.count("decdec: compiling CPU kernels") for _, err in reports) == 1
    assert len(list(cache.glob("*/decdec_ops.so"))) == 1
    assert not list(cache.glob("*/building-*"))
    assert reports[0][0]["indices"] == reports[1][0]["indices"]
    assert reports[0][0]["y"] == reports[1][0]["y"]


def test_a_filled_cache_is_read_without_the_builder(report: dict[str, Any]) -> None:
    assert report["kernel"] == "compiled"
    assert not report["imported_builder"]
    assert not report["warnings"]


def test_there_is_one_openmp_runtime(report: dict[str, Any]) -> None:
    if not sys.platform.startswith("linux"):
        pytest.skip("reads /proc/self/maps")
    assert len(report["openmp"]) == 1


def assert_same_numbers(left: dict[str, Any], right: dict[str, Any]) -> None:
    assert left["indices"] == right["indices"]
    for a, b in zip(left["y"], right["y"], strict=True):
        # sums of 16 terms up to some tens in float32
        assert a == pytest.approx(b, rel=1e-5, abs=1e-4)


def test_no_compiler_warns_once_and_gives_the_same_numbers(tmp_path: Path, report: dict[str, Any]) -> None:
    twin, err = finish(start(tmp_path, CXX="/nowhere/c++"))
    assert twin["kernel"] == "twin"
    assert "compiling" not in err
    assert len(twin["warnings"]) == 1
    assert "no C++ compiler '/nowhere/c++'" in twin["warnings"][0]
    assert "plain torch serves instead" in twin["warnings"][0]
    assert_same_numbers(twin, report)


def test_kernels_off_are_off_without_a_warning(built: tuple[Path, Any], report: dict[str, Any]) -> None:
    twin, _ = finish(start(built[0], DECDEC_KERNELS="off"))
    assert twin["kernel"] == "twin"
    assert not twin["warnings"]
    assert_same_numbers(twin, report)


def test_another_word_for_off_is_refused(tmp_path: Path) -> None:
    process = start(tmp_path, DECDEC_KERNELS="of")
    _, err = process.communicate(timeout=300)
    assert process.returncode != 0
    assert "DECDEC_KERNELS must be one of on, off, got 'of' (did you mean 'off'?)" in err


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    twin, _ = finish(start(tmp_path / "file"))
    assert twin["kernel"] == "twin"
    assert len(twin["warnings"]) == 1
    assert str(tmp_path / "file") in twin["warnings"][0]


def fake_compiler(folder: Path) -> tuple[Path, Path]:
    """Return a compiler that takes its time until the second path is there, and then fails."""
    compiler, impatient = folder / "c++", folder / "impatient"
    compiler.write_text(
        "#!/bin/sh\n"
        'case "$*" in *ops.cpp*) ;; *) echo 12.0.0; exit 0;; esac\n'  # what asks for its version
        f'until [ -e "{impatient}" ]; do sleep 0.1; done\n'
        'echo "x.cpp:1:1: error: not today" >&2; exit 1\n'
    )
    compiler.chmod(0o755)
    return compiler, impatient


def wait_for_build(cache: Path) -> None:
    deadline = time.monotonic() + 120
    while not list(cache.glob("*/building-*/*.ninja")):
        assert time.monotonic() < deadline, "no build was started"
        time.sleep(0.1)


def test_a_killed_builder_does_not_hang_the_next(tmp_path: Path) -> None:
    compiler, impatient = fake_compiler(tmp_path)
    cache = tmp_path / "cache"
    killed = start(cache, CXX=str(compiler))
    wait_for_build(cache)
    waiting = start(cache, CXX=str(compiler))
    killed.kill()
    killed.communicate()
    impatient.touch()
    reported, err = finish(waiting)
    assert "compiling" in err, "the next in line builds anew"
    assert reported["kernel"] == "twin"
    assert len(reported["warnings"]) == 1
    assert "x.cpp:1:1: error: not today" in reported["warnings"][0]
    assert not list(cache.glob("*/building-*")), "what the killed one left is cleared away"
