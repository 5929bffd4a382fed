"""What Gymnasium's MuJoCo v5 tasks observe, reward and end by, for many simulators at once.

A task is an entry of `TASKS`: what is observed, what a step earns, how episodes begin, and the point whose displacement
pays. The functions are for arrays of NumPy and for tensors alike (`Batch`). In NumPy they follow the operations of
`gymnasium.envs.mujoco.<task>_v5.step` in their order: the numbers are the same, bit for bit
(`tests/envs/test_mujoco_batch.py`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np

Array: TypeAlias = Any
"""Of NumPy, or a tensor."""


class Batch(ABC):
    """What the functions of a task read of N simulators: ``batch["qpos"]`` is that field of all of them, [N, ...].

    Attributes:
        xp: the library of the arrays, numpy or torch.
        env: the prototype, with the task's arguments as attributes.
        model: of the simulators.
        actions: the actions of this step, [N, nu].
        before: the tracked point before the step, [N] or [N, 2].
        after: the tracked point after the step.
        goals: of tasks with goals, [N, 3].
    """

    xp: Any
    env: Any
    model: Any
    actions: Array
    before: Array
    after: Array
    goals: Array

    @abstractmethod
    def __getitem__(self, field: str) -> Array:
        """A field of MjData, [N, ...]."""

    @abstractmethod
    def mass_centers(self) -> Array:
        """Centre of mass of each model in the plane, [N, 2]."""

    @property
    def timestep(self) -> Any:
        """Seconds of a step of the simulators; [N] where they have models of their own."""
        return float(self.model.opt.timestep)

    def body(self, name: str | int) -> Array:
        """Position [N, 3] of a body."""
        return self["xpos"][:, self.model.body(name).id]

    def velocity(self) -> Array:
        """Velocity of the tracked point, averaged over the step, [N] or [N, 2]."""
        seconds = self.timestep * self.env.frame_skip
        if isinstance(seconds, np.ndarray) and self.after.ndim == 2:
            seconds = seconds[:, None]
        return (self.after - self.before) / seconds


Reader: TypeAlias = Callable[[Batch], Array]
"""What is read of all simulators, [N, k] or [N]."""
Outcome: TypeAlias = tuple[Array, Array, dict[str, Array]]
"""Reward [N] (in NumPy float64), terminated [N] (bool), and the entries of info, each [N] or [N, k]."""


@dataclass(frozen=True)
class Field:
    """Part of an observation: a field of MjData without its first rows, flattened to [N, k].

    Args:
        name: field of MjData.
        skip: entries (of the position: only if positions are excluded) or bodies to leave out.
        clip: bound of the magnitude, or the attribute of the environment that holds (low, high).
        when: attribute of the environment that switches it on.
    """

    name: str
    skip: int = 0
    clip: float | str | None = None
    when: str | None = None

    def __call__(self, s: Batch) -> Array:
        """The part of each observation, [N, k]."""
        values, start = s[self.name], self.start(s.env)
        if start is None:
            return values.reshape(len(values), -1)[:, :0]
        bounds = self.bounds(s.env)
        if bounds is not None:
            values = s.xp.clip(values, *bounds)
        return values[:, start:].reshape(len(values), -1)

    def start(self, env: Any) -> int | None:
        """The first row that is observed; None if it is switched off."""
        if self.when and not getattr(env, self.when):
            return None
        shown = self.skip and self.name == "qpos" and not env._exclude_current_positions_from_observation
        return 0 if shown else self.skip

    def bounds(self, env: Any) -> tuple[Any, Any] | None:
        """The lowest and the highest value."""
        if isinstance(self.clip, str):
            low, high = getattr(env, self.clip)
            return low, high
        return None if self.clip is None else (-self.clip, self.clip)


@dataclass(frozen=True)
class Task:
    """What a task adds to the simulation.

    Args:
        observation: parts of the observation, each [N, k], in their order.
        outcome: reward, termination and info of a step.
        point: the point whose displacement pays, [N] or [N, 2].
        contact_forces: compute cfrc_ext after every step (`mj_rnePostConstraint`).
        start: where episodes begin. "uniform": at init_qpos and init_qvel, each plus uniform noise; "normal": with
            normal noise of the velocity; or by a rule of the task's own.
        derived: what is observed, or the point, is more than positions and velocities: it follows from them.
        frames: attribute of the environment that holds the simulators' steps per step.
        settle: what is done to the simulators after these, before anything is observed.
    """

    observation: tuple[Reader, ...]
    outcome: Callable[[Batch], Outcome]
    point: Reader | None = None
    contact_forces: bool = False
    start: Literal["uniform", "normal", "reacher", "pusher"] = "uniform"
    derived: bool = False
    frames: str = "frame_skip"
    settle: Callable[[Any], None] | None = None

    @property
    def uniform_start(self) -> bool:
        """Whether all that a new episode needs is uniform noise of positions and velocities."""
        return self.start == "uniform" and not self.derived


def _dot(a: Array) -> Array:
    """|a|^2 of the rows of a [N, k], by the same BLAS routine as `numpy.linalg.norm` of one row."""
    return (a[:, None, :] @ a[:, :, None])[:, 0, 0]


def _packed(s: Batch, a: Array) -> Array:
    """The rows without gaps in memory: NumPy rounds some functions of others in another way."""
    return s.xp.concatenate([a], axis=1)


def _norm(s: Batch, a: Array) -> Array:
    return s.xp.sqrt(_dot(_packed(s, a)))


def _square_sum(a: Array) -> Array:
    """Sum of squares of each row, over all axes but the first."""
    return (a * a).reshape(len(a), -1).sum(axis=1)


def _square(s: Batch, values: Array) -> Array:
    """Squares of values [N]; in NumPy by Python's power, which rounds as that of a NumPy number."""
    return np.array([value**2 for value in values.tolist()]) if s.xp is np else values * values


def _state(s: Batch) -> Array:
    return s.xp.concatenate([s["qpos"], s["qvel"]], axis=1)


def _within(values: Array, bounds: tuple[float, float]) -> Array:
    return (bounds[0] < values) & (values < bounds[1])


def _never(s: Batch) -> Array:
    return s.xp.zeros_like(s["qpos"][:, 0], dtype=bool)


def _locomotion(
    *,
    position: Callable[[Batch], dict[str, Array]],
    healthy: Reader | None = None,
    contact_cost: Reader | None = None,
    control: Reader = lambda s: s.actions,
) -> Callable[[Batch], Outcome]:
    """Forward velocity and survival are paid; control and contact forces cost."""

    def outcome(s: Batch) -> Outcome:
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


def _planar_position(s: Batch) -> dict[str, Array]:
    return {"x_position": s["qpos"][:, 0]}


def _height_position(s: Batch) -> dict[str, Array]:
    return {"x_position": s["qpos"][:, 0], "z_distance_from_origin": s["qpos"][:, 1] - s.env.init_qpos[1]}


def _xy_position(s: Batch) -> dict[str, Array]:
    x, y = s["qpos"][:, 0], s["qpos"][:, 1]
    return {"x_position": x, "y_position": y, "distance_from_origin": _norm(s, s["qpos"][:, :2])}


def _tendons(s: Batch) -> dict[str, Array]:
    return {"tendon_length": s["ten_length"], "tendon_velocity": s["ten_velocity"]}


def _hopper_healthy(s: Batch) -> Array:
    return _within(_state(s)[:, 2:], s.env._healthy_state_range).all(axis=1) & _walker_healthy(s)


def _walker_healthy(s: Batch) -> Array:
    height, angle = s["qpos"][:, 1], s["qpos"][:, 2]
    return _within(height, s.env._healthy_z_range) & _within(angle, s.env._healthy_angle_range)


def _ant_healthy(s: Batch) -> Array:
    low, high = s.env._healthy_z_range
    height = s["qpos"][:, 2]
    return s.xp.isfinite(_state(s)).all(axis=1) & (low <= height) & (height <= high)


def _ant_contact_cost(s: Batch) -> Array:
    return s.env._contact_cost_weight * _square_sum(s.xp.clip(s["cfrc_ext"], *s.env._contact_force_range))


def _humanoid_contact_cost(s: Batch) -> Array:
    return (s.env._contact_cost_weight * _square_sum(s["cfrc_ext"])).clip(*s.env._contact_cost_range)


def _standup(s: Batch) -> Outcome:
    env, height = s.env, s["qpos"][:, 2]
    up = (height - 0) / s.timestep
    control = env._ctrl_cost_weight * _square_sum(s["ctrl"])
    impact = (env._impact_cost_weight * _square_sum(s["cfrc_ext"])).clip(*env._impact_cost_range)
    terms = {"reward_linup": up, "reward_quadctrl": -control, "reward_impact": -impact}
    position = {"x_position": s["qpos"][:, 0], "y_position": s["qpos"][:, 1]}
    position["z_distance_from_origin"] = height - env.init_qpos[2]
    return up - control - impact + 1, _never(s), position | _tendons(s) | terms


def _reacher(s: Batch) -> Outcome:
    distance = -_norm(s, s.body("fingertip") - s.body("target")) * s.env._reward_dist_weight
    control = -_square_sum(s.actions) * s.env._reward_control_weight
    return distance + control, _never(s), {"reward_dist": distance, "reward_ctrl": control}


def _pusher(s: Batch) -> Outcome:
    near = -_norm(s, s.body("object") - s.body("tips_arm")) * s.env._reward_near_weight
    distance = -_norm(s, s.body("object") - s.body("goal")) * s.env._reward_dist_weight
    control = -_square_sum(s.actions) * s.env._reward_control_weight
    terms = {"reward_dist": distance, "reward_ctrl": control, "reward_near": near}
    return distance + control + near, _never(s), terms


def _inverted_pendulum(s: Batch) -> Outcome:
    state = _state(s)
    terminated = ~s.xp.isfinite(state).all(axis=1) | (abs(state[:, 1]) > 0.2)
    reward = 1 * ~terminated
    return reward, terminated, {"reward_survive": reward}


def _inverted_double_pendulum(s: Batch) -> Outcome:
    x, y = s["site_xpos"][:, 0, 0], s["site_xpos"][:, 0, 2]
    x2, y2, v1, v2 = (_square(s, column) for column in (x, y - 2, s["qvel"][:, 1], s["qvel"][:, 2]))
    terminated = y <= 1
    distance, velocity = 0.01 * x2 + y2, 1e-3 * v1 + 5e-3 * v2
    alive = s.env._healthy_reward * (1 * ~terminated)
    terms = {"reward_survive": alive, "distance_penalty": -distance, "velocity_penalty": -velocity}
    return alive - distance - velocity, terminated, terms


_HUMANOID_OBSERVATION = (
    Field("qpos", skip=2),
    Field("qvel"),
    Field("cinert", skip=1, when="_include_cinert_in_observation"),
    Field("cvel", skip=1, when="_include_cvel_in_observation"),
    Field("qfrc_actuator", skip=6, when="_include_qfrc_actuator_in_observation"),
    Field("cfrc_ext", skip=1, when="_include_cfrc_ext_in_observation"),
)

TASKS: dict[str, Task] = {
    "HalfCheetah-v5": Task(
        observation=(Field("qpos", skip=1), Field("qvel")),
        outcome=_locomotion(position=_planar_position),
        point=lambda s: s["qpos"][:, 0],
        start="normal",
    ),
    "Hopper-v5": Task(
        observation=(Field("qpos", skip=1), Field("qvel", clip=10)),
        outcome=_locomotion(position=_height_position, healthy=_hopper_healthy),
        point=lambda s: s["qpos"][:, 0],
    ),
    "Walker2d-v5": Task(
        observation=(Field("qpos", skip=1), Field("qvel", clip=10)),
        outcome=_locomotion(position=_height_position, healthy=_walker_healthy),
        point=lambda s: s["qpos"][:, 0],
    ),
    "Swimmer-v5": Task(
        observation=(Field("qpos", skip=2), Field("qvel")),
        outcome=_locomotion(position=_xy_position),
        point=lambda s: s["qpos"][:, :2],
    ),
    "Ant-v5": Task(
        observation=(
            Field("qpos", skip=2),
            Field("qvel"),
            Field("cfrc_ext", skip=1, clip="_contact_force_range", when="_include_cfrc_ext_in_observation"),
        ),
        outcome=_locomotion(position=_xy_position, healthy=_ant_healthy, contact_cost=_ant_contact_cost),
        point=lambda s: s.body(s.env._main_body)[:, :2],
        contact_forces=True,
        start="normal",
        derived=True,
    ),
    "Humanoid-v5": Task(
        observation=_HUMANOID_OBSERVATION,
        outcome=_locomotion(
            position=lambda s: _xy_position(s) | _tendons(s),
            healthy=lambda s: _within(s["qpos"][:, 2], s.env._healthy_z_range),
            contact_cost=_humanoid_contact_cost,
            control=lambda s: s["ctrl"],
        ),
        point=lambda s: s.mass_centers(),
        contact_forces=True,
        derived=True,
    ),
    "HumanoidStandup-v5": Task(observation=_HUMANOID_OBSERVATION, outcome=_standup, contact_forces=True, derived=True),
    "Reacher-v5": Task(
        observation=(
            lambda s: s.xp.cos(_packed(s, s["qpos"][:, :2])),
            lambda s: s.xp.sin(_packed(s, s["qpos"][:, :2])),
            lambda s: s["qpos"][:, 2:],
            lambda s: s["qvel"][:, :2],
            lambda s: (s.body("fingertip") - s.body("target"))[:, :2],
        ),
        outcome=_reacher,
        start="reacher",
        derived=True,
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
        start="pusher",
        derived=True,
    ),
    "InvertedPendulum-v5": Task(
        observation=(Field("qpos"), Field("qvel")),
        outcome=_inverted_pendulum,
    ),
    "InvertedDoublePendulum-v5": Task(
        observation=(
            lambda s: s["qpos"][:, :1],
            lambda s: s.xp.sin(_packed(s, s["qpos"][:, 1:])),
            lambda s: s.xp.cos(_packed(s, s["qpos"][:, 1:])),
            lambda s: s.xp.clip(s["qvel"], -10, 10),
            lambda s: s.xp.clip(s["qfrc_constraint"], -10, 10)[:, :1],
        ),
        outcome=_inverted_double_pendulum,
        start="normal",
        derived=True,
    ),
}
"""The tasks that `MujocoVecEnv` and `WarpVecEnv` step in batches, by their Gymnasium id."""
