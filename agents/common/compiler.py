"""The compiler of programs, a process of its own, and the folder on disk that keeps what it made."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import fx

from ...envs.native.build import cache_folder, find_compiler

_log = logging.getLogger(__name__)

KEPT = 100
"""Programs that the folder keeps, the latest used; one takes about a megabyte."""
SCRIPT = Path(__file__).with_name("aot.py")
_FORGOTTEN = 86_400.0
"""Seconds after which what a killed process left of a compilation is removed."""


class CompilerError(RuntimeError):
    """PyTorch's compiler did not make a program."""


def compile_program(graph: fx.GraphModule, described: list[Any], onednn: bool, package: Path) -> None:
    """Compile a graph; the package appears as a whole or not at all.

    Several processes that want the same program wait for the first of them.

    Args:
        graph: what to compile.
        described: shape, strides and dtype of each of its inputs.
        onednn: whether to multiply matrices by oneDNN.
        package: file to write.

    Raises:
        CompilerError: if the compiler fails, or the package cannot be written.
    """
    with _alone(package):
        if package.is_file():  # another process made it meanwhile
            return
        with tempfile.TemporaryDirectory(prefix=_PREFIX, dir=_without_blanks()) as name:
            place = Path(name)
            source, made = place / "graph.pt", place / "program.pt2"
            _log.info("compiling for this kind of run; kept in %s, so that the next begins at once ...", package.parent)
            begun = time.monotonic()
            torch.save((graph, described, torch.get_num_threads(), onednn), source)
            _run([sys.executable, str(SCRIPT), str(source), str(made)], _environment(place))
            _log.info("compiled in %.0f s", time.monotonic() - begun)
            part = package.with_suffix(f".{os.getpid()}.part")
            try:
                shutil.copyfile(made, part)
                os.replace(part, package)
            except OSError as error:
                part.unlink(missing_ok=True)
                raise CompilerError(
                    f"compile: cannot write {package}, {error.strerror}; make room, or set compile to off"
                ) from error
    _tidy(package.parent)


_PREFIX = "driftrl-compile-"


def folder() -> Path:
    """Where programs are kept: programs/ in our cache folder; a temporary one if that is not ours to write."""
    base = cache_folder() / "programs"
    try:
        base.mkdir(mode=0o700, parents=True, exist_ok=True)
        mine = not hasattr(os, "getuid") or (base.stat().st_uid == os.getuid() and not base.stat().st_mode & 0o022)
        if mine and os.access(base, os.W_OK):
            return base
    except (OSError, RuntimeError):  # no home
        pass
    return Path(_temporary(base).name)


@cache
def _temporary(instead_of: Path) -> tempfile.TemporaryDirectory[str]:
    text = f"compile: {instead_of} cannot be used to keep programs; this run compiles anew, and so will the next"
    warnings.warn(f"{text}. Set XDG_CACHE_HOME to a folder of yours", RuntimeWarning, stacklevel=2)
    return tempfile.TemporaryDirectory(prefix="driftrl-programs-")


@contextlib.contextmanager
def _alone(package: Path) -> Iterator[None]:
    """Hold the lock of a program, where the system has locks."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    lock = package.with_suffix(".lock")
    with contextlib.ExitStack() as held:
        try:
            file = held.enter_context(lock.open("w"))
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:  # a file system without locks, or a full one: then each process makes its own
            pass
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


def _places() -> tuple[str, ...]:
    return tempfile.gettempdir(), "/tmp", "/var/tmp"


def _without_blanks() -> str:
    """A folder for temporary files whose path the compiler can read: it does not quote paths."""
    for each in _places():
        if not re.search(r"\s", each) and os.access(each, os.W_OK):
            return each
    raise CompilerError(f"compile: got TMPDIR {tempfile.gettempdir()!r}, expected a folder without blanks in its path")


def _environment(place: Path) -> dict[str, str]:
    """Variables of the compiler's process."""
    variables = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(place / "inductor"), "TMPDIR": str(place)}
    if compiler := find_compiler():  # $CXX, or another where it is not there
        variables["CXX"] = compiler
    packages = Path(torch.__file__).parents[1]
    if re.search(r"\s", str(packages)):
        (place / "packages").symlink_to(packages)
        packages = place / "packages"
        variables["PYTHONPATH"] = os.pathsep.join(filter(None, [str(packages), os.environ.get("PYTHONPATH")]))
    return variables


def _run(command: list[str], environment: dict[str, str]) -> None:
    """Run the compiler in a session of its own: Ctrl-C is for the one who trains, who then ends it."""
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
    )
    try:
        _, said = process.communicate()
    except BaseException:
        _end(process)
    if process.returncode:
        why = (said.strip().splitlines() or [f"code {process.returncode}"])[-1]
        raise CompilerError(f"compile: PyTorch's compiler failed, {why[:300]}; use compile='off'\n{said[-3000:]}")


def _end(process: subprocess.Popen[str]) -> NoReturn:
    """End the compiler with all that it started, and go on with the exception."""
    with contextlib.suppress(ProcessLookupError):
        if hasattr(os, "killpg"):
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
    process.communicate()
    raise


def _tidy(programs: Path) -> None:
    """Remove programs that were not used for long, and what killed processes left."""
    for old in sorted(programs.glob("*.pt2"), key=_used_at)[:-KEPT]:
        old.unlink(missing_ok=True)
    for left in Path(_without_blanks()).glob(f"{_PREFIX}*"):
        if 0 < _used_at(left) < time.time() - _FORGOTTEN and os.access(left, os.W_OK):
            shutil.rmtree(left, ignore_errors=True)


def _used_at(path: Path) -> float:
    """When a file or folder was last written to or used; 0 where another process has just removed it."""
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0
