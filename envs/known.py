"""Which environments are tasks that we know: a class with its arguments, wrapped by nothing that changes it.

An id says little: it can be registered anew with another class, and an environment can be wrapped. What a batched
backend, a termination rule or a preset knows, it knows of a class; where the class is another one, or something stands
between it and the agent, it is not asked.
"""

from __future__ import annotations

from typing import Any

import gymnasium as gym
from gymnasium.envs.registration import EnvSpec, find_highest_version, get_env_id, parse_env_id
from stable_baselines3.common.vec_env import DummyVecEnv, VecCheckNan, VecEnv, VecEnvWrapper, VecMonitor

_MUJOCO = "gymnasium.envs.mujoco"
TASK_CLASSES: dict[str, str] = {
    f"{_MUJOCO}.ant_v5:AntEnv": "Ant-v5",
    f"{_MUJOCO}.half_cheetah_v5:HalfCheetahEnv": "HalfCheetah-v5",
    f"{_MUJOCO}.hopper_v5:HopperEnv": "Hopper-v5",
    f"{_MUJOCO}.humanoid_v5:HumanoidEnv": "Humanoid-v5",
    f"{_MUJOCO}.humanoidstandup_v5:HumanoidStandupEnv": "HumanoidStandup-v5",
    f"{_MUJOCO}.inverted_double_pendulum_v5:InvertedDoublePendulumEnv": "InvertedDoublePendulum-v5",
    f"{_MUJOCO}.inverted_pendulum_v5:InvertedPendulumEnv": "InvertedPendulum-v5",
    f"{_MUJOCO}.pusher_v5:PusherEnv": "Pusher-v5",
    f"{_MUJOCO}.reacher_v5:ReacherEnv": "Reacher-v5",
    f"{_MUJOCO}.swimmer_v5:SwimmerEnv": "Swimmer-v5",
    f"{_MUJOCO}.walker2d_v5:Walker2dEnv": "Walker2d-v5",
    "driftrl.envs.multigoal:MultiGoalEnv": "driftrl/MultiGoal-v0",
    "driftrl.envs.multigoal:SoftMultiGoalEnv": "driftrl/SoftMultiGoal-v0",
    "driftrl.envs.avoid:AvoidEnv": "driftrl/Avoid-v0",
    "driftrl.envs.point_maze:PointMazeMedium": "driftrl/PointMazeMedium-v0",
    "gymnasium_robotics.envs.fetch.pick_and_place:MujocoFetchPickAndPlaceEnv": "FetchPickAndPlace-v4",
    "gymnasium_robotics.envs.fetch.push:MujocoFetchPushEnv": "FetchPush-v4",
    "gymnasium_robotics.envs.fetch.reach:MujocoFetchReachEnv": "FetchReach-v4",
    "gymnasium_robotics.envs.fetch.slide:MujocoFetchSlideEnv": "FetchSlide-v4",
}
"""Entry point of a class -> the task as we call it, by the id under which it usually is registered."""
FETCH_TASKS = tuple(task for task in TASK_CLASSES.values() if task.startswith("Fetch"))
NEUTRAL_WRAPPERS = {
    "stable_baselines3.common.monitor:Monitor",
    "gymnasium.wrappers.common:RecordEpisodeStatistics",
    "gymnasium.wrappers.common:TimeLimit",
    "gymnasium.wrappers.common:OrderEnforcing",
    "gymnasium.wrappers.common:PassiveEnvChecker",
    "gymnasium.wrappers.rendering:RecordVideo",
    "gymnasium.wrappers.rendering:RenderCollection",
    "gymnasium.wrappers.rendering:HumanRendering",
}
"""Wrappers that change neither observations, actions and rewards nor when an episode terminates."""


def known_task(spec: EnvSpec | None) -> str | None:
    """The task that an environment of this spec is, a value of `TASK_CLASSES`; None if we do not know it."""
    if spec is None or any(wrapper.entry_point not in NEUTRAL_WRAPPERS for wrapper in spec.additional_wrappers):
        return None
    entry: Any = spec.entry_point
    if not isinstance(entry, str):
        entry = f"{getattr(entry, '__module__', '')}:{getattr(entry, '__qualname__', '')}"
    return TASK_CLASSES.get(entry)


def known_task_of_id(id: str) -> str | None:
    """The task that `gymnasium.make` would make of an id, if we know it."""
    return known_task(gym.registry.get(id.rpartition(":")[2]))


def bare_task_of_id(id: str) -> str | None:
    """The known task of an id that adds no wrappers to it: a batch would leave out what they do (a film, a limit)."""
    spec = gym.registry.get(id.rpartition(":")[2])
    return None if spec is None or spec.additional_wrappers else known_task(spec)


def task_name(id: str) -> str:
    """What presets go by: the task that an id stands for, else the id; "" where it only has the name of a task."""
    return known_task_of_id(id) or ("" if id in TASK_CLASSES.values() and id in gym.registry else id)


def _has_neutral_wrappers(env: gym.Env[Any, Any]) -> bool:
    """Whether nothing but wrappers that change nothing stands around an environment; a spec does not tell all."""
    while isinstance(env, gym.Wrapper):
        kind = type(env)
        if f"{kind.__module__}:{kind.__qualname__}" not in NEUTRAL_WRAPPERS:
            return False
        env = env.env
    return True


def known_task_of(env: VecEnv) -> tuple[str, dict[str, Any]] | None:
    """The task that all environments of a VecEnv are, and its arguments; None if we do not know it."""
    while isinstance(env, VecEnvWrapper):
        if not isinstance(env, VecMonitor | VecCheckNan):
            return None
        env = env.venv
    if isinstance(env, DummyVecEnv) and not all(map(_has_neutral_wrappers, env.envs)):
        return None
    specs = env.get_attr("spec")
    tasks = [known_task(spec) for spec in specs]
    if tasks[0] is None or tasks != tasks[:1] * len(tasks) or any(each.kwargs != specs[0].kwargs for each in specs):
        return None
    return tasks[0], dict(specs[0].kwargs)


def full_id(id: str) -> str:
    """An id with its version, "Hopper-v5" for "Hopper", as `gymnasium.make` would take it; other ids as they are."""
    module, colon, name = id.rpartition(":")
    try:
        namespace, base, version = parse_env_id(name)
    except gym.error.Error:
        return id
    if version is not None or name in gym.registry:
        return id
    highest = find_highest_version(namespace, base)
    return id if highest is None else f"{module}{colon}{get_env_id(namespace, base, highest)}"
