"""What a Ray task does: train one run in a process of its own. Ray's workers import this and little else."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from ..commands.member import call, last_words

_TICK = 0.1
"""Seconds between two looks at the process; Ray's way to interrupt a task does not wake one that waits for it."""


def train_run(folder: str, options: Sequence[str], program: str) -> tuple[int, str]:
    """Train a run from where it is; if this worker dies, the run saves and stops, as its input ends.

    Args:
        folder: of the run, the same on all machines.
        options: of `train.py --resume`.
        program: what the run says that the user called.

    Returns:
        Exit code of its process, and what it said last.
    """
    log = Path(folder) / "output.log"
    with log.open("ab") as output:
        begin = output.tell()
        process = subprocess.Popen(
            call(Path(folder), options, program, waits=True),
            stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=output, start_new_session=True,
        )  # fmt: skip
    try:
        _wait(process)
    except KeyboardInterrupt:  # the task was cancelled: the run saves, a second time says that nobody waits for that
        process.terminate()
        try:
            _wait(process)
        except KeyboardInterrupt:
            process.kill()
    return process.wait(), last_words(log, begin)


def _wait(process: subprocess.Popen[bytes]) -> None:
    while process.poll() is None:
        time.sleep(_TICK)
