"""One training by several processes that torchrun starts: `torchrun --nproc_per_node 2 train.py policyflow --env ID`.

Rank 0 prints, logs, evaluates and saves. The others train along; they print nothing but the traceback of an error in
the user's own code. What ends one of them rank 0 says in one line.
"""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from ..agents.common.ranks import RankError, present
from ..agents.registry import AGENTS
from ..runs.folder import RunSettings, new_run
from ..runs.lock import alone

ANSWER = timedelta(minutes=30)
"""How long ranks wait for one that lives: rank 0 evaluates meanwhile. Of one that dies they hear at once."""


def started_by_torchrun() -> bool:
    """Whether this process is one of several of the same training."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    return all(name in os.environ for name in names) and os.environ["WORLD_SIZE"] != "1"


def in_ranks(command: Callable[[], int]) -> int:
    """Run a command in the process group that torchrun's environment variables describe, if there are any."""
    if not started_by_torchrun() or dist.is_initialized():
        return command()
    devices = torch.cuda.device_count()
    if devices:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % devices)
    has_own = devices >= int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # which NCCL asks for; gloo goes through the host
    dist.init_process_group("cpu:gloo,cuda:nccl" if devices and has_own else "gloo", timeout=ANSWER)
    code = 1
    try:
        with contextlib.ExitStack() as stack:
            if present().rank:
                stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
                stack.enter_context(warnings.catch_warnings())
                warnings.simplefilter("ignore")
            code = command()
        return code
    finally:
        if code and present().aligned:  # torchrun ends all as soon as one fails: not before rank 0 has said why
            with contextlib.suppress(RankError):
                present().gather(None)
        dist.destroy_process_group()


def is_said_elsewhere() -> bool:
    """Whether rank 0 says what ends this rank."""
    return present().rank > 0 and present().aligned


def check_agent(name: str) -> None:
    """Refuse agents that do not train on several ranks.

    Raises:
        ValueError: if this is one of several ranks and the agent is such a one.
    """
    able = [each for each, entry in AGENTS.items() if getattr(entry.agent, "trains_on_ranks", False)]
    if (size := present().size) > 1 and name not in able:
        raise ValueError(
            f"ranks: got {size} for {name}, which trains in one process; leave out torchrun, or use {', '.join(able)}"
        )


def check_same_file(path: Path) -> None:
    """Refuse to go on from different files: all ranks must see the run's folder."""
    if len(names := {each.name for each in present().gather(path)}) > 1:
        got = ", ".join(sorted(names))
        raise ValueError(f"ranks: got {got} as the newest on different ranks; all must see the run's folder")


@contextlib.contextmanager
def run_folder(root: Path, settings: RunSettings) -> Iterator[Path | None]:
    """The folder of a new run, on rank 0; the others have none."""
    if present().rank:
        yield None
        return
    with new_run(root, settings) as folder, alone(folder):
        yield folder


def say(text: str) -> None:
    """Print to stderr, on rank 0."""
    if not is_said_elsewhere():
        print(text, file=sys.stderr)
