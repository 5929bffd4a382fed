"""What a task observes and earns: on tensors as on arrays, which are Gymnasium's own (test_mujoco_batch.py)."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch

from driftrl.envs.mujoco_batch import MujocoVecEnv
from driftrl.envs.mujoco_tasks import TASKS, Batch
from driftrl.envs.simulators import Simulators


class Tensors(Batch):
    """What is read of simulators in NumPy, as tensors."""

    xp = torch

    def __init__(self, simulators: Simulators, dtype: torch.dtype) -> None:
        self._simulators, self._dtype = simulators, dtype
        self.env, self.model = simulators.env, simulators.model
        self.actions = self._tensor(simulators.actions)
        if hasattr(simulators, "after"):
            self.before, self.after = self._tensor(simulators.before), self._tensor(simulators.after)

    def _tensor(self, array: Any) -> torch.Tensor:
        return torch.as_tensor(np.asarray(array), dtype=self._dtype)

    def __getitem__(self, field: str) -> torch.Tensor:
        return self._tensor(self._simulators[field])

    def mass_centers(self) -> torch.Tensor:
        mass = self._tensor(self.model.body_mass)[:, None]
        return ((mass * self["xipos"]).sum(1) / mass.sum())[:, :2]


NEVER_END = ("HalfCheetah-v5", "Swimmer-v5", "HumanoidStandup-v5", "Reacher-v5", "Pusher-v5")
ARGUMENTS: list[tuple[str, dict[str, Any]]] = [
    ("Hopper-v5", {"healthy_z_range": [np.float64(0.9), 1.4], "healthy_reward": 2}),
    ("Ant-v5", {"contact_force_range": (np.float64(-0.2), 0.5), "main_body": "front_left_leg"}),
    ("HalfCheetah-v5", {"exclude_current_positions_from_observation": False, "ctrl_cost_weight": np.float64(0.3)}),
    ("Humanoid-v5", {"include_cinert_in_observation": False, "contact_cost_range": (0.0, 1e-3)}),
]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-4)])
@pytest.mark.parametrize(("id", "arguments"), [*((id, {}) for id in TASKS), *ARGUMENTS])
def test_tensors_are_observed_and_paid_as_arrays(
    id: str, arguments: dict[str, Any], dtype: torch.dtype, tolerance: float
) -> None:
    env = MujocoVecEnv(id, 16, **arguments)
    env.seed(0)
    env.reset()
    assert isinstance(env.action_space, gym.spaces.Box)
    low, high = env.action_space.low, env.action_space.high
    rng, task, simulators = np.random.default_rng(0), TASKS[id], env.simulators
    ends = []
    for _ in range(30):  # on and on, without resets, until some have fallen
        simulators.step(rng.uniform(low, high, (16, len(low))), timed=False)
        if task.point is not None:
            simulators.after = task.point(simulators)
        batch = Tensors(simulators, dtype)
        (reward, ended, info), (expected, terminated, entries) = task.outcome(batch), task.outcome(simulators)
        obs = np.concatenate([part(simulators) for part in task.observation], 1)
        found = torch.cat([part(batch) for part in task.observation], 1)
        assert found.dtype == dtype and ended.dtype == torch.bool and info.keys() == entries.keys()
        assert np.array_equal(ended.numpy(), terminated)
        for mine, other in [(found, obs), (reward, expected), *((info[name], entries[name]) for name in info)]:
            np.testing.assert_allclose(mine.numpy(), other, rtol=tolerance, atol=tolerance)
        ends.append(terminated.mean())
        if task.point is not None:
            simulators.before = simulators.after
    assert id in NEVER_END or any(0 < share < 1 for share in ends)
    env.close()
