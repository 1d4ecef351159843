"""Selection and compensation: compiled ops, their fakes, and their plain-torch twins.

Each op stands beside its twin `<name>_ref`, which is its oracle and, where nothing can be compiled, its
stand-in. csrc is compiled once per machine into $DECDEC_BUILD_DIR (else ~/.cache/decdec/build) on first
use; DECDEC_KERNELS=off leaves it alone.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import math
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

import torch
from torch import Tensor

from decdec_core.config import (
    CHUNK,
    RESIDUAL_BITS,
    DecDECError,
    channels_per_chunk,
    require_int,
    require_one_of,
    total_channels,
)
from decdec_core.packing import channel_bytes, unpack_channels

BUCKETS = 32
MAX_SEED = 2**63 - 1

_ACTIVATION_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_WORD = 0xFFFFFFFF


def bucket_floors(a: float, b: float) -> Tensor:
    """Return the lower bounds (32,) float32 of the buckets of |x|, descending, the last one 0.

    a: boundary at rank 1; b: boundary at rank K (method.md section 4). The first 16 run linearly from a to
    b, the last 16 from b to 0. Raises DecDECError unless a >= b >= 0 and both are finite.
    """
    if not (math.isfinite(a) and a >= b >= 0):
        raise DecDECError(f"bucket boundaries must be finite with a >= b >= 0, got a={a}, b={b}")
    upper = [a - i * (a - b) / 15 for i in range(16)]
    lower = [b - j * b / 16 for j in range(1, 17)]
    return torch.tensor(upper + lower, dtype=torch.float32)


def select_topk(x: Tensor, k_chunk: int) -> Tensor:
    """Return, per token and chunk, the channels with the largest |x|: `exact` selection.

    x: (tokens, in) float32, float16 or bfloat16, contiguous. k_chunk: 0..1024.
    Returns (tokens, K) int32, K = total_channels(in, k_chunk), ascending within a chunk. NaN counts as
    larger than infinity; of equals the lowest channels are taken. Refused input raises DecDECError.
    """
    _check_selection(x, k_chunk)
    if not _compiled_for(x):
        return select_topk_ref(x, k_chunk)
    indices = _new_indices(x, k_chunk)
    torch.ops.decdec.select_topk.default(x, k_chunk, indices)
    return indices


def select_topk_ref(x: Tensor, k_chunk: int) -> Tensor:
    """Return, per token and chunk, the channels with the largest |x|: the twin of select_topk.

    x: (tokens, in) float32, float16 or bfloat16, contiguous. k_chunk: 0..1024.
    Returns (tokens, K) int32, K = total_channels(in, k_chunk), ascending within a chunk. NaN counts as
    larger than infinity; of equals the lowest channels are taken. Refused input raises DecDECError.
    """
    _check_selection(x, k_chunk)
    return _largest_per_chunk(_magnitude_bits(x), k_chunk)


def select_buckets(x: Tensor, floors: Tensor, k_chunk: int) -> Tensor:
    """Return, per token and chunk, the channels of the topmost buckets of |x|: `dynamic` selection.

    x: (tokens, in) float32, float16 or bfloat16, contiguous. floors: (32,) float32 from bucket_floors.
    k_chunk: 0..1024. Returns (tokens, K) int32, ascending within a chunk: whole buckets from the top, and
    the lowest channels of the bucket that does not fit. NaN and anything above floors[0] are in the first
    bucket. Refused input raises DecDECError.
    """
    _check_selection(x, k_chunk)
    _check_floors(floors)
    if not _compiled_for(x):
        return select_buckets_ref(x, floors, k_chunk)
    indices = _new_indices(x, k_chunk)
    try:
        torch.ops.decdec.select_buckets.default(x, floors, k_chunk, indices)
    except ValueError as error:
        raise DecDECError(str(error)) from None
    return indices


def select_buckets_ref(x: Tensor, floors: Tensor, k_chunk: int) -> Tensor:
    """Return, per token and chunk, the channels of the topmost buckets of |x|: the twin of select_buckets.

    x: (tokens, in) float32, float16 or bfloat16, contiguous. floors: (32,) float32 from bucket_floors.
    k_chunk: 0..1024. Returns (tokens, K) int32, ascending within a chunk: whole buckets from the top, and
    the lowest channels of the bucket that does not fit. NaN and anything above floors[0] are in the first
    bucket. Refused input raises DecDECError.
    """
    _check_selection(x, k_chunk)
    _check_floors(floors)
    bounds = floors.view(torch.int32)
    if bounds[-1] != 0 or (bounds[1:] > bounds[:-1]).any():
        raise DecDECError("floors must be descending to 0, got another order")
    # ascending bounds: a key reaches the floor of its bucket and all below; the more, the sooner taken
    reached = torch.searchsorted(bounds.flip(0), _magnitude_bits(x), right=True)
    return _largest_per_chunk(reached, k_chunk)


def select_random(x: Tensor, seed: int, k_chunk: int) -> Tensor:
    """Return, per token and chunk, channels drawn without replacement: `random` selection.

    x: (tokens, in) float32, float16 or bfloat16, contiguous. seed: 0..2**63 - 1. k_chunk: 0..1024.
    Returns (tokens, K) int32, ascending within a chunk. The draw is a function of the seed and of the signs
    of the token's activations: the same in any batch and after any rounding, another for another token.
    Layers that should draw differently need seeds that differ. Refused input raises DecDECError.
    """
    _check_selection(x, k_chunk)
    require_int("seed", seed, 0, MAX_SEED)
    if not _compiled_for(x):
        return select_random_ref(x, seed, k_chunk)
    indices = _new_indices(x, k_chunk)
    torch.ops.decdec.select_random.default(x, seed, k_chunk, indices)
    return indices


def select_random_ref(x: Tensor, seed: int, k_chunk: int) -> Tensor:
    """Return, per token and chunk, channels drawn without replacement: the twin of select_random.

    x: (tokens, in) float32, float16 or bfloat16, contiguous. seed: 0..2**63 - 1. k_chunk: 0..1024.
    Returns (tokens, K) int32, ascending within a chunk. The draw is a function of the seed and of the signs
    of the token's activations: the same in any batch and after any rounding, another for another token.
    Layers that should draw differently need seeds that differ. Refused input raises DecDECError.
    """
    _check_selection(x, k_chunk)
    require_int("seed", seed, 0, MAX_SEED)
    low, high = torch.tensor([seed & _WORD, seed >> 32], device=x.device)
    channel_hash = _mix32(torch.arange(x.shape[1], device=x.device))
    signs = (x.signbit() * channel_hash).sum(1, keepdim=True)
    fingerprint = _mix32(signs + _mix32(_mix32(low) + high) & _WORD)
    return _largest_per_chunk(_mix32(channel_hash ^ fingerprint) >> 1, k_chunk)


def compensate(x: Tensor, indices: Tensor, codes: Tensor, scale: Tensor, bits: int, y: Tensor) -> None:
    """Add to y what the selected channels contribute: y[t] += sum of x[t, c] * residual row c, in place.

    x: (tokens, in) float32, float16 or bfloat16, contiguous. indices: (tokens, K) int32, or (1, K) for the
    same channels in every token. codes: the residual by channel, (in, ceil(out * bits / 8)) uint8 at 2, 4
    and 8 bits, (in, out) float16 and finite at 16. scale: (out,) float32. y: (tokens, out) float32, which
    is also how the sum is carried. Refused input, an index outside 0..in - 1 among it, raises DecDECError.
    """
    if not _compiled_for(x):
        compensate_ref(x, indices, codes, scale, bits, y)
        return
    try:
        torch.ops.decdec.compensate.default(x, indices, codes, scale, bits, y)
    except ValueError as error:
        raise DecDECError(str(error)) from None


def compensate_ref(x: Tensor, indices: Tensor, codes: Tensor, scale: Tensor, bits: int, y: Tensor) -> None:
    """Add to y what the selected channels contribute: the twin of compensate.

    x: (tokens, in) float32, float16 or bfloat16, contiguous. indices: (tokens, K) int32, or (1, K) for the
    same channels in every token. codes: the residual by channel, (in, ceil(out * bits / 8)) uint8 at 2, 4
    and 8 bits, (in, out) float16 and finite at 16. scale: (out,) float32. y: (tokens, out) float32, which
    is also how the sum is carried. Refused input, an index outside 0..in - 1 among it, raises DecDECError.
    """
    _check_compensation(x, indices, codes, scale, bits, y)
    if indices.numel() == 0 or y.numel() == 0:
        return
    channels, position = indices.unique(return_inverse=True)
    if channels[0] < 0 or channels[-1] >= x.shape[1]:
        wrong = channels[0] if channels[0] < 0 else channels[-1]
        raise DecDECError(f"indices must be 0..{x.shape[1] - 1}, got {int(wrong)}")
    shape = (x.shape[0], indices.shape[1])
    values = x.gather(1, indices.long().expand(shape)).float()
    # only channels that some token selected, and 1024 of them decoded at a time: bounded memory
    spread = (
        torch.zeros(x.shape[0], len(channels)).to(x.device).scatter_add_(1, position.expand(shape), values)
    )
    for part, weights in zip(channels.split(CHUNK), spread.split(CHUNK, dim=1), strict=True):
        rows = codes[part]
        decoded = rows.float() if bits == 16 else unpack_channels(rows, bits, y.shape[1]).T.float()
        y.addcmul_(weights @ decoded, scale)


def _magnitude_bits(x: Tensor) -> Tensor:
    # bit patterns order as the magnitudes do, with NaN above infinity
    return x.float().view(torch.int32) & 0x7FFFFFFF


def _largest_per_chunk(keys: Tensor, k_chunk: int) -> Tensor:
    budgets = channels_per_chunk(keys.shape[1], k_chunk)
    chosen = [keys[:, :0]]
    for chunk, (part, k) in enumerate(zip(keys.split(CHUNK, dim=1), budgets, strict=False)):
        # the channel as the low digits makes all keys differ, the lowest channel the largest of equals
        digits = torch.arange(CHUNK, CHUNK - part.shape[1], -1, device=keys.device)
        distinct = part.to(torch.int64) * (CHUNK + 1) + digits
        chosen.append(distinct.topk(k, dim=1, sorted=False).indices.sort(dim=1).values + chunk * CHUNK)
    return torch.cat(chosen, dim=1).to(torch.int32)


def _mix32(word: Tensor) -> Tensor:
    # mix32 of csrc/layout.h in int64, of which the low 32 bits count
    word = (word ^ (word >> 16)) * 0x7FEB352D & _WORD
    word = (word ^ (word >> 15)) * 0x846CA68B & _WORD
    return word ^ (word >> 16)


def _new_indices(x: Tensor, k_chunk: int) -> Tensor:
    return x.new_empty((x.shape[0], total_channels(x.shape[1], k_chunk)), dtype=torch.int32)


def _check_activations(x: Tensor) -> None:
    if x.dim() != 2:
        raise DecDECError(f"x must be (tokens, in), got {tuple(x.shape)}")
    if x.dtype not in _ACTIVATION_DTYPES:
        raise DecDECError(f"x must be float32, float16 or bfloat16, got {x.dtype}")
    if not x.is_contiguous():
        raise DecDECError(f"x must be contiguous, got strides {x.stride()}")


def _check_selection(x: Tensor, k_chunk: int) -> None:
    _check_activations(x)
    require_int("k_chunk", k_chunk, 0, CHUNK)


def _check_tensor(which: str, got: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if tuple(got.shape) != shape:
        raise DecDECError(f"{which} must be {shape}, got {tuple(got.shape)}")
    if got.dtype != dtype:
        raise DecDECError(f"{which} must be {dtype}, got {got.dtype}")
    if not got.is_contiguous():
        raise DecDECError(f"{which} must be contiguous, got strides {got.stride()}")


def _check_floors(floors: Tensor) -> None:
    _check_tensor("floors", floors, (BUCKETS,), torch.float32)


def _check_compensation(
    x: Tensor, indices: Tensor, codes: Tensor, scale: Tensor, bits: int, y: Tensor
) -> None:
    _check_activations(x)
    require_one_of("bits", bits, RESIDUAL_BITS)
    tokens, out = x.shape[0], scale.numel()
    _check_tensor("scale", scale, (out,), torch.float32)
    width, dtype = (out, torch.float16) if bits == 16 else (channel_bytes(out, bits), torch.uint8)
    _check_tensor("codes", codes, (x.shape[1], width), dtype)
    _check_tensor("y", y, (tokens, out), torch.float32)
    if indices.dim() != 2 or indices.shape[0] not in (1, tokens):
        raise DecDECError(f"indices must be (tokens, K) or (1, K), got {tuple(indices.shape)}")
    _check_tensor("indices", indices, tuple(indices.shape), torch.int32)


def kernel_in_use() -> str:
    """Return "compiled" or "twin": which of the two serves. Compiles the kernels if that is still to do."""
    return "compiled" if _kernels_loaded() else "twin"


def _compiled_for(x: Tensor) -> bool:
    if x.device.type not in ("cpu", "meta"):
        raise DecDECError(f"x must be on the CPU, for which alone there are kernels, got {x.device}")
    return _kernels_loaded()


class _BuildFailedError(Exception):
    """Why the kernels cannot be had, in one line."""


_OPS = ("select_topk", "select_buckets", "select_random", "compensate")
_LIBRARY = "decdec_ops"
# -Wno-psabi: vectors wider than the machine's registers are passed among inlined functions only
_CFLAGS = ("-O3", "-march=native", "-fopenmp", "-Wno-psabi")
_loaded: bool | None = None
_loading = threading.Lock()


def _kernels_loaded() -> bool:
    global _loaded
    if _loaded is None:
        with _loading:
            if _loaded is None:
                _loaded = _load_kernels()
    return _loaded


def _load_kernels() -> bool:
    switch = os.environ.get("DECDEC_KERNELS", "on")
    require_one_of("DECDEC_KERNELS", switch, ("on", "off"))
    if switch == "off":
        return False
    try:
        _load_or_build()
    except (_BuildFailedError, OSError) as error:
        warnings.warn(
            "decdec: no compiled kernels, so plain torch serves instead, with the same results but some "
            f"twenty times slower: {error}",
            RuntimeWarning,
            stacklevel=4,
        )
        return False
    for name in _OPS:
        # what an op writes, it writes into an argument: there is nothing to make up
        torch.library.register_fake(f"decdec::{name}", lambda *arguments: None)
    return True


def _load_or_build() -> None:
    default = Path.home() / ".cache" / "decdec" / "build"
    folder = Path(os.environ.get("DECDEC_BUILD_DIR") or default).absolute() / _build_key()
    library = folder / f"{_LIBRARY}.so"
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "lock", "w") as lock:
            # the system drops the lock with its holder, however that one ended
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not library.exists():
                _build(library)
                return
    torch.ops.load_library(library)


def _build(library: Path) -> None:
    """Compile csrc into `library` and load it. To be called with the folder's lock held."""
    print(f"decdec: compiling CPU kernels, about 30 s, once, into {library.parent}", file=sys.stderr)
    for abandoned in library.parent.glob("building-*"):
        shutil.rmtree(abandoned, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix="building-", dir=library.parent) as scratch, _ninja_on_path():
        try:
            # here, because it takes half a second and wants setuptools
            from torch.utils import cpp_extension

            cpp_extension.load(
                _LIBRARY,
                [str(s) for s in _sources() if s.suffix == ".cpp"],
                extra_cflags=list(_CFLAGS),
                extra_ldflags=[str(runtime) for runtime in _openmp_runtime()] or ["-fopenmp"],
                build_directory=scratch,
                is_python_module=False,
            )
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


def _sources() -> list[Path]:
    inside = Path(__file__).parent / "csrc"
    csrc = inside if inside.is_dir() else Path(__file__).parent.parent / "csrc"
    return [csrc / "ops.cpp", csrc / "checks.h", csrc / "layout.h", *sorted(csrc.glob("cpu/*"))]


def _openmp_runtime() -> list[Path]:
    """Return torch's own OpenMP runtime, where its wheel brings one: a second would have its own threads."""
    site = Path(torch.__file__).parent
    return [*site.glob("lib/libgomp*.so*"), *site.parent.glob("torch.libs/libgomp*.so*")][:1]


def _build_key() -> str:
    """Return the name of the cache's sub-folder: a hash of everything that the compiled code depends on."""
    command = shlex.split(os.environ.get("CXX", "c++"))
    if not command or shutil.which(command[0]) is None:
        raise _BuildFailedError(f"no C++ compiler {' '.join(command)!r} on PATH (the variable CXX names one)")
    version = subprocess.run([*command, "--version"], capture_output=True, check=False).stdout
    # the lines that -march=native goes by, on x86 and on Arm
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else [f"model name {platform.processor()}"]
    cpu = sorted({line for line in lines if line.startswith(("flags", "model name", "Features"))})
    runtime = [path.name for path in _openmp_runtime()]
    texts = [torch.__version__, *_CFLAGS, *runtime, *cpu]
    parts = [*(text.encode() for text in texts), version]
    parts += [part for path in _sources() for part in (path.name.encode(), path.read_bytes())]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]
