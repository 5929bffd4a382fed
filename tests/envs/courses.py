"""Whether a scripted episode is what its task does."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np

from driftrl.envs.episodes import Episode
from driftrl.envs.make import with_module


def assert_course(env_id: str, episode: Episode, seed: int, steps: int) -> None:
    """That the first episode of a seed is the environment's own, action by action, and ends by the time limit."""
    env: Any = gymnasium.make(with_module(env_id))
    assert isinstance(episode.observations, dict)
    obs, _ = env.reset(seed=int(np.random.default_rng(seed).integers(2**31)))
    for step, action in enumerate(episode.actions):
        for name, rows in episode.observations.items():
            assert np.array_equal(rows[step], obs[name])
        assert env.action_space.contains(action)
        obs, reward, terminated, truncated, _ = env.step(action)
        assert (reward, terminated, truncated) == (
            episode.rewards[step], episode.terminated[step], episode.truncated[step],
        )  # fmt: skip
    assert truncated and step == steps - 1
