"""Validation shared by the agents' Config dataclasses."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Mapping
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T", bound="DataclassInstance")


def _number(value: Any) -> bool:
    return not isinstance(value, bool) and isinstance(value, Real) and math.isfinite(value)


def _count(value: Any) -> bool:
    return not isinstance(value, bool) and isinstance(value, Integral)


RANGES: dict[str, Callable[[Any], bool]] = {
    "a number above 0": lambda x: _number(x) and x > 0,
    "a number above 0, or None": lambda x: x is None or (_number(x) and x > 0),
    "a number of at least 0": lambda x: _number(x) and x >= 0,
    "a number in [0, 1]": lambda x: _number(x) and 0 <= x <= 1,
    "a number in [0, 1)": lambda x: _number(x) and 0 <= x < 1,
    "a number above 0, at most 1": lambda x: _number(x) and 0 < x <= 1,
    "a number in [0.3, 1)": lambda x: _number(x) and 0.3 <= x < 1,
    "two numbers, or None": lambda x: x is None or (isinstance(x, Collection) and len(x) == 2 and all(map(_number, x))),
    "an integer of at least 1": lambda x: _count(x) and x >= 1,
    "an integer of at least 0": lambda x: _count(x) and x >= 0,
    "an integer of 1 .. 2**31 - 1": lambda x: _count(x) and 1 <= x < 2**31,
    "an integer of 0 .. 2**31 - 1": lambda x: _count(x) and 0 <= x < 2**31,
    "positive integers, at least one": lambda x: (
        isinstance(x, Collection) and len(x) > 0 and all(_count(width) and width >= 1 for width in x)
    ),
    "text": lambda x: isinstance(x, str),
    "names with values": lambda x: isinstance(x, dict),
    "True or False": lambda x: isinstance(x, bool),
}
"""Wording of a range -> whether a value lies in it."""


def validate(config: Any, ranges: dict[str, str]) -> None:
    """Check a Config's fields against their ranges, and its Literal fields against their alternatives.

    Args:
        config: dataclass instance.
        ranges: key of `RANGES` -> names of the fields it holds for, separated by blanks.

    Raises:
        ValueError: if a field is outside its range.
    """
    for expected, names in ranges.items():
        for name in names.split():
            require(config, name, RANGES[expected](getattr(config, name)), expected)
    for name, hint in get_type_hints(type(config)).items():
        if get_origin(hint) is Literal:
            require(config, name, getattr(config, name) in get_args(hint), "one of " + ", ".join(get_args(hint)))


def resolve(config: T, fields: Mapping[str, Any]) -> T:
    """A Config with fields given by keyword in place of its own.

    Raises:
        TypeError: if a keyword is no field.
    """
    known = [field.name for field in dataclasses.fields(config)]
    if unknown := [name for name in fields if name not in known]:
        raise TypeError(
            f"unknown argument: got {', '.join(unknown)}, expected fields of {type(config).__name__}: "
            f"{', '.join(known)}"
        )
    return dataclasses.replace(config, **fields)


def given_at_load(config: T, agent: object) -> T:
    """A Config with the fields that an agent has as attributes: hyperparameters given to `load` arrive as such."""
    names = {field.name for field in dataclasses.fields(config)} & vars(agent).keys()
    return dataclasses.replace(config, **{name: vars(agent)[name] for name in names if not callable(vars(agent)[name])})


def require(config: Any, name: str, valid: bool, expected: str) -> None:
    """Raise ValueError with what was got and what is expected unless the field is valid."""
    if not valid:
        raise ValueError(f"{name}: got {getattr(config, name)!r}, expected {expected}")
