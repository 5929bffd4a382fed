"""Batches beside the oracle of their numbers: Gymnasium's own environments in Stable-Baselines3's DummyVecEnv."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecEnv

from driftrl.envs.make import make_vec, with_module


def gymnasium_env(id: str, n: int, **env_kwargs: Any) -> VecEnv:
    return make_vec_env(functools.partial(gym.make, with_module(id)), n_envs=n, seed=3, env_kwargs=env_kwargs)


def batched_env(id: str, n: int, **env_kwargs: Any) -> Any:
    return make_vec(id, n, 3, "batched", **env_kwargs)


def assert_equal(ours: Any, theirs: Any, where: str) -> None:
    """Equal to the last bit; times of day apart."""
    if isinstance(theirs, dict):
        assert set(ours) == set(theirs), where
        for key in set(theirs) - {"t"}:
            assert_equal(ours[key], theirs[key], f"{where} {key}")
    else:
        np.testing.assert_array_equal(ours, theirs, err_msg=where, strict=isinstance(theirs, np.ndarray))


def assert_same_course(
    id: str, steps: int, n: int, dtype: type = np.float32, act: Callable[[Any], np.ndarray] | None = None,
    **env_kwargs: Any,
) -> int:  # fmt: skip
    """Step both with the same actions, random ones or act(observations); returns how many episodes ended."""
    ours, theirs = batched_env(id, n, **env_kwargs), gymnasium_env(id, n, **env_kwargs)
    assert ours.observation_space == theirs.observation_space
    assert ours.action_space == theirs.action_space
    obs: Any = ours.reset()
    assert_equal(obs, theirs.reset(), "first observation")
    rng, ends = np.random.default_rng(0), 0
    assert isinstance(theirs.action_space, gym.spaces.Box)
    low, high = theirs.action_space.low, theirs.action_space.high
    for step in range(steps):
        # Every other stretch is gentle, for episodes that last.
        drawn = rng.uniform(low, high, (n, len(low))) * (0.2 if step % 200 >= 100 else 1.0)
        actions: np.ndarray = (act(obs) if act else drawn).astype(dtype)
        obs, rewards, dones, infos = ours.step(actions)
        expected_obs, expected_rewards, expected_dones, expected_infos = theirs.step(actions)
        assert_equal(obs, expected_obs, f"{id} observation, step {step}")
        assert_equal(rewards, expected_rewards, f"{id} reward, step {step}")
        assert_equal(dones, expected_dones, f"{id} done, step {step}")
        for i in range(n):
            assert_equal(infos[i], expected_infos[i], f"{id} info {i}, step {step}")
            assert_equal(ours.reset_infos[i], theirs.reset_infos[i], f"{id} reset info {i}, step {step}")
        ends += int(dones.sum())
    ours.close()
    theirs.close()
    return ends
