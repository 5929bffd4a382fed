"""One run of a group, in a process of its own: `call` starts it, `main` is what it does.

Its output goes to the run's output.log. Its first output carries the run's progress to the process that started it, as
lines of JSON. Its input tells it that this process is there: where it ends, the run stops as by SIGTERM.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

_PROGRAM = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); sys.argv[:3] = [json.loads(sys.argv[2])]; "
    "from driftrl.commands.member import main; sys.exit(main(sys.argv[1:]))"
)
"""What Python runs; its arguments are the starter's sys.path and sys.argv[0] as JSON, then those of `main`."""
_WAIT = "--wait"


def call(folder: Path, options: Sequence[str], program: str, waits: bool) -> list[str]:
    """The command that trains a run.

    Args:
        folder: of the run.
        options: of `train.py --resume`.
        program: what it says that the user called.
        waits: whether it waits where another process trains the run, in place of an error.
    """
    where = [json.dumps([str(each) for each in sys.path]), json.dumps(program)]
    return [sys.executable, "-c", _PROGRAM, *where, *([_WAIT] if waits else []), "--resume", str(folder), *options]


def last_words(log: Path, begin: int) -> str:
    """What a run said last, after so many bytes of its output.log: its error, where it says one."""
    text = log.read_bytes()[begin:].decode(errors="replace")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error:")]
    return (errors or lines or ["no output"])[-1].removeprefix("error: ")


def main(args: Sequence[str]) -> int:
    """Train one run; returns the exit code of `train.py --resume`."""
    progress = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    threading.Thread(target=_watch_the_starter, daemon=True).start()
    if args[0] == _WAIT:
        from ..runs.lock import turn

        with turn(Path(args[2])):
            return _train(args[1:], progress)
    return _train(args, progress)


def _train(args: Sequence[str], progress: IO[str]) -> int:
    from .train import main as train  # what takes seconds to import comes after the watch

    def report(values: dict[str, Any]) -> None:
        try:
            print(json.dumps(values), file=progress, flush=True)
        except OSError:  # nobody reads it any more: the watch ends the run
            return

    return train(args, report)


def _watch_the_starter() -> None:
    while os.read(0, 1):  # sys.stdin would hold a lock that Python wants when it ends
        continue
    os.kill(os.getpid(), signal.SIGTERM)
