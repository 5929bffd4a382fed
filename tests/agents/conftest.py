"""Fixtures that several tests of the agents share."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="module")
def toy() -> ModuleType:
    """The affine flow, whose actions are Gaussian and policy gradient is known."""
    path = Path(__file__).parents[1] / "oracles" / "affine_flow.py"
    spec = importlib.util.spec_from_file_location("affine_flow", path)
    assert spec is not None and spec.loader is not None
    module = sys.modules["affine_flow"] = importlib.util.module_from_spec(spec)  # dataclasses look it up
    spec.loader.exec_module(module)
    return module
