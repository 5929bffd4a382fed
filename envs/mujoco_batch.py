"""Gymnasium's MuJoCo v5 tasks in batches: all cores step the simulators, NumPy does the rest for all of them at once.

The numbers are Gymnasium's own, bit for bit (`tests/envs/test_mujoco_batch.py`). One Gymnasium environment, the
prototype, supplies the model, the arguments and the spaces, its copies the resets and the pictures. What runs in every
step stands in `batch.py`, here, in `mujoco_tasks.py` and in `simulators.py`.
"""

from __future__ import annotations

import copy
import functools
import os
from collections.abc import Collection
from typing import Any

import gymnasium as gym
import mujoco
import numpy as np
from gymnasium.envs.mujoco.mujoco_rendering import MujocoRenderer
from gymnasium.envs.registration import EnvSpec
from stable_baselines3.common.vec_env.base_vec_env import VecEnvIndices, VecEnvStepReturn

from .batch import Array, BatchVecEnv, make_prototype
from .known import bare_task_of_id
from .mujoco_tasks import TASKS, Task
from .simulators import STATE, Simulators


class MujocoVecEnv(BatchVecEnv):
    """A batch of one of the `TASKS` as a Stable-Baselines3 VecEnv, with what its DummyVecEnv and Monitor report.

    An episode ends as terminated with ``info["simulation_diverged"]`` if its simulation becomes unstable (MuJoCo finds
    a bad state and resets it): reward 0, the last sound observation as terminal observation. The others go on.

    All environments share the task's arguments, and one model until somebody asks for that of an environment.
    `env_method` and `get_attr` reach each environment as in DummyVecEnv.

    Args:
        id: Gymnasium id of one of the `TASKS`: of its class, not wrapped.
        n_envs: number of environments, N.
        threads: CPU threads that step the simulators, the calling one among them; None: one per available core.
        native: whether compiled code steps them, which is built at first use and has the same numbers; None: where a
            C++ compiler is found and the system is not Windows. The attribute `native` tells what was chosen.
        **env_kwargs: arguments of the environment. With render_mode="rgb_array", `render` shows all environments, or
            the environment `render_index`.

    Raises:
        ValueError: if the id is of none of the `TASKS`, a number is below 1, render_mode is "human", or native is True
            and cannot be had.
    """

    tasks: Collection[str] = TASKS
    """The tasks that it steps."""

    def __init__(
        self, id: str, n_envs: int, threads: int | None = None, native: bool | None = None, **env_kwargs: Any
    ) -> None:
        task = bare_task_of_id(id)
        if task is None or task not in self.tasks:
            raise ValueError(f"batched: got {id!r}, expected one of {', '.join(self.tasks)}; use another backend")
        if threads is not None and threads < 1:
            raise ValueError(f"threads: got {threads}, expected an integer of at least 1")
        prototype = make_prototype(id, n_envs, env_kwargs)
        self._task = self._describe(task, prototype.unwrapped)
        self.simulators = Simulators(
            prototype.unwrapped, self._task, n_envs, min(threads or available_cores(), n_envs), native
        )
        self._watched = False  # whether somebody has something in hand by which environments can be moved or seen
        self._unready: list[int] = []  # whose state was set in this step, but not computed what follows from it
        super().__init__(prototype, n_envs)
        self.diverged = np.zeros(n_envs, dtype=np.int64)  # unstable simulations so far
        self.native = self.simulators.compiled is not None
        quick = self._task.uniform_start and "xml_file" not in env_kwargs and _draws_alike()
        self._first_state = _first_state(self.simulators.model) if quick else None

    def _describe(self, task: str, env: Any) -> Task:
        """What a task adds to the simulation."""
        return TASKS[task]

    def step_wait(self) -> VecEnvStepReturn:
        """Observations [N, O], rewards [N] (float32), dones [N] and infos; ended episodes begin anew."""
        obs, rewards, dones, infos = super().step_wait()
        for i in np.flatnonzero(self._unstable).tolist():
            infos[i]["simulation_diverged"] = True
        return obs, rewards, dones, infos

    def _advance(self, actions: Array) -> tuple[Array, Array, Array, dict[str, Array]]:
        s = self.simulators
        if self._watched:
            self._moved()
        self._unready.clear()
        obs, diverged = s.step(actions, timed=self._watched)
        if self._task.point is not None:
            s.after = self._task.point(s)
        reward, terminated, info = self._task.outcome(s)
        reward = reward.astype(np.float64)
        if diverged.any():
            reward[diverged], terminated, obs[diverged] = 0.0, terminated | diverged, self._obs[diverged]
            self.diverged += diverged
        self._unstable = diverged
        if self._task.point is not None:
            s.before = s.after
        return obs, reward, terminated, info

    def _restart(self, ended: list[int], obs: Array) -> None:
        """Begin episodes by Gymnasium's resets, or set the states that these would: where nobody sees the difference.

        A state that is set lacks what follows from it, until `_look` or the next step.
        """
        s, env = self.simulators, self._env
        if self._watched or self._first_state is None or not s.can_restart(ended):
            super()._restart(ended, obs)
            return
        states = np.empty((len(ended), len(self._first_state)))
        states[:] = self._first_state
        noise = states[:, 1 : 1 + s.model.nq + s.model.nv]
        for i, row in zip(ended, noise, strict=True):
            self._envs[i].np_random.random(out=row)
        low, high = -env._reset_noise_scale, env._reset_noise_scale
        noise[:] = np.concatenate([env.init_qpos, env.init_qvel]) + (low + (high - low) * noise)
        s.restart(ended, states)
        for i in ended:
            self._count_anew(i)
            self.reset_infos[i] = self._envs[i]._get_reset_info()
        self._unready += ended
        if self._task.point is not None:
            s.before = self._task.point(s)

    def _look(self) -> None:
        """Compute what follows from the states that were set, as Gymnasium's reset does."""
        s = self.simulators
        for i in self._unready:
            state = np.empty(mujoco.mj_stateSize(s.model, STATE))
            mujoco.mj_getState(s.models[i], s.datas[i], state, STATE)
            mujoco.mj_resetData(s.models[i], s.datas[i])
            mujoco.mj_setState(s.models[i], s.datas[i], state, STATE)
            mujoco.mj_forward(s.models[i], s.datas[i])
        self._unready.clear()

    def _begin(self) -> None:
        """All environments are in an episode now."""
        self._unready.clear()
        super()._begin()

    def _own(self, i: int) -> dict[str, Any]:
        model, data, theirs = self.simulators.models[i], self.simulators.datas[i], self._env.mujoco_renderer
        renderer = MujocoRenderer(
            model, data, theirs.default_cam_config, theirs.width, theirs.height, theirs.max_geom, theirs.camera_id,
            visual_options=theirs._vopt,
        )  # fmt: skip
        return {"model": model, "data": data, "mujoco_renderer": renderer}

    def _hand_out(self, i: int, value: Any) -> bool:
        """Give environment i a model of its own if its model can be changed now; expect its state to be changed."""
        if _harmless(value):
            return False
        self._watched = True
        if not isinstance(value, gym.Env | mujoco.MjModel | mujoco.MjData):
            return False
        shares = self.simulators.models[i] is self.simulators.model
        if shares and not isinstance(value, mujoco.MjData):
            self.simulators.models[i], self.simulators.own_models = copy.copy(self.simulators.model), True
            self._envs[i].mujoco_renderer.close()
            vars(self._envs[i]).update(self._own(i))
        return True

    def set_attr(self, attr_name: str, value: Any, indices: VecEnvIndices = None) -> None:
        """As `BatchVecEnv.set_attr`."""
        self._watched = self._watched or not _harmless(value)
        super().set_attr(attr_name, value, indices)
        self.simulators.arguments_changed()

    def _moved(self) -> None:
        """Note where the next step begins."""
        self.simulators.forget()
        if self._task.point is not None:
            self.simulators.before = self._task.point(self.simulators)

    def get_state(self) -> dict[str, Any]:
        """All that determines the course of the environments, as arrays, for `set_state`; after the first `reset`."""
        s = self.simulators
        physics = np.empty((self.num_envs, mujoco.mj_stateSize(s.model, STATE)))
        for row, data in zip(physics, s.datas, strict=True):
            mujoco.mj_getState(s.model, data, row, STATE)
        before = None if self._task.point is None else s.before.copy()
        return super().get_state() | {"physics": physics, "before": before, "diverged": self.diverged.copy()}

    def set_state(self, state: dict[str, Any]) -> Any:
        """Go on where `get_state` was called, on the same or another batch of the task; returns the observations.

        Raises:
            ValueError: if it is the state of another number of environments or of another model.
        """
        s = self.simulators
        expected = (self.num_envs, mujoco.mj_stateSize(s.model, STATE))
        if state["physics"].shape != expected:
            raise ValueError(f"state: got physics of shape {state['physics'].shape}, expected {expected}")
        for row, model, data in zip(state["physics"], s.models, s.datas, strict=True):
            mujoco.mj_setState(model, data, row, STATE)
            mujoco.mj_forward(model, data)  # what is shown and read follows from the state
        self.diverged = state["diverged"].copy()
        obs = super().set_state(state)
        if self._task.point is not None:
            s.before = state["before"].copy()  # mj_forward has moved bodies by as much as a step leaves them behind
        return obs

    def __reduce__(self) -> Any:
        raise TypeError(
            "MujocoVecEnv: a batch of simulators is not pickled or copied; make another one and take the state over by "
            "other.set_state(env.get_state())"
        )

    def close(self) -> None:
        """End the threads and close the environments."""
        self.simulators.close()
        super().close()


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _harmless(value: Any) -> bool:
    """Whether nobody can move environments by it, nor look into them."""
    if isinstance(value, tuple):
        return all(map(_harmless, value))
    return isinstance(value, str | bytes | int | float | None | np.generic | gym.Space | EnvSpec)


def _first_state(model: Any) -> Array:
    """The state of a simulator that was reset: time, qpos, qvel and what follows."""
    data = mujoco.MjData(model)
    state = np.empty(mujoco.mj_stateSize(model, STATE))
    data.time, data.qpos[:], data.qvel[:] = 1, 2, 3
    mujoco.mj_getState(model, data, state, STATE)
    assert state[: 1 + model.nq + model.nv].tolist() == [1.0] + [2.0] * model.nq + [3.0] * model.nv
    mujoco.mj_resetData(model, data)
    mujoco.mj_getState(model, data, state, STATE)
    return state


@functools.cache
def _draws_alike() -> bool:
    """Whether NumPy rounds uniform numbers as we do: a build of it might contract product and sum."""
    ours, theirs = (np.random.default_rng(0) for _ in range(2))
    return np.array_equal(-0.1 + 0.2 * ours.random(500), theirs.uniform(-0.1, 0.1, 500))
