"""What stands for one environment of a batch where somebody asks for it: Gymnasium's own objects on its state.

A seat is a copy of the prototype with its wrappers and Stable-Baselines3's Monitor. What differs between environments
(simulator, generator, steps and rewards so far) is the batch's own: what is done to a seat happens in the batch. What
the batch shares, the arguments of the task, can be read from a seat and not be set.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.wrappers import OrderEnforcing, PassiveEnvChecker, TimeLimit
from numpy.typing import NDArray
from stable_baselines3.common.monitor import Monitor

Array: TypeAlias = NDArray[Any]


@dataclass
class Episodes:
    """Where the episodes of N environments are. The batch and its seats share one.

    Args:
        elapsed: steps so far, [N]; -1 before the first reset.
        limit: steps after which an episode is truncated, [N]; inf for none.
        rewards: rewards so far, N lists.
        earlier: steps before this episode, N numbers.
    """

    elapsed: Array
    limit: Array
    rewards: list[list[float]]
    earlier: list[int]


class Seat(Monitor):
    """The Monitor of one environment of a batch: its counts are the batch's."""

    _episodes: Episodes
    _index: int

    @property
    def rewards(self) -> list[float]:
        """Rewards of the episode so far."""
        return self._episodes.rewards[self._index]

    @rewards.setter
    def rewards(self, values: list[float]) -> None:
        self._episodes.earlier[self._index] += len(self.rewards) - len(values)
        self._episodes.rewards[self._index] = values

    @property
    def total_steps(self) -> int:
        """Steps of all episodes."""
        return self._episodes.earlier[self._index] + len(self.rewards)

    @total_steps.setter
    def total_steps(self, value: int) -> None:
        """Monitor counts a step here that its reward has counted already."""

    def begin(self) -> None:
        """Allow steps: the batch has begun an episode."""
        self.needs_reset = False
        layer: Any = self.env
        while isinstance(layer, gym.Wrapper):
            if isinstance(layer, OrderEnforcing):
                layer._has_reset = True
            if isinstance(layer, PassiveEnvChecker):  # looks at the first reset and step only, which were the batch's
                layer.checked_reset = layer.checked_step = layer.checked_data_reuse = True
            layer = layer.env


if TYPE_CHECKING:
    _Limit = TimeLimit[Any, Any]
else:  # rl_zoo3 puts a class that takes no parameters in its place
    _Limit = TimeLimit


class _SeatLimit(_Limit):
    """The time limit of one environment of a batch: its counter is the batch's."""

    _episodes: Episodes
    _index: int

    @property  # type: ignore[override]
    def _elapsed_steps(self) -> int | None:
        elapsed = int(self._episodes.elapsed[self._index])
        return None if elapsed < 0 else elapsed

    @_elapsed_steps.setter  # type: ignore[override]  # there it is the type of the first value, None
    def _elapsed_steps(self, value: int) -> None:
        self._episodes.elapsed[self._index] = value

    @property
    def _max_episode_steps(self) -> int:
        return int(self._episodes.limit[self._index])

    @_max_episode_steps.setter
    def _max_episode_steps(self, value: int) -> None:
        self._episodes.limit[self._index] = value


def make_seats(
    prototype: gym.Env[Any, Any], episodes: Episodes, own: Callable[[int], dict[str, Any]], free: tuple[str, ...] = ()
) -> list[Seat]:
    """The seats of a batch.

    Args:
        prototype: environment with the wrappers of `gymnasium.make`.
        episodes: of the batch.
        own: attributes of the unwrapped environment i that it shares with no other.
        free: names of attributes that an environment may set for itself.
    """
    top = Monitor(prototype)
    layers: list[Any] = [top]
    while isinstance(layers[-1], gym.Wrapper):
        _ = layers[-1].spec  # copied with the wrapper; N times it would take a second
        layers.append(layers[-1].env)
    env = layers.pop()
    kind = _refusing(env, free)
    seats = []
    for i in range(len(episodes.elapsed)):
        mine: dict[str, Any] = {}
        for name, value in vars(env).items():
            # The first has the spaces of the batch, as in DummyVecEnv; Pusher writes into its init_qpos.
            own_copy = isinstance(value, np.ndarray | dict | list) or (i and isinstance(value, spaces.Space))
            mine[name] = copy.deepcopy(value) if own_copy else value
        layer: Any = _filled(kind, mine | own(i))
        for wrapper in reversed(layers):
            layer = _copied(wrapper, layer, episodes, i)
        seats.append(cast(Seat, layer))
    return seats


def _copied(wrapper: Any, env: Any, episodes: Episodes, i: int) -> Any:
    """A wrapper of the prototype around the seat of environment i."""
    kind = {Monitor: Seat, TimeLimit: _SeatLimit}.get(type(wrapper), type(wrapper))
    names = vars(wrapper) | {"env": env}
    if issubclass(kind, Seat | _SeatLimit):
        names |= {"_episodes": episodes, "_index": i}
    if kind is Seat:
        names |= {"episode_returns": [], "episode_lengths": [], "episode_times": []}
    return _filled(
        kind, {name: value for name, value in names.items() if not isinstance(getattr(kind, name, None), property)}
    )


def _filled(kind: type[Any], names: dict[str, Any]) -> Any:
    """An object with these attributes, one by one: so Python shares their names between objects, which is faster."""
    found = object.__new__(kind)
    for name, value in names.items():
        object.__setattr__(found, name, value)
    return found


def _refusing(env: gym.Env[Any, Any], free: tuple[str, ...]) -> type[Any]:
    """The class of an environment, with a refusal to set on one what all share."""
    kind, shared = type(env), frozenset(vars(env)) - frozenset(free)

    def set_own(self: Any, name: str, value: Any) -> None:
        if name in shared:
            raise ValueError(
                f"{name}: got a value for one environment, but a batch shares it or steps it by itself; use set_attr "
                "of all environments for an argument, write into arrays in place, or use the backend 'sync'"
            )
        object.__setattr__(self, name, value)

    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
    return type(kind.__name__, (kind,), {"__setattr__": set_own, **names})
