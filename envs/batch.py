"""Batches of one environment as a Stable-Baselines3 VecEnv: what they share beside the step itself.

One Gymnasium environment, the prototype, supplies the arguments and the spaces. A subclass steps all environments at
once. Copies of the prototype on the state of one environment each (`seats.py`) reset it and answer for it.
"""

from __future__ import annotations

import time
import warnings
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, TypeAlias, cast

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray
from stable_baselines3.common.env_util import is_wrapped
from stable_baselines3.common.vec_env import VecEnv
from stable_baselines3.common.vec_env.base_vec_env import VecEnvIndices, VecEnvStepReturn

from .seats import Episodes, make_seats

Array: TypeAlias = NDArray[Any]


class BatchVecEnv(VecEnv):
    """N environments that share their arguments, with what Stable-Baselines3's DummyVecEnv and Monitor report.

    Args:
        prototype: the environment, see `make_prototype`. A subclass makes first what `_own` needs.
        n_envs: number of environments, N.

    Attributes:
        render_index: the environment that `render` and `get_images` show; None: all, tiled, as DummyVecEnv.
        all_infos: whether `step` gives the infos of all environments; else those whose episode goes on have empty ones.
        set_by_reset: attributes of an environment that its reset sets: each environment has its own.
    """

    set_by_reset: tuple[str, ...] = ()

    def __init__(self, prototype: gym.Env[Any, Any], n_envs: int) -> None:
        self._env = cast(Any, prototype.unwrapped)
        self.render_index: int | None = None
        self.all_infos = True
        steps = prototype.spec.max_episode_steps if prototype.spec else None
        limit = np.inf if steps is None or steps < 0 else steps
        rewards: list[list[float]] = [[] for _ in range(n_envs)]
        self._episodes = Episodes(np.full(n_envs, -1), np.full(n_envs, limit), rewards, [0] * n_envs)
        self._seats = make_seats(prototype, self._episodes, self._own, self.set_by_reset)
        self._envs: list[Any] = [seat.unwrapped for seat in self._seats]
        self._ready = False  # whether all environments may be stepped
        self._start = time.time()
        self.metadata = self._env.metadata
        super().__init__(n_envs, self._env.observation_space, self._env.action_space)

    @abstractmethod
    def _advance(self, actions: Array) -> tuple[Array, Array, Array, dict[str, Array]]:
        """Step all environments: observations [N, O], rewards [N] (float64), terminated [N], entries of info [N, ...].

        The parts of a dict of observations stand side by side, in the order of the space. The observations of the last
        step are in `_obs`. The arrays returned are not used again.
        """

    @abstractmethod
    def _own(self, i: int) -> dict[str, Any]:
        """What environment i has for itself, by its attribute of the unwrapped environment."""

    def _moved(self) -> None:
        """Called after resets and methods of environments, which may have moved them."""

    def _hand_out(self, i: int, value: Any) -> bool:
        """Called with what somebody gets or gives of environment i; whether an attribute has to be read again."""
        return False

    def _look(self) -> None:
        """Called before somebody looks at environments or into them."""

    def reset(self) -> Any:
        """Begin a new episode everywhere; the seeds set by `seed` apply once. Returns observations [N, O]."""
        rows = [self._reset(i, self._seeds[i], self._options[i] or None) for i in range(self.num_envs)]
        self._reset_seeds()
        self._reset_options()
        self._begin()
        self._obs = np.stack(rows)
        return self._shown(self._obs.copy())

    def _begin(self) -> None:
        """All environments are in an episode now."""
        for seat in self._seats:
            seat.begin()
        self._ready = True
        self._moved()

    def step_async(self, actions: Array) -> None:
        """Take the actions [N, D], an array or lists; `step_wait` steps.

        Raises:
            ValueError: if their shape is another.
            RuntimeError: if an environment is not in an episode, as Monitor has it.
        """
        if not self._ready:
            raise RuntimeError("Tried to step environment that needs reset")
        actions = np.asarray(actions)
        expected = (self.num_envs, *cast(tuple[int, ...], self.action_space.shape))
        if actions.shape != expected:
            raise ValueError(f"actions: got shape {actions.shape}, expected {expected}")
        self._actions = actions

    def step_wait(self) -> VecEnvStepReturn:
        """Observations [N, O], rewards [N] (float32), dones [N] and infos; ended episodes begin anew."""
        obs, reward, terminated, info = self._advance(self._actions)
        episodes = self._episodes
        episodes.elapsed += 1
        truncated = (episodes.elapsed >= episodes.limit) & ~terminated
        for history, value in zip(episodes.rewards, reward.tolist(), strict=True):
            history.append(value)
        dones = terminated | truncated
        ended = dones.nonzero()[0].tolist()
        infos = self._infos(info | {"TimeLimit.truncated": truncated}, ended)
        if ended:
            for i in ended:
                infos[i]["episode"] = self._episode(i)
                infos[i]["terminal_observation"] = self._shown(obs[i].copy())
            self._restart(ended, obs)
        self._obs = obs
        return self._shown(obs.copy()), reward.astype(np.float32), dones, infos

    def _shown(self, obs: Array) -> Any:
        """Observations [..., O] as the space has them, an array or a dict of its parts."""
        if not isinstance(self.observation_space, spaces.Dict):
            return obs
        sizes = [cast(tuple[int], part.shape)[0] for part in self.observation_space.values()]
        parts = np.split(obs, np.cumsum(sizes)[:-1], axis=-1)
        return dict(zip(self.observation_space, parts, strict=True))

    def _infos(self, columns: dict[str, Array], ended: list[int]) -> list[dict[str, Any]]:
        """The infos of a step, from their entries [N, ...]."""
        if not self.all_infos:
            infos: list[dict[str, Any]] = [{} for _ in range(self.num_envs)]
            for i in ended:
                infos[i] = {
                    name: values[i].tolist() if values.ndim == 1 else values[i] for name, values in columns.items()
                }
            return infos
        empty = dict.fromkeys(columns)
        infos = [empty.copy() for _ in range(self.num_envs)]  # a copy has its size from the beginning
        for name, values in columns.items():
            for info, value in zip(infos, values.tolist() if values.ndim == 1 else values, strict=True):
                info[name] = value
        return infos

    def _restart(self, ended: list[int], obs: Array) -> None:
        """Begin episodes of the environments `ended`, and write their observations into `obs` [N, O]."""
        for i in ended:
            obs[i] = self._reset(i)
        self._moved()

    def _reset(self, i: int, seed: int | None = None, options: dict[str, Any] | None = None) -> Array:
        """New episode of environment i by Gymnasium's own reset; returns its observation [O]."""
        self._count_anew(i)
        obs, self.reset_infos[i] = self._envs[i].reset(seed=seed, options=options)
        if isinstance(obs, dict):
            obs = np.concatenate([obs[part] for part in cast(spaces.Dict, self.observation_space)])
        return cast(Array, obs)

    def _count_anew(self, i: int) -> None:
        """No step, no reward of environment i so far."""
        episodes, rewards = self._episodes, self._episodes.rewards[i]
        episodes.elapsed[i] = 0
        episodes.earlier[i] += len(rewards)
        rewards.clear()

    def _episode(self, i: int) -> dict[str, float]:
        """What Monitor says of an episode."""
        rewards = self._episodes.rewards[i]
        total, length, seconds = sum(rewards), len(rewards), round(time.time() - self._start, 6)
        seat = self._seats[i]
        seat.episode_returns.append(total)
        seat.episode_lengths.append(length)
        seat.episode_times.append(seconds)
        return {"r": round(total, 6), "l": length, "t": seconds}

    def get_state(self) -> dict[str, Any]:
        """All that determines the course of the environments, as arrays, for `set_state`; after the first `reset`."""
        return {
            "observation": self._obs.copy(),
            "elapsed": self._episodes.elapsed.copy(),
            "rewards": np.concatenate(self._episodes.rewards),  # of the episodes so far, as many as have elapsed
            "random": np.array([_random_words(env.np_random) for env in self._envs], dtype=np.uint64),
        }

    def set_state(self, state: dict[str, Any]) -> Any:
        """Go on where `get_state` was called, on the same or another batch of the task; returns the observations."""
        self._obs = state["observation"].copy()
        self._episodes.elapsed[:] = state["elapsed"]
        ends = np.cumsum(state["elapsed"])
        self._episodes.rewards[:] = [part.tolist() for part in np.split(state["rewards"], ends[:-1])]
        for env, words in zip(self._envs, state["random"].tolist(), strict=True):
            env.np_random = _generator(words)
        self._begin()
        return self._shown(self._obs.copy())

    def close(self) -> None:
        """Close the environments."""
        for seat in self._seats:
            seat.close()

    def get_images(self) -> Sequence[Array | None]:
        """The pictures of all environments, or the one of the environment `render_index`."""
        chosen = self._seats if self.render_index is None else [self._seats[self.render_index]]
        if self.render_mode != "rgb_array":
            warnings.warn(f"render_mode: got {self.render_mode}, expected 'rgb_array' for pictures", stacklevel=2)
            return [None for _ in chosen]
        self._look()
        return [cast("Array | None", seat.render()) for seat in chosen]

    def get_attr(self, attr_name: str, indices: VecEnvIndices = None) -> list[Any]:
        """An attribute of each environment or of its wrappers."""
        values = []
        self._look()
        for i in self._get_indices(indices):
            value = self._seats[i].get_wrapper_attr(attr_name)
            values.append(self._seats[i].get_wrapper_attr(attr_name) if self._hand_out(i, value) else value)
        return values

    def set_attr(self, attr_name: str, value: Any, indices: VecEnvIndices = None) -> None:
        """Set an attribute of environments; of their Monitors where the environments have none of this name.

        Raises:
            ValueError: if the environments share it and the indices leave one out, or if the batch steps it itself.
        """
        chosen = list(self._get_indices(indices))
        if attr_name in vars(self._env) and attr_name not in self.set_by_reset:
            if attr_name in self._own(0):
                raise ValueError(f"set_attr: got {attr_name}, which the batch steps itself; write into it in place")
            if len(set(chosen)) < self.num_envs:
                raise ValueError(
                    f"set_attr: got {len(set(chosen))} of {self.num_envs} environments, expected all: a batch shares "
                    f"{attr_name}; use the backend 'sync' for environments that differ"
                )
            for env in (self._env, *self._envs):
                vars(env)[attr_name] = value
            return
        for i in chosen:
            target = self._envs[i] if hasattr(self._envs[i], attr_name) else self._seats[i]
            setattr(target, attr_name, value)

    def env_method(
        self, method_name: str, *method_args: Any, indices: VecEnvIndices = None, **method_kwargs: Any
    ) -> list[Any]:
        """Call a method of each environment or of its wrappers."""
        results = []
        self._look()
        for i in self._get_indices(indices):
            method = self._seats[i].get_wrapper_attr(method_name)
            self._hand_out(i, method)
            results.append(method(*method_args, **method_kwargs))
        self._ready = not any(seat.needs_reset for seat in self._seats)
        self._moved()  # set_state, for example, moves them
        return results

    def env_is_wrapped(
        self, wrapper_class: type[gym.Wrapper[Any, Any, Any, Any]], indices: VecEnvIndices = None
    ) -> list[bool]:
        """True for Monitor, whose episode statistics the infos have, and for the wrappers of `gymnasium.make`."""
        return [is_wrapped(self._seats[i], wrapper_class) for i in self._get_indices(indices)]


class StatesVecEnv(BatchVecEnv):
    """A batch whose environments are the rows of one array, which is all that determines their course.

    Attributes:
        states: [N, S]. A subclass makes them before it calls this class.
    """

    states: Array

    def _own(self, i: int) -> dict[str, Any]:
        return {"state": self.states[i : i + 1]}

    def get_state(self) -> dict[str, Any]:
        """All that determines the course of the environments, as arrays, for `set_state`; after the first `reset`."""
        return super().get_state() | {"states": self.states.copy()}

    def set_state(self, state: dict[str, Any]) -> Any:
        """Go on where `get_state` was called, on the same or another batch of the task; returns the observations.

        Raises:
            ValueError: if it is the state of another number of environments or of another task.
        """
        if state["states"].shape != self.states.shape:
            raise ValueError(f"state: got states of shape {state['states'].shape}, expected {self.states.shape}")
        self.states[:] = state["states"]
        return super().set_state(state)


def _random_words(rng: np.random.Generator) -> list[int]:
    """The state of a generator as Gymnasium makes them (PCG64), in numbers of 64 bits."""
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
