"""What a sweep has to train: the runs of a grid. A search gives its runs in the same way (study.py)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from ..commands.processes import Job
from ..runs.group import is_trained
from ..runs.lock import is_in_use
from .executors import Executor
from .plan import Planned, begin


class Source(Protocol):
    """Gives runs to train."""

    jobs: list[Job]
    """All that were given so far."""

    @property
    def is_open(self) -> bool:
        """Whether a run trains, waits, or is still to come."""

    def progress(self) -> str:
        """How far the whole is, for a line."""

    def next(self) -> Job | None:
        """A run to start now, if there is one."""

    def look(self) -> None:
        """Note what has come of the runs."""

    def close(self) -> None:
        """No more runs are started."""


class GridSource:
    """The runs of a grid, in their order."""

    def __init__(self, groups: Sequence[Planned], executor: Executor) -> None:
        self.jobs: list[Job] = []
        for group in groups:
            begin(group)
            self.jobs += jobs_of(group, executor, f"{group.runs[0].env_id} {group.name}")

    @property
    def is_open(self) -> bool:
        """Whether a run trains or waits."""
        return any(job.is_open for job in self.jobs)

    def progress(self) -> str:
        """How many runs are complete, of all."""
        return f"{sum(job.state.ended == 'complete' for job in self.jobs)} of {len(self.jobs)} runs complete"

    def next(self) -> Job | None:
        """The first run that waits and that no other process trains."""
        return next_of(self.jobs)

    def look(self) -> None:
        """Note what has come of the runs."""
        for job in self.jobs:
            job.look()

    def close(self) -> None:
        """Those that wait are not started."""
        for job in self.jobs:
            if job.is_waiting:
                job.end_stopped()


def jobs_of(group: Planned, executor: Executor, label: str) -> list[Job]:
    """The runs of a group, whose folders are there."""
    return [executor.job(group.run_folder(run), f"{label} s{run.seed}", run.total_timesteps) for run in group.runs]


def next_of(jobs: Sequence[Job]) -> Job | None:
    """The first run that waits and that no other process trains; one that another process has completed has ended."""
    for job in jobs:
        if job.is_waiting and not is_in_use(job.folder):
            if not is_trained(job.folder, job.state.total):
                return job
            job.state.end("complete")
    return None
