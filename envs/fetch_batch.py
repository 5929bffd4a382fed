"""Gymnasium-Robotics' Fetch tasks in batches, as `mujoco_batch.py` has Gymnasium's.

The numbers are those of `gymnasium_robotics.envs.fetch`, bit for bit (`tests/envs/test_fetch_batch.py`). There half of
a step's time is Python's, which looks up names and builds arrays for one environment at a time.

Needs the extra `maze` (Gymnasium-Robotics).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import mujoco
import numpy as np
from gymnasium_robotics.utils.rotations import mat2euler

from .known import FETCH_TASKS
from .mujoco_batch import MujocoVecEnv
from .mujoco_tasks import Outcome, Reader, Task
from .simulators import Array, Simulators

_STEP = 0.05
"""Metres by which an action of 1 moves the gripper."""
_TURN = (1.0, 0.0, 1.0, 0.0)
"""What every action adds to the orientation of the gripper, a quaternion."""


class Fetch:
    """What a Fetch task does with the simulators.

    An action [4] moves the body to which the gripper is welded (a mocap body, which nothing else moves) in x, y, z and
    opens or closes the fingers.

    Args:
        env: the prototype, a `MujocoFetchEnv`.
    """

    def __init__(self, env: Any) -> None:
        model = env.model
        self._grip, self._thing = model.site("robot0:grip").id, model.site("object0").id if env.has_object else None
        joints = [model.joint(i) for i in range(model.njnt)]
        last = [joint for joint in joints if joint.name.startswith("robot")][-2:]
        self._fingers = [int(joint.qposadr[0]) for joint in last], [int(joint.dofadr[0]) for joint in last]
        self._blocked = [int(model.joint(f"robot0:{side}_gripper_finger_joint").qposadr[0]) for side in "lr"]
        (weld,) = np.flatnonzero(model.eq_type == mujoco.mjtEq.mjEQ_WELD)
        first, second = int(model.eq_obj1id[weld]), int(model.eq_obj2id[weld])
        self.welded = second if model.body_mocapid[first] >= 0 else first  # the other one is the mocap body
        self._relative = model.actuator_biastype != 0  # which actuators take a target relative to where they are
        self._address = model.jnt_qposadr[model.actuator_trnid[:, 0]]

    @property
    def task(self) -> Task:
        """As the simulators want it."""
        observation, outcome = cast(Reader, self.observation), cast(Callable[[Any], Outcome], self.outcome)
        return Task((observation,), outcome, derived=True, frames="n_substeps", settle=self.settle)

    def move(self, s: Simulators, actions: Array) -> Array:
        """Move the mocap bodies by actions [N, 4] within their bounds; returns the controls [N, nu]."""
        positions = s["xpos"][:, self.welded] + actions[:, :3] * _STEP
        turned = s["xquat"][:, self.welded] + np.array(_TURN)
        bodies = zip(s.view("mocap_pos"), s.view("mocap_quat"), positions, turned, strict=True)
        for position, orientation, new_position, new_orientation in bodies:
            position[0], orientation[0] = new_position, new_orientation
        fingers = np.zeros_like(actions[:, 3:]) if s.env.block_gripper else actions[:, 3:]
        controls: Array = fingers + np.where(self._relative, s["qpos"][:, self._address], 0.0)
        return controls

    def settle(self, s: Simulators) -> None:
        """Keep the fingers of a blocked gripper closed."""
        if not s.env.block_gripper:
            return

        def close(chunk: slice) -> None:
            for model, data in zip(s.models[chunk], s.datas[chunk], strict=True):
                data.qpos[self._blocked] = 0.0
                mujoco.mj_forward(model, data)

        s.share(close)

    def observation(self, s: Simulators) -> Array:
        """Achieved and desired goal, each [N, 3], and what else is observed, in one array."""
        seconds = s.frames * s.timestep
        if isinstance(seconds, np.ndarray):
            seconds = seconds[:, None]
        grip, speed = s["site_xpos"][:, self._grip], _velocity(s, self._grip)[0] * seconds
        fingers, fingers_speed = s["qpos"][:, self._fingers[0]], s["qvel"][:, self._fingers[1]] * seconds
        if self._thing is None:
            parts = [grip, fingers]
        else:
            thing, (linear, angular) = s["site_xpos"][:, self._thing], _velocity(s, self._thing)
            turned = mat2euler(s["site_xmat"][:, self._thing].reshape(-1, 3, 3))
            parts = [grip, thing, thing - grip, fingers, turned, linear * seconds - speed, angular * seconds]
        return np.concatenate([self._achieved(s), s.goals, *parts, speed, fingers_speed], axis=1)

    def outcome(self, s: Simulators) -> Outcome:
        """Reward, termination (never) and whether the goal is reached."""
        env, distance = s.env, np.linalg.norm(self._achieved(s) - s.goals, axis=-1)
        far, near = distance > env.distance_threshold, distance < env.distance_threshold
        reward = -far.astype(np.float32) if env.reward_type == "sparse" else -distance
        return reward, np.zeros(len(distance), dtype=bool), {"is_success": near.astype(np.float32)}

    def _achieved(self, s: Simulators) -> Array:
        return s["site_xpos"][:, self._grip if self._thing is None else self._thing]


def _velocity(s: Simulators, site: int) -> tuple[Array, Array]:
    """Linear and angular velocity of a site, each [N, 3]."""
    linear, angular = np.empty((2, len(s.datas), 3))
    jacobians = np.empty((2, 3, s.model.nv))
    for i, (model, data, velocity) in enumerate(zip(s.models, s.datas, s["qvel"], strict=True)):
        mujoco.mj_jacSite(model, data, *jacobians, site)
        # One by one: over the whole batch BLAS adds in another order.
        linear[i], angular[i] = jacobians[0] @ velocity, jacobians[1] @ velocity
    return linear, angular


class FetchVecEnv(MujocoVecEnv):
    """A batch of a Fetch task as a Stable-Baselines3 VecEnv, with what its DummyVecEnv and Monitor report.

    Observations are a dict of "achieved_goal" [N, 3], "desired_goal" [N, 3] and "observation" [N, O]. The arguments and
    the rest are those of `MujocoVecEnv`.

    Raises:
        ValueError: as `MujocoVecEnv`.
    """

    tasks = FETCH_TASKS
    set_by_reset = ("goal",)

    def __init__(
        self, id: str, n_envs: int, threads: int | None = None, native: bool | None = None, **env_kwargs: Any
    ) -> None:
        super().__init__(id, n_envs, threads, native, **env_kwargs)
        if self.render_mode is not None:  # pictures move the mark of the goal, which is part of the model
            self.get_attr("model")

    def _describe(self, task: str, env: Any) -> Task:
        self._fetch = Fetch(env)
        return self._fetch.task

    def _advance(self, actions: Array) -> tuple[Array, Array, Array, dict[str, Array]]:
        s = self.simulators
        s.forget()
        s.goals = self._goals()
        actions = np.clip(actions, self._env.action_space.low, self._env.action_space.high)
        return super()._advance(self._fetch.move(s, actions))

    def _goals(self) -> Array:
        return np.stack([env.goal for env in self._envs])

    def get_state(self) -> dict[str, Any]:
        """As `MujocoVecEnv.get_state`."""
        s, body = self.simulators, self._fetch.welded
        s.forget()
        welded = np.concatenate([s["xpos"][:, body], s["xquat"][:, body]], axis=1)
        return super().get_state() | {"goals": self._goals(), "welded": welded}

    def set_state(self, state: dict[str, Any]) -> Any:
        """As `MujocoVecEnv.set_state`."""
        obs = super().set_state(state)
        for env, data, goal, welded in zip(
            self._envs, self.simulators.datas, state["goals"], state["welded"], strict=True
        ):
            env.goal = goal.copy()
            # A step leaves bodies behind by one of the simulator's; the next action begins there.
            data.xpos[self._fetch.welded], data.xquat[self._fetch.welded] = welded[:3], welded[3:]
        self._moved()
        return obs
