"""The agents' Config dataclasses: their validation, and agents whose attributes are their Config's fields."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import partial
from numbers import Integral, Real
from operator import attrgetter
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar, get_args, get_origin, get_type_hints

from gymnasium.vector import VectorEnv
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.vec_env import VecEnv

from .arguments import Neutral, without_neutral
from .learning_rate import no_function

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
    "a number of at least 0, or None": lambda x: x is None or (_number(x) and x >= 0),
    "a number in [0, 1]": lambda x: _number(x) and 0 <= x <= 1,
    "a number in (0, 1)": lambda x: _number(x) and 0 < x < 1,
    "a number in [0, 1)": lambda x: _number(x) and 0 <= x < 1,
    "a number above 0, at most 1": lambda x: _number(x) and 0 < x <= 1,
    "a number in [0.3, 1)": lambda x: _number(x) and 0.3 <= x < 1,
    "a number, or None": lambda x: x is None or _number(x),
    "two numbers, or None": lambda x: x is None or (isinstance(x, Collection) and len(x) == 2 and all(map(_number, x))),
    "an integer of at least 1": lambda x: _count(x) and x >= 1,
    "an integer of at least 2": lambda x: _count(x) and x >= 2,
    "an integer of at least 1, or None": lambda x: x is None or (_count(x) and x >= 1),
    "an integer of at least 1, or -1": lambda x: _count(x) and (x >= 1 or x == -1),
    "an integer of at least 0": lambda x: _count(x) and x >= 0,
    "an integer of 1 .. 2**31 - 1": lambda x: _count(x) and 1 <= x < 2**31,
    "an integer of 0 .. 2**31 - 1": lambda x: _count(x) and 0 <= x < 2**31,
    "positive integers": lambda x: isinstance(x, Collection) and all(_count(width) and width >= 1 for width in x),
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
        config: dataclass instance; lists in it become tuples.
        ranges: key of `RANGES` -> names of the fields it holds for, separated by blanks.

    Raises:
        ValueError: if a field is outside its range.
    """
    for name in (field.name for field in dataclasses.fields(config)):
        if isinstance(value := getattr(config, name), list):  # a Config does not change, nor do its values
            object.__setattr__(config, name, tuple(value))
    for expected, names in ranges.items():
        for name in names.split():
            require(config, name, RANGES[expected](getattr(config, name)), expected)
    for name, hint in get_type_hints(type(config)).items():
        if get_origin(hint) is Literal:
            require(config, name, getattr(config, name) in get_args(hint), "one of " + ", ".join(get_args(hint)))


def agreeing(given: Mapping[str, Any], implied: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Fields given by their names, and those that another argument stands for.

    Raises:
        ValueError: if the two contradict each other.
    """
    for name in given.keys() & implied.keys():
        if given[name] != implied[name]:
            raise ValueError(
                f"{name}: got {given[name]!r}, but {source} stands for {implied[name]!r}; give one of the two"
            )
    return {**given, **implied}


class UnknownArgument(TypeError):
    """A keyword that is none of a Config's fields."""


def resolve(config: T, fields: Mapping[str, Any]) -> T:
    """A Config with fields given by keyword in place of its own, each of which means something.

    Raises:
        UnknownArgument: if a keyword is no field.
        ValueError: if a field is outside its range, or has no effect as the others are.
    """
    known = [field.name for field in dataclasses.fields(config)]
    if unknown := [name for name in fields if name not in known]:
        near = difflib.get_close_matches(unknown[0], known, 1)
        hint = f"did you mean {near[0]}?" if near else ", ".join(known)
        raise UnknownArgument(
            f"unknown argument: got {', '.join(unknown)}, expected fields of {type(config).__name__}; {hint}"
        )
    config = dataclasses.replace(config, **{name: constant(name, value) for name, value in fields.items()})
    for name, switch in inert(config).items():
        raise _no_effect(config, name, switch)
    return config


def _no_effect(config: Any, name: str, switch: str) -> ValueError:
    return ValueError(f"{name}: got {getattr(config, name)!r}, which changes nothing without {switch}")


def inert(config: Any) -> dict[str, str]:
    """Fields that are not at their default although they change nothing as the others are -> what would switch them on.

    A Config names them by its method `switched_off`.
    """
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    off: dict[str, str] = config.switched_off()
    return {name: switch for name, switch in off.items() if getattr(config, name) != defaults[name]}


def without_inert(config: T, chosen: Collection[str]) -> T:
    """A Config in which no preset's field is inert: those that are go back to their defaults, except `chosen` ones."""
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    off = [name for name in inert(config) if name not in chosen]
    return dataclasses.replace(config, **{name: defaults[name] for name in off})


def constant(name: str, value: Any) -> Any:
    """A field's value; of a schedule, as PPO takes for clip_range, the number that it always has.

    Raises:
        ValueError: if the schedule's values differ.
    """
    if not callable(value):
        return value
    numbers = {float(value(remaining)) for remaining in (0.0, 0.25, 0.5, 0.75, 1.0)}
    if len(numbers) > 1:
        raise ValueError(f"{name}: got a schedule from {value(1.0)} to {value(0.0)}, expected a number")
    return numbers.pop()


def require(config: Any, name: str, valid: bool, expected: str) -> None:
    """Raise ValueError with what was got and what is expected unless the field is valid."""
    if not valid:
        raise ValueError(f"{name}: got {getattr(config, name)!r}, expected {expected}")


class Configured(BaseAlgorithm):
    """An agent whose attributes are its Config's fields: reading one reads it, assigning to one replaces the Config."""

    _config: Any
    _rate: float  # of `LearningRate`
    config_class: ClassVar[type[Any]]
    _fixed: ClassVar[frozenset[str]]
    """Fields that networks and buffers are made of: to change them means to make another agent."""
    _learned: ClassVar[frozenset[str]]
    """Those of them whose values the saved weights and optimizers hold: `load` takes no others."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for field in dataclasses.fields(cls.config_class) if "config_class" in vars(cls) else ():
            if not hasattr(cls, field.name):
                read = attrgetter(f"config.{field.name}")
                setattr(cls, field.name, property(read, partial(cls._assign, field.name)))

    @staticmethod
    def _assign(name: str, agent: Configured, value: Any) -> None:
        if isinstance(now := getattr(agent.config, name), tuple) and isinstance(value, Iterable):
            value = tuple(value)
        if value != now:
            agent.config = dataclasses.replace(agent.config, **{name: constant(name, value)})

    @staticmethod
    def _wrap_env(env: Any, verbose: int = 0, monitor_wrapper: bool = True) -> VecEnv:
        """As Stable-Baselines3, which takes Gymnasium's vector environments for single ones.

        Raises:
            ValueError: if it is one of Gymnasium's vector environments.
        """
        if isinstance(env, VectorEnv):
            raise ValueError(
                f"env: got Gymnasium's {type(env).__name__}, expected a VecEnv of Stable-Baselines3; use "
                "driftrl.envs.make_vec(id, n_envs, seed)"
            )
        return BaseAlgorithm._wrap_env(env, verbose, monitor_wrapper)

    def _assign_config(self, config: Any) -> None:
        if type(config) is not self.config_class:
            raise ValueError(f"config: got a {type(config).__name__}, expected a {self.config_class.__name__}")
        if "_gradient" not in vars(self):  # nothing is built yet
            self._config = config
            return
        off = inert(config)
        for name in (field.name for field in dataclasses.fields(config)):
            if (value := getattr(config, name)) == getattr(self.config, name):
                continue
            if name in self._fixed:
                raise ValueError(f"{name}: got {value!r}, but it was fixed when the agent was made; make another agent")
            if name in off:  # others may be without effect for now: a callback anneals what switches them on
                raise _no_effect(config, name, off[name])
        self._check(config)
        if config.learning_rate != self.config.learning_rate:
            self._rate = config.learning_rate
        self._config = config
        if config.lr_schedule != "function":
            vars(self).pop("learning_rate", None)
        self._config_changed()

    config = property(
        attrgetter("_config"), _assign_config,
        doc="The hyperparameters. Another Config is used at once; what the networks are made of has to agree.",
    )  # fmt: skip

    def _check_neutral(self, neutral: Neutral) -> None:
        """Refuse attributes of Stable-Baselines3 that somebody set and nothing reads.

        Raises:
            ValueError: if one asks for something else than what is done anyway.
        """
        names = [name for name in neutral if name in vars(self) and "buffer" not in name]  # buffers are our own
        without_neutral({name: vars(self)[name] for name in names}, neutral)

    def _check(self, config: Any) -> None:
        """Whether the Config suits the agent.

        Raises:
            ValueError: if not.
        """
        function: Any = vars(self).get("learning_rate")
        if config.lr_schedule == "function" and not callable(function):
            raise no_function()
        if config.lr_schedule == "function" and config.learning_rate != float(function(1.0)):
            got = f"learning_rate: got {config.learning_rate}, but lr_schedule is 'function'"
            raise ValueError(f"{got}; assign to agent.learning_rate, or set lr_schedule, too")

    def _config_changed(self) -> None:
        """Use the Config as it is now; called when the agent is built and after every assignment."""

    def _take_attributes(self, implied: Mapping[str, Any]) -> None:
        """Let the Config say what attributes and policy_kwargs say; for a saved agent, or arguments given to `load`.

        Args:
            implied: fields that policy_kwargs imply.
        """
        attributes = vars(self)
        self._config = attributes.pop("config", self._config)  # a file's
        names = {field.name for field in dataclasses.fields(self.config)}
        given = {name: attributes.pop(name) for name in names & attributes.keys()}
        rate, schedule = given.pop("learning_rate", None), given.get("lr_schedule", attributes.pop("lr_schedule", None))
        if callable(schedule):
            rate = given.pop("lr_schedule", schedule)
        numbers = {name: constant(name, value) for name, value in given.items()}
        before = self.config
        config = self._config = dataclasses.replace(before, **{**implied, **numbers})
        off = inert(config)
        for name in sorted(given):
            if name in off:
                raise _no_effect(config, name, off[name])
            if name in self._learned and numbers[name] != getattr(before, name):
                saved = getattr(before, name)
                raise ValueError(f"{name}: got {numbers[name]!r}, but the saved weights were made with {saved!r}")
        if config.lr_schedule == "function" and rate is not None and not callable(rate):  # a number in its place
            self._config = dataclasses.replace(config, lr_schedule="constant")
        if callable(rate) or (rate is not None and rate != config.learning_rate):
            self.learning_rate = rate
        self._check(self.config)
