"""Steps the simulators of a batch by the compiled step.cpp."""

from __future__ import annotations

import ctypes
import os
import weakref
from ctypes import c_char_p, c_double, c_int, c_void_p
from pathlib import Path
from typing import Any

import mujoco
import numpy as np

from ..simulators import Array, Field, Reader, Simulators
from ..stepping import BAD_STATE, Stepper, ThreadedStepper, observed
from .build import NativeUnavailableError, library

_CALLBACKS = (
    "mjcb_passive", "mjcb_control", "mjcb_contactfilter", "mjcb_sensor", "mjcb_act_dyn", "mjcb_act_gain",
    "mjcb_act_bias", "mju_user_warning",
)  # fmt: skip
"""MuJoCo's variables by which Python code can come to run within a step."""


class _Functions(ctypes.Structure):
    """`Functions` of step.cpp."""

    _fields_ = [(name, c_void_p) for name in ("step", "contact_forces", "get_error_handler", "set_error_handler")]


class _Part(ctypes.Structure):
    """`Part` of step.cpp."""

    _fields_ = [
        ("field", c_int), ("start", c_int), ("count", c_int), ("clipped", c_int), ("low", c_double), ("high", c_double)
    ]  # fmt: skip


class NativeStepper(Stepper):
    """Threads outside Python take one simulator after the other from a queue, step it and gather what is read of it.

    What is gathered is what was asked for so far: the fields in `Simulators.views`. Observations made of `Field`s alone
    are gathered, too. The threads sleep between steps and are joined by `close`. A forked process has none of them and
    starts its own.

    Where Python code was hooked into MuJoCo (`mujoco.set_mjcb_control` and the like) a `ThreadedStepper` steps.

    Args:
        simulators: what is stepped.
        observation: parts of the observation.
        contact_forces: compute cfrc_ext after every step.
        threads: threads that step, the calling one among them.

    Raises:
        NativeUnavailableError: if the source cannot be built here, or MuJoCo lacks what it needs.
    """

    def __init__(
        self, simulators: Simulators, observation: tuple[Reader, ...], contact_forces: bool, threads: int
    ) -> None:
        self._simulators, self._observation, self._contact_forces = simulators, observation, contact_forces
        self._library, self._threads = _declare(library()), threads
        self._plain = tuple(part for part in observation if isinstance(part, Field))
        if len(self._plain) < len(observation):
            self._plain = ()
        self._fallback = ThreadedStepper(simulators, observation, contact_forces, threads)
        n, datas = len(simulators.datas), simulators.datas
        try:
            physics = _mujoco_library()
            names = ("mj_step", "mj_rnePostConstraint", "_mjPRIVATE__get_tls_error_fn", "_mjPRIVATE__set_tls_error_fn")
            self._functions = _Functions(*(ctypes.cast(physics[name], c_void_p) for name in names))
            self._callbacks = [c_void_p.in_dll(physics, name) for name in _CALLBACKS]
            self._models = _addresses([model._address for model in simulators.models])
            self._datas = _addresses([data._address for data in datas])
        except (AttributeError, OSError, ValueError, StopIteration) as error:
            reason = f"MuJoCo {mujoco.__version__} lacks what native stepping needs: {error}"
            raise NativeUnavailableError(reason) from error
        self._controls, self._n_controls = _addresses([data.ctrl.ctypes.data for data in datas]), datas[0].ctrl.size
        warnings = [data.warning.number[BAD_STATE] for data in datas]
        self._warnings = _addresses([each.ctypes.data for each in warnings])
        self._n_warnings, self._warning_stride = warnings[0].size, warnings[0].strides[0]
        self._bad: Array = np.empty(n, dtype=bool)
        self._bad_address = _address(self._bad)
        self._start()

    def _start(self) -> None:
        """Start the threads in this process."""
        n = len(self._simulators.datas)
        self._batch = self._library.driftrl_make(
            ctypes.byref(self._functions), n, self._threads, _address(self._models), _address(self._datas),
            _address(self._controls), self._n_controls, _address(self._warnings), self._n_warnings,
            self._warning_stride,
        )  # fmt: skip
        if not self._batch:
            raise MemoryError(f"no memory for the threads of {n} environments")
        self._process = os.getpid()
        self._end = weakref.finalize(self, _end, self._library, self._batch, self._process)
        self._told: tuple[Any, ...] = ()  # what the batch was told to gather

    def step(self, frames: int) -> tuple[Array, Array]:
        """See `Stepper`."""
        s = self._simulators
        # The clock's variable is never empty: MuJoCo's bindings set one of their own.
        if any(each.value for each in self._callbacks) or mujoco.get_mjcb_time() is not None:
            return self._fallback.step(frames)
        if not self._end.alive or self._process != os.getpid():
            self._start()
        if s.own_models:
            self._models[:] = [model._address for model in s.models]
        wanted = (len(s.views), *_wanted(self._plain, s.env))
        if wanted != self._told:
            self._tell(wanted)
        actions = np.ascontiguousarray(s.actions, dtype=np.float64)
        fields, obs = np.empty(self._size), np.empty((len(s.datas), self._width))
        failed = self._library.driftrl_step(
            self._batch, _address(actions), frames, self._contact_forces, _address(fields), _address(obs),
            self._bad_address,
        )  # fmt: skip
        s.forget({name: fields[part].reshape(shape) for name, part, shape in self._gathered})
        if failed:
            raise mujoco.FatalError(self._library.driftrl_error(self._batch).decode())
        if self._width:
            return obs, self._bad
        obs = observed(s, self._observation)
        return obs, self._bad | ~np.isfinite(obs).all(axis=1)

    def _tell(self, wanted: tuple[Any, ...]) -> None:
        """Tell the batch what to gather: the fields that were read so far, and the parts of the observation."""
        s = self._simulators
        n = len(s.datas)
        for part in self._plain:
            s.view(part.name)
        views = {name: each for name, each in s.views.items() if each[0].dtype == np.float64}
        sources = _addresses([view.ctypes.data for each in views.values() for view in each])
        sizes: Array = np.array([each[0].size for each in views.values()], dtype=np.intc)
        parts, names = [], list(views)
        for part, (start, bounds) in zip(self._plain, wanted[1:], strict=False):
            whole, row = views[part.name][0].size, views[part.name][0][:1].size
            if start is not None:
                count = whole - start * row
                parts.append(_Part(names.index(part.name), start * row, count, bounds is not None, *(bounds or (0, 0))))
        failed = self._library.driftrl_read(
            self._batch, len(views), _address(sources), _address(sizes), len(parts), (_Part * len(parts))(*parts)
        )
        if failed:
            raise MemoryError("no memory for the list of what is read")
        self._width = sum(part.count for part in parts)
        ends = n * np.cumsum([0, *sizes])
        self._size = int(ends[-1])
        self._gathered = [
            (name, slice(int(low), int(high)), (n, *each[0].shape))
            for (name, each), low, high in zip(views.items(), ends[:-1], ends[1:], strict=True)
        ]
        self._told = (len(s.views), *wanted[1:])

    def close(self) -> None:
        """End and join the threads."""
        self._end()
        self._fallback.close()


def _wanted(parts: tuple[Field, ...], env: Any) -> list[tuple[int | None, tuple[float, float] | None]]:
    """Of each part of the observation the first row and the bounds; empty where bounds are not two numbers."""
    try:
        return [
            (part.start(env), None if (bounds := part.bounds(env)) is None else (float(bounds[0]), float(bounds[1])))
            for part in parts
        ]
    except (TypeError, ValueError):
        return []


def _address(array: Array) -> int:
    return array.ctypes.data


def _addresses(values: list[int]) -> Array:
    """Pointers for the library."""
    return np.array(values, dtype=np.uintp)


def _end(library: ctypes.CDLL, batch: int, process: int) -> None:
    """End the threads of a batch in the process that started them."""
    if os.getpid() == process:
        library.driftrl_end(batch)


def _declare(library: ctypes.CDLL) -> ctypes.CDLL:
    """Give the functions of step.cpp their types."""
    library.driftrl_make.argtypes = [c_void_p, c_int, c_int, *[c_void_p] * 3, c_int, c_void_p, c_int, c_int]
    library.driftrl_make.restype = c_void_p
    library.driftrl_read.argtypes = [c_void_p, c_int, c_void_p, c_void_p, c_int, c_void_p]
    library.driftrl_step.argtypes = [c_void_p, c_void_p, c_int, c_int, c_void_p, c_void_p, c_void_p]
    library.driftrl_error.argtypes, library.driftrl_error.restype = [c_void_p], c_char_p
    library.driftrl_end.argtypes, library.driftrl_end.restype = [c_void_p], None
    return library


def _mujoco_library() -> ctypes.CDLL:
    """The library that the mujoco package has loaded."""
    folder = Path(mujoco.__file__).parent
    path = next(path for pattern in ("libmujoco.so*", "libmujoco*.dylib") for path in sorted(folder.glob(pattern)))
    return ctypes.CDLL(str(path))
