"""Who steps the simulators of a batch: threads of Python, or the compiled ones of native/."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import mujoco
import numpy as np

from .simulators import Array, Reader, Simulators

BAD_STATE = slice(int(mujoco.mjtWarning.mjWARN_BADQPOS), int(mujoco.mjtWarning.mjWARN_BADQACC) + 1)
"""Warnings after which MuJoCo has reset a simulator by itself."""


class Stepper(ABC):
    """Steps all simulators of a batch at once; their numbers do not depend on who steps."""

    @abstractmethod
    def step(self, frames: int) -> tuple[Array, Array]:
        """Step by `Simulators.actions` and drop the copies of what was there before.

        Args:
            frames: steps of the simulator.

        Returns:
            Observations [N, O], and [N] whether MuJoCo found a bad state or a number of the observation is not finite.

        Raises:
            mujoco.FatalError: if MuJoCo stops at an error.
        """

    @abstractmethod
    def close(self) -> None:
        """End the threads. Another step would start them anew."""


class ThreadedStepper(Stepper):
    """Each thread of Python steps an equal share: `mj_step` works without Python's lock.

    Args:
        simulators: what is stepped.
        observation: parts of the observation.
        contact_forces: compute cfrc_ext after every step (`mj_rnePostConstraint`).
        threads: threads that step, the calling one among them.
    """

    def __init__(
        self, simulators: Simulators, observation: tuple[Reader, ...], contact_forces: bool, threads: int
    ) -> None:
        self._simulators, self._observation, self._contact_forces = simulators, observation, contact_forces
        self._controls = [data.ctrl for data in simulators.datas]
        self._warnings = [data.warning.number[BAD_STATE] for data in simulators.datas]
        n = len(simulators.datas)
        bounds = [n * i // threads for i in range(threads + 1)]
        self._chunks = [slice(low, high) for low, high in pairwise(bounds)]
        self._pool: ThreadPoolExecutor | None = None
        self._process = os.getpid()

    def step(self, frames: int) -> tuple[Array, Array]:
        """See `Stepper`."""
        s = self._simulators
        for control, action in zip(self._controls, s.actions, strict=True):
            control[:] = action
        if self._process != os.getpid():  # a forked process has none of the threads
            self._pool, self._process = None, os.getpid()
        if self._pool is None and len(self._chunks) > 1:
            self._pool = ThreadPoolExecutor(len(self._chunks) - 1, "mujoco")

        def step(chunk: slice) -> None:
            for model, data in zip(s.models[chunk], s.datas[chunk], strict=True):
                mujoco.mj_step(model, data, frames)
                if self._contact_forces:
                    mujoco.mj_rnePostConstraint(model, data)

        others = [self._pool.submit(step, chunk) for chunk in self._chunks[1:]] if self._pool else []
        step(self._chunks[0])
        for other in others:
            other.result()
        s.forget()
        obs = observed(s, self._observation)
        warned = np.concatenate(self._warnings).reshape(len(s.datas), -1).any(axis=1)
        return obs, np.logical_or(warned, ~np.isfinite(obs).all(axis=1))

    def close(self) -> None:
        """End the threads."""
        if self._pool is not None and self._process == os.getpid():
            self._pool.shutdown()
        self._pool = None


def observed(s: Simulators, observation: tuple[Reader, ...]) -> Array:
    """The observations [N, O] made of their parts."""
    return np.concatenate([part(s) for part in observation], axis=1)


def make_stepper(
    simulators: Simulators, observation: tuple[Reader, ...], contact_forces: bool, threads: int, native: bool | None
) -> Stepper:
    """The compiled stepper where it can be built, else Python's threads.

    Args:
        simulators: what is stepped.
        observation: parts of the observation.
        contact_forces: compute cfrc_ext after every step.
        threads: threads that step, the calling one among them.
        native: True to insist on the compiled one, False for Python's threads.

    Raises:
        ValueError: if native is True and it cannot be built.
    """
    from .native.build import NativeUnavailableError
    from .native.stepper import NativeStepper

    arguments = (simulators, observation, contact_forces, threads)
    if native is False:
        return ThreadedStepper(*arguments)
    try:
        return NativeStepper(*arguments)
    except NativeUnavailableError as error:
        if native:
            raise ValueError(f"native: got True, but {error}; or choose None") from error
        return ThreadedStepper(*arguments)
