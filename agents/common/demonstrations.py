"""Demonstrations for an agent: steps of recorded episodes, checked against the spaces the agent acts in."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from gymnasium import spaces

from ...envs.episodes import Array, Episode
from .observations import observation_vectors

SLACK = 1e-4
"""Share of its range by which an action may lie outside the bounds: what other precisions make of one on them."""


@dataclass(frozen=True)
class Demonstrations:
    """M steps of E episodes, one after the other.

    Attributes:
        observations: raw observation vectors, before each step, float32 [M, O].
        actions: in the environment's units, within the bounds, float32 [M, D].
        rewards: float32 [M].
        lengths: steps of each episode, [E], which sum to M.
        demonstrated: of chunks that reach beyond their episode's end, bool [M, D]: which actions were demonstrated;
            None: all.
    """

    observations: Array
    actions: Array
    rewards: Array
    lengths: Array
    demonstrated: Array | None = None

    @classmethod
    def of(
        cls, episodes: Iterable[tuple[str, Episode]], observation_space: spaces.Space[Any],
        action_space: spaces.Space[Any], keys: Sequence[str] = (),
    ) -> Demonstrations:  # fmt: skip
        """Check episodes and put them together.

        Args:
            episodes: with what messages call each.
            observation_space: Box, or Dict of Boxes.
            action_space: Box with finite bounds.
            keys: where the episodes have observations by name and the space is a Box: which of them the observation
                is made of, in their order.

        Raises:
            ValueError: if there is no episode, the shapes are not those of the spaces, a number is not finite or an
                action is outside the bounds; in one line that names the episode and the step.
        """
        assert isinstance(action_space, spaces.Box)
        rows = [_checked(name, each, observation_space, action_space, keys) for name, each in episodes]
        if not rows:
            raise ValueError("demonstrations: got no episode, expected one at least")
        observations, actions, rewards = (np.concatenate(parts) for parts in zip(*rows, strict=True))
        return cls(observations, actions, rewards, np.array([len(row[1]) for row in rows]))

    @property
    def returns(self) -> Array:
        """Undiscounted sum of rewards of each episode, [E]."""
        starts = np.cumsum(self.lengths) - self.lengths
        return np.add.reduceat(self.rewards.astype(np.float64), starts)

    @property
    def digest(self) -> str:
        """SHA-256 of what is learned from, in hexadecimal: lengths, observations and actions."""
        digest = hashlib.sha256(self.lengths.astype(np.int64).tobytes())
        for part in (self.observations, self.actions):
            digest.update(np.ascontiguousarray(part).data)
        return digest.hexdigest()

    def split(self, share: float, rng: np.random.Generator) -> tuple[Demonstrations, Demonstrations]:
        """Two parts by whole episodes: the rest, and `share` of the episodes drawn at random, at least one.

        Raises:
            ValueError: if there is only one episode.
        """
        number = len(self.lengths)
        if number < 2:
            raise ValueError("demonstrations: got one episode, expected two at least, to validate on one of them")
        chosen = np.zeros(number, dtype=bool)
        chosen[rng.permutation(number)[: min(max(round(share * number), 1), number - 1)]] = True
        return self._episodes(~chosen), self._episodes(chosen)

    def returning(self, at_least: float) -> Demonstrations:
        """The episodes whose return is no less: of data with failures, those worth imitating.

        Raises:
            ValueError: if there is none.
        """
        chosen = self.returns >= at_least
        if not chosen.any():
            raise ValueError(
                f"demonstrations: got no episode that returns {at_least:g}, at most {self.returns.max():g}"
            )
        return self._episodes(chosen)

    def chunked(self, chunk: int) -> Demonstrations:
        """With the actions of so many steps, one after the other, in place of each action: actions [M, chunk x D].

        After its end an episode goes on with its last action, and `demonstrated` says so.

        Raises:
            ValueError: if no episode is as long: nothing would say what the last actions are to be.
        """
        if chunk > (longest := self.lengths.max()):
            raise ValueError(f"chunk: got {chunk}, but the longest episode that is demonstrated has {longest} steps")
        ends = np.repeat(np.cumsum(self.lengths), self.lengths)
        rows = np.arange(len(ends))[:, None] + np.arange(chunk)
        inside = rows < ends[:, None]
        return replace(
            self,
            actions=self.actions[np.minimum(rows, ends[:, None] - 1)].reshape(len(ends), -1),
            demonstrated=None if inside.all() else inside.repeat(self.actions.shape[1], axis=1),
        )

    def _episodes(self, chosen: Array) -> Demonstrations:
        steps = np.repeat(chosen, self.lengths)
        return Demonstrations(
            self.observations[steps],
            self.actions[steps],
            self.rewards[steps],
            self.lengths[chosen],
            None if self.demonstrated is None else self.demonstrated[steps],
        )


def _checked(
    name: str, episode: Episode, observation_space: spaces.Space[Any], action_space: spaces.Box, keys: Sequence[str]
) -> tuple[Array, Array, Array]:
    """Observation vectors, actions and rewards of the steps of an episode."""
    steps = len(episode.actions)
    observations = _vectors(name, episode.observations, observation_space, keys)[: steps + 1]
    _check_shape(name, "actions", episode.actions, action_space.shape)
    actions = episode.actions.reshape(steps, -1)
    _check_shape(name, "rewards", episode.rewards, ())
    columns = [
        _finite(name, part, values)
        for part, values in (
            ("observations", observations),
            ("actions", actions),
            ("rewards", episode.rewards[:, None]),
        )
    ]
    low, high = action_space.low.ravel().astype(np.float64), action_space.high.ravel().astype(np.float64)
    slack = SLACK * (high - low)
    if not (inside := ((actions >= low - slack) & (actions <= high + slack)).all(axis=1)).all():
        step = int(np.argmin(inside))
        k = int(np.argmax((actions[step] < low - slack) | (actions[step] > high + slack)))
        bounds = f"[{low[k]:g}, {high[k]:g}]"
        raise ValueError(f"{name}: step {step}: actions: got {actions[step, k]:g} in dimension {k}, expected {bounds}")
    within = actions.clip(action_space.low.ravel(), action_space.high.ravel()).astype(np.float32)
    return columns[0][:steps], within, columns[2][:, 0]


def _finite(name: str, part: str, values: Array) -> Array:
    """Rows in float32; a ValueError if a number is not finite in it."""
    with np.errstate(over="ignore"):  # the error below says more
        rows: Array = values.astype(np.float32)
    if not (finite := np.isfinite(rows).all(axis=1)).all():
        step = int(np.argmin(finite))
        got = values[step][~np.isfinite(rows[step])][0]
        raise ValueError(f"{name}: step {step}: {part}: got {got}, expected finite numbers of float32")
    return rows


def _vectors(name: str, observations: Any, space: spaces.Space[Any], keys: Sequence[str]) -> Array:
    """Observation vectors, one row each."""
    if isinstance(space, spaces.Dict):
        if keys:
            raise ValueError(f"demonstration_keys: got {', '.join(keys)}, but the environment's observations have keys")
        if not isinstance(observations, dict):
            raise ValueError(f"{name}: observations: got one array, expected {', '.join(space.spaces)}")
        for key, part in space.spaces.items():
            if key not in observations:
                raise ValueError(f"{name}: observations: got {', '.join(observations)}, expected {key} among them")
            _check_shape(name, f"observations {key}", observations[key], part.shape)
        return observation_vectors(observations, space)
    if isinstance(observations, dict):
        chosen = list(keys) or (list(observations) if len(observations) == 1 else [])
        if not chosen or not set(chosen) <= observations.keys():
            got = ", ".join(observations)
            asked = f", expected {', '.join(keys)} among them" if keys else "; name those wanted in demonstration_keys"
            raise ValueError(f"{name}: observations: got {got}{asked}")
        parts = [observations[key] for key in chosen]
        observations = np.concatenate([part.reshape(len(part), -1) for part in parts], axis=1)
        observations = observations.reshape(-1, *(space.shape or ())) if _fits(observations, space) else observations
    elif keys:
        raise ValueError(f"demonstration_keys: got {', '.join(keys)}, but {name} has observations without keys")
    _check_shape(name, "observations", observations, space.shape)
    return observation_vectors(observations, space)


def _fits(vectors: Array, space: spaces.Space[Any]) -> bool:
    return int(vectors.shape[1]) == int(np.prod(space.shape or ()))


def _check_shape(name: str, part: str, rows: Array, shape: tuple[int, ...] | None) -> None:
    if rows.shape[1:] != shape:
        raise ValueError(f"{name}: {part}: got rows of shape {list(rows.shape[1:])}, expected {list(shape or ())}")
