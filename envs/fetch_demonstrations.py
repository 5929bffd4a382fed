"""Scripted demonstrations of Gymnasium-Robotics' FetchPush and FetchPickAndPlace, some of them failures on purpose.

The scripts look at the observation alone, so a policy can imitate them. Positions are in metres; an action moves the
gripper by up to 5 cm in x, y, z, and opens (1) or closes (-1) it. An episode that shall fail carries the object to a
place 10 to 15 cm from its goal: so data of half-good demonstrations show, in equal shares, the goal and other places.

Needs the extra `maze` (Gymnasium-Robotics).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import gymnasium
import numpy as np

from .episodes import Array, Episode, play, scripted

GAIN = 8.0
"""Action per metre of what is left of the way."""
ABOVE = np.array([0.0, 0.0, 0.08])
"""Where the gripper comes down from, relative to the object."""


def push(obs: dict[str, Array], goal: Array) -> Array:
    """The action [4] of one that goes behind the object, above it, then down, and pushes it to the goal [3]."""
    grip, thing = obs["observation"][:3], obs["achieved_goal"]
    way = (goal - thing)[:2]
    distance = float(np.linalg.norm(way))
    if distance < 0.015:
        return np.zeros(4)
    ahead = way / distance
    along = (grip - thing)[:2] @ ahead
    aside = float(np.linalg.norm((grip - thing)[:2] - along * ahead))
    behind = thing[:2] - 0.06 * ahead
    to_behind = np.linalg.norm(grip[:2] - behind)
    is_low, is_behind = abs(grip[2] - thing[2]) < 0.015, -0.1 < along < -0.02 and aside < 0.012
    if is_low and is_behind:
        target = np.append(thing[:2] + (min(distance, 0.06) - 0.03) * ahead, thing[2])
    elif is_behind or to_behind < 0.01:
        target = np.append(behind, thing[2])
    elif is_low and to_behind > 0.02:  # up first, or it would push the object aside
        target = np.append(grip[:2] + 0.3 * (behind - grip[:2]) * (along < -0.02), thing[2] + 0.1)
    else:
        target = np.append(behind, thing[2] + 0.07)
    return np.append(GAIN * (target - grip), 0.0)


def pick_and_place(obs: dict[str, Array], goal: Array) -> Array:
    """The action [4] of one that comes from above, closes the gripper around the object and carries it to the goal."""
    grip, thing, opening = obs["observation"][:3], obs["achieved_goal"], obs["observation"][9:11].sum()
    way = thing - grip
    beside = np.linalg.norm(way[:2])
    if np.linalg.norm(way) < 0.025 and opening < 0.055:  # the object is 5 cm wide
        return np.append(GAIN * (goal - thing), -1.0)
    if beside > (0.02 if abs(way[2]) < 0.02 else 0.01):
        move = GAIN * (way + ABOVE)
        if beside > 0.03 and way[2] > -0.04:  # up first
            move[:2] *= 0.3
        return np.append(move, 1.0)
    return np.append(GAIN * way, 1.0 if abs(way[2]) > 0.012 else -1.0)


FETCH: dict[str, Callable[[dict[str, Array], Array], Array]] = {
    "FetchPush-v4": push,
    "FetchPickAndPlace-v4": pick_and_place,
}
"""Tasks -> (observation, goal) -> action."""


def fetch_demonstrations(
    env_id: str, episodes: int, seed: int, *, success: float = 1.0, noise: float = 0.1
) -> list[Episode]:
    """Play the script of a task.

    Args:
        env_id: a key of `FETCH`.
        episodes: how many, at least 1.
        seed: of starts, goals and noise.
        success: share of the episodes that aim at their goal, in [0, 1]; some of them miss it.
        noise: standard deviation of the actions' noise, at least 0.

    Raises:
        ValueError: if an argument is outside its range.
    """
    return scripted(env_id, episodes, seed, success, noise, partial(_episode, FETCH[env_id]))


def _episode(
    script: Callable[..., Array], env: gymnasium.Env[Any, Any], good: bool, noise: float, rng: np.random.Generator
) -> Episode:
    obs, _ = env.reset(seed=int(rng.integers(2**31)))
    goal = obs["desired_goal"]
    if not good:
        angle = rng.uniform(0, 2 * np.pi)
        goal = goal + rng.uniform(0.1, 0.15) * np.array([np.cos(angle), np.sin(angle), 0])
    return play(env, obs, lambda seen: script(seen, goal) + noise * rng.standard_normal(4))
