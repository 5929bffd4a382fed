"""Where the runs of a sweep train: a Ray cluster that is there already. Its machines share the folder of the sweep."""

from __future__ import annotations

import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

from ..commands.processes import Job
from .progress_file import last_steps
from .spec import RayOptions
from .worker import train_run

_PATIENCE = 30.0
"""Seconds that a run has for its last checkpoint after it was stopped."""
_REACH = 10.0
"""Seconds to reach a cluster."""
_LONGEST = 300
"""Characters of an error of Ray that are shown."""
_LOOK = 2.0
"""Seconds between two looks at a run's log, which tells how far it is."""


class Cluster:
    """A Ray cluster; a context manager that is connected to it.

    Args:
        options: which one, and what a run needs of it.
        jobs: runs at a time; None: as many as it has room for at the start.
        retries: how many times a run is started again after its process, its worker or its machine was lost.

    Raises:
        ValueError: if Ray is not installed; entering it, if no cluster is reached, or no machine has what a run needs.
    """

    def __init__(self, options: RayOptions, jobs: int | None, retries: int) -> None:
        try:
            import ray
        except ModuleNotFoundError as error:
            raise ValueError("executor: ray is not installed; run pip install 'driftrl[sweep]'") from error
        self._ray, self._options, self._retries = ray, options, retries
        self.at_a_time = jobs or 1
        self._fits = jobs is None

    def __enter__(self) -> Cluster:
        try:
            _check_reached(self._options.address)
            self._ray.init(address=self._options.address, log_to_driver=False, logging_level="ERROR")
        except (OSError, RuntimeError, ValueError) as error:
            text = " ".join(str(error).split())[:_LONGEST]
            raise ValueError(
                f"ray.address: found no cluster at {self._options.address} ({text}); start one by ray start --head, or "
                "give the address of one"
            ) from error
        try:
            room = self._room()
        except ValueError:
            self._ray.shutdown()
            raise
        if self._fits:
            self.at_a_time = room
        self._task = self._ray.remote(
            num_cpus=self._options.cpus, num_gpus=self._options.gpus, resources=dict(self._options.resources),
            max_retries=0, max_calls=1,
        )(train_run)  # fmt: skip
        return self

    def __exit__(self, *exception: object) -> None:
        self._ray.shutdown()

    def _room(self) -> int:
        """How many runs the machines have room for, each run on one of them.

        Raises:
            ValueError: if none fits any machine: Ray would wait for one for ever.
        """
        needed = {"CPU": self._options.cpus, "GPU": self._options.gpus, **self._options.resources}
        needed = {name: amount for name, amount in needed.items() if amount > 0}
        if not needed:
            return 1
        machines = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        room = sum(min(int(each.get(name, 0.0) / amount) for name, amount in needed.items()) for each in machines)
        if not room:
            best = {name: max((each.get(name, 0.0) for each in machines), default=0.0) for name in needed}
            wanted, found = (", ".join(f"{amount:g} {name}" for name, amount in of.items()) for of in (needed, best))
            raise ValueError(f"ray: a run needs {wanted}; no machine has that, the most of each is {found}")
        return room

    def job(self, folder: Path, label: str, total_timesteps: int) -> Job:
        """A run as a task of the cluster."""
        return _Task(self._ray, self._task, folder.resolve(), label, total_timesteps, self._retries)


def _check_reached(address: str) -> None:
    """Fail at once where nobody listens: Ray would try for minutes.

    Raises:
        OSError: if an address with a port, of another kind than "auto" or "local", is not reached.
    """
    host, colon, port = address.rpartition("://")[2].rpartition(":")
    if colon and port.isdigit():
        socket.create_connection((host, int(port)), timeout=_REACH).close()


class _Task(Job):
    """A run that is a task of a Ray cluster."""

    def __init__(self, ray: Any, task: Any, folder: Path, label: str, total_timesteps: int, retries: int) -> None:
        super().__init__(folder, label, total_timesteps, retries)
        self._ray, self._task, self._looked_at = ray, task, 0.0
        self._reference: Any = None

    @property
    def is_running(self) -> bool:
        """Whether the cluster has it, waiting for room or training."""
        return self._reference is not None

    def start(self) -> None:
        """Give it to the cluster."""
        options = ["--total-timesteps", str(self.state.total)]
        self._reference = self._task.remote(str(self.folder), options, sys.argv[0])

    def look(self) -> None:
        """Note whether it has ended, and how."""
        if self._reference is None:
            return
        if not self._ray.wait([self._reference], timeout=0)[0]:
            self._note_progress()
            return
        errors = self._ray.exceptions
        try:
            code, said = self._ray.get(self._reference)
        except errors.TaskCancelledError:
            code, said = -signal.SIGTERM, ""
        except errors.RayTaskError as error:  # of our own function: a folder that this machine does not see, say
            code, said = 1, " ".join(str(error.cause or error).split())[:_LONGEST]
        except errors.RayError:  # the worker or its machine is lost
            code, said = -signal.SIGKILL, ""
        self._reference = None
        self._note_end(code, said)

    def stop(self, number: int = signal.SIGTERM) -> None:
        """Cancel the task, if there is one: the run saves a checkpoint first, unless it is killed."""
        if self._reference is not None:
            self._ray.cancel(self._reference, force=number == signal.SIGKILL)
            self.is_told = True

    def wait(self) -> None:
        """Wait until it has ended; kill its worker where that takes too long."""
        if self._reference is not None:
            if not self._ray.wait([self._reference], timeout=_PATIENCE)[0]:
                self.stop(signal.SIGKILL)
                self._ray.wait([self._reference], timeout=_PATIENCE)
            self.look()

    def _note_progress(self) -> None:
        now = time.monotonic()
        if now - self._looked_at >= _LOOK:
            self._looked_at = now
            steps = last_steps(self.folder)
            if steps is not None:
                self.state.take({"steps": steps})
