"""Arguments of Stable-Baselines3's algorithms that have no counterpart here, and what a pipeline may give for them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

Neutral = Mapping[str, tuple[Collection[Any], str]]
"""Name of an argument -> values that ask for what is done anyway, the default first, and what to do instead."""


def without_neutral(given: Mapping[str, Any], neutral: Neutral) -> dict[str, Any]:
    """Arguments without those that ask for nothing else than what is done anyway.

    Raises:
        ValueError: if one of them asks for something else.
    """
    for name in given.keys() & neutral.keys():
        accepted, remedy = neutral[name]
        if given[name] not in accepted:
            expected = " or ".join(map(repr, accepted)) or "it elsewhere"
            raise ValueError(f"{name}: got {given[name]!r}, expected {expected}; {remedy}")
    return {name: value for name, value in given.items() if name not in neutral}
