"""Locks between processes: one that trains in a folder, or writes a file, keeps others out until it ends or dies."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

_TURN = "run.lock"
"""File of a run folder that the processes of sweeps lock, the directory itself being locked by whoever trains."""


@contextlib.contextmanager
def alone(folder: Path, tries: int = 10) -> Iterator[None]:
    """Be the only process that trains in a run's folder; where the system cannot say (Windows), believe it.

    Args:
        folder: of the run.
        tries: how often to look, 0.01 s apart: `is_in_use` of another process holds the lock for a moment.

    Raises:
        ValueError: if another one does.
    """
    if os.name != "posix":
        yield
        return
    import fcntl

    descriptor = os.open(folder, os.O_RDONLY)
    try:
        for left in reversed(range(tries)):
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not left:
                    text = f"run in use: another process trains {folder}; wait for it, or stop it"
                    raise ValueError(text) from None
                time.sleep(0.01)
        yield
    finally:
        os.close(descriptor)


def is_in_use(folder: Path) -> bool:
    """Whether a process trains in a folder, or is about to: `turn` is taken before what takes seconds to import."""
    return not (_is_free(folder) and (not (folder / _TURN).exists() or _is_free(folder / _TURN)))


@contextlib.contextmanager
def turn(folder: Path) -> Iterator[None]:
    """Wait until no other process is in such a block of the folder, nor trains in it by `alone`."""
    with exclusively(folder / _TURN):
        told = False
        while not _is_free(folder):
            if not told:
                print(f"waiting for another process that trains {folder}", flush=True)
            told = True
            time.sleep(0.2)
        yield


def _is_free(folder: Path) -> bool:
    try:
        with alone(folder, tries=1):
            return True
    except ValueError:
        return False


@contextlib.contextmanager
def exclusively(path: Path) -> Iterator[None]:
    """Wait until no other process is in such a block of the same file, which is made where there is none."""
    import fcntl

    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
