"""When Gymnasium's MuJoCo v5 tasks and our own terminate, as functions of the observation reached: for model states.

    terminated = termination_function("Hopper-v5", {"healthy_z_range": (0.8, 2.0)})
    if terminated is not None:
        ended = terminated(next_obs)  # [B, O] -> bool [B]

The conditions are those of `gymnasium.envs.mujoco.<task>_v5`, with their strict and weak inequalities. Two of them read
more than the observation has:

    Hopper                  also looks at velocities before they are clipped to +-10. Bounds of ``healthy_state_range``
                            beyond that (the default is +-100) are never crossed by the clipped ones.
    InvertedDoublePendulum  reads the tip's height where the simulator last computed it, up to one simulator step before
                            the state observed: near the threshold the two may differ.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
from gymnasium.envs.registration import load_env_creator
from torch import Tensor

from .known import FETCH_TASKS, TASK_CLASSES
from .multigoal import GOAL_TASKS

Termination: TypeAlias = Callable[[Tensor], Tensor]
"""Next observation [B, O] to terminated, bool [B]."""

MULTI_GOAL, SOFT_MULTI_GOAL = GOAL_TASKS["driftrl/MultiGoal-v0"], GOAL_TASKS["driftrl/SoftMultiGoal-v0"]

_Options: TypeAlias = Mapping[str, Any]


def _within(values: Tensor, bounds: tuple[float, float]) -> Tensor:
    return (bounds[0] < values) & (values < bounds[1])


def _first(options: _Options, hidden: int) -> int:
    """Column of the first coordinate after the `hidden` ones, which an argument may add to the observation."""
    return 0 if options["exclude_current_positions_from_observation"] else hidden


def _walker(options: _Options) -> Termination:
    z = _first(options, 1)

    def terminated(next_obs: Tensor) -> Tensor:
        upright = _within(next_obs[:, z + 1], options["healthy_angle_range"])
        return ~(upright & _within(next_obs[:, z], options["healthy_z_range"]))

    return terminated


def _hopper(options: _Options) -> Termination:
    z, fallen = _first(options, 1), _walker(options)
    return lambda next_obs: fallen(next_obs) | ~_within(next_obs[:, z + 1 :], options["healthy_state_range"]).all(1)


def _ant(options: _Options) -> Termination:
    z, (low, high) = _first(options, 2), options["healthy_z_range"]
    return lambda next_obs: ~(next_obs.isfinite().all(1) & (low <= next_obs[:, z]) & (next_obs[:, z] <= high))


def _humanoid(options: _Options) -> Termination:
    z = _first(options, 2)
    return lambda next_obs: ~_within(next_obs[:, z], options["healthy_z_range"])


def _inverted_pendulum(options: _Options) -> Termination:
    return lambda next_obs: ~next_obs.isfinite().all(1) | (next_obs[:, 1].abs() > 0.2)


def _inverted_double_pendulum(options: _Options) -> Termination:
    def terminated(next_obs: Tensor) -> Tensor:
        sin_1, sin_2, cos_1, cos_2 = next_obs[:, 1:5].unbind(1)
        return 0.6 * (cos_1 + cos_1 * cos_2 - sin_1 * sin_2) <= 1  # two poles of 0.6 m; angle 2 counts from pole 1

    return terminated


def no_end(next_obs: Tensor) -> Tensor:
    """The rule of a task that never terminates."""
    return torch.zeros(len(next_obs), dtype=torch.bool, device=next_obs.device)


def _never(options: _Options) -> Termination:
    return no_end


def _multi_goal(options: _Options) -> Termination:
    return lambda next_obs: (next_obs[:, :2].abs() > MULTI_GOAL.half_width).any(1)


def _soft_multi_goal(options: _Options) -> Termination:
    def terminated(next_obs: Tensor) -> Tensor:
        goals = torch.as_tensor(SOFT_MULTI_GOAL.goals, dtype=next_obs.dtype, device=next_obs.device)
        return ((next_obs[:, None] - goals).square().sum(-1) < SOFT_MULTI_GOAL.goal_radius**2).any(1)

    return terminated


_TASKS: dict[str, Callable[[_Options], Termination]] = {
    "Ant-v5": _ant,
    "HalfCheetah-v5": _never,
    "Hopper-v5": _hopper,
    "Humanoid-v5": _humanoid,
    "HumanoidStandup-v5": _never,
    "InvertedDoublePendulum-v5": _inverted_double_pendulum,
    "InvertedPendulum-v5": _inverted_pendulum,
    "Pusher-v5": _never,
    "Reacher-v5": _never,
    "Swimmer-v5": _never,
    "Walker2d-v5": _walker,
    "driftrl/MultiGoal-v0": _multi_goal,
    "driftrl/PointMazeMedium-v0": _never,
    "driftrl/SoftMultiGoal-v0": _soft_multi_goal,
    **dict.fromkeys(FETCH_TASKS, _never),
}


def termination_function(env_id: str, env_kwargs: Mapping[str, Any] | None = None) -> Termination | None:
    """The rule by which a task terminates, to apply to a model's states.

    Args:
        env_id: the task, as `known_task` calls it.
        env_kwargs: the environment's arguments, all that are not at their defaults.

    Returns:
        The rule, or None where the observation does not tell: for other environments, and where ``xml_file`` changes
        what the columns mean. A terminal head of the learned model can take its place. Equal arguments give the same
        function, so that who has compiled it sees whether it is another.
    """
    if env_id not in _TASKS:
        return None
    if _TASKS[env_id] is _never:
        return no_end
    (entry_point,) = (entry for entry, task in TASK_CLASSES.items() if task == env_id)
    arguments = inspect.signature(load_env_creator(entry_point)).parameters.values()
    defaults = {argument.name: argument.default for argument in arguments}
    options = defaults | dict(env_kwargs or {})
    rule = _TASKS[env_id] if options.get("terminate_when_unhealthy", True) else _never
    if rule is not _never and options.get("xml_file") != defaults.get("xml_file"):
        return None
    key = repr((rule, sorted(options.items())))
    return _made.setdefault(key, rule(options))


_made: dict[str, Termination] = {}
"""Rules by what they were made of."""

TERMINATIONS: dict[str, Termination] = {
    env_id: rule for env_id in _TASKS if (rule := termination_function(env_id)) is not None
}
"""The rules of the tasks with their default arguments."""
