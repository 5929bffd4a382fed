"""The multi-goal tasks and Avoid as programs of tensors; `multigoal.py` and `avoid.py` define them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .avoid import AVOID
from .avoid import Avoid as AvoidTask
from .multigoal import GOAL_TASKS, GoalTask
from .tensor import TensorTask


class Goals(TensorTask):
    """What both multi-goal tasks share.

    Args:
        task: the task in NumPy, whose goals and bounds these are.
        limit: steps of an episode.
        start: "random", as the task defines it, or a point (x, y) where all episodes begin at rest.
    """

    def __init__(self, task: GoalTask, limit: float, start: Any = "random") -> None:
        self.limit, self.radius, self.half_width = limit, task.goal_radius, task.half_width
        self.observation_space, self.action_space = task.observation_space, task.action_space
        self._goals = torch.as_tensor(task.goals)
        self._point = None if start == "random" else torch.as_tensor(start, dtype=torch.float32)

    def start(self, count: int, generator: torch.Generator) -> Tensor:
        """At rest."""
        position = self._positions(count, generator)
        if self._point is not None:
            self._point = self._point.to(position.device)  # once: a copy to the device waits for it
            position = self._point.expand(count, 2)
        size = self.observation_space.shape[0]
        return torch.cat([position, position.new_zeros(count, size - 2)], 1)

    def _positions(self, count: int, generator: torch.Generator) -> Tensor:
        """Positions [count, 2] where episodes begin."""
        raise NotImplementedError

    def nearest(self, position: Tensor) -> Tensor:
        """Squared distance [N] from positions [N, 2] to the nearest goal."""
        self._goals = self._goals.to(position)
        return (position[:, None] - self._goals).square().sum(-1).amin(1)


class MultiGoal(Goals):
    """See `driftrl.envs.multigoal.MultiGoal`."""

    def _positions(self, count: int, generator: torch.Generator) -> Tensor:
        return 14 * torch.rand(count, 2, generator=generator, device=generator.device) - 7

    def step(self, state: Tensor, action: Tensor) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
        """One step of 0.1 s."""
        position, velocity = state.split(2, 1)
        position, velocity = position + 0.1 * velocity, velocity + 0.1 * action
        m = self.nearest(position)
        reward = 0.1 * (torch.exp(-0.3 * m) + torch.exp(-0.1 * m) - 0.01 * action.square().sum(1))
        terminated = (position.abs() > self.half_width).any(1)
        return torch.cat([position, velocity], 1), reward, terminated, {"is_success": m < self.radius**2}


class SoftMultiGoal(Goals):
    """See `driftrl.envs.multigoal.SoftMultiGoal`."""

    def _positions(self, count: int, generator: torch.Generator) -> Tensor:
        return (0.1 * torch.randn(count, 2, generator=generator, device=generator.device)).clamp(-7, 7)

    def step(self, state: Tensor, action: Tensor) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
        """One step."""
        position = (state + action).clamp(-7, 7)
        m = self.nearest(position)
        near = m < self.radius**2
        return position, 10 * near - 30 * action.square().sum(1) - m, near, {"is_success": near}


class Avoid(TensorTask):
    """See `driftrl.envs.avoid.Avoid`.

    Args:
        task: the task in NumPy.
        limit: steps of an episode.
    """

    def __init__(self, task: AvoidTask, limit: float) -> None:
        self.task, self.limit = task, limit
        self.observation_space, self.action_space = task.observation_space, task.action_space
        self._obstacles = torch.as_tensor(task.obstacles)

    def start(self, count: int, generator: torch.Generator) -> Tensor:
        """At rest at the bottom."""
        state = torch.zeros(count, 4, device=generator.device)
        width = self.task.start_half_width
        state[:, 0] = width * (2 * torch.rand(count, generator=generator, device=generator.device) - 1)
        state[:, 1] = self.task.start_y
        return state

    def step(self, state: Tensor, action: Tensor) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
        """One step."""
        task, before = self.task, state[:, :2]
        after = before + task.step_length * action
        hit = self._touched(before, after)
        x, y = after.unbind(1)
        success = (y >= task.goal_y) & (x.abs() <= 1) & ~hit
        outside = (x.abs() > 1) | (y < task.start_y - 0.5 * task.step_length)
        place = after.clamp(-task.edge, task.edge)
        return torch.cat([place, action], 1), success.to(state), success | outside | hit, {"is_success": success}

    def _touched(self, before: Tensor, after: Tensor) -> Tensor:
        """Whether the straight ways from positions [N, 2] to others touch an obstacle, [N]."""
        self._obstacles = self._obstacles.to(before)
        way, to = after - before, self._obstacles - before[:, None]  # [N, 2], [N, obstacles, 2]
        length = way.square().sum(1)
        along = (to * way[:, None]).sum(-1)
        share = (along / torch.where(length > 0, length, 1)[:, None]).clamp(0, 1)  # of the way, to its nearest point
        gap = to - share[..., None] * way[:, None]
        return (gap.square().sum(-1) < self.task.radius**2).any(1)


TENSOR_TASKS: dict[str, Callable[..., TensorTask]] = {
    "driftrl/MultiGoal-v0": lambda limit, **kwargs: MultiGoal(GOAL_TASKS["driftrl/MultiGoal-v0"], limit, **kwargs),
    "driftrl/SoftMultiGoal-v0": lambda limit, **kwargs: SoftMultiGoal(
        GOAL_TASKS["driftrl/SoftMultiGoal-v0"], limit, **kwargs
    ),
    AVOID: lambda limit: Avoid(AvoidTask(), limit),
}
"""Makers of the tasks by their Gymnasium id, given the steps of an episode and the environment's arguments."""
