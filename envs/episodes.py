"""An episode as arrays: what demonstrations are made of, and what recordings and data sets hold."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import gymnasium
import numpy as np
from numpy.typing import NDArray

from .make import with_module

Array: TypeAlias = NDArray[Any]


class Episode(NamedTuple):
    """T steps of an environment, each part as its space has it."""

    observations: Array | dict[str, Array]
    """T + 1 rows, the first before the first step; T where a data set does not know what the last step reached."""
    actions: Array  # [T, ...], in the environment's units
    rewards: Array  # [T]
    terminated: Array  # bool, [T]
    truncated: Array  # bool, [T]


def play(env: gymnasium.Env[Any, Any], obs: dict[str, Array], act: Callable[[dict[str, Array]], Array]) -> Episode:
    """The episode of an environment with Dict observations, from its first one to the time limit.

    Args:
        env: that ends by its time limit alone; it was reset.
        obs: what the reset returned.
        act: observation -> action, which is clipped to [-1, 1].
    """
    observations, actions, rewards, truncated = [obs], list[Array](), list[float](), False
    while not truncated:
        actions.append(act(obs).clip(-1, 1).astype(np.float32))
        obs, reward, _, truncated, _ = env.step(actions[-1])
        observations.append(obs)
        rewards.append(float(reward))
    ends = np.zeros(len(actions), dtype=bool)
    columns = {key: np.stack([each[key] for each in observations]) for key in observations[0]}
    last = ends.copy()
    last[-1] = True
    return Episode(columns, np.stack(actions), np.array(rewards), ends, last)


def scripted(
    env_id: str, episodes: int, seed: int, success: float, noise: float, episode: Callable[..., Episode]
) -> list[Episode]:
    """Episodes of a task, each by ``episode(env, whether it shall succeed, noise, random numbers)``."""
    check_script(episodes, success, noise)
    env, rng = gymnasium.make(with_module(env_id)), np.random.default_rng(seed)
    good = good_episodes(episodes, success)
    played = [episode(env, bool(good[i]), noise, rng) for i in range(episodes)]
    env.close()
    return played


def check_script(episodes: int, success: float, noise: float) -> None:
    """Raise ValueError unless scripted demonstrations can be made with these arguments."""
    if episodes < 1:
        raise ValueError(f"episodes: got {episodes}, expected an integer of at least 1")
    if not 0 <= success <= 1:
        raise ValueError(f"success: got {success}, expected a number in [0, 1]")
    if not 0 <= noise < math.inf:
        raise ValueError(f"noise: got {noise}, expected a finite number of at least 0")


def good_episodes(episodes: int, success: float, routes: int = 1) -> Array:
    """Which episodes shall succeed, bool [episodes]: their share, spread evenly over routes that take turns."""
    number = round(episodes * success)
    by_route = np.argsort(np.arange(episodes) % routes, kind="stable")  # one route after the other
    good = np.zeros(episodes, dtype=bool)
    good[by_route] = np.diff(np.arange(episodes + 1) * number // episodes) > 0  # in integers: nothing is rounded off
    return good
