"""Agents compute in float32: another default type is refused where it would hurt, and changes nothing elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from driftrl import LipschitzMBPO, PolicyFlow

FIELDS: dict[type[Any], dict[str, Any]] = {
    PolicyFlow: {"n_steps": 16, "batch_size": 16, "n_epochs": 1},
    LipschitzMBPO: {"learning_starts": 4, "gradient_steps": 1, "model_hidden": (8,), "model_epochs": 1},
}
REFUSAL = r"default dtype: got torch.float64, expected torch.float32, .* call torch.set_default_dtype"


@pytest.fixture
def restored() -> Iterator[None]:
    """The default type as it was, whatever the test sets."""
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("kind", FIELDS)
def test_float64_by_default(kind: type[Any], tmp_path: Path, restored: None) -> None:
    agent = kind("MlpPolicy", "InvertedPendulum-v5", seed=0, device="cpu", **FIELDS[kind])
    agent.save(tmp_path / "agent.zip")
    obs = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)

    def actions() -> list[np.ndarray]:
        torch.manual_seed(0)
        return [agent.predict(each, deterministic=sure)[0] for each in (obs, obs[0]) for sure in (True, False)]

    expected = actions()
    torch.set_default_dtype(torch.float64)
    for got, right in zip(actions(), expected, strict=True):
        np.testing.assert_array_equal(got, right, strict=True)
    agent.save(tmp_path / "again.zip")
    assert (tmp_path / "again.zip").stat().st_size == (tmp_path / "agent.zip").stat().st_size
    attempts: tuple[Callable[[], Any], ...] = (
        lambda: kind("MlpPolicy", "InvertedPendulum-v5", device="cpu", **FIELDS[kind]),
        lambda: kind.load(tmp_path / "agent.zip", device="cpu"),
        lambda: agent.learn(32),
    )
    for refused in attempts:
        with pytest.raises(ValueError, match=REFUSAL):
            refused()
    torch.set_default_dtype(torch.float32)
    agent.learn(32)
