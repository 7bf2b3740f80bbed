"""Tiles of some profiles in one compiled pass, where the machine has a C++ compiler.

A profile in torch is four to eight passes over a tile, each of which reads and writes
all of it; compiled it is one. ``fused.cpp`` is compiled at the first tile that is large
enough, in about a second, once for a compiler and a processor, into
``$XDG_CACHE_HOME/sgdgp`` (``~/.cache/sgdgp``). Without a compiler, and for every other
kernel, device and dtype, the profile in torch is what is computed: that of a kernel is
always needed, one in C++ never. ``SGDGP_COMPILE=0`` in the environment switches it off.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

PROFILES: dict[Callable[..., None], int] = {}
"""Which profile of ``fused.cpp`` a method computes. By the method itself, so that a
subclass that overrides it is not taken for its parent."""

MOST_DIMENSIONS = 10
"""Of points whose products a compiled pass makes: a row's coordinates stay in registers
(16 with AVX2), and its tile takes .6 to .85 of the time. With more, a matrix product is
as quick."""

_SOURCE = Path(__file__).with_suffix(".cpp")
_SMALLEST = 2**15  # entries of a tile that are worth a call; fewer compile nothing
_COMPILERS = ("c++", "g++", "clang++")
_SECONDS = 120  # after which a compiler has failed

_loading = threading.Lock()

_FAST = ("-O3", "-ffast-math", "-fPIC", "-std=c++17")
_FLAGS = (
    (*_FAST, "-march=native", "-mprefer-vector-width=512"),
    (*_FAST, "-march=native"),
    (*_FAST, "-mcpu=native"),
    _FAST,
)
"""What is tried in turn: compilers refuse flags of processors that are not theirs."""


def written(
    profile: Callable[..., None], left: Tensor, right: Tensor, out: Tensor, level: float
) -> bool:
    """Write the tile of a profile from its forms; whether that was possible.

    Args:
        profile: The method of a tile class.
        left: Form of the rows (a, p): see ``distance.left_form``.
        right: Form of the columns (b, p).
        out: The tile (a, b). For augmented forms of more than ``MOST_DIMENSIONS`` it
            holds their product.
        level: Squared distances below it, times the squares of both points, have
            cancelled and are taken from differences instead.
    """
    function = _function()
    forms_fit = left.is_contiguous() and right.is_contiguous() and left.shape[1] > 0
    if function is None or not forms_fit:
        return False
    rows, columns = out.shape
    done = function(
        PROFILES[profile],
        rows,
        columns,
        left.shape[1],
        left.data_ptr(),
        right.data_ptr(),
        out.data_ptr(),
        out.stride(0),
        level,
    )
    return bool(done)


def pays(out: Tensor) -> bool:
    """Whether a tile is large enough for a compiled pass, and lies as that needs it."""
    return out.numel() >= _SMALLEST and out.stride(1) == 1


def serves(profile: Callable[..., None], like: Tensor) -> bool:
    """Whether a compiled pass is there for the dtype and the device of ``like``."""
    return (
        profile in PROFILES
        and like.dtype == torch.float32
        and like.device.type == "cpu"
        and _function() is not None
    )


def _function() -> Any:
    """The function; while one thread compiles it, the others wait."""
    if _library.cache_info().currsize:
        return _library()  # without a lock, which a fork amid a tile would leave taken
    with _loading:
        return _library()


@functools.cache
def _library() -> Any:
    """The function, compiled at the first call; None where there can be none."""
    if os.environ.get("SGDGP_COMPILE", "1").strip().lower() in ("0", "false", "no", ""):
        return None
    try:
        function = _compiled()
    except (OSError, RuntimeError, ValueError, subprocess.SubprocessError):
        return None
    if function is not None:
        size, number, address = ctypes.c_int64, ctypes.c_int, ctypes.c_void_p
        function.restype = number
        function.argtypes = [number, *[size] * 3, *[address] * 3, size, ctypes.c_float]
    return function


def _compiled() -> Any:
    """``sgdgp_tile`` from the cache, or compiled into it.

    Any number of processes may compile it at once. Where no folder can be kept, it is
    compiled into one that is removed as soon as it is loaded.
    """
    compiler = _compiler()
    if compiler is None:
        return None
    name = f"fused-{_key(compiler)}.so"
    # Not there, or nothing that can be loaded; RuntimeError: there is no home.
    with contextlib.suppress(OSError, RuntimeError):
        return _loaded(_cache_folder() / name)
    with tempfile.TemporaryDirectory(prefix="sgdgp-") as workspace:
        library = _build(compiler, Path(workspace))
        if library is None:
            return None
        with contextlib.suppress(OSError, RuntimeError):
            return _loaded(_kept(library, _cache_folder(), name))
        return _loaded(library)


def _loaded(library: Path) -> Any:
    return ctypes.CDLL(str(library)).sgdgp_tile


def _kept(library: Path, folder: Path, name: str) -> Path:
    """The library in the cache, complete before it has its name."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    handle, part = tempfile.mkstemp(dir=folder, prefix=".", suffix=".so")
    os.close(handle)
    try:
        shutil.copyfile(library, part)
        return Path(part).replace(folder / name)
    except OSError:
        Path(part).unlink()  # as much as a full disk took
        raise


def _build(compiler: list[str], folder: Path) -> Path | None:
    compiled, library = folder / "fused.o", folder / "fused.so"
    for flags in _FLAGS:
        # In two steps: linked with fast-math, it would change how the whole process
        # treats the smallest numbers.
        steps = (
            [*compiler, *flags, "-c", str(_SOURCE), "-o", str(compiled)],
            [*compiler, "-shared", str(compiled), "-o", str(library)],
        )
        if all(_runs(step) for step in steps):
            return library
    return None


def _runs(command: list[str]) -> bool:
    result = subprocess.run(command, capture_output=True, check=False, timeout=_SECONDS)
    return result.returncode == 0


def _compiler() -> list[str] | None:
    """The user's compiler, ``$CXX`` if there is one."""
    named = shlex.split(os.environ.get("CXX", ""))
    for name in named[:1] or _COMPILERS:
        path = shutil.which(name)
        if path is not None:
            return [path, *named[1:]]
    return None


def _key(compiler: list[str]) -> str:
    """What a library depends on: source, flags, compiler, processor."""
    version = subprocess.run(
        [*compiler, "--version"], capture_output=True, check=False, timeout=_SECONDS
    )
    parts = (_SOURCE.read_bytes(), repr((compiler, _FLAGS)).encode(), version.stdout)
    digest = hashlib.sha256(b"\0".join((*parts, _processor().encode())))
    return digest.hexdigest()[:24]


def _processor() -> str:
    """What tells processors with different instructions apart."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()} {platform.node()}"
    facts = ("flags", "Features", "model name", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(facts)}))


def _cache_folder() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "sgdgp"
