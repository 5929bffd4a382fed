"""Values of a checkpoint as a tree for JSON with tensors beside it, and back: data, and the classes named here.

The tree is plain JSON; what JSON lacks is an object with one key that begins with "$", see `Decoder`.
"""

from __future__ import annotations

import dataclasses
import math
import re
import reprlib
import warnings
from collections import OrderedDict, deque
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.type_aliases import TrainFreq, TrainFrequencyUnit
from stable_baselines3.common.utils import ConstantSchedule, FloatSchedule, LinearSchedule
from torch import Tensor, nn

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "BOOL": torch.bool,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8,
}  # fmt: skip
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_NOT_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


T = TypeVar("T", bound=type)


class CheckpointError(ValueError):
    """A file that cannot be read as a checkpoint, or a value that no checkpoint can hold."""


_FIELDS: dict[type, tuple[str, ...]] = {
    spaces.Box: ("low", "high", "dtype"),
    spaces.Dict: ("spaces",),
    spaces.Discrete: ("n", "start"),
    spaces.MultiDiscrete: ("nvec",),
    spaces.MultiBinary: ("n",),
    LinearSchedule: ("start", "end", "end_fraction"),
    ConstantSchedule: ("val",),
    FloatSchedule: ("value_schedule",),
    TrainFreq: ("frequency", "unit"),
    TrainFrequencyUnit: ("value",),
}
"""Classes whose instances can be stored -> their attributes that, as arguments, make an equal one."""

_CLASSES = {kind.__name__: kind for kind in _FIELDS}
_UPGRADES: dict[type, Callable[[dict[str, Any]], dict[str, Any]]] = {}


def storable(kind: T | None = None, *, upgrade: Callable[[dict[str, Any]], dict[str, Any]] | None = None) -> Any:
    """Let checkpoints hold a class, by its name, and its instances if it is a dataclass. A decorator.

    Args:
        kind: the class.
        upgrade: of a dataclass: fields as any earlier version saved them -> fields of this one.
    """
    if kind is None:
        return partial(storable, upgrade=upgrade)
    _CLASSES[kind.__name__] = kind
    if dataclasses.is_dataclass(kind):
        _FIELDS[kind] = tuple(field.name for field in dataclasses.fields(kind))
    if upgrade is not None:
        _UPGRADES[kind] = upgrade
    return kind


@storable
@dataclasses.dataclass(frozen=True)
class SavedSchedule:
    """A function of what remains of training (1 to 0) as its values at equal steps, linear in between.

    Any function can be a schedule, but only data can be saved. Between the 1,001 values a smooth one is met to six
    digits, one with jumps to a thousandth of the training.
    """

    values: np.ndarray

    @classmethod
    def of(cls, schedule: Callable[[float], float]) -> SavedSchedule:
        """The values of a schedule."""
        return cls(np.array([float(schedule(remaining)) for remaining in np.linspace(0, 1, 1001).tolist()]))

    def __call__(self, remaining: float) -> float:
        """The value at what remains."""
        return float(np.interp(remaining, np.linspace(0, 1, len(self.values)), self.values))


def storable_schedule(schedule: Callable[[float], float]) -> Callable[[float], float]:
    """A schedule that checkpoints can hold: itself, or its values."""
    inner = schedule.value_schedule if isinstance(schedule, FloatSchedule) else schedule
    return schedule if type(inner) in _FIELDS else SavedSchedule.of(schedule)


class Encoder:
    """Turns values into a tree for JSON; `tensors` collects what goes beside it."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}

    def encode(self, value: Any, where: str) -> Any:
        """The tree for a value that lies at `where`, a path of names and numbers."""
        kind = type(value)
        if value is None or kind in (bool, int, str):
            return value
        if kind is float:
            return value if math.isfinite(value) else {"$float": str(value)}
        if isinstance(value, Tensor):
            return {"$tensor": self._add(value.detach(), where)}
        if isinstance(value, np.ndarray | np.generic):
            return {"$array" if kind is np.ndarray else "$scalar": self._add_array(value, where)}
        if kind in (dict, OrderedDict):
            if all(isinstance(key, str) and not key.startswith("$") for key in value):
                return {key: self.encode(each, f"{where}.{key}" if where else key) for key, each in value.items()}
            return {"$dict": self.encode([list(item) for item in value.items()], where)}
        if kind is list and len(value) >= 16 and all(type(each) is float for each in value):
            return {"$floats": self._add(torch.tensor(value, dtype=torch.float64), where)}
        if kind in (list, tuple, deque):
            items = [self.encode(each, f"{where}.{i}") for i, each in enumerate(value)]
            return items if kind is list else {"$tuple": items} if kind is tuple else {"$deque": [value.maxlen, items]}
        if isinstance(value, np.dtype) and value.kind in "biufc":
            return {"$dtype": value.name}
        if isinstance(value, type) and (name := _class_name(value)):
            return {"$class": name}
        if kind in _FIELDS:
            fields = {name: getattr(value, name) for name in _FIELDS[kind]}
            if kind is spaces.Dict:
                fields["spaces"] = list(value.spaces.items())  # of a dict it would sort the keys
            return {"$object": [kind.__name__, self.encode(fields, where)]}
        raise _unstorable(value, where)

    def _add(self, tensor: Tensor, where: str) -> str:
        if tensor.dtype not in DTYPE_NAMES or tensor.layout is not torch.strided:
            raise _unstorable(tensor, where)
        while where in self.tensors:  # names with dots can meet
            where += "'"
        self.tensors[where] = tensor
        return where

    def _add_array(self, value: Any, where: str) -> str:
        try:
            return self._add(torch.from_numpy(np.array(value, order="C")), where)
        except TypeError:  # objects, text
            raise _unstorable(value, where) from None


def _unstorable(value: object, where: str) -> CheckpointError:
    names = where.split(".")
    attribute = names[1] if names[0] == "attributes" and len(names) > 1 else names[0]
    place = f" in {where}" if len(names) > 2 else ""
    return CheckpointError(
        f"{attribute}: got {reprlib.repr(value)}{place}, which a checkpoint cannot hold, only data and the classes of "
        f"DriftRL and torch; save(..., exclude=[{attribute!r}]) leaves it out, load(..., "
        f"custom_objects={{{attribute!r}: ...}}) puts it back"
    )


def _class_name(kind: type) -> str | None:
    """The name of a class that checkpoints can refer to, or None."""
    if _CLASSES.get(kind.__name__) is kind:
        return kind.__name__
    for prefix, module in (("torch.nn", nn), ("torch.optim", torch.optim)):
        if getattr(module, kind.__name__, None) is kind:
            return f"{prefix}.{kind.__name__}"
    return None


def _class_of(name: str) -> type:
    if name in _CLASSES:
        return _CLASSES[name]
    for prefix, module, base in (("torch.nn.", nn, nn.Module), ("torch.optim.", torch.optim, torch.optim.Optimizer)):
        kind = getattr(module, name.removeprefix(prefix), None) if name.startswith(prefix) else None
        if isinstance(kind, type) and issubclass(kind, base):
            return kind
    raise CheckpointError(f"got the class {name!r}, expected one of DriftRL, torch.nn or torch.optim")


class Decoder:
    """Turns a tree back into values."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self._tensors = tensors
        self._readers: dict[str, Callable[[Any], Any]] = {
            "$float": lambda text: _NOT_FINITE[text],
            "$tensor": lambda name: tensors[name],
            "$array": lambda name: tensors[name].numpy(),
            "$scalar": lambda name: tensors[name].numpy()[()],
            "$floats": lambda name: tensors[name].tolist(),
            "$dict": lambda items: {key: value for key, value in self.decode(items)},
            "$tuple": lambda items: tuple(self.decode(items)),
            "$deque": lambda parts: deque(self.decode(parts[1]), maxlen=parts[0]),
            "$dtype": self._dtype,
            "$class": _class_of,
            "$object": self._object,
        }

    def decode(self, tree: Any) -> Any:
        """The value of a tree."""
        if isinstance(tree, list):
            return [self.decode(each) for each in tree]
        if not isinstance(tree, dict):
            return tree
        if not any(key.startswith("$") for key in tree):
            return {key: self.decode(value) for key, value in tree.items()}
        ((tag, value),) = tree.items()
        return self._readers[tag](value)

    @staticmethod
    def _dtype(name: str) -> np.dtype[Any]:
        if not re.fullmatch(r"(bool|u?int|float|complex)\d*", name):
            raise CheckpointError(f"got the dtype {name!r}, expected one of numbers")
        return np.dtype(name)

    def _object(self, parts: list[Any]) -> Any:
        name, tree = parts
        kind, arguments = _CLASSES[name], self.decode(tree)
        if kind in _UPGRADES:
            arguments = _UPGRADES[kind](arguments)
        unknown = sorted(arguments.keys() - set(_FIELDS[kind]))
        if unknown and not dataclasses.is_dataclass(kind):  # other arguments could make it of any size
            raise CheckpointError(f"got {name} with {', '.join(unknown)}, expected {', '.join(_FIELDS[kind])}")
        if unknown:
            warnings.warn(f"{name}: ignored {', '.join(unknown)}, which this version does not know", stacklevel=2)
        return kind(**{field: value for field, value in arguments.items() if field not in unknown})
