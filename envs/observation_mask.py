"""Partially observed tasks: a wrapper that hides entries of the observation."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from numbers import Integral
from typing import Any

import gymnasium as gym
from gymnasium import spaces
from numpy.typing import NDArray


class ObservationMask(gym.ObservationWrapper[NDArray[Any], Any, NDArray[Any]], gym.utils.RecordConstructorArgs):
    """An environment whose observation lacks some entries; the others keep their order and their bounds.

    The state, the rewards and the ends of episodes are those of the environment, but the observation no longer tells
    the state: Hopper-v5 with ``hidden=slice(5, None)`` shows positions and hides velocities.

    Args:
        env: an environment that observes a Box of one dimension.
        hidden: the entries that are left out: indices, from the end where negative, or a slice.

    Raises:
        ValueError: if the observation is no Box of one dimension, or ``hidden`` is something else, or names an entry
            that does not exist or one twice, none, or all.
    """

    def __init__(self, env: gym.Env[NDArray[Any], Any], hidden: Sequence[int] | slice) -> None:
        if not _names_entries(hidden):
            raise ValueError(f"hidden: got {hidden}, expected integers, such as [0, 3], or a slice of them")
        hidden = hidden if isinstance(hidden, slice) else list(hidden)
        gym.utils.RecordConstructorArgs.__init__(self, hidden=hidden)
        gym.ObservationWrapper.__init__(self, env)
        space = env.observation_space
        if not isinstance(space, spaces.Box) or len(space.shape) != 1:
            raise ValueError(
                f"ObservationMask: got the observation space {space}, expected a Box of one dimension; wrap the "
                "environment with gymnasium.wrappers.FlattenObservation first"
            )
        size = space.shape[0]
        entries = list(range(size)[hidden]) if isinstance(hidden, slice) else hidden
        if any(not -size <= entry < size for entry in entries):
            raise ValueError(f"hidden: got {hidden}, expected indices of {size} entries, {-size} to {size - 1}")
        places = {entry % size for entry in entries}
        if len(places) < len(entries):
            raise ValueError(f"hidden: got {hidden}, expected each of the {size} entries once at most")
        if not 0 < len(places) < size:
            what = "all" if places else "none"
            raise ValueError(
                f"hidden: got {hidden}, {what} of {size} entries, expected one at least, and one that is left"
            )
        self._shown = [entry for entry in range(size) if entry not in places]
        self.observation_space = spaces.Box(
            space.low[self._shown],
            space.high[self._shown],
            dtype=space.dtype.type,
        )

    def observation(self, observation: NDArray[Any]) -> NDArray[Any]:
        """What is left of an observation."""
        return observation[self._shown]


def _names_entries(hidden: object) -> bool:
    """Whether it is a slice of integers or some integers; True and False are none."""
    if isinstance(hidden, slice):
        hidden = [part for part in (hidden.start, hidden.stop, hidden.step) if part is not None]
    return isinstance(hidden, Collection) and all(
        isinstance(entry, Integral) and not isinstance(entry, bool) for entry in hidden
    )
