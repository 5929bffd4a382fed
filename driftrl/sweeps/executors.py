"""Where the runs of a sweep train: processes on this machine."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Protocol

from ..commands.processes import Job, RunProcess


class Executor(Protocol):
    """A place where runs train; a context manager that holds what it needs for that."""

    at_a_time: int
    """How many runs train at a time."""

    def __enter__(self) -> Executor:
        """Get hold of what runs need."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Give it back."""

    def job(self, folder: Path, label: str, total_timesteps: int) -> Job:
        """A run that can be started there."""


class Local:
    """Processes on this machine.

    Args:
        jobs: runs at a time.
        retries: how many times a run is started again after its process was killed.
    """

    def __init__(self, jobs: int, retries: int) -> None:
        self.at_a_time, self._retries = jobs, retries

    def __enter__(self) -> Local:
        return self

    def __exit__(self, *exception: object) -> None:
        return None

    def job(self, folder: Path, label: str, total_timesteps: int) -> Job:
        """A run in a process of its own."""
        options = ["--total-timesteps", str(total_timesteps)]
        return RunProcess(folder, label, options, total_timesteps, self._retries, waits=True)
