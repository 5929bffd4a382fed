import math
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env as gymnasium_check_env
from stable_baselines3.common.env_checker import check_env as sb3_check_env
from stable_baselines3.common.vec_env import DummyVecEnv

from driftrl.envs import make_vec
from driftrl.envs.multigoal import GOAL_TASKS, GoalVecEnv
from driftrl.envs.termination import TERMINATIONS

from .courses import count_ends

MULTI, SOFT = "driftrl/MultiGoal-v0", "driftrl/SoftMultiGoal-v0"


def course(id: str, start: tuple[float, float], actions: list[tuple[float, float]]) -> list[tuple[Any, float, bool]]:
    """Observation, reward and terminated of each step."""
    env = gym.make(id, start=start, disable_env_checker=True).unwrapped
    env.reset()
    return [env.step(np.array(action))[:3] for action in actions]  # type: ignore[misc]


@pytest.mark.parametrize("id", GOAL_TASKS)
@pytest.mark.filterwarnings("ignore:.*symmetric and normalized.*space")  # accelerations reach 5, as in the paper
def test_the_checkers_are_content(id: str) -> None:
    env = gym.make(id, render_mode="rgb_array").unwrapped
    gymnasium_check_env(env)
    sb3_check_env(env)


def test_a_constant_acceleration_is_integrated_with_the_old_velocity() -> None:
    steps = course(MULTI, (1, -2), [(2, -3)] * 10)
    for k, (obs, _, terminated) in enumerate(steps, start=1):
        expected = [1 + 0.01 * 2 * k * (k - 1) / 2, -2 - 0.01 * 3 * k * (k - 1) / 2, 0.2 * k, -0.3 * k]
        np.testing.assert_allclose(obs, expected, rtol=1e-6)
        assert not terminated
    obs, _, _ = course(MULTI, (0, 0), [(70, -5.1)])[0]
    np.testing.assert_allclose(obs, [0, 0, 0.5, -0.5], rtol=1e-6)  # clipped


def test_rewards_of_multi_goal() -> None:
    at_goal = (2.5, 2.5 * math.sqrt(3))  # the one at 60 degrees
    for start, m in [(at_goal, 0.0), ((0, 0), 25.0), ((5, 2), 4.0), ((-6, 0), 1.0)]:
        ((_, reward, _),) = course(MULTI, start, [(0, 0)])
        assert reward == pytest.approx(0.1 * (math.exp(-0.3 * m) + math.exp(-0.1 * m)), rel=1e-12)
    ((_, reward, _),) = course(MULTI, at_goal, [(3, -4)])
    assert reward == pytest.approx(0.2 - 0.1 * 0.01 * 25, rel=1e-12)
    ((_, _, _), (_, moved, _)) = course(MULTI, (5, 0), [(5, 0), (0, 0)])  # the reward is that of the position reached
    assert moved == pytest.approx(0.1 * (math.exp(-0.3 * 0.05**2) + math.exp(-0.1 * 0.05**2)), rel=1e-12)


@pytest.mark.parametrize(("id", "degrees"), [(MULTI, 60), (SOFT, 90)])
def test_all_goals_are_equally_good(id: str, degrees: float) -> None:
    task, angle = GOAL_TASKS[id], math.radians(degrees)
    rotation = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    points = np.random.default_rng(0).uniform(-4, 4, (200, 2))
    np.testing.assert_allclose(task.reward_map(points @ rotation.T), task.reward_map(points), rtol=1e-9, atol=1e-12)


def test_multi_goal_terminates_beyond_eight() -> None:
    for sign in (1, -1):
        *inside, (obs, _, terminated) = course(MULTI, (sign * 7.9, 0), [(sign * 5, 0)] * 3)
        assert [step[2] for step in inside] == [False, False]  # at 7.9 and 7.95
        assert abs(obs[0]) == pytest.approx(8.05) and terminated
    assert not course(MULTI, (8, -8), [(0, 0)])[0][2]


def test_soft_multi_goal_by_hand() -> None:
    steps = course(SOFT, (0, 0), [(1, 0), (1, 0), (1, 0), (1, 0), (0.5, 0)])
    assert [reward for _, reward, _ in steps] == [-30 - 16, -30 - 9, -30 - 4, -30 - 1, 10 - 7.5 - 0.25]
    assert [terminated for _, _, terminated in steps] == [False, False, False, False, True]  # within 1, not at 1
    obs, reward, _ = course(SOFT, (6.5, -7), [(30, -30)])[0]  # action and position are clipped
    assert obs.tolist() == [7, -7]
    assert reward == -30 * 2 - (4 + 49)


@pytest.mark.parametrize("id", GOAL_TASKS)
def test_a_state_steps_the_same_alone_and_in_a_batch(id: str) -> None:
    task, rng = GOAL_TASKS[id], np.random.default_rng(0)
    states = rng.uniform(-7, 7, (1003, len(task.at_rest(np.zeros((1, 2)))[0])))
    actions = rng.uniform(-6, 6, (1003, 2))
    together = task.step(states, actions)
    for i in range(len(states)):
        for one, many in zip(task.step(states[i : i + 1], actions[i : i + 1]), together, strict=True):
            np.testing.assert_array_equal(one[0], many[i], strict=True)


@pytest.mark.parametrize("id", GOAL_TASKS)
@pytest.mark.parametrize("env_kwargs", [{}, {"start": (1.0, -2.0), "max_episode_steps": 17}])
def test_the_batch_equals_single_environments_to_the_last_bit(id: str, env_kwargs: dict[str, Any]) -> None:
    ours, theirs = make_vec(id, 5, 3, **env_kwargs), make_vec(id, 5, 3, "sync", **env_kwargs)
    assert isinstance(ours, GoalVecEnv) and isinstance(theirs, DummyVecEnv)
    rng, high = np.random.default_rng(0), GOAL_TASKS[id].action_space.high
    drift = rng.uniform(-high, high, (5, 2))

    def draw() -> Any:
        return (drift + rng.uniform(-high, high, (5, 2))).clip(-high, high).astype(np.float32)

    terminations, truncations, _ = count_ends(ours, theirs, draw, 130)
    assert terminations > 0 and (truncations > 0 or not env_kwargs)


@pytest.mark.parametrize("id", GOAL_TASKS)
def test_a_restored_state_goes_on_as_if_nothing_had_happened(id: str) -> None:
    env, other = GoalVecEnv(id, 3, max_episode_steps=9), GoalVecEnv(id, 3, max_episode_steps=9)
    actions = np.random.default_rng(0).uniform(-1, 1, (40, 3, 2)).astype(np.float32)
    env.seed(0)
    env.reset()
    other.reset()
    for action in actions[:13]:
        env.step(action)
    state = env.get_state()
    rest = [env.step(action)[:3] for action in actions[13:]]
    for target in (other, env):  # into another batch, and back into the same one
        np.testing.assert_array_equal(target.set_state(state), state["observation"])
        for action, expected in zip(actions[13:], rest, strict=True):
            for got, want in zip(target.step(action)[:3], expected, strict=True):
                np.testing.assert_array_equal(np.asarray(got), np.asarray(want))
    with pytest.raises(ValueError, match="states of shape"):
        GoalVecEnv(id, 2).set_state(state)


def test_seeds_apply_once_and_differ_between_environments() -> None:
    env = make_vec(MULTI, 3, 5)
    first, second = np.asarray(env.reset()), np.asarray(env.reset())
    assert len(np.unique(first[:, 0])) == 3
    assert not np.array_equal(first, second)
    env.seed(5)
    np.testing.assert_array_equal(np.asarray(env.reset()), first)
    np.testing.assert_array_equal(np.asarray(make_vec(MULTI, 2, 6).reset()), first[1:])  # environment i has seed + i


def test_starts_are_those_of_the_tasks() -> None:
    starts = np.asarray(make_vec(MULTI, 4000, 0).reset())
    assert not starts[:, 2:].any()
    assert np.abs(starts).max() <= 7
    np.testing.assert_allclose(np.quantile(starts[:, :2], [0.1, 0.5, 0.9]), [-5.6, 0, 5.6], atol=0.2)
    starts = np.asarray(make_vec(SOFT, 4000, 0).reset())
    np.testing.assert_allclose(starts.std(axis=0), 0.1, rtol=0.05)
    np.testing.assert_array_equal(np.asarray(make_vec(MULTI, 2, 0, start=[3, -4]).reset()), [[3, -4, 0, 0]] * 2)


@pytest.mark.parametrize("start", ["uniform", (9, 0), (1,), (0.0, math.nan)])
def test_other_starts_are_refused(start: Any) -> None:
    with pytest.raises(ValueError, match=r"start: got .*expected 'random' or a point \(x, y\) in \[-8, 8\]\^2"):
        make_vec(MULTI, 1, 0, start=start)


def test_options_and_other_batches_are_refused() -> None:
    with pytest.raises(ValueError, match="argument start sets the start"):
        gym.make(MULTI).reset(options={"start": (0, 0)})
    with pytest.raises(ValueError, match="use another backend"):
        GoalVecEnv("Hopper-v5", 1)
    with pytest.raises(ValueError, match="n_envs: got 0"):
        GoalVecEnv(MULTI, 0)
    with pytest.raises(ValueError, match=r"got shape \(3, 2\), expected \(2, 2\)"):
        env = GoalVecEnv(MULTI, 2)
        env.reset()
        env.step(np.zeros((3, 2)))


@pytest.mark.parametrize("back", range(0, 22, 3))
def test_observations_stay_within_their_space(back: int) -> None:
    env = gym.make(MULTI, start=(-8, -8), max_episode_steps=100).unwrapped
    env.reset()
    # Across the plane at full speed, or first all the way to the right and back from there.
    signs = [1] * 26 if back == 0 else [1] * back + [-1] * 100
    for sign in signs:
        obs, _, terminated, _, _ = env.step(np.array([5.0, 5.0]) * sign)
        assert obs in env.observation_space
        if terminated:
            return
    raise AssertionError("it should have left the plane")


@pytest.mark.parametrize("id", GOAL_TASKS)
def test_the_model_terminates_where_the_task_does(id: str) -> None:
    task, rng = GOAL_TASKS[id], np.random.default_rng(0)
    states = rng.uniform(-8, 8, (2000, len(task.at_rest(np.zeros((1, 2)))[0])))
    next_states, _, terminated = task.step(states, rng.uniform(-1, 1, (2000, 2)))
    np.testing.assert_array_equal(TERMINATIONS[id](torch.as_tensor(next_states)).numpy(), terminated)
    assert 40 < terminated.sum() < 1960


def test_pictures_show_the_point_and_the_goals() -> None:
    env = make_vec(MULTI, 2, 0, render_mode="rgb_array")
    env.reset()
    assert isinstance(env, GoalVecEnv)
    env.states[1] = [-4, 6, 0, 0]
    env.render_index = 1
    picture = env.render()
    assert picture is not None and picture.shape == (240, 240, 3)

    def pixel(x: float, y: float) -> list[int]:
        row, column = round((8 - y) / 16 * 239), round((x + 8) / 16 * 239)
        return [int(value) for value in picture[row, column]]

    assert pixel(-4, 6) == [220, 0, 0]
    assert pixel(5, 0) == [0, 140, 0]
    grey = pixel(0, 0)
    assert grey[0] == grey[1] == grey[2] > pixel(5, 0.6)[0]  # darker where the reward is high
    assert gym.make(MULTI).unwrapped.render() is None


def test_attributes_and_methods_reach_each_environment() -> None:
    env = GoalVecEnv(MULTI, 3, start=(1, 2))
    env.reset()
    env.step(np.ones((3, 2)))
    np.testing.assert_array_equal(np.concatenate(env.get_attr("state")), env.states)
    env.env_method("reset", indices=[1])
    np.testing.assert_allclose(env.states[:, 2], [0.1, 0, 0.1])
    env.set_attr("_start", np.array([3.0, 3.0]))
    np.testing.assert_array_equal(np.asarray(env.reset())[:, :2], [[3, 3]] * 3)
