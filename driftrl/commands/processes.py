"""Runs in processes of their own: start them, hear of their progress, stop them, notice how they end."""

from __future__ import annotations

import abc
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import FrameType

from ..runs.folder import read_settings, saved_steps
from ..runs.group import is_trained
from .member import call, last_words
from .progress import RunState

_PATIENCE = 30.0
"""Seconds after a signal until a process that is still there is killed; a run stops within some 6."""
_STOPPED = (128 + signal.SIGINT, 128 + signal.SIGTERM, -signal.SIGTERM)


class Job(abc.ABC):
    """A run that trains elsewhere: it waits, trains, and ends, or waits again where its process was killed.

    Args:
        folder: of the run.
        label: what its line calls it.
        total_timesteps: steps to train for in all; None: as its config.json says.
        retries: how many times it is started again after its process was killed from outside.
    """

    def __init__(self, folder: Path, label: str, total_timesteps: int | None = None, retries: int = 0) -> None:
        self.folder, self.log = folder, folder / "output.log"
        self.state = RunState(label, total_timesteps or read_settings(folder).total_timesteps)
        self.failed = self.is_told = self.is_unwanted = False
        self._retries = retries
        if is_trained(folder, total_timesteps):
            self.state.end("complete")

    @property
    @abc.abstractmethod
    def is_running(self) -> bool:
        """Whether somebody works on it."""

    @abc.abstractmethod
    def start(self) -> None:
        """Start it; it is waiting."""

    @abc.abstractmethod
    def look(self) -> None:
        """Note whether it has ended, and how."""

    @abc.abstractmethod
    def stop(self, number: int = signal.SIGTERM) -> None:
        """Send it a signal, if it runs."""

    @abc.abstractmethod
    def wait(self) -> None:
        """Wait until it does not run; kill it where that takes too long."""

    @property
    def is_open(self) -> bool:
        """Whether it waits or trains."""
        return self.state.ended is None

    @property
    def is_waiting(self) -> bool:
        """Whether it can be started."""
        return self.is_open and not self.is_running

    def drop(self) -> None:
        """End it because its result is not wanted any longer: it saves a checkpoint and stops."""
        self.is_unwanted = True
        if self.is_running:
            self.stop()
        else:
            self.state.end("pruned")

    def end_stopped(self) -> None:
        """End it because of a signal, and say what it has saved."""
        if found := saved_steps(self.folder):
            self.state.end(f"stopped at {found:,} of {self.state.total:,} steps, with a checkpoint")
        else:
            self.state.end("stopped, nothing saved" if self.is_told else "not begun")

    def _note_end(self, code: int, said: str) -> None:
        """It does not run any longer: note how that came.

        Args:
            code: exit code of its process, minus the number of the signal that killed it.
            said: what it said last.
        """
        if code == 0 and is_trained(self.folder, self.state.total):
            self.state.end("complete")
        elif self.is_unwanted:
            self.state.end("pruned")
        elif (code < 0 or code in _STOPPED) and not self.is_told and self._retries > 0:
            self._retries -= 1
        elif code in _STOPPED:
            self.end_stopped()
        else:
            self.failed = True
            how = f"killed by signal {-code}" if code < 0 else f"exit code {code}: {said}"
            self.state.end(f"failed ({how}); see {self.log}")


class RunProcess(Job):
    """A run in a process on this machine.

    Args:
        folder: of the run.
        label: what its line calls it.
        options: of `train.py --resume`.
        total_timesteps: steps to train for in all; None: as its config.json says.
        retries: how many times it is started again after its process was killed from outside.
        waits: whether its process waits where another one trains the run, in place of an error.
    """

    def __init__(
        self, folder: Path, label: str, options: Sequence[str] = (), total_timesteps: int | None = None,
        retries: int = 0, waits: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(folder, label, total_timesteps, retries)
        self._options, self._waits = options, waits
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def is_running(self) -> bool:
        """Whether it has a process."""
        return self.process is not None

    def start(self) -> None:
        """Start its process, out of reach of the terminal's signals: this process passes them on."""
        with self.log.open("ab") as log:
            self._log_begin = log.tell()
            self.process = subprocess.Popen(
                call(self.folder, self._options, sys.argv[0], self._waits),
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, start_new_session=True,
            )  # fmt: skip
        self._reader = threading.Thread(target=self._listen, args=(self.process,), daemon=True)
        self._reader.start()

    def _listen(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None
        with process.stdout as lines:
            for line in lines:
                with contextlib.suppress(ValueError):  # half a line of a process that was killed
                    self.state.take(json.loads(line))

    def look(self) -> None:
        """Note whether its process has ended, and how."""
        if self.process is None or (code := self.process.poll()) is None:
            return
        assert self.process.stdin is not None
        self.process.stdin.close()
        self._reader.join(timeout=1)
        self.process = None
        self._note_end(code, last_words(self.log, self._log_begin))

    def stop(self, number: int = signal.SIGTERM) -> None:
        """Send its process a signal, if there is one."""
        if self.process is not None:
            self.process.send_signal(number)
            self.is_told = True

    def wait(self) -> None:
        """Wait for its process, and kill it where that takes too long."""
        if self.process is not None:
            try:
                self.process.wait(_PATIENCE)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
            self.look()


class Signals:
    """Within the block SIGINT and SIGTERM stop the runs: the first lets them save, the next ends them at once.

    Args:
        jobs: gives the runs that there are.
    """

    def __init__(self, jobs: Callable[[], Iterable[Job]]) -> None:
        self._jobs = jobs
        self.number: int | None = None

    def __enter__(self) -> Signals:
        self._before = {each: signal.signal(each, self._handle) for each in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.number is None:
            self.number, self._since = number, time.monotonic()
            os.write(2, b"\nstopping all runs after their iterations (again: at once, without saving)\n")
        for job in self._jobs():
            job.stop()

    def insist(self) -> None:
        """After a signal, see to it that every process knows of it, and kill what is still there long after."""
        if self.number is None:
            return
        for job in self._jobs():
            if time.monotonic() - self._since > _PATIENCE:
                job.stop(signal.SIGKILL)
            elif not job.is_told:  # its process was just being started when the signal came
                job.stop()
