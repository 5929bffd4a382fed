"""The same course of a batch and of single environments, and of a script and its task."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import gymnasium
import numpy as np
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecEnv

from driftrl.envs.episodes import Episode
from driftrl.envs.make import make_vec, with_module


def gymnasium_env(id: str, n: int, **env_kwargs: Any) -> VecEnv:
    """The oracle of a batch: single environments in Stable-Baselines3's DummyVecEnv with Monitor."""
    return make_vec_env(functools.partial(gymnasium.make, with_module(id)), n_envs=n, seed=3, env_kwargs=env_kwargs)


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


def same_course(
    ours: VecEnv, theirs: VecEnv, act: Callable[[Any], np.ndarray], steps: int
) -> Iterator[list[dict[str, Any]]]:
    """Reset and step both by act(observations); all they report is the same to the last bit. Yields the infos."""
    assert (ours.observation_space, ours.action_space) == (theirs.observation_space, theirs.action_space)
    obs: Any = ours.reset()
    assert_equal(obs, theirs.reset(), "first observation")
    for step in range(steps):
        actions = act(obs)
        obs, rewards, dones, infos = ours.step(actions)
        expected_obs, expected_rewards, expected_dones, expected_infos = theirs.step(actions)
        assert_equal(obs, expected_obs, f"observation, step {step}")
        assert_equal(rewards, expected_rewards, f"reward, step {step}")
        assert_equal(dones, expected_dones, f"done, step {step}")
        for i, (info, expected) in enumerate(zip(infos, expected_infos, strict=True)):
            assert_equal(info, expected, f"info {i}, step {step}")
            assert_equal(ours.reset_infos[i], theirs.reset_infos[i], f"reset info {i}, step {step}")
        yield infos


def assert_same_course(
    id: str, steps: int, n: int, dtype: type = np.float32, act: Callable[[Any], np.ndarray] | None = None,
    **env_kwargs: Any,
) -> int:  # fmt: skip
    """Step both kinds with the same actions, random ones or act(observations); returns how many episodes ended."""
    ours, theirs = batched_env(id, n, **env_kwargs), gymnasium_env(id, n, **env_kwargs)
    rng, step = np.random.default_rng(0), 0
    assert isinstance(theirs.action_space, gymnasium.spaces.Box)
    low, high = theirs.action_space.low, theirs.action_space.high

    def draw(obs: Any) -> np.ndarray:
        nonlocal step
        # Every other stretch is gentle, for episodes that last.
        drawn = rng.uniform(low, high, (n, len(low))) * (0.2 if step % 200 >= 100 else 1.0)
        step += 1
        actions: np.ndarray = (act(obs) if act else drawn).astype(dtype)
        return actions

    ends = sum("episode" in info for infos in same_course(ours, theirs, draw, steps) for info in infos)
    ours.close()
    theirs.close()
    return ends


def count_ends(ours: VecEnv, theirs: VecEnv, draw: Callable[[], np.ndarray], steps: int) -> tuple[int, int, int]:
    """Terminations, truncations and successes at the end of an episode of the `same_course`."""
    terminations = truncations = successes = 0
    for infos in same_course(ours, theirs, lambda obs: draw(), steps):
        for info in infos:
            assert type(info["is_success"]) is bool
            if "episode" in info:
                truncations += info["TimeLimit.truncated"]
                terminations += not info["TimeLimit.truncated"]
                successes += info["is_success"]
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
