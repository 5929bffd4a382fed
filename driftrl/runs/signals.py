"""Signals that end a run: SIGINT and SIGTERM stop training where nothing is lost."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from types import FrameType


@contextlib.contextmanager
def sigterm_as_interrupt() -> Iterator[None]:
    """Within the block SIGTERM raises KeyboardInterrupt, as SIGINT does: what is open gets closed."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt(number)

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def exit_code(interrupt: KeyboardInterrupt) -> int:
    """Exit code of a process that a signal ended: 130 for SIGINT, 143 for SIGTERM."""
    number: int = interrupt.args[0] if interrupt.args else signal.SIGINT
    return 128 + number


class StopOnSignal:
    """Within the block the first SIGINT or SIGTERM asks training to stop; the next one is handled as outside.

    `Checkpoints` stops it where nothing is lost, between an update and the next rollout. Where that takes longer than
    `PATIENCE` seconds, training is interrupted.

    Args:
        says_so: whether to print that training will stop; one of several ranks is enough.

    Attributes:
        signal: what came here.
        agreed: what stops all ranks, where nothing is lost.
        ran_out: whether it took too long, and training was interrupted.
    """

    PATIENCE = 6.0

    def __init__(self, says_so: bool = True) -> None:
        self.signal: int | None = None
        self.agreed: int | None = None
        self.ran_out = False
        self._says_so = says_so

    def __enter__(self) -> StopOnSignal:
        self._handlers = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        self._handlers[signal.SIGALRM] = signal.signal(signal.SIGALRM, self._interrupt)
        return self

    def __exit__(self, *exception: object) -> None:
        self.be_patient()
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def be_patient(self) -> None:
        """Do not interrupt: training has stopped."""
        signal.setitimer(signal.ITIMER_REAL, 0)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, self._handlers[each])
        signal.setitimer(signal.ITIMER_REAL, self.PATIENCE)
        if self._says_so:
            os.write(2, b"\nstopping after this iteration (again: at once, without saving)\n")  # print is not reentrant

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        self.ran_out = True
        raise KeyboardInterrupt(self.signal)
