"""Builds step.cpp at first use, keeps the result on disk, loads it, and says what its functions take.

The compiler is the one that torch.compile needs. The result lies in the user's cache folder under a name that tells
what it was built of (source, compiler, MuJoCo's version, system) and what it contains: a damaged file is not loaded,
and processes that build at the same time do not disturb each other.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import warnings
from ctypes import c_char_p, c_double, c_int, c_void_p
from pathlib import Path

import mujoco

SOURCE = Path(__file__).with_name("step.cpp")
FLAGS = ("-std=c++20", "-O2", "-fPIC", "-shared", "-pthread")
_SECONDS = 120  # a build takes one or two


class NativeUnavailableError(Exception):
    """Why the simulators cannot be stepped natively here."""


class Functions(ctypes.Structure):
    """`Functions` of step.cpp: those of MuJoCo by these names."""

    NAMES = (
        "mj_step", "mj_rnePostConstraint", "mj_setState", "_mjPRIVATE__get_tls_error_fn", "_mjPRIVATE__set_tls_error_fn"
    )  # fmt: skip
    _fields_ = [(name.strip("_"), c_void_p) for name in NAMES]


class Part(ctypes.Structure):
    """`Part` of step.cpp."""

    _fields_ = [
        ("field", c_int), ("start", c_int), ("count", c_int), ("clipped", c_int), ("low", c_double), ("high", c_double)
    ]  # fmt: skip


def find_compiler() -> str | None:
    """The C++ compiler: $CXX, g++ or clang++; None if there is none."""
    candidates = (os.environ.get("CXX", "g++"), "g++", "clang++")
    return next((path for candidate in candidates if (path := shutil.which(candidate))), None)


def cache_folder() -> Path:
    """Where built files are kept: driftrl/ in the user's cache folder ($XDG_CACHE_HOME, or the system's default)."""
    default = "~/Library/Caches" if sys.platform == "darwin" else "~/.cache"
    return Path(os.environ.get("XDG_CACHE_HOME") or default).expanduser() / "driftrl"


def library() -> ctypes.CDLL:
    """The compiled step.cpp; its functions have their types.

    Raises:
        NativeUnavailableError: if there is no compiler, or it does not build the source (which also warns, once).
    """
    loaded, reason = _loaded()
    if loaded is None:
        raise NativeUnavailableError(reason)
    loaded.driftrl_make.argtypes = [c_void_p, c_int, c_int, *[c_void_p] * 3, c_int, c_void_p, c_int, c_int]
    loaded.driftrl_make.restype = c_void_p
    loaded.driftrl_read.argtypes = [c_void_p, c_int, c_void_p, c_void_p, c_int, c_void_p]
    loaded.driftrl_step.argtypes = [c_void_p, c_void_p, *[c_int] * 3, *[c_void_p] * 3]
    loaded.driftrl_step.restype = c_char_p
    loaded.driftrl_restart.argtypes = [c_void_p, c_void_p, c_int, c_void_p, c_int, c_int, c_void_p, c_void_p]
    loaded.driftrl_end.argtypes = [c_void_p]
    for function in (loaded.driftrl_restart, loaded.driftrl_end):
        function.restype = None
    return loaded


def mujoco_library() -> ctypes.CDLL:
    """The library that the mujoco package has loaded.

    Raises:
        OSError: if it is not where it should be.
    """
    folder = Path(mujoco.__file__).parent
    for pattern in ("libmujoco.so*", "libmujoco*.dylib"):
        for path in sorted(folder.glob(pattern)):
            return ctypes.CDLL(str(path))
    raise OSError(f"no libmujoco in {folder}")


@functools.cache
def _loaded() -> tuple[ctypes.CDLL | None, str]:
    """The library, or why there is none; found out once in a process."""
    compiler = find_compiler()
    if compiler is None:
        return None, "no C++ compiler is found; install g++ or clang++"
    if os.name != "posix":
        return None, "native stepping is made for POSIX systems"
    try:
        return _from_cache(compiler) or _built(compiler), ""
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None) or str(error)
        reason = f"{compiler} does not build {SOURCE.name}: {said.strip()[:600]}"
        text = f"{reason}; the simulators are stepped by threads of Python instead, more slowly"
        warnings.warn(text, RuntimeWarning, stacklevel=2)
        return None, reason


def _key(compiler: str) -> str:
    """What a built file depends on, in 16 characters."""
    path = Path(compiler).resolve()
    made = path.stat()
    parts = [SOURCE.read_text(), *FLAGS, mujoco.__version__, sys.platform, platform.machine(), str(path)]
    parts += [str(made.st_size), str(made.st_mtime_ns)]  # for its version, without starting it
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def _from_cache(compiler: str) -> ctypes.CDLL | None:
    """The library that an earlier process built; None if there is none that is whole and can be loaded."""
    try:
        for path in sorted(cache_folder().glob(f"step-{_key(compiler)}-*.so")):
            if path.stem.endswith(_digest(path)):
                return ctypes.CDLL(str(path))
    except (OSError, RuntimeError):  # unreadable, of another system, no home folder
        pass
    return None


def _built(compiler: str) -> ctypes.CDLL:
    """Build into the cache folder; where that cannot be written or loaded from, into a temporary one."""
    try:
        folder = cache_folder()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix="build-") as work:
            made = _compile(compiler, Path(work))
            kept = folder / f"step-{_key(compiler)}-{_digest(made)}.so"
            made.replace(kept)
        return ctypes.CDLL(str(kept))
    except (OSError, RuntimeError):
        with tempfile.TemporaryDirectory(prefix="driftrl-") as work:
            return ctypes.CDLL(str(_compile(compiler, Path(work))))  # what is loaded outlives its file


def _compile(compiler: str, folder: Path) -> Path:
    """The library, built in a folder."""
    target = folder / "step.so"
    command = [compiler, *FLAGS, str(SOURCE), "-o", str(target)]
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=_SECONDS)
    return target
