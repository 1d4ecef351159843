"""Compiles csrc, once per machine, and loads it: the CPU kernels, and on first use of a GPU the CUDA kernels.

They go into $DECDEC_BUILD_DIR (else ~/.cache/decdec/build); DECDEC_KERNELS=off leaves them alone. Without CPU
kernels plain torch serves, with one warning; without CUDA kernels a CUDA tensor raises and says why.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from decdec_core.config import DecDECError, require_one_of

_OPS = (
    *("select_topk", "select_buckets", "select_random", "compensate"),
    *("select_and_compensate", "dequantize", "linear", "dequantize_residual"),
    *("add_norm", "silu_mul", "decode_attention"),
)
# -Wno-psabi: vectors wider than the machine's registers are passed among inlined functions only
_CFLAGS = ("-O3", "-march=native", "-fopenmp", "-Wno-psabi")
_CUDA_FLAGS = ("-O3", "-std=c++20")
_LEAST_CAPABILITY = (8, 0)  # asynchronous copies, bfloat16 and reductions over a warp
_cpu: bool | None = None
_cuda: set[int] = set()  # devices that the loaded CUDA kernels serve
_loading = threading.RLock()


class _BuildFailedError(Exception):
    """Why the kernels cannot be had, in one line."""


def in_use() -> str:
    """Return "compiled" or "twin": which of the two serves on a CPU. Compiles if that is still to do."""
    return "compiled" if cpu_loaded() else "twin"


# a compiler that traces a model runs these two, and traces past them
@torch.compiler.assume_constant_result
def cpu_loaded() -> bool:
    """Return whether compiled CPU kernels serve, after compiling them if that is still to do."""
    global _cpu
    if _cpu is None:
        with _loading:
            if _cpu is None:
                _cpu = _load_cpu()
    return _cpu


@torch.compiler.assume_constant_result
def require_cuda(device: torch.device) -> None:
    """Raise DecDECError, saying why, unless CUDA kernels serve `device`; compiles them on first use."""
    if not torch.cuda.is_available():
        raise DecDECError(f"x must be on a device that this torch can use, got {device}")
    index = device.index if device.index is not None else torch.cuda.current_device()
    if index not in _cuda:
        with _loading:
            if index not in _cuda:
                _load_cuda(index)
                _cuda.add(index)


def _load_cpu() -> bool:
    switch = os.environ.get("DECDEC_KERNELS", "on")
    require_one_of("DECDEC_KERNELS", switch, ("on", "off"))
    if switch == "off":
        return False
    try:
        _load_or_build("decdec_ops", _cpu_key(), _cpu_options, "CPU kernels, about 30 s")
    except (_BuildFailedError, OSError) as error:
        warnings.warn(
            "decdec: no compiled kernels, so plain torch serves instead, with the same results but some "
            f"twenty times slower: {error}",
            RuntimeWarning,
            stacklevel=5,
        )
        return False
    for name in _OPS:
        # what an op writes, it writes into an argument: there is nothing to make up
        torch.library.register_fake(f"decdec::{name}", lambda *arguments: None)
    return True


def _load_cuda(index: int) -> None:
    capability = torch.cuda.get_device_capability(index)
    name = torch.cuda.get_device_name(index)
    if capability < _LEAST_CAPABILITY:
        raise DecDECError(f"GPU must be of compute capability 8.0 or newer, got {name} of {capability}")
    if not cpu_loaded():
        raise DecDECError(
            "CUDA kernels must stand on the CPU kernels, which are off or could not be compiled"
        )
    try:
        _load_or_build("decdec_cuda", _cuda_key(), _cuda_options, "CUDA kernels, about a minute")
    except (_BuildFailedError, OSError) as error:
        raise DecDECError(f"CUDA kernels for {name} could not be compiled: {error}") from error


def _load_or_build(library_name: str, key: str, options: Any, what: str) -> None:
    default = Path.home() / ".cache" / "decdec" / "build"
    folder = Path(os.environ.get("DECDEC_BUILD_DIR") or default).absolute() / key
    library = folder / f"{library_name}.so"
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "lock", "w") as lock:
            # the system drops the lock with its holder, however that one ended
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not library.exists():
                print(f"decdec: compiling {what}, once, into {folder}", file=sys.stderr)
                _build(library, options)
                return
    torch.ops.load_library(library)


def _build(library: Path, options: Any) -> None:
    """Compile csrc into `library` and load it. To be called with the folder's lock held."""
    for abandoned in library.parent.glob("building-*"):
        shutil.rmtree(abandoned, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix="building-", dir=library.parent) as scratch, _ninja_on_path():
        try:
            # here, because it takes half a second and wants setuptools
            from torch.utils import cpp_extension

            cpp_extension.load(library.stem, build_directory=scratch, is_python_module=False, **options())
        except (RuntimeError, ImportError, subprocess.CalledProcessError) as error:
            raise _BuildFailedError(_telling_line(str(error))) from error
        os.replace(Path(scratch) / library.name, library)


def _telling_line(log: str) -> str:
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    return next((line for line in lines if "error:" in line), lines[-1] if lines else "no message")


@contextlib.contextmanager
def _ninja_on_path() -> Iterator[None]:
    # an environment that is used without being activated has its ninja beside its python, off PATH
    before = os.environ.get("PATH", "")
    os.environ["PATH"] = os.pathsep.join([before, str(Path(sys.executable).parent)])
    try:
        yield
    finally:
        os.environ["PATH"] = before


def _csrc() -> Path:
    inside = Path(__file__).parent / "csrc"
    return inside if inside.is_dir() else Path(__file__).parent.parent / "csrc"


def _cpu_sources() -> list[Path]:
    return [_csrc() / name for name in ("ops.cpp", "checks.h", "layout.h")] + sorted(_csrc().glob("cpu/*"))


def _cpu_options() -> dict[str, Any]:
    return {
        "sources": [str(source) for source in _cpu_sources() if source.suffix == ".cpp"],
        "extra_cflags": list(_CFLAGS),
        "extra_ldflags": [str(runtime) for runtime in _openmp_runtime()] or ["-fopenmp"],
    }


def _cuda_sources() -> list[Path]:
    names = ("ops_cuda.cpp", "ops_decode.cpp", "checks.h", "checks_cuda.h", "layout.h")
    return [_csrc() / name for name in names] + sorted(_csrc().glob("cuda/*"))


def _cuda_options() -> dict[str, Any]:
    return {
        "sources": [str(source) for source in _cuda_sources() if source.suffix in (".cpp", ".cu")],
        "extra_cflags": ["-O3"],
        "extra_cuda_cflags": list(_CUDA_FLAGS),
        "with_cuda": True,
    }


def _openmp_runtime() -> list[Path]:
    """Return torch's own OpenMP runtime, where its wheel brings one: a second would have its own threads."""
    site = Path(torch.__file__).parent
    return [*site.glob("lib/libgomp*.so*"), *site.parent.glob("torch.libs/libgomp*.so*")][:1]


def _cpu_key() -> str:
    """Return the name of the cache's sub-folder: a hash of everything that the compiled code depends on."""
    # the lines that -march=native goes by, on x86 and on Arm
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else [f"model name {platform.processor()}"]
    cpu = sorted({line for line in lines if line.startswith(("flags", "model name", "Features"))})
    runtime = [path.name for path in _openmp_runtime()]
    return _key([torch.__version__, *_CFLAGS, *runtime, *cpu, _version(_compiler())], _cpu_sources())


def _cuda_key() -> str:
    from torch.utils.cpp_extension import CUDA_HOME

    if CUDA_HOME is None or not (Path(CUDA_HOME) / "bin" / "nvcc").exists():
        raise _BuildFailedError("no CUDA compiler (nvcc on PATH, or CUDA_HOME)")
    chosen = os.environ.get("TORCH_CUDA_ARCH_LIST")
    devices = range(torch.cuda.device_count())
    targets = [chosen] if chosen else sorted({str(torch.cuda.get_device_capability(i)) for i in devices})
    versions = [_version(_compiler()), _version([str(Path(CUDA_HOME) / "bin" / "nvcc")])]
    return _key([torch.__version__, *_CUDA_FLAGS, *targets, *versions], _cuda_sources())


def _compiler() -> list[str]:
    command = shlex.split(os.environ.get("CXX", "c++"))
    if not command or shutil.which(command[0]) is None:
        raise _BuildFailedError(f"no C++ compiler {' '.join(command)!r} on PATH (the variable CXX names one)")
    return command


def _version(command: list[str]) -> str:
    done = subprocess.run([*command, "--version"], capture_output=True, check=False)
    return done.stdout.decode(errors="replace")


def _key(texts: list[str], sources: list[Path]) -> str:
    parts = [text.encode() for text in texts]
    parts += [part for path in sources for part in (path.name.encode(), path.read_bytes())]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]
