"""Fixtures that several tests of the agents share."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="module")
def toy() -> ModuleType:
    """The linear flow of the benchmark, whose actions are Gaussian and policy gradient is known."""
    path = Path(__file__).parents[2] / "benchmarks" / "ratio_gradients.py"
    spec = importlib.util.spec_from_file_location("ratio_gradients", path)
    assert spec is not None and spec.loader is not None
    module = sys.modules["ratio_gradients"] = importlib.util.module_from_spec(spec)  # dataclasses look it up
    spec.loader.exec_module(module)
    return module
