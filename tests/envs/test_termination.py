"""The oracle is Gymnasium's own environment, put into states of our choice."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from driftrl.envs.known import FETCH_TASKS
from driftrl.envs.mujoco_tasks import TASKS
from driftrl.envs.multigoal import GOAL_TASKS
from driftrl.envs.termination import TERMINATIONS, termination_function

SHOWN = {"exclude_current_positions_from_observation": False}
BARE = {f"include_{part}_in_observation": False for part in ("cinert", "cvel", "qfrc_actuator", "cfrc_ext")}

CASES: list[tuple[str, dict[str, Any]]] = [
    *((id, {}) for id in TASKS),
    ("Hopper-v5", SHOWN | {"healthy_z_range": (0.9, 1.4), "healthy_angle_range": (-0.1, 0.15)}),
    ("Hopper-v5", {"healthy_state_range": (-2.0, 3.0), "healthy_angle_range": (-2.5, 2.5)}),
    ("Hopper-v5", SHOWN | {"healthy_state_range": (-3.0, 2.0), "healthy_angle_range": (-2.5, 2.5)}),
    ("Hopper-v5", {"terminate_when_unhealthy": False}),
    ("Walker2d-v5", SHOWN | {"healthy_z_range": (1.0, 1.5), "healthy_angle_range": (-0.4, 0.4)}),
    ("Walker2d-v5", {"terminate_when_unhealthy": False}),
    ("Ant-v5", {"include_cfrc_ext_in_observation": False, "healthy_z_range": (0.4, 0.8)}),
    ("Ant-v5", SHOWN | {"healthy_z_range": (-math.inf, 0.5)}),
    ("Humanoid-v5", BARE | {"healthy_z_range": (1.3, 1.5)}),
    ("Humanoid-v5", SHOWN),
    ("HalfCheetah-v5", SHOWN),
]
THRESHOLDS = (-2.5, -2.0, -1.0, -0.4, -0.2, -0.1, 0.15, 0.2, 0.4, 0.5, 0.7, 0.8, 0.9, 1.0, 1.3, 1.4, 1.5, 2.0, 2.5, 3.0)
"""Bounds of the cases, and what lies beside them."""


def states(env: Any, n: int) -> Iterator[tuple[NDArray[Any], NDArray[Any]]]:
    """Positions and velocities from healthy to far off, most with one entry on or right beside a threshold."""
    rng = np.random.default_rng(0)
    for _ in range(n):
        qpos = env.init_qpos + rng.choice([0.05, 0.3, 1.0]) * rng.standard_normal(env.model.nq)
        qvel = rng.choice([0.5, 3.0, 20.0]) * rng.standard_normal(env.model.nv)
        entry = rng.integers(min(3, env.model.nq))
        threshold = rng.choice(THRESHOLDS)
        qpos[entry] = rng.choice([qpos[entry], threshold, np.nextafter(threshold, -9), np.nextafter(threshold, 9)])
        if rng.random() < 0.2:
            qvel[rng.integers(env.model.nv)] = threshold
        yield qpos, qvel


@pytest.mark.parametrize(("id", "env_kwargs"), CASES, ids=lambda value: value if isinstance(value, str) else "")
def test_rule_equals_gymnasiums_on_any_state(
    id: str, env_kwargs: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    env: Any = gym.make(id, **env_kwargs).unwrapped
    env.reset(seed=0)
    monkeypatch.setattr(env, "do_simulation", lambda action, frames: None)  # a step that stays where it is
    observations, expected = [], []
    for qpos, qvel in states(env, 400):
        env.set_state(qpos, qvel)
        observation, _, terminated, _, _ = env.step(np.zeros(env.action_space.shape))
        observations.append(observation)
        expected.append(terminated)
    env.close()
    rule = termination_function(id, env_kwargs)
    assert rule is not None
    ended = rule(torch.as_tensor(np.stack(observations)))
    np.testing.assert_array_equal(ended.numpy(), np.array(expected, dtype=bool), strict=True)
    if env_kwargs.get("terminate_when_unhealthy", True) and hasattr(env, "is_healthy"):
        assert 40 < sum(expected) < 360


@pytest.mark.parametrize("id", ["Hopper-v5", "Walker2d-v5", "Ant-v5", "Humanoid-v5", "InvertedPendulum-v5"])
def test_rule_equals_gymnasiums_on_courses_of_random_actions(id: str) -> None:
    env = gym.make(id)
    env.action_space.seed(0)
    env.reset(seed=0)
    ends = 0
    for _ in range(300):
        observation, _, terminated, truncated, _ = env.step(env.action_space.sample())
        assert TERMINATIONS[id](torch.as_tensor(observation)[None]).item() == terminated
        ends += terminated
        if terminated or truncated:
            env.reset()
    assert ends > 0
    env.close()


def test_double_pendulum_may_differ_from_gymnasium_near_the_threshold_only() -> None:
    env: Any = gym.make("InvertedDoublePendulum-v5")
    env.action_space.seed(0)
    env.reset(seed=0)
    ends = different = 0
    for _ in range(2000):
        observation, _, terminated, _, _ = env.step(env.action_space.sample())
        mine = TERMINATIONS["InvertedDoublePendulum-v5"](torch.as_tensor(observation)[None]).item()
        ends += terminated
        if mine != terminated:
            different += 1
            assert env.unwrapped.data.site_xpos[0][2] == pytest.approx(1.0, abs=0.02)
        if terminated:
            env.reset()
    assert ends > 100 and different < 0.02 * ends
    env.close()


@pytest.mark.parametrize("id", ["Hopper-v5", "Walker2d-v5", "Ant-v5", "Humanoid-v5", "InvertedPendulum-v5"])
def test_model_states_that_are_not_numbers_terminate(id: str) -> None:
    env = gym.make(id)
    observation = torch.as_tensor(env.reset(seed=0)[0], dtype=torch.float32)
    env.close()
    batch = observation.repeat(4, 1)
    batch[1, 0], batch[2, :2], batch[3, -1] = math.nan, math.inf, math.nan
    everywhere = id in ("Ant-v5", "Hopper-v5", "InvertedPendulum-v5")  # the others look at height and angle only
    assert TERMINATIONS[id](batch).tolist() == [False, True, True, everywhere]


def test_other_environments_and_other_models_have_no_rule() -> None:
    assert termination_function("Pendulum-v1") is None
    assert termination_function("Ant-v4") is None
    assert termination_function("Ant-v5", {"xml_file": "other.xml"}) is None
    assert termination_function("HalfCheetah-v5", {"xml_file": "other.xml"}) is not None
    assert termination_function("Ant-v5", {"xml_file": "other.xml", "terminate_when_unhealthy": False}) is not None
    assert set(TERMINATIONS) == {*TASKS, *GOAL_TASKS, *FETCH_TASKS, "driftrl/PointMazeMedium-v0"}
