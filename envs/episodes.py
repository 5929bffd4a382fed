"""An episode as arrays: what demonstrations are made of, and what recordings and data sets hold."""

from __future__ import annotations

from typing import Any, NamedTuple, TypeAlias

from numpy.typing import NDArray

Array: TypeAlias = NDArray[Any]


class Episode(NamedTuple):
    """T steps of an environment, each part as its space has it."""

    observations: Array | dict[str, Array]
    """T + 1 rows, the first before the first step; T where a data set does not know what the last step reached."""
    actions: Array  # [T, ...], in the environment's units
    rewards: Array  # [T]
    terminated: Array  # bool, [T]
    truncated: Array  # bool, [T]
