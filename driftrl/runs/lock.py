"""Locks between processes: one that trains in a folder, or writes a file, keeps others out until it ends or dies."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Be the only process that trains in a run's folder; where the system cannot say (Windows), believe it.

    Raises:
        ValueError: if another one does.
    """
    if os.name != "posix":
        yield
        return
    import fcntl

    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise ValueError(f"run in use: another process trains {folder}; wait for it, or stop it") from None
    finally:
        os.close(descriptor)


def is_in_use(folder: Path) -> bool:
    """Whether a process trains in a folder."""
    try:
        with alone(folder):
            return False
    except ValueError:
        return True


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
