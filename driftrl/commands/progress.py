"""The progress of several runs: a line each, updated in place on a terminal, else printed now and then."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Sequence
from typing import Any

from tqdm import tqdm

_EVERY = 30.0
"""Seconds between two lines of a run where there is no terminal; a tenth of the run is the other occasion."""


class RunState:
    """Where a run is.

    Args:
        label: what its line begins with.
        total: steps to train for.
    """

    def __init__(self, label: str, total: int) -> None:
        self.label, self.total = label, total
        self.ended: str | None = None
        self._news: dict[str, Any] = {}

    def take(self, news: dict[str, Any]) -> None:
        """Take what the run's process reports: steps, begin, seconds, return; or that it evaluates."""
        self._news = {**self._news, **news}

    def end(self, how: str) -> None:
        """The run has ended."""
        self.ended = how

    @property
    def share(self) -> float:
        """Share of the steps that are done; of none to train, for pretraining alone, whether it has ended."""
        return min(float(self._news.get("steps", 0)) / self.total, 1.0) if self.total else float(self.ended is not None)

    @property
    def stage(self) -> str:
        """Changes where a new line is due at once."""
        return self.ended or ("evaluates" if self._news.get("evaluates") else "trains" if self._news else "waits")

    def line(self) -> str:
        """One line about the run."""
        head = self.label
        if self.stage == "evaluates":
            return f"{head} 100%  evaluating"
        if self.stage != "trains":
            return f"{head} {self.stage if self.ended else '  0%'}"
        steps, news = int(self._news["steps"]), self._news
        speed = (steps - int(news["begin"])) / max(float(news["seconds"]), 1e-9)
        mean = "return -" if news["return"] is None else f"return {news['return']:.1f}"
        left = f"{tqdm.format_interval(max(self.total - steps, 0) / speed)} left" if speed > 0 else ""
        return f"{head} {self.share:4.0%}  {steps:,} steps  {speed:,.0f} steps/s  {mean}  {left}"


class Board:
    """Shows the runs' lines; a context manager that leaves their last state on the screen."""

    def __init__(self, runs: Sequence[RunState]) -> None:
        self._runs = runs
        self._in_place = sys.stdout.isatty() and len(runs) < shutil.get_terminal_size().lines
        self._drawn = ""
        self._shown: dict[RunState, tuple[str, float, float]] = {}

    def __enter__(self) -> Board:
        return self

    def __exit__(self, *exception: object) -> None:
        if exception[0] is None:
            self.show()

    def show(self) -> None:
        """Bring the lines up to date."""
        if self._in_place:
            width = shutil.get_terminal_size().columns - 1
            lines = "".join(f"\033[K{run.line()[:width]}\n" for run in self._runs)
            if lines != self._drawn:
                print((f"\033[{len(self._runs)}A" if self._drawn else "") + lines, end="", flush=True)
                self._drawn = lines
            return
        now = time.monotonic()
        for run in self._runs:
            stage, share, at = self._shown.setdefault(run, ("waits", 0.0, now))
            late = run.stage == "trains" and (run.share - share >= 0.1 or now - at >= _EVERY)
            if run.stage != stage or late:
                self._shown[run] = (run.stage, run.share, now)
                print(run.line(), flush=True)
