"""Observations of a space, Dicts of them included, as vectors."""

from __future__ import annotations

from typing import Any

import numpy as np
from gymnasium import spaces


def observation_vectors(obs: Any, space: spaces.Space[Any]) -> np.ndarray:
    """Flatten a batch of observations, or of Dicts of them in the order of their space, to vectors [N, O]."""
    if isinstance(space, spaces.Dict):
        return np.concatenate([observation_vectors(obs[key], part) for key, part in space.spaces.items()], axis=1)
    vectors: np.ndarray = obs.reshape(len(obs), -1)
    return vectors


def row_of(obs: Any, i: int) -> Any:
    """Observation i of a batch."""
    return {key: part[i] for key, part in obs.items()} if isinstance(obs, dict) else obs[i]


def batch_of_one(obs: Any) -> Any:
    """An observation as a batch."""
    return (
        {key: np.asarray(part)[None] for key, part in obs.items()} if isinstance(obs, dict) else np.asarray(obs)[None]
    )


def with_rows(obs: Any, rows: np.ndarray, other: Any) -> Any:
    """A copy of a batch [N] with the rows that a mask [N] names taken from another batch."""
    if isinstance(obs, dict):
        return {key: with_rows(part, rows, other[key]) for key, part in obs.items()}
    return np.where(rows.reshape(-1, *[1] * (obs.ndim - 1)), other, obs)
