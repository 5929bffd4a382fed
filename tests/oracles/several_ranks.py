"""Processes that train together, for tests: copies of this one, where nothing needs to be imported anew."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import socket
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist

from driftrl.commands import train

LONGEST = 180.0


class Said(NamedTuple):
    """What a rank of `train.py` came to."""

    code: int | None  # None: an exception left the command
    out: str  # with the traceback


def on_ranks(size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Call a function in a process of each of several ranks; what it returns, or the exception that it raises."""
    with tempfile.TemporaryDirectory() as folder:
        method = f"file://{folder}/store"

        def call(rank: int) -> Any:
            how: dict[str, Any] = {"init_method": method, "rank": rank, "world_size": size}
            dist.init_process_group("gloo", timeout=timedelta(seconds=LONGEST), **how)
            return function(*arguments)

        return _forked([(call, rank) for rank in range(size)])


def train_on_ranks(size: int, arguments: Sequence[str], before: Callable[[int], Any] | None = None) -> list[Said]:
    """What `torchrun --nproc_per_node SIZE train.py ARGUMENTS` does; `before` is called with the rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])

    def call(rank: int) -> Said:
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in names.items()})
        if before is not None:
            before(rank)
        path = Path(tempfile.mkstemp()[1])
        with path.open("w") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
            try:
                code = train.main(list(arguments))
            except BaseException:
                code = None
                traceback.print_exc()
        said = Said(code, path.read_text())
        path.unlink()
        return said

    return _forked([(call, rank) for rank in range(size)])


def _forked(calls: Sequence[tuple[Callable[[int], Any], int]]) -> list[Any]:
    context = multiprocessing.get_context("fork")
    pipes = [context.Pipe(duplex=False) for _ in calls]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of copies of a process that has threads
        processes = [
            context.Process(target=_run, args=(*call, pipe[1])) for call, pipe in zip(calls, pipes, strict=True)
        ]
        for process in processes:
            process.start()
    end = time.monotonic() + LONGEST
    try:
        for _, other in pipes:
            other.close()
        results = list[Any]()
        for receiver, _ in pipes:
            assert receiver.poll(max(0.0, end - time.monotonic())), "a rank does not end"
            try:
                results.append(pickle.loads(receiver.recv_bytes()))
            except EOFError:
                results.append(None)  # it was killed
        return results
    finally:
        for process in processes:
            process.kill()
            process.join()


def _run(function: Callable[[int], Any], rank: int, pipe: Any) -> None:
    try:
        result = function(rank)
    except BaseException as error:
        result = error.with_traceback(None)
        result.__cause__ = result.__context__ = None
    pipe.send_bytes(pickle.dumps(result))  # not as multiprocessing does: tensors would need this process to live on
    pipe.close()
    if dist.is_initialized():
        dist.destroy_process_group()
    os._exit(0)
