"""Gymnasium's MuJoCo v5 tasks in batches: all cores step the simulators, NumPy does the rest for all of them at once.

The numbers are Gymnasium's own, bit for bit (`tests/envs/test_mujoco_batch.py`). One Gymnasium environment, the
prototype, supplies the model, the arguments, the spaces, the resets and the pictures; this file repeats only what runs
in every step. A task is an entry of `TASKS`: what is observed, what a step earns, and the point whose displacement
pays. What an entry computes follows the operations of `gymnasium.envs.mujoco.<task>_v5.step` in their order.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeAlias, cast

import mujoco
import numpy as np
from gymnasium.envs.mujoco.humanoid_v5 import mass_center
from stable_baselines3.common.vec_env.base_vec_env import VecEnvStepReturn

from .batch import Array, BatchVecEnv, make_prototype

Reader: TypeAlias = Callable[["Simulators"], Array]
Outcome: TypeAlias = tuple[Array, Array, dict[str, Array]]
"""Reward [N] (float64), terminated [N] (bool), and the entries of info, each [N] or [N, k]."""

_STATE = int(mujoco.mjtState.mjSTATE_INTEGRATION)
_BAD_STATE = slice(int(mujoco.mjtWarning.mjWARN_BADQPOS), int(mujoco.mjtWarning.mjWARN_BADQACC) + 1)


class Simulators:
    """N simulators of one model, and what the step functions read of them.

    ``s["qpos"]`` is that field of every MjData in one array [N, ...], copied at the first access after a step.

    Attributes:
        env: the prototype, with the task's arguments as attributes.
        actions: the actions of this step, [N, nu], in the dtype in which they came.
        before: the tracked point before the step, [N] or [N, 2].
        after: the tracked point after the step.
    """

    actions: Array
    before: Array
    after: Array

    def __init__(self, env: Any, n: int) -> None:
        self.env, self.model = env, env.model
        self.datas = [mujoco.MjData(self.model) for _ in range(n)]
        self._views: dict[str, list[Array]] = {}
        self._arrays: dict[str, Array] = {}

    def __getitem__(self, field: str) -> Array:
        if field not in self._arrays:
            if field not in self._views:
                self._views[field] = [getattr(data, field) for data in self.datas]
            views = self._views[field]
            self._arrays[field] = np.concatenate(views).reshape(len(views), *views[0].shape)
        return self._arrays[field]

    def forget(self) -> None:
        """Drop the copies: the simulators have moved."""
        self._arrays.clear()

    def body(self, name: str | int) -> Array:
        """Position [N, 3] of a body."""
        return self["xpos"][:, self.model.body(name).id]

    def velocity(self) -> Array:
        """Velocity of the tracked point, averaged over the step, [N] or [N, 2]."""
        return cast(Array, (self.after - self.before) / self.env.dt)


@dataclass(frozen=True)
class Task:
    """What a task adds to the simulation.

    Args:
        observation: parts of the observation, each [N, k], in their order.
        outcome: reward, termination and info of a step.
        point: the point whose displacement pays, [N] or [N, 2].
        contact_forces: compute cfrc_ext after every step (`mj_rnePostConstraint`).
    """

    observation: tuple[Reader, ...]
    outcome: Callable[[Simulators], Outcome]
    point: Reader | None = None
    contact_forces: bool = False


def _field(name: str, skip: int = 0, clip: float | str | None = None, when: str | None = None) -> Reader:
    """A field of MjData without its first `skip` rows, flattened to [N, k].

    Args:
        name: field of MjData.
        skip: entries (of the position: only if positions are excluded) or bodies to leave out.
        clip: bound of the magnitude, or the attribute of the environment that holds (low, high).
        when: attribute of the environment that switches it on.
    """

    def read(s: Simulators) -> Array:
        values = s[name]
        if when and not getattr(s.env, when):
            return np.empty((len(values), 0))
        if clip is not None:
            values = np.clip(values, *(getattr(s.env, clip) if isinstance(clip, str) else (-clip, clip)))
        start = skip if name != "qpos" or s.env._exclude_current_positions_from_observation else 0
        return values[:, start:].reshape(len(values), -1)

    return read


def _dot(a: Array) -> Array:
    """|a|^2 of the rows of a [N, k], by the same BLAS routine as `numpy.linalg.norm` of one row."""
    return (a[:, None, :] @ a[:, :, None])[:, 0, 0]


def _norm(a: Array) -> Array:
    return np.sqrt(_dot(np.ascontiguousarray(a)))


def _square_sum(a: Array) -> Array:
    """Sum of squares of each row, over all axes but the first."""
    return cast(Array, np.square(a).reshape(len(a), -1).sum(axis=1))


def _within(values: Array, bounds: tuple[float, float]) -> Array:
    return (bounds[0] < values) & (values < bounds[1])


def _never(s: Simulators) -> Array:
    return np.zeros(len(s.datas), dtype=bool)


def _locomotion(
    *,
    position: Callable[[Simulators], dict[str, Array]],
    healthy: Reader | None = None,
    contact_cost: Reader | None = None,
    control: Reader = lambda s: s.actions,
) -> Callable[[Simulators], Outcome]:
    """Forward velocity and survival are paid; control and contact forces cost."""

    def outcome(s: Simulators) -> Outcome:
        env, velocity = s.env, s.velocity()
        axes = (
            {"x_velocity": velocity}
            if velocity.ndim == 1
            else dict(zip(("x_velocity", "y_velocity"), velocity.T, strict=True))
        )
        forward = env._forward_reward_weight * axes["x_velocity"]
        costs = control_cost = env._ctrl_cost_weight * _square_sum(control(s))
        info = position(s) | axes | {"reward_forward": forward, "reward_ctrl": -control_cost}
        rewards, terminated = forward, _never(s)
        if healthy is not None:
            alive = healthy(s)
            info["reward_survive"] = alive * env._healthy_reward
            rewards = forward + info["reward_survive"]
            terminated = ~alive if env._terminate_when_unhealthy else terminated
        if contact_cost is not None:
            contact = contact_cost(s)
            info["reward_contact"] = -contact
            costs = control_cost + contact
        return rewards - costs, terminated, info

    return outcome


def _planar_position(s: Simulators) -> dict[str, Array]:
    return {"x_position": s["qpos"][:, 0]}


def _height_position(s: Simulators) -> dict[str, Array]:
    return {"x_position": s["qpos"][:, 0], "z_distance_from_origin": s["qpos"][:, 1] - s.env.init_qpos[1]}


def _xy_position(s: Simulators) -> dict[str, Array]:
    x, y = s["qpos"][:, 0], s["qpos"][:, 1]
    return {"x_position": x, "y_position": y, "distance_from_origin": _norm(s["qpos"][:, :2])}


def _tendons(s: Simulators) -> dict[str, Array]:
    return {"tendon_length": s["ten_length"], "tendon_velocity": s["ten_velocity"]}


def _hopper_healthy(s: Simulators) -> Array:
    state = np.concatenate([s["qpos"], s["qvel"]], axis=1)[:, 2:]
    return _within(state, s.env._healthy_state_range).all(axis=1) & _walker_healthy(s)


def _walker_healthy(s: Simulators) -> Array:
    height, angle = s["qpos"][:, 1], s["qpos"][:, 2]
    return _within(height, s.env._healthy_z_range) & _within(angle, s.env._healthy_angle_range)


def _ant_healthy(s: Simulators) -> Array:
    low, high = s.env._healthy_z_range
    height, state = s["qpos"][:, 2], np.concatenate([s["qpos"], s["qvel"]], axis=1)
    healthy: Array = np.isfinite(state).all(axis=1) & (low <= height) & (height <= high)
    return healthy


def _ant_contact_cost(s: Simulators) -> Array:
    return cast(Array, s.env._contact_cost_weight * _square_sum(np.clip(s["cfrc_ext"], *s.env._contact_force_range)))


def _humanoid_contact_cost(s: Simulators) -> Array:
    cost: Array = s.env._contact_cost_weight * _square_sum(s["cfrc_ext"])
    return cost.clip(*s.env._contact_cost_range)


def _mass_centers(s: Simulators) -> Array:
    # One by one: over the whole batch numpy.einsum adds in another order.
    return np.stack([mass_center(s.model, data) for data in s.datas])


def _standup(s: Simulators) -> Outcome:
    env, height = s.env, s["qpos"][:, 2]
    up = (height - 0) / s.model.opt.timestep
    control = env._ctrl_cost_weight * _square_sum(s["ctrl"])
    impact = np.clip(env._impact_cost_weight * _square_sum(s["cfrc_ext"]), *env._impact_cost_range)
    terms = {"reward_linup": up, "reward_quadctrl": -control, "reward_impact": -impact}
    position = {"x_position": s["qpos"][:, 0], "y_position": s["qpos"][:, 1]}
    position["z_distance_from_origin"] = height - env.init_qpos[2]
    return up - control - impact + 1, _never(s), position | _tendons(s) | terms


def _reacher(s: Simulators) -> Outcome:
    distance = -_norm(s.body("fingertip") - s.body("target")) * s.env._reward_dist_weight
    control = -_square_sum(s.actions) * s.env._reward_control_weight
    return distance + control, _never(s), {"reward_dist": distance, "reward_ctrl": control}


def _pusher(s: Simulators) -> Outcome:
    near = -_norm(s.body("object") - s.body("tips_arm")) * s.env._reward_near_weight
    distance = -_norm(s.body("object") - s.body("goal")) * s.env._reward_dist_weight
    control = -_square_sum(s.actions) * s.env._reward_control_weight
    terms = {"reward_dist": distance, "reward_ctrl": control, "reward_near": near}
    return distance + control + near, _never(s), terms


def _inverted_pendulum(s: Simulators) -> Outcome:
    state = np.concatenate([s["qpos"], s["qvel"]], axis=1)
    terminated = ~np.isfinite(state).all(axis=1) | (np.abs(state[:, 1]) > 0.2)
    reward = (~terminated).astype(np.int64)
    return reward, terminated, {"reward_survive": reward}


def _inverted_double_pendulum(s: Simulators) -> Outcome:
    x, y = s["site_xpos"][:, 0, 0], s["site_xpos"][:, 0, 2]
    # By Python's power: it rounds as that of a NumPy number, the power of an array is a multiplication.
    x2, y2, v1, v2 = (
        np.array([value**2 for value in column.tolist()]) for column in (x, y - 2, s["qvel"][:, 1], s["qvel"][:, 2])
    )
    terminated = y <= 1
    distance, velocity = 0.01 * x2 + y2, 1e-3 * v1 + 5e-3 * v2
    alive = s.env._healthy_reward * (~terminated).astype(np.int64)
    terms = {"reward_survive": alive, "distance_penalty": -distance, "velocity_penalty": -velocity}
    return alive - distance - velocity, terminated, terms


_HUMANOID_OBSERVATION = (
    _field("qpos", skip=2),
    _field("qvel"),
    _field("cinert", skip=1, when="_include_cinert_in_observation"),
    _field("cvel", skip=1, when="_include_cvel_in_observation"),
    _field("qfrc_actuator", skip=6, when="_include_qfrc_actuator_in_observation"),
    _field("cfrc_ext", skip=1, when="_include_cfrc_ext_in_observation"),
)

TASKS: dict[str, Task] = {
    "HalfCheetah-v5": Task(
        observation=(_field("qpos", skip=1), _field("qvel")),
        outcome=_locomotion(position=_planar_position),
        point=lambda s: s["qpos"][:, 0],
    ),
    "Hopper-v5": Task(
        observation=(_field("qpos", skip=1), _field("qvel", clip=10)),
        outcome=_locomotion(position=_height_position, healthy=_hopper_healthy),
        point=lambda s: s["qpos"][:, 0],
    ),
    "Walker2d-v5": Task(
        observation=(_field("qpos", skip=1), _field("qvel", clip=10)),
        outcome=_locomotion(position=_height_position, healthy=_walker_healthy),
        point=lambda s: s["qpos"][:, 0],
    ),
    "Swimmer-v5": Task(
        observation=(_field("qpos", skip=2), _field("qvel")),
        outcome=_locomotion(position=_xy_position),
        point=lambda s: s["qpos"][:, :2],
    ),
    "Ant-v5": Task(
        observation=(
            _field("qpos", skip=2),
            _field("qvel"),
            _field("cfrc_ext", skip=1, clip="_contact_force_range", when="_include_cfrc_ext_in_observation"),
        ),
        outcome=_locomotion(position=_xy_position, healthy=_ant_healthy, contact_cost=_ant_contact_cost),
        point=lambda s: s.body(s.env._main_body)[:, :2],
        contact_forces=True,
    ),
    "Humanoid-v5": Task(
        observation=_HUMANOID_OBSERVATION,
        outcome=_locomotion(
            position=lambda s: _xy_position(s) | _tendons(s),
            healthy=lambda s: _within(s["qpos"][:, 2], s.env._healthy_z_range),
            contact_cost=_humanoid_contact_cost,
            control=lambda s: s["ctrl"],
        ),
        point=_mass_centers,
        contact_forces=True,
    ),
    "HumanoidStandup-v5": Task(observation=_HUMANOID_OBSERVATION, outcome=_standup, contact_forces=True),
    "Reacher-v5": Task(
        observation=(
            lambda s: np.cos(np.ascontiguousarray(s["qpos"][:, :2])),
            lambda s: np.sin(np.ascontiguousarray(s["qpos"][:, :2])),
            lambda s: s["qpos"][:, 2:],
            lambda s: s["qvel"][:, :2],
            lambda s: (s.body("fingertip") - s.body("target"))[:, :2],
        ),
        outcome=_reacher,
    ),
    "Pusher-v5": Task(
        observation=(
            lambda s: s["qpos"][:, :7],
            lambda s: s["qvel"][:, :7],
            lambda s: s.body("tips_arm"),
            lambda s: s.body("object"),
            lambda s: s.body("goal"),
        ),
        outcome=_pusher,
    ),
    "InvertedPendulum-v5": Task(
        observation=(lambda s: s["qpos"], lambda s: s["qvel"]),
        outcome=_inverted_pendulum,
    ),
    "InvertedDoublePendulum-v5": Task(
        observation=(
            lambda s: s["qpos"][:, :1],
            lambda s: np.sin(np.ascontiguousarray(s["qpos"][:, 1:])),
            lambda s: np.cos(np.ascontiguousarray(s["qpos"][:, 1:])),
            lambda s: np.clip(s["qvel"], -10, 10),
            lambda s: np.clip(s["qfrc_constraint"], -10, 10)[:, :1],
        ),
        outcome=_inverted_double_pendulum,
    ),
}
"""The tasks that `MujocoVecEnv` steps in batches, by their Gymnasium id."""


class MujocoVecEnv(BatchVecEnv):
    """A batch of one of the `TASKS` as a Stable-Baselines3 VecEnv, with what its DummyVecEnv and Monitor report.

    An episode ends as terminated with ``info["simulation_diverged"]`` if its simulation becomes unstable (MuJoCo finds
    a bad state and resets it): reward 0, the last sound observation as terminal observation. The others go on.

    All environments share one model and the task's arguments. `env_method` and `get_attr` act on the prototype with
    the simulator of each environment in its place.

    Args:
        id: key of `TASKS`.
        n_envs: number of environments, N.
        threads: CPU threads that step the simulators, the calling one among them; None: one per available core.
        **env_kwargs: arguments of the environment. With render_mode="rgb_array", `render` shows the environment
            `render_index`.

    Raises:
        ValueError: if the id is not in `TASKS`, a number is below 1, or render_mode is "human".
    """

    def __init__(self, id: str, n_envs: int, threads: int | None = None, **env_kwargs: Any) -> None:
        if id not in TASKS:
            raise ValueError(f"batched: got {id!r}, expected one of {', '.join(TASKS)}; use another backend")
        if threads is not None and threads < 1:
            raise ValueError(f"threads: got {threads}, expected an integer of at least 1")
        prototype = make_prototype(id, n_envs, env_kwargs)
        self._task = TASKS[id]
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
