"""What the commands share: a parser whose errors are one line, and whose fault an error is.

What we refuse is said in one line. What fails in the user's own code, an environment's most of all, keeps its
traceback.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import select
import sys
import sysconfig
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

_OURS = Path(__file__).resolve().parents[1]
_ROOTS = [_OURS, *(_OURS.parent / name for name in ("agents", "envs", "dynamics"))]
_LIBRARIES = ("gymnasium", "gymnasium_robotics", "mujoco", "numpy", "stable_baselines3", "torch", "tqdm", "tyro")
"""Packages whose errors we cause and pass on; any other may be the user's."""


class Parser(argparse.ArgumentParser):
    """An argument parser that raises ValueError, for a one-line error in place of its usage."""

    def error(self, message: str) -> NoReturn:
        """Raise what argparse would print."""
        raise ValueError(f"{message}; see {self.prog} --help")


class NotWhole(argparse.ArgumentTypeError, ValueError):
    """A text that is no integer."""


def whole_number(text: str) -> int:
    """An integer as people write it: 1000000, 1_000_000, 1e6.

    Raises:
        ArgumentTypeError, a ValueError to other callers: if it is none.
    """
    if re.fullmatch(r"[-+]?[\d_]+", text):
        return int(text)
    if not re.fullmatch(r"[-+]?\d+(\.\d+)?[eE]\+?\d{1,2}", text) or not float(text).is_integer():
        raise NotWhole(f"got {text}, expected an integer")
    return int(float(text))


def check_installed(option: str, extra: str, *modules: str) -> None:
    """Refuse an option whose packages are missing, before anything is loaded for it.

    Args:
        option: what needs them.
        extra: of driftrl, which has them.
        modules: their names when imported.
    """
    for module in modules:
        if importlib.util.find_spec(module) is None:
            raise ValueError(f"{option}: {module} is not installed; run pip install 'driftrl[{extra}]'")


def import_from_here() -> None:
    """Find modules of the present folder, after all others: `--env my_module:MyTask-v0`."""
    if not {"", os.getcwd()} & set(sys.path):
        sys.path.append(os.getcwd())


def fail(error: Exception) -> int:
    """Print an error in one line to stderr and return the exit code of bad input."""
    print("error:", " ".join(str(error).split()), file=sys.stderr)
    return 2


def until_output_closes(command: Callable[[], int]) -> int:
    """Run a command and return its exit code; where the reader of its output has gone (`| head`), end quietly with 141.

    That is what a shell says of a program that SIGPIPE ended. Training stops then, as it does at the first SIGTERM: who
    closed its output expects it to end, and what was learned is saved.
    """
    try:
        try:
            return command()
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        if not output_closed():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more when it ends
        return 128 + 13  # SIGPIPE, which Windows does not have


def output_closed() -> bool:
    """Whether nobody reads the standard output any longer; False where the system cannot say."""
    if not hasattr(select, "poll"):  # Windows
        return False
    poller = select.poll()
    try:
        poller.register(sys.stdout.fileno(), 0)
    except OSError:  # no file, in a notebook say
        return False
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poller.poll(0))


def users_line(error: BaseException) -> str | None:
    """Where an error arose, "file:line", if that is code of the user; None if it is ours, or of a library we call."""
    found = None
    for frame in traceback.extract_tb(error.__traceback__):
        path = Path(frame.filename)
        if not path.is_file():  # generated code
            continue
        path = path.resolve()
        if not any(path.is_relative_to(root) for root in _ROOTS) and not _is_library(path):
            found = f"{frame.filename}:{frame.lineno}"
    return found


def is_ours(error: BaseException) -> bool:
    """Whether it was our code that raised it: then one line says all."""
    last = Path(traceback.extract_tb(error.__traceback__)[-1].filename).resolve()
    return any(last.is_relative_to(root) for root in _ROOTS)


def _is_library(path: Path) -> bool:
    """Whether a file is of Python's library, or of a package whose errors we pass on."""
    paths = sysconfig.get_paths()
    for folder in {Path(paths["purelib"]).resolve(), Path(paths["platlib"]).resolve()}:
        if path.is_relative_to(folder):
            return path.relative_to(folder).parts[0] in _LIBRARIES
    return path.is_relative_to(Path(paths["stdlib"]).resolve())
