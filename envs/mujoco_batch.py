"""Gymnasium's MuJoCo v5 tasks in batches: all cores step the simulators, NumPy does the rest for all of them at once.

The numbers are Gymnasium's own, bit for bit (`tests/envs/test_mujoco_batch.py`). One Gymnasium environment, the
prototype, supplies the model, the arguments, the spaces, the resets and the pictures; what runs in every step stands
here and in `mujoco_tasks.py`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any, cast

import mujoco
import numpy as np
from stable_baselines3.common.vec_env.base_vec_env import VecEnvStepReturn

from .batch import Array, BatchVecEnv, make_prototype
from .known import known_task_of_id
from .mujoco_tasks import TASKS, Simulators

_STATE = int(mujoco.mjtState.mjSTATE_INTEGRATION)
_BAD_STATE = slice(int(mujoco.mjtWarning.mjWARN_BADQPOS), int(mujoco.mjtWarning.mjWARN_BADQACC) + 1)


class MujocoVecEnv(BatchVecEnv):
    """A batch of one of the `TASKS` as a Stable-Baselines3 VecEnv, with what its DummyVecEnv and Monitor report.

    An episode ends as terminated with ``info["simulation_diverged"]`` if its simulation becomes unstable (MuJoCo finds
    a bad state and resets it): reward 0, the last sound observation as terminal observation. The others go on.

    All environments share one model and the task's arguments. `env_method` and `get_attr` act on the prototype with
    the simulator of each environment in its place.

    Args:
        id: Gymnasium id of one of the `TASKS`: of its class, not wrapped.
        n_envs: number of environments, N.
        threads: CPU threads that step the simulators, the calling one among them; None: one per available core.
        **env_kwargs: arguments of the environment. With render_mode="rgb_array", `render` shows the environment
            `render_index`.

    Raises:
        ValueError: if the id is of none of the `TASKS`, a number is below 1, or render_mode is "human".
    """

    def __init__(self, id: str, n_envs: int, threads: int | None = None, **env_kwargs: Any) -> None:
        task = known_task_of_id(id)
        if task not in TASKS:
            raise ValueError(f"batched: got {id!r}, expected one of {', '.join(TASKS)}; use another backend")
        if threads is not None and threads < 1:
            raise ValueError(f"threads: got {threads}, expected an integer of at least 1")
        prototype = make_prototype(id, n_envs, env_kwargs)
        self._task = TASKS[task]
        self.simulators = Simulators(prototype.unwrapped, n_envs)
        self._shown = self.simulators.env.data
        super().__init__(prototype, n_envs)
        self.diverged = np.zeros(n_envs, dtype=np.int64)  # unstable simulations so far
        datas = self.simulators.datas
        self._controls = [data.ctrl for data in datas]
        self._warnings = [data.warning.number[_BAD_STATE] for data in datas]
        parts = min(threads or available_cores(), n_envs)
        bounds = [n_envs * i // parts for i in range(parts + 1)]
        self._chunks = [datas[low:high] for low, high in pairwise(bounds)]
        self._pool = ThreadPoolExecutor(parts - 1, "mujoco") if parts > 1 else None

    def step_wait(self) -> VecEnvStepReturn:
        """Observations [N, O], rewards [N] (float32), dones [N] and infos; ended episodes begin anew."""
        obs, rewards, dones, infos = super().step_wait()
        for i in np.flatnonzero(self._unstable).tolist():
            infos[i]["simulation_diverged"] = True
        return obs, rewards, dones, infos

    def _advance(self, actions: Array) -> tuple[Array, Array, Array, dict[str, Array]]:
        s = self.simulators
        s.actions = actions
        self._simulate()
        obs = np.concatenate([part(s) for part in self._task.observation], axis=1)
        if self._task.point is not None:
            s.after = self._task.point(s)
        reward, terminated, info = self._task.outcome(s)
        reward = reward.astype(np.float64)
        diverged = np.concatenate(self._warnings).reshape(self.num_envs, -1).any(axis=1) | ~np.isfinite(obs).all(axis=1)
        if diverged.any():
            reward[diverged], terminated, obs[diverged] = 0.0, terminated | diverged, self._obs[diverged]
            self.diverged += diverged
        self._unstable = diverged
        if self._task.point is not None:
            s.before = s.after
        return obs, reward, terminated, info

    def _simulate(self) -> None:
        """Step all simulators, in parallel: `mj_step` works without Python's lock."""
        for control, action in zip(self._controls, self.simulators.actions, strict=True):
            control[:] = action
        model, frames, contact_forces = self.simulators.model, self._env.frame_skip, self._task.contact_forces

        def step(datas: Sequence[Any]) -> None:
            for data in datas:
                mujoco.mj_step(model, data, frames)
                if contact_forces:
                    mujoco.mj_rnePostConstraint(model, data)

        others = [self._pool.submit(step, chunk) for chunk in self._chunks[1:]] if self._pool else []
        step(self._chunks[0])
        for other in others:
            other.result()
        self.simulators.forget()

    def _bind(self, i: int) -> None:
        self._env.data, self._env.np_random = self.simulators.datas[i], self._rngs[i]

    def _moved(self) -> None:
        """Note where the next step begins."""
        self.simulators.forget()
        if self._task.point is not None:
            self.simulators.before = self._task.point(self.simulators)

    def get_state(self) -> dict[str, Any]:
        """All that determines the course of the environments, as arrays, for `set_state`; after the first `reset`."""
        s = self.simulators
        physics = np.empty((self.num_envs, mujoco.mj_stateSize(s.model, _STATE)))
        for row, data in zip(physics, s.datas, strict=True):
            mujoco.mj_getState(s.model, data, row, _STATE)
        before = None if self._task.point is None else s.before.copy()
        return super().get_state() | {"physics": physics, "before": before, "diverged": self.diverged.copy()}

    def set_state(self, state: dict[str, Any]) -> Array:
        """Go on where `get_state` was called, on the same or another batch of the task; returns the observations.

        Raises:
            ValueError: if it is the state of another number of environments or of another model.
        """
        s = self.simulators
        expected = (self.num_envs, mujoco.mj_stateSize(s.model, _STATE))
        if state["physics"].shape != expected:
            raise ValueError(f"state: got physics of shape {state['physics'].shape}, expected {expected}")
        for row, data in zip(state["physics"], s.datas, strict=True):
            mujoco.mj_setState(s.model, data, row, _STATE)
            mujoco.mj_forward(s.model, data)  # what is shown and read follows from the state
        s.forget()
        if self._task.point is not None:
            s.before = state["before"].copy()
        self.diverged = state["diverged"].copy()
        return super().set_state(state)

    def close(self) -> None:
        """End the threads and close the renderer."""
        if self._pool:
            self._pool.shutdown()
        self._env.data = self._shown
        super().close()

    def get_images(self) -> Sequence[Array | None]:
        """The picture of the environment `render_index` alone."""
        mujoco.mj_copyData(self._shown, self.simulators.model, self.simulators.datas[self.render_index])
        self._env.data = self._shown  # the renderer keeps to the MjData that it was made for
        return [cast("Array | None", self._env.render())]


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
