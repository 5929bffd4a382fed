"""A task is a class with its arguments, not an id: what we know of one is used where it holds, and nowhere else."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.envs.mujoco.half_cheetah_v5 import HalfCheetahEnv
from gymnasium.envs.mujoco.hopper_v5 import HopperEnv
from gymnasium.wrappers import (
    FrameStackObservation,
    NormalizeObservation,
    RecordEpisodeStatistics,
    TimeLimit,
    TransformObservation,
    TransformReward,
)
from stable_baselines3.common.vec_env import DummyVecEnv, VecFrameStack, VecMonitor

from driftrl import LipschitzMBPO
from driftrl.agents.lipschitz_mbpo.model import termination_rule
from driftrl.agents.registry import AGENTS
from driftrl.envs import make_vec
from driftrl.envs.known import TASK_CLASSES, full_id, known_task, known_task_of, known_task_of_id, task_name
from driftrl.envs.mujoco_batch import MujocoVecEnv


class Mine(HalfCheetahEnv):
    """Every step pays 100."""

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        obs, _, terminated, truncated, info = super().step(action)  # type: ignore[no-untyped-call]
        return obs, 100.0, terminated, truncated, info


class Early(TimeLimit[Any, Any]):
    """Ends where the hopper is lower than 1.2."""

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        obs, reward, terminated, truncated, info = super().step(action)
        return obs, reward, terminated or obs[0] < 1.2, truncated, info


class Sooner(HopperEnv):
    """Ends where the hopper is lower than 1.2."""

    @property
    def is_healthy(self) -> bool:
        return bool(self.data.qpos[1] > 1.2)


@pytest.fixture
def registered_anew() -> Iterator[None]:
    """HalfCheetah-v5 is another class."""
    kept = gym.registry["HalfCheetah-v5"]
    del gym.registry["HalfCheetah-v5"]
    gym.register("HalfCheetah-v5", entry_point=Mine, max_episode_steps=1000)
    yield
    gym.registry["HalfCheetah-v5"] = kept


def test_every_class_we_know_is_the_one_that_is_registered() -> None:
    for task in TASK_CLASSES.values():
        assert known_task_of_id(task) == task


def test_an_id_registered_anew_is_another_environment(registered_anew: None) -> None:
    env = make_vec("HalfCheetah-v5", 1, 0)
    env.reset()
    assert env.step(np.zeros((1, 6), np.float32))[1] == 100
    with pytest.raises(ValueError, match="batched: got 'HalfCheetah-v5', an environment that is wrapped or of"):
        make_vec("HalfCheetah-v5", 1, 0, backend="batched")
    assert task_name("HalfCheetah-v5") == ""
    spec = AGENTS["policyflow"]
    assert spec.preset("HalfCheetah-v5", "standard") == dict(spec.default_presets["standard"])


def test_another_id_of_a_known_class_is_that_task() -> None:
    gym.register("test/Hop-v0", "gymnasium.envs.mujoco.hopper_v5:HopperEnv", kwargs={"healthy_z_range": (0.9, 2.0)})
    try:
        env = make_vec("test/Hop-v0", 2, 0)
        assert isinstance(env, MujocoVecEnv)
        assert known_task_of(env) == ("Hopper-v5", {"healthy_z_range": (0.9, 2.0)})
        assert AGENTS["mbpo"].preset("test/Hop-v0", "fast") == AGENTS["mbpo"].preset("Hopper-v5", "fast")
    finally:
        del gym.registry["test/Hop-v0"]


def test_wrappers_that_change_something_hide_the_task() -> None:
    bare = gym.make("Hopper-v5")
    assert known_task(bare.spec) == known_task(RecordEpisodeStatistics(bare).spec) == "Hopper-v5"
    rewarded = TransformReward(bare, lambda reward: 2 * float(reward))
    for wrapped in (NormalizeObservation(bare), FrameStackObservation(bare, 2), rewarded):
        assert known_task(wrapped.spec) is None
    venv = DummyVecEnv([lambda: gym.make("Hopper-v5")])
    assert known_task_of(VecMonitor(venv)) == ("Hopper-v5", {})
    assert known_task_of(VecFrameStack(venv, 2)) is None
    mixed = DummyVecEnv([lambda: gym.make("Hopper-v5"), lambda: gym.make("Hopper-v5", healthy_z_range=(0.9, 2.0))])
    assert known_task_of(mixed) is None
    # A subclass of a wrapper that changes nothing may change something; its spec does not tell.
    assert known_task(Early(bare, 1000).spec) == "Hopper-v5"
    assert known_task_of(DummyVecEnv([lambda: Early(bare, 1000)])) is None
    assert known_task_of(DummyVecEnv([lambda: HopperEnv()])) is None  # made without gymnasium.make: it has no spec


def test_rule_and_data_are_compared_at_every_fit() -> None:
    env = gym.make("InvertedPendulum-v5")
    learner = agent(make_vec("InvertedPendulum-v5", 1, 0)).learn(250)
    other = DummyVecEnv([lambda: TransformObservation(env, lambda obs: obs + 1, env.observation_space)])
    learner.set_env(other)
    learner.terminated = lambda next_obs: next_obs[:, 1].abs() > 0.2  # right before, wrong of what comes now
    with pytest.raises(ValueError, match="termination: got auto, whose rule disagrees"):
        learner.learn(450, reset_num_timesteps=False)


def agent(env: Any, **fields: Any) -> LipschitzMBPO:
    sizes: dict[str, Any] = {
        "learning_starts": 200, "model_epochs": 2, "model_hidden": (16, 16), "model_interval": 200,
        "model_retain": 200, "model_rollouts": 20, "rollout_max": 1, "gradient_steps": 1, "actor_hidden": (8,),
        "critic_hidden": (8,), "compile": "off",
    }  # fmt: skip
    return LipschitzMBPO("MlpPolicy", env, seed=0, device="cpu", **sizes | fields)


def test_ends_of_imagined_transitions_are_learned_where_the_observation_is_another() -> None:
    learner = agent(NormalizeObservation(gym.make("Hopper-v5")), rollout_max=1)
    learner.learn(450)
    real, imagined = (each.all().terminated.mean().item() for each in (learner._real, learner.model_buffer))
    assert imagined < real + 0.05
    with pytest.raises(ValueError, match="termination: got task, but no rule of this environment is known"):
        agent(NormalizeObservation(gym.make("Hopper-v5")), termination="task")


@pytest.mark.parametrize("task", ["Hopper-v5", "InvertedDoublePendulum-v5", "InvertedPendulum-v5", "Walker2d-v5"])
def test_known_rules_agree_with_their_environments(task: str) -> None:
    agent(make_vec(task, 1, 0)).learn(450)


def test_a_rule_that_disagrees_with_the_data_is_an_error() -> None:
    env = DummyVecEnv([lambda: gym.wrappers.TimeLimit(Sooner(), 1000)])
    rule = termination_rule("auto", None, make_vec("Hopper-v5", 1, 0))
    options: dict[str, Any] = {"learning_starts": 200, "model_interval": 200, "seed": 0, "device": "cpu"}
    learner = LipschitzMBPO("MlpPolicy", env, terminated=rule, **options)
    with pytest.raises(ValueError, match=r"termination: got auto, whose rule disagrees .*; make an agent with learned"):
        learner.learn(450)


def test_ids_without_a_version_are_the_newest() -> None:
    assert full_id("Hopper") == "Hopper-v5"
    assert full_id("Hopper-v4") == "Hopper-v4"
    assert full_id("no such") == "no such"
    assert full_id("some.module:Hopper") == "some.module:Hopper-v5"
    assert full_id("driftrl/MultiGoal") == "driftrl/MultiGoal-v0"
