"""Data sets of episodes for agents: read for learning from, recorded from policies."""

from __future__ import annotations

import contextlib
import json
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from stable_baselines3.common.base_class import BaseAlgorithm

from ..agents.common.demonstrations import SLACK, Demonstrations
from ..agents.common.observations import row_of
from ..agents.storage.datasets import Origin, read_episodes, read_origin
from ..analysis.evaluation import MAX_STEPS, CheckedPolicy, evaluation_env
from ..envs.episodes import Array, Episode
from ..envs.known import full_id, known_task_of_id


def read_demonstrations(
    source: str | os.PathLike[str], observation_space: spaces.Space[Any], action_space: spaces.Space[Any],
    keys: Sequence[str] = (), env_id: str | None = None, env_kwargs: Mapping[str, Any] | None = None,
) -> Demonstrations:  # fmt: skip
    """Read a data set of Minari or robomimic for an agent that acts in these spaces.

    Args:
        source: an .hdf5 file, a Minari folder, or the id of a Minari data set on this machine.
        observation_space: of the agent.
        action_space: of the agent.
        keys: see `Demonstrations.of`.
        env_id: the agent's environment; a warning says so where a Minari data set is of another one.
        env_kwargs: its options; a warning names one in which a data set of the same environment differs.

    Raises:
        ValueError: in one line that names file, episode and step, if the data set is damaged or does not fit; or if
            it was recorded with other bounds of the actions.
    """
    origin = read_origin(source)
    if isinstance(action_space, spaces.Box):
        _check_bounds(origin, action_space)
    data = Demonstrations.of(read_episodes(source), observation_space, action_space, keys)
    if env_id is not None and origin.env_id is not None and _task(origin.env_id) != _task(env_id):
        text = f"{origin.file}: env_spec: got episodes of {origin.env_id!r}, expected those of {env_id}"
        warnings.warn(f"{text}; they are learned from all the same", UserWarning, stacklevel=2)
    elif other := _other(origin, env_id, env_kwargs):
        text = f"{origin.file}: env_spec: got {other}"
        warnings.warn(f"{text}; they are learned from all the same", UserWarning, stacklevel=2)
    return data


def _other(origin: Origin, env_id: str | None, env_kwargs: Mapping[str, Any] | None) -> str:
    """The option in which an environment differs from the one of that id that was recorded, in words; or nothing."""
    recorded = origin.env_kwargs
    if env_id is None or recorded is None or origin.env_id != full_id(env_id).rpartition(":")[2]:
        return ""
    try:
        ours = {**gymnasium.spec(full_id(env_id)).kwargs, **(env_kwargs or {})}
    except gymnasium.error.Error:  # its id is not known here
        return ""
    ours = json.loads(json.dumps(ours, default=str))
    for name in sorted({*ours, *recorded} - {"render_mode"}):
        theirs, mine = recorded.get(name, "its default"), ours.get(name, "its default")
        if theirs != mine:
            return f"episodes with {name} {theirs}, expected {mine}"
    return ""


def _check_bounds(origin: Origin, space: spaces.Box) -> None:
    """Refuse actions in other units; bounds of another shape, and infinite ones, say nothing of the units."""
    if origin.action_bounds is None or any(each.shape != space.shape for each in origin.action_bounds):
        return
    got = np.stack([each.ravel() for each in origin.action_bounds])
    expected = np.stack([space.low.ravel(), space.high.ravel()]).astype(np.float64)
    differs = np.isfinite(got) & (np.abs(got - expected) > SLACK * (expected[1] - expected[0]))
    if differs.any():
        k = int(np.argmax(differs.any(0)))
        (low, high), (lowest, highest) = got[:, k], expected[:, k]
        raise ValueError(
            f"{origin.file}: action_space: got [{low:g}, {high:g}] in dimension {k}, expected the environment's "
            f"[{lowest:g}, {highest:g}]; its actions are in other units, or of another task"
        )


def _task(id: str) -> str:
    """What an id stands for: a task that we know by its class, else the id without the module that registers it."""
    return known_task_of_id(full_id(id)) or full_id(id).rpartition(":")[2]


def record_episodes(
    agent: BaseAlgorithm, env_id: str, env_kwargs: dict[str, Any], episodes: int, seed: int, *, sample: bool,
    max_steps: int = MAX_STEPS,
) -> Iterator[Episode]:  # fmt: skip
    """Play episodes with a policy, in the order in which they end.

    The episodes are divided among parallel environments beforehand, so that short ones are not over-represented.

    Arguments and errors are those of `evaluate_agent`.
    """
    with contextlib.closing(evaluation_env(agent, env_id, env_kwargs, episodes, seed, max_steps)) as env:
        agent.set_random_seed(seed)
        policy, dtype = CheckedPolicy(agent, env_id), _dtypes(agent.observation_space)
        left = [(episodes + i) // env.num_envs for i in range(env.num_envs)]
        obs: Any = env.reset()
        seen: list[list[Any]] = [[row_of(obs, i)] for i in range(env.num_envs)]
        acted: list[list[Array]] = [[] for _ in left]
        earned: list[list[float]] = [[] for _ in left]
        state, dones = None, np.ones(env.num_envs, dtype=bool)
        while any(left):
            actions, state = policy.predict(obs, state, dones, deterministic=not sample)
            obs, rewards, dones, infos = env.step(actions)
            for i in range(env.num_envs):
                acted[i].append(np.array(actions[i]))
                earned[i].append(float(rewards[i]))
                if not np.isfinite(rewards[i]):
                    raise ValueError(
                        f"non-finite reward: got {rewards[i]} of {env_id}, expected finite numbers; check the "
                        "environment's rewards"
                    )
                seen[i].append(infos[i]["terminal_observation"] if dones[i] else row_of(obs, i))
                if not dones[i]:
                    continue
                if left[i]:
                    left[i] -= 1
                    truncated = bool(infos[i].get("TimeLimit.truncated", False))
                    yield _episode(seen[i], acted[i], earned[i], truncated, dtype)
                seen[i], acted[i], earned[i] = [row_of(obs, i)], [], []


def _dtypes(space: spaces.Space[Any]) -> Any:
    if isinstance(space, spaces.Dict):
        return {key: part.dtype for key, part in space.spaces.items()}
    return space.dtype


def _episode(seen: list[Any], acted: list[Array], earned: list[float], truncated: bool, dtype: Any) -> Episode:
    if isinstance(dtype, dict):
        observations: Any = {key: np.stack([row[key] for row in seen]).astype(kind) for key, kind in dtype.items()}
    else:
        observations = np.stack(seen).astype(dtype)
    last = np.arange(len(acted)) == len(acted) - 1
    return Episode(observations, np.stack(acted), np.array(earned), last & (not truncated), last & truncated)
