"""One run of a group, in a process of its own: `main` is what that process calls.

Its output goes to the run's output.log. Its first output carries the run's progress to the process that started it, as
lines of JSON. Its input tells it that this process is there: where it ends, the run stops as by SIGTERM.
"""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Sequence
from typing import Any

PROGRAM = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); sys.argv[:3] = [json.loads(sys.argv[2])]; "
    "from driftrl.commands.member import main; sys.exit(main(sys.argv[1:]))"
)
"""What Python runs; its arguments are the starter's sys.path and sys.argv[0] as JSON, then those of `main`."""


def main(args: Sequence[str]) -> int:
    """Train one run; returns the exit code of `train.py --resume`."""
    progress = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    threading.Thread(target=_watch_the_starter, daemon=True).start()
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
