"""Settings of the whole test run: one thread, repeatable examples, GPU tests only where there is a GPU."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch reads it, and for the processes that tests start

import pytest
import torch
from hypothesis import settings

# Floating-point sums depend on how many threads share them: one makes results independent of the number of cores.
torch.set_num_threads(1)

# The same examples each time, and no deadline: a first call into torch may take a second.
settings.load_profile("ci")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests marked `gpu` where there is no CUDA device."""
    if torch.cuda.is_available():
        return
    no_cuda = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(no_cuda)
