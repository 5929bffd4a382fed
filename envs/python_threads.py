"""Threads of Python that share work: what steps the simulators where compiled code does not."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from itertools import pairwise


class PythonThreads:
    """Each thread takes an equal share of n things; the calling one is one of them."""

    def __init__(self, n: int, threads: int) -> None:
        bounds = [n * i // threads for i in range(threads + 1)]
        self._chunks = [slice(low, high) for low, high in pairwise(bounds)]
        self._pool: ThreadPoolExecutor | None = None
        self._process = os.getpid()

    def run(self, work: Callable[[slice], None]) -> None:
        """Do the work of all shares; what the first one raises is raised when all have ended."""
        first, *rest = self._chunks
        if self._process != os.getpid():  # a forked process has none of the threads
            self._pool, self._process = None, os.getpid()
        if self._pool is None and rest:
            self._pool = ThreadPoolExecutor(len(rest), "mujoco")
        others = [self._pool.submit(work, chunk) for chunk in rest] if self._pool else []
        try:
            work(first)
        finally:  # after an error, too: nothing may move any more when it is reported
            wait(others)
        for other in others:
            other.result()

    def close(self) -> None:
        """End the threads."""
        if self._pool is not None and self._process == os.getpid():
            self._pool.shutdown()
        self._pool = None
