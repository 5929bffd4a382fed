"""A PolicyFlow agent that learns from few steps at once, for tests of environments."""

from __future__ import annotations

from typing import Any

from driftrl import PolicyFlow


def agent(env: Any, **fields: Any) -> PolicyFlow:
    """The agent; fields take the place of its settings."""
    settings: dict[str, Any] = {
        "n_steps": 20, "batch_size": 40, "n_epochs": 2, "actor_hidden": (16,), "critic_hidden": (16,), "seed": 0,
        "compile": "off", "device": "cpu",
    }  # fmt: skip
    return PolicyFlow("MlpPolicy", env, **(settings | fields))
