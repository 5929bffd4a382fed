"""Values of JSON and YAML as the fields of dataclasses: lists as tuples, numbers as people write them."""

from __future__ import annotations

import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")


def made_of(cls: type[T], fields: Mapping[str, Any]) -> T:
    """A dataclass of values that a file held.

    Raises:
        ValueError: if a value is of another kind than its field, or outside its range.
    """
    hints = get_type_hints(cls)
    return cls(**{name: fitted(name, value, hints[name]) for name, value in fields.items()})


def fitted(name: str, value: Any, hint: Any) -> Any:
    """A value as a type hint wants it.

    YAML 1.1 reads `1e-3` as text and `off` as False; both are taken for what they mean.

    Raises:
        ValueError: if the value is of another kind.
    """
    origin, parts = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        for part in parts:
            try:
                return fitted(name, value, part)
            except ValueError:
                continue
    elif origin is Literal:
        word = {True: "on", False: "off"}[value] if isinstance(value, bool) else value
        if word in parts:
            return word
    elif origin is tuple and isinstance(value, list | tuple):
        kinds = [parts[0]] * len(value) if parts[-1] is ... else parts
        if len(kinds) == len(value):
            return tuple(fitted(name, each, kind) for each, kind in zip(value, kinds, strict=True))
    elif hint is Any or (hint is types.NoneType and value in (None, "None")):
        return None if value == "None" else value
    elif hint in (int, float) and not isinstance(value, bool) and isinstance(value, int | float | str):
        number = _number(value)
        if number is not None and (hint is float or number == number // 1):
            return hint(value if isinstance(value, int) else number)
    elif isinstance(value, hint if hint in (str, bool) else ()):
        return value
    elif hint is Path and isinstance(value, str):
        return Path(value)
    raise ValueError(f"{name}: got {value!r}, expected {_meaning(hint)}")


def _number(value: float | str) -> float | None:
    try:
        return float(value)
    except (ValueError, OverflowError):
        return None


def _meaning(hint: Any) -> str:
    """A type hint in words."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(map(_meaning, parts))
    if origin is Literal:
        return " or ".join(map(str, parts))
    if origin is tuple:
        return f"a list of {_meaning(parts[0])}"
    names: dict[Any, str] = {
        int: "an integer", float: "a number", bool: "true or false", str: "text", Path: "a path",
        types.NoneType: "None",
    }  # fmt: skip
    return names.get(hint, str(hint))
