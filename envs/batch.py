"""Batches of one environment as a Stable-Baselines3 VecEnv: what they share beside the step itself.

One Gymnasium environment, the prototype, supplies the arguments, the spaces, the resets and the pictures. A subclass
steps all environments at once and says how the prototype takes the place of one of them.
"""

from __future__ import annotations

import time
from abc import abstractmethod
from typing import Any, TypeAlias, cast

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray
from stable_baselines3.common.env_util import is_wrapped
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import VecEnv
from stable_baselines3.common.vec_env.base_vec_env import VecEnvIndices, VecEnvStepReturn

Array: TypeAlias = NDArray[Any]


class BatchVecEnv(VecEnv):
    """N environments that share their arguments, with what Stable-Baselines3's DummyVecEnv and Monitor report.

    Args:
        prototype: the environment, see `make_prototype`. A subclass makes first what `_bind` needs.
        n_envs: number of environments, N.
    """

    def __init__(self, prototype: gym.Env[Any, Any], n_envs: int) -> None:
        self._wrapped, self._env = prototype, cast(Any, prototype.unwrapped)
        self.render_index = 0
        self._rngs: list[np.random.Generator | None] = [None] * n_envs
        self._elapsed = np.zeros(n_envs, dtype=np.int64)
        self._rewards: list[list[float]] = [[] for _ in range(n_envs)]
        limit = self._wrapped.spec.max_episode_steps if self._wrapped.spec else None
        self._limit = np.inf if limit is None or limit < 0 else limit
        self._start = time.time()
        self.metadata = self._env.metadata
        super().__init__(n_envs, self._env.observation_space, self._env.action_space)

    @abstractmethod
    def _advance(self, actions: Array) -> tuple[Array, Array, Array, dict[str, Array]]:
        """Step all environments: observations [N, O], rewards [N] (float64), terminated [N], entries of info [N, ...].

        The observations of the last step are in `_obs`. The arrays returned are not used again.
        """

    @abstractmethod
    def _bind(self, i: int) -> None:
        """Put the prototype in the place of environment i: its state, and `_rngs[i]` as its np_random."""

    def _moved(self) -> None:
        """Called after resets and methods of the prototype, which may have moved environments."""

    def reset(self) -> Array:
        """Begin a new episode everywhere; the seeds set by `seed` apply once. Returns observations [N, O]."""
        rows = [self._reset(i, self._seeds[i], self._options[i] or None) for i in range(self.num_envs)]
        self._reset_seeds()
        self._reset_options()
        self._moved()
        self._obs = np.stack(rows)
        return self._obs.copy()

    def step_async(self, actions: Array) -> None:
        """Take the actions [N, D], an array or lists; `step_wait` steps.

        Raises:
            ValueError: if their shape is another.
        """
        actions = np.asarray(actions)
        expected = (self.num_envs, *cast(tuple[int, ...], self.action_space.shape))
        if actions.shape != expected:
            raise ValueError(f"actions: got shape {actions.shape}, expected {expected}")
        self._actions = actions

    def step_wait(self) -> VecEnvStepReturn:
        """Observations [N, O], rewards [N] (float32), dones [N] and infos; ended episodes begin anew."""
        obs, reward, terminated, info = self._advance(self._actions)
        self._elapsed += 1
        truncated = (self._elapsed >= self._limit) & ~terminated
        info["TimeLimit.truncated"] = truncated
        columns = [values.tolist() if values.ndim == 1 else list(values) for values in info.values()]
        names = tuple(info)
        infos: list[dict[str, Any]] = [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]
        for history, value in zip(self._rewards, reward.tolist(), strict=True):
            history.append(value)
        dones = terminated | truncated
        if dones.any():
            for i in np.flatnonzero(dones).tolist():
                infos[i] |= {"episode": self._episode(i), "terminal_observation": obs[i].copy()}
                obs[i] = self._reset(i)
            self._moved()
        self._obs = obs
        return obs.copy(), reward.astype(np.float32), dones, infos

    def _reset(self, i: int, seed: int | None = None, options: dict[str, Any] | None = None) -> Array:
        """New episode of environment i by Gymnasium's own reset; returns its observation [O]."""
        self._elapsed[i] = 0
        self._rewards[i].clear()
        self._bind(i)
        obs, self.reset_infos[i] = self._env.reset(seed=seed, options=options)
        self._rngs[i] = self._env.np_random
        return cast(Array, obs)

    def _episode(self, i: int) -> dict[str, float]:
        """What Monitor says of an episode."""
        rewards = self._rewards[i]
        return {"r": round(sum(rewards), 6), "l": len(rewards), "t": round(time.time() - self._start, 6)}

    def get_state(self) -> dict[str, Any]:
        """All that determines the course of the environments, as arrays, for `set_state`; after the first `reset`."""
        return {
            "observation": self._obs.copy(),
            "elapsed": self._elapsed.copy(),
            "rewards": np.concatenate(self._rewards),  # of the episodes so far, as many as have elapsed
            "random": np.array([_random_words(rng) for rng in self._rngs], dtype=np.uint64),
        }

    def set_state(self, state: dict[str, Any]) -> Array:
        """Go on where `get_state` was called, on the same or another batch of the task; returns the observations."""
        self._obs, self._elapsed = state["observation"].copy(), state["elapsed"].copy()
        ends = np.cumsum(self._elapsed)
        self._rewards = [part.tolist() for part in np.split(state["rewards"], ends[:-1])]
        self._rngs = [_generator(words) for words in state["random"].tolist()]
        return self._obs.copy()

    def close(self) -> None:
        """Close the prototype."""
        self._wrapped.close()

    def get_attr(self, attr_name: str, indices: VecEnvIndices = None) -> list[Any]:
        """An attribute of the prototype in the place of each environment."""
        values = []
        for i in self._get_indices(indices):
            self._bind(i)
            values.append(self._wrapped.get_wrapper_attr(attr_name))
        return values

    def set_attr(self, attr_name: str, value: Any, indices: VecEnvIndices = None) -> None:
        """Set an attribute of the prototype, for all environments.

        Raises:
            ValueError: if the indices leave out an environment: they share their attributes.
        """
        chosen = set(self._get_indices(indices))
        if len(chosen) < self.num_envs:
            raise ValueError(
                f"set_attr: got {len(chosen)} of {self.num_envs} environments, expected all: a batch shares its "
                "attributes; use the backend 'sync' for environments that differ"
            )
        setattr(self._env if hasattr(self._env, attr_name) else self._wrapped, attr_name, value)

    def env_method(
        self, method_name: str, *method_args: Any, indices: VecEnvIndices = None, **method_kwargs: Any
    ) -> list[Any]:
        """Call a method of the prototype in the place of each environment."""
        results = []
        for i in self._get_indices(indices):
            self._bind(i)
            results.append(self._wrapped.get_wrapper_attr(method_name)(*method_args, **method_kwargs))
        self._moved()  # set_state, for example, moves them
        return results

    def env_is_wrapped(
        self, wrapper_class: type[gym.Wrapper[Any, Any, Any, Any]], indices: VecEnvIndices = None
    ) -> list[bool]:
        """True for Monitor, whose episode statistics the infos have, and for the wrappers of `gymnasium.make`."""
        wrapped = issubclass(Monitor, wrapper_class) or is_wrapped(self._wrapped, wrapper_class)
        return [wrapped for _ in self._get_indices(indices)]


def _random_words(rng: np.random.Generator | None) -> list[int]:
    """The state of a generator as Gymnasium makes them (PCG64), in numbers of 64 bits."""
    assert rng is not None
    state = cast("dict[str, Any]", rng.bit_generator.state)
    words = [word for name in ("state", "inc") for word in divmod(state["state"][name], 2**64)]
    return [*words, state["has_uint32"], state["uinteger"]]


def _generator(words: list[int]) -> np.random.Generator:
    """The generator whose state `_random_words` returned."""
    generator = np.random.Generator(np.random.PCG64())
    numbers = {"state": words[0] * 2**64 + words[1], "inc": words[2] * 2**64 + words[3]}
    generator.bit_generator.state = {
        "bit_generator": "PCG64", "state": numbers, "has_uint32": words[4], "uinteger": words[5],
    }  # fmt: skip
    return generator


def make_prototype(id: str, n_envs: int, env_kwargs: dict[str, Any]) -> gym.Env[Any, Any]:
    """The environment that a batch of n_envs shares.

    Raises:
        ValueError: if n_envs is below 1, or render_mode is "human": there is no window for a batch.
    """
    if n_envs < 1:
        raise ValueError(f"n_envs: got {n_envs}, expected an integer of at least 1")
    if env_kwargs.get("render_mode") == "human":
        raise ValueError("batched: got render_mode='human', expected 'rgb_array' or None; use the backend 'sync'")
    return gym.make(id, **env_kwargs)
