"""Train the runs of a group: one process per run, some at a time, with their progress and a table at the end."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from ..analysis.several import Row, format_runs, over_runs
from ..envs.mujoco_batch import available_cores
from ..runs.folder import alone, has_saved, read_settings
from ..runs.group import is_trained, members
from ..runs.log import warn
from .describe import command
from .member import PROGRAM
from .progress import Board, RunState

_TICK = 0.2
"""Seconds between two looks at the processes."""
_PATIENCE = 30.0
"""Seconds after a signal until a process that is still there is killed; a run stops within some 6."""


def check_seeds(seeds: Sequence[int]) -> None:
    """Refuse seeds of which no group can be made; their range is checked with the other settings."""
    if not seeds:
        raise ValueError("seeds: got none, expected different integers of 0 .. 2**31 - 1")
    if twice := sorted({seed for seed in seeds if seeds.count(seed) > 1}):
        raise ValueError(f"seeds: got {', '.join(map(str, twice))} more than once, expected different integers")


def check_jobs(jobs: int) -> None:
    """Refuse a number of runs at a time that trains none."""
    if jobs < 1:
        raise ValueError(f"jobs: got {jobs}, expected an integer of at least 1")


def train_group(group: Path, jobs: int, total_timesteps: int | None = None, device: str | None = None) -> int:
    """Train those runs of a group that are not complete; returns 0, 1 if some failed, 130 or 143 after a signal.

    Args:
        group: its folder.
        jobs: how many runs train at a time, at least 1.
        total_timesteps: steps of each run in all; None: as the runs say.
        device: likewise.
    """
    if jobs > (cores := available_cores()):
        warn(f"jobs: {jobs} runs at a time share {cores} core{'s' if cores > 1 else ''}; each gets slower")
    changed = {"--total-timesteps": total_timesteps, "--device": device}
    options = [str(text) for flag, value in changed.items() if value is not None for text in (flag, value)]
    runs = [_Run(folder, options, total_timesteps) for folder in members(group)]
    print(f"group folder: {group}", flush=True)
    with alone(group), _Signals(runs) as signals, Board([run.state for run in runs]) as board:
        try:
            while any(run.is_open for run in runs):
                _start_some(runs, jobs, signals)
                for run in runs:
                    run.look()
                signals.insist()
                board.show()
                time.sleep(_TICK)
        finally:  # nobody reads our output, say
            for run in runs:
                run.stop()
            for run in runs:
                run.wait()
    print(f"\n{_table(runs)}\n")
    print(_next_commands(group, runs))
    if signals.number is not None:
        return 128 + signals.number
    return 1 if any(run.failed for run in runs) else 0


def _start_some(runs: Sequence[_Run], jobs: int, signals: _Signals) -> None:
    """Start waiting runs up to the number of jobs; after a signal none."""
    for run in runs:
        if run.is_waiting and signals.number is not None:
            run.state.end("not begun" if not has_saved(run.folder) else "stopped")
        elif run.is_waiting and sum(each.process is not None for each in runs) < jobs:
            run.start()


class _Run:
    """A run of the group and its process."""

    def __init__(self, folder: Path, options: Sequence[str], total_timesteps: int | None) -> None:
        settings = read_settings(folder)
        self.folder, self._options, self._log = folder, options, folder / "output.log"
        self.state = RunState(settings.seed, total_timesteps or settings.total_timesteps)
        self.process: subprocess.Popen[bytes] | None = None
        self.failed = self.is_told = False
        if is_trained(folder, total_timesteps):
            self.state.end("complete")

    @property
    def is_open(self) -> bool:
        """Whether it waits or trains."""
        return self.state.ended is None

    @property
    def is_waiting(self) -> bool:
        return self.is_open and self.process is None

    def start(self) -> None:
        """Start its process, out of reach of the terminal's signals: this process passes them on."""
        where = [json.dumps([str(each) for each in sys.path]), json.dumps(sys.argv[0])]
        call = [sys.executable, "-c", PROGRAM, *where, "--resume", str(self.folder), *self._options]
        with self._log.open("ab") as log:
            self._log_begin = log.tell()
            self.process = subprocess.Popen(
                call, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, start_new_session=True
            )
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
        if code == 0 and is_trained(self.folder):
            self.state.end("complete")
        elif code in (128 + signal.SIGINT, 128 + signal.SIGTERM, -signal.SIGTERM):
            self.state.end("stopped")
        else:
            self.failed = True
            how = f"killed by signal {-code}" if code < 0 else f"exit code {code}: {self._last_words()}"
            self.state.end(f"failed ({how}); see {self._log}")

    def _last_words(self) -> str:
        """What its process said last: its error, where it says one."""
        text = self._log.read_bytes()[self._log_begin :].decode(errors="replace")
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("error:")]
        return (errors or lines or ["no output"])[-1].removeprefix("error: ")

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


class _Signals:
    """Within the block SIGINT and SIGTERM stop the runs: the first lets them save, the next ends them at once."""

    def __init__(self, runs: Sequence[_Run]) -> None:
        self._runs = runs
        self.number: int | None = None

    def __enter__(self) -> _Signals:
        self._before = {each: signal.signal(each, self._handle) for each in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.number is None:
            self.number, self._since = number, time.monotonic()
            os.write(2, b"\nstopping all runs after their iterations (again: at once, without saving)\n")
        for run in self._runs:
            run.stop()

    def insist(self) -> None:
        """After a signal, see to it that every process knows of it, and kill what is still there long after."""
        if self.number is None:
            return
        for run in self._runs:
            if time.monotonic() - self._since > _PATIENCE:
                run.stop(signal.SIGKILL)
            elif not run.is_told:  # its process was just being started when the signal came
                run.stop()


def _table(runs: Sequence[_Run]) -> str:
    rows = [_row(run) for run in runs]
    reports = [row.report for row in rows if row.report is not None]
    summaries = [(f"IQM of {len(reports)} [95 %]", over_runs(reports))] if len(reports) > 1 else []
    return format_runs("seed", rows, summaries)


def _row(run: _Run) -> Row:
    if run.state.ended == "complete":
        report: dict[str, Any] = json.loads((run.folder / "eval.json").read_text())
        return Row(str(run.state.seed), report)
    return Row(str(run.state.seed), None, run.state.ended or "")


def _next_commands(group: Path, runs: Sequence[_Run]) -> str:
    """What can be done next with a group."""
    folder = shlex.quote(str(group))
    return "\n".join(_lines(folder, all(run.state.ended == "complete" for run in runs), runs[0].state.total))


def _lines(folder: str, complete: bool, total: int) -> Iterator[str]:
    yield f"evaluate:  {command('evaluate')} {folder} --episodes 20"
    yield f"curves:    {command('tensorboard')} --logdir {folder}"
    yield f"resume:    {command('train')} --resume {folder}{f' --total-timesteps {2 * total}' if complete else ''}"
