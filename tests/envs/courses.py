"""The same course of a batch and of single environments, and of a script and its task."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
from numpy.typing import NDArray
from stable_baselines3.common.vec_env import VecEnv

from driftrl.envs.episodes import Episode
from driftrl.envs.make import with_module


def assert_same_course(
    ours: VecEnv, theirs: VecEnv, draw: Callable[[], NDArray[np.float32]], steps: int
) -> tuple[int, int, int]:
    """Reset and step both by the same actions; all they report is the same to the last bit, but for the time.

    Returns:
        Terminations, truncations and successes at the end of an episode.
    """
    assert (ours.observation_space, ours.action_space) == (theirs.observation_space, theirs.action_space)
    np.testing.assert_array_equal(np.asarray(ours.reset()), np.asarray(theirs.reset()), strict=True)
    terminations = truncations = successes = 0
    for _ in range(steps):
        actions = draw()
        *mine, infos = ours.step(actions)
        *others, expected_infos = theirs.step(actions)
        for one, other in zip(mine, others, strict=True):
            np.testing.assert_array_equal(np.asarray(one), np.asarray(other), strict=True)
        for info, expected in zip(infos, expected_infos, strict=True):
            assert set(info) == set(expected)
            assert type(info["is_success"]) is bool
            for key in set(info) - {"episode"}:
                np.testing.assert_array_equal(info[key], expected[key])
            if "episode" in info:
                truncations += info["TimeLimit.truncated"]
                terminations += not info["TimeLimit.truncated"]
                successes += info["is_success"]
                assert {**info["episode"], "t": 0} == {**expected["episode"], "t": 0}
    return terminations, truncations, successes


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
