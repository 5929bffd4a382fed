"""N MuJoCo simulators of one task: how they are stepped, and what is read of them as arrays over all of them.

Compiled code steps them (`native/step.cpp`) where it can be built, else threads of Python do. The numbers are the same.
"""

from __future__ import annotations

import ctypes
import os
import threading
import weakref
from collections.abc import Callable
from ctypes import c_void_p
from typing import Any, TypeAlias, cast

import mujoco
import numpy as np
from gymnasium.envs.mujoco.humanoid_v5 import mass_center
from numpy.typing import NDArray

from .mujoco_tasks import Batch, Field, Reader, Task
from .native.build import Functions, NativeUnavailableError, Part, library, mujoco_library
from .python_threads import PythonThreads

Array: TypeAlias = NDArray[Any]

STATE = int(mujoco.mjtState.mjSTATE_INTEGRATION)
"""All that determines the course of a simulator."""
_BAD_STATE = slice(int(mujoco.mjtWarning.mjWARN_BADQPOS), int(mujoco.mjtWarning.mjWARN_BADQACC) + 1)
"""Warnings after which MuJoCo has reset a simulator by itself."""
_CALLBACKS = (
    "mjcb_passive", "mjcb_control", "mjcb_contactfilter", "mjcb_sensor", "mjcb_act_dyn", "mjcb_act_gain",
    "mjcb_act_bias", "mju_user_warning",
)  # fmt: skip
"""MuJoCo's variables, the clock's apart, by which Python code can come to run within a step."""


class Simulators(Batch):
    """N simulators of one model, and what the functions of a task read of them.

    ``s["qpos"]`` is that field of every MjData in one array [N, ...], copied at the first access after a step, or by
    the compiled code with the step.

    Args:
        env: the prototype, with the task's arguments as attributes.
        task: what is observed, and whether contact forces are.
        n: number of simulators, N.
        threads: threads that step, the calling one among them.
        native: True to insist on the compiled code, False for Python's threads, None: where it can be built.

    Attributes:
        models: of every simulator its model, one for all unless a user asked for one.
        own_models: whether a user did.
        actions: the actions of this step, [N, nu], in the dtype in which they came.
        before: the tracked point before the step, [N] or [N, 2].
        after: the tracked point after the step.
        views: of each field that was read so far, the simulators' own arrays.
        compiled: the compiled code, or None.

    Raises:
        ValueError: if native is True and it cannot be built.
    """

    xp = np

    def __init__(self, env: Any, task: Task, n: int, threads: int, native: bool | None) -> None:
        self.env: Any = env
        self.model, self._task = self.env.model, task
        self.models, self.own_models = [self.model] * n, False
        self.datas = [mujoco.MjData(self.model) for _ in range(n)]
        self.views: dict[str, list[Array]] = {}
        self._arrays: dict[str, Array] = {}
        self._controls = [data.ctrl for data in self.datas]
        self._warnings = [data.warning.number for data in self.datas]
        self._python = PythonThreads(n, threads)
        self.compiled: CompiledThreads | None = None
        if native is not False:
            try:
                self.compiled = CompiledThreads(self, task.observation, threads)
            except NativeUnavailableError as error:
                if native:
                    raise ValueError(f"native: got True, but {error}; or choose None") from error

    def step(self, actions: Array, timed: bool) -> tuple[Array, Array]:
        """Step all.

        Args:
            actions: [N, nu].
            timed: whether somebody can see what MuJoCo notes of the time that it takes (`data.timer`).

        Returns:
            Observations [N, O], and [N] whether MuJoCo found a bad state or a number of the observation is not finite.

        Raises:
            mujoco.FatalError: if MuJoCo stops at an error.
        """
        self.actions, self._arrays = actions, {}
        n, contact_forces = len(self.datas), self._task.contact_forces
        found = self.compiled.step(self, contact_forces, timed) if self.compiled else None
        if found is None:
            for control, action in zip(self._controls, actions, strict=True):
                control[:] = action

            def step(chunk: slice) -> None:
                for model, data in zip(self.models[chunk], self.datas[chunk], strict=True):
                    mujoco.mj_step(model, data, self.frames)
                    if contact_forces:
                        mujoco.mj_rnePostConstraint(model, data)

            self.share(step)
            warned: Array = np.concatenate(self._warnings).reshape(n, -1)[:, _BAD_STATE]
            obs, bad = None, cast(Array, warned.any(axis=1))
        else:
            self._arrays, obs, bad = found
        if self._task.settle is not None:
            self._task.settle(self)
            self.forget()
        if obs is None:
            obs = np.concatenate([part(self) for part in self._task.observation], axis=1)
            bad |= ~np.isfinite(obs).all(axis=1)
        return obs, bad

    @property
    def frames(self) -> int:
        """Steps of a simulator per step."""
        return int(getattr(self.env, self._task.frames))

    def share(self, work: Callable[[slice], None]) -> None:
        """Do something with all of them: Python's threads take equal shares."""
        self._python.run(work)

    def can_restart(self, which: list[int]) -> bool:
        """Whether `restart` will do: the last step gathered observations, and no simulator has warnings to be reset."""
        gathered = self.compiled is not None and self.compiled.gathered
        return gathered and not np.concatenate([self._warnings[i] for i in which]).any()

    def restart(self, which: list[int], states: Array) -> None:
        """Set the state of some, without what follows from it; update the observations that the last step returned.

        Args:
            which: k simulators.
            states: their `STATE`, [k, S].
        """
        assert self.compiled is not None
        self.compiled.restart(self, which, states)

    def __getitem__(self, field: str) -> Array:
        if field not in self._arrays:
            views = self.view(field)
            self._arrays[field] = np.concatenate(views).reshape(len(views), *views[0].shape)
        return self._arrays[field]

    def view(self, field: str) -> list[Array]:
        """A field of each MjData, not copied."""
        if field not in self.views:
            self.views[field] = [getattr(data, field) for data in self.datas]
        return self.views[field]

    def forget(self) -> None:
        """Drop the copies, for the simulators have moved."""
        self._arrays = {}

    def arguments_changed(self) -> None:
        """Note that what is observed may be other from the next step on."""
        if self.compiled:
            self.compiled.look_again = True

    def mass_centers(self) -> Array:
        """Centre of mass of each model in the plane, [N, 2]."""
        # One by one: over the whole batch numpy.einsum adds in another order.
        return np.stack([mass_center(*each) for each in zip(self.models, self.datas, strict=True)])

    @property
    def timestep(self) -> float | Array:
        """See `Batch`."""
        return np.array([model.opt.timestep for model in self.models]) if self.own_models else super().timestep

    def __reduce__(self) -> Any:
        raise TypeError("simulators are not pickled or copied; take the state of their batch over by get_state")

    def close(self) -> None:
        """End the threads. Another step would start them anew."""
        if self.compiled:
            self.compiled.close()
        self._python.close()


class CompiledThreads:
    """Threads outside Python take one simulator after the other from a queue, step it and gather what is read of it.

    What is gathered is what was asked for so far: the fields in `Simulators.views`. Observations made of `Field`s alone
    are gathered, too. The threads sleep between steps. `close`, garbage collection or the end of the process joins
    them, after the step in progress if another thread of Python steps. A forked process has none of them and starts its
    own.

    MuJoCo reads its clock 32 times in a step by Euler's method and 114 times in one by Runge and Kutta's, for
    `data.timer`: a quarter of the time of a small model. The first step puts a clock of ours in its place, which is
    MuJoCo's own but within steps whose timer nobody sees.

    Args:
        s: the simulators.
        observation: parts of the observation.
        threads: threads that step, the calling one among them.

    Raises:
        NativeUnavailableError: if the source cannot be built here, or MuJoCo lacks what it needs.
    """

    def __init__(self, s: Simulators, observation: tuple[Reader, ...], threads: int) -> None:
        self._library, self._threads, self._n = library(), threads, len(s.datas)
        plain = tuple(part for part in observation if isinstance(part, Field))
        self._plain = plain if len(plain) == len(observation) else ()
        try:
            physics = mujoco_library()
            self._functions = Functions(*(ctypes.cast(physics[name], c_void_p) for name in Functions.NAMES))
            self._callbacks = [c_void_p.in_dll(physics, name) for name in _CALLBACKS]
            self._clock = c_void_p.in_dll(physics, "mjcb_time")
            models, datas = ([each._address for each in some] for some in (s.models, s.datas))
        except (AttributeError, OSError, ValueError) as error:
            reason = f"MuJoCo {mujoco.__version__} lacks what native stepping needs: {error}"
            raise NativeUnavailableError(reason) from error
        self._our_clock = ctypes.cast(self._library.driftrl_clock, c_void_p).value
        self._their_clock = c_void_p.in_dll(self._library, "driftrl_their_clock")
        warnings = [data.warning.number[_BAD_STATE] for data in s.datas]
        self._n_warnings, self._warning_stride = warnings[0].size, warnings[0].strides[0]
        self._models, self._datas = _pointers(models), _pointers(datas)
        self._n_controls = s.datas[0].ctrl.size
        self._controls = _pointers([data.ctrl.ctypes.data for data in s.datas])
        self._warned = _pointers([each.ctypes.data for each in warnings])
        self._lock = threading.Lock()  # of several threads of Python one steps or ends the batch
        self._ending, self.look_again = False, False
        self._last: tuple[Array, Array] | None = None  # the fields and observations that `step` returned
        self._start()

    def _start(self) -> None:
        """Start the threads in this process."""
        self._batch = self._library.driftrl_make(
            ctypes.byref(self._functions), self._n, self._threads, *map(_address, (self._models, self._datas)),
            _address(self._controls), self._n_controls, _address(self._warned), self._n_warnings, self._warning_stride,
        )  # fmt: skip
        if not self._batch:
            raise MemoryError(f"no memory for the threads of {self._n} environments")
        self._process = os.getpid()
        self._end = weakref.finalize(self, _end, self._library, self._batch, self._process, self._lock)
        self._told: Any = None  # what the batch was told to gather

    @property
    def gathered(self) -> bool:
        """Whether the last call of `step` gathered observations."""
        return self._last is not None

    def step(
        self, s: Simulators, contact_forces: bool, timed: bool
    ) -> tuple[dict[str, Array], Array | None, Array] | None:
        """Step all by `Simulators.actions`.

        Args:
            s: the simulators.
            contact_forces: compute cfrc_ext then.
            timed: whether MuJoCo's clock runs; what is observed may have changed since the last step, too.

        Returns:
            Fields by their names, observations [N, O] where they are gathered, and [N] which simulators are broken.
            None, with nothing done, where Python code was hooked into MuJoCo (`mujoco.set_mjcb_control` and the like).
        """
        self._last = None
        if self._hooked():
            return None
        if self._process != os.getpid():  # the threads have stayed behind, and so may have who held the lock
            self._lock = threading.Lock()
            self._end.detach()
            self._start()
        n = len(s.datas)
        actions = np.ascontiguousarray(s.actions, dtype=np.float64)
        with self._lock:
            if not self._end.alive:
                self._start()
            if s.own_models:
                self._models[:] = [model._address for model in s.models]
            if timed or self.look_again or self._told is None or self._told[0] != len(s.views):
                self._tell(s)
            fields, obs, broken = np.empty(self._size), np.empty((n, self._width)), np.empty(n, dtype=bool)
            error = self._library.driftrl_step(
                self._batch, _address(actions), s.frames, contact_forces, timed, _address(fields),
                _address(obs), _address(broken),
            )  # fmt: skip
        if self._ending:  # `close` was called meanwhile
            self.close()
        if error is not None:
            raise mujoco.FatalError(error.decode(errors="replace"))
        if self._width:
            self._last = fields, obs
        arrays = {name: fields[part].reshape(shape) for name, part, shape in self._gathered}
        return arrays, obs if self._width else None, broken

    def _hooked(self) -> bool:
        """Whether Python code would run within a step. If not, the clock is ours from now on."""
        if any(each.value for each in self._callbacks):
            return True
        clock = self._clock.value
        if clock is None or clock == self._our_clock:
            return False
        if mujoco.get_mjcb_time() is not None:
            return True
        if not self._their_clock.value:  # the first one: it never becomes one that calls ours
            self._their_clock.value = clock
        self._clock.value = self._our_clock
        return False

    def _tell(self, s: Simulators) -> None:
        """Tell the batch what to gather: the fields that were read so far, and the parts of the observation."""
        for part in self._plain:
            s.view(part.name)
        wanted = (len(s.views), _spans(self._plain, s.env))
        self.look_again = False
        if wanted == self._told:
            return
        self._told = None  # an interrupt on the way leaves nothing half told
        n, views = len(s.datas), {name: each for name, each in s.views.items() if each[0].dtype == np.float64}
        sources = _pointers([view.ctypes.data for each in views.values() for view in each])
        sizes: Array = np.array([each[0].size for each in views.values()], dtype=np.intc)
        parts, names = [], list(views)
        for part, (start, bounds) in zip(self._plain, wanted[1], strict=False):
            whole, row = views[part.name][0].size, views[part.name][0][:1].size
            if start is not None:
                count = whole - start * row
                parts.append(Part(names.index(part.name), start * row, count, bounds is not None, *(bounds or (0, 0))))
        failed = self._library.driftrl_read(
            self._batch, len(views), _address(sources), _address(sizes), len(parts), (Part * len(parts))(*parts)
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
        self._told = wanted

    def restart(self, s: Simulators, which: list[int], states: Array) -> None:
        """Set states [k, S], and update what the last call of `step` returned of these k simulators."""
        assert self._last is not None
        fields, obs = self._last
        indices: Array = np.array(which, dtype=np.intc)
        with self._lock:
            if not self._end.alive:  # closed meanwhile
                self._start()
                self._tell(s)
            self._library.driftrl_restart(
                self._batch, _address(indices), len(which), _address(states), states.shape[1], STATE, _address(fields),
                _address(obs),
            )  # fmt: skip
        if self._ending:
            self.close()

    __reduce__ = Simulators.__reduce__

    def close(self) -> None:
        """End and join the threads; while another thread of Python steps, that one does when it is ready."""
        self._ending = self._process == os.getpid()
        if self._ending and self._lock.acquire(blocking=False):
            try:
                self._ending = False
                if self._end.detach() is not None:
                    self._library.driftrl_end(self._batch)
            finally:
                self._lock.release()


def _spans(parts: tuple[Field, ...], env: Any) -> list[tuple[int | None, tuple[float, float] | None]]:
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


def _pointers(addresses: list[int]) -> Array:
    """A table for the library."""
    return np.array(addresses, dtype=np.uintp)


def _end(library: ctypes.CDLL, batch: int, process: int, lock: threading.Lock) -> None:
    """End the threads of a batch in the process that started them, after the step in progress."""
    if os.getpid() == process:
        with lock:
            library.driftrl_end(batch)
