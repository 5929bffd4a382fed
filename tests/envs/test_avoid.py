import math
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env as gymnasium_check_env
from stable_baselines3.common.env_checker import check_env as sb3_check_env
from stable_baselines3.common.vec_env import DummyVecEnv

from driftrl.envs import make_vec
from driftrl.envs.avoid import AVOID, Avoid, AvoidVecEnv
from driftrl.envs.avoid_demonstrations import avoid_demonstrations

from .courses import count_ends


def test_the_checkers_are_content() -> None:
    env = gym.make(AVOID, render_mode="rgb_array").unwrapped
    gymnasium_check_env(env)
    sb3_check_env(env)


def play(x: float, actions: list[tuple[float, float]]) -> tuple[np.ndarray, list[float], list[bool]]:
    """States, rewards and terminated of a course that begins at rest at (x, -1)."""
    task, state = Avoid(), np.array([[x, -1.0, 0, 0]])
    states, rewards, ends = [state], [], []
    for action in actions:
        state, reward, terminated = task.step(state, np.array([action]))
        states.append(state)
        rewards.append(float(reward[0]))
        ends.append(bool(terminated[0]))
    return np.concatenate(states), rewards, ends


def test_straight_up_hits_the_first_obstacle_when_its_edge_is_reached() -> None:
    _, rewards, ends = play(0.1, [(0, 1)] * 4)
    # At x = 0.1 the edge is at y = -0.4 - sqrt(0.25^2 - 0.1^2) = -0.629: touched with the fourth step of 0.1.
    assert ends == [False] * 3 + [True] and sum(rewards) == 0
    states, _, _ = play(0.0, [(0.5, -0.25), (5, 0.3)])  # the first is within the bounds, the second is clipped to 1
    np.testing.assert_allclose(states[1:], [[0.05, -1.025, 0.5, -0.25], [0.15, -0.995, 1, 0.3]])


def test_a_step_across_the_edge_of_an_obstacle_touches_it() -> None:
    # Both ends lie outside the disc, 0.251 from its middle; the way between them comes as near as 0.2462.
    angle, half = math.radians(45), math.radians(11.2)
    ends = [(0.251 * math.cos(a), -0.4 + 0.251 * math.sin(a)) for a in (angle - half, angle + half)]
    before, after = np.array(ends[:1]), np.array(ends[1:])
    task = Avoid()
    assert not task.touched(before, before).any() and not task.touched(after, after).any()
    assert task.touched(before, after).all() and task.touched(after, before).all()
    further = before + 1.2 * (before - np.array([[0, -0.4]]))
    assert not task.touched(before, further).any()  # away from it: the nearest point is where it begins


@pytest.mark.parametrize(("x", "n", "ended"), [(-0.99, 1, True), (0.99, 1, True), (0.9, 1, False), (0.9, 2, True)])
def test_the_arena_ends_at_its_sides(x: float, n: int, ended: bool) -> None:
    _, rewards, ends = play(x, [(math.copysign(1, x) * 0.9, 0)] * n)
    assert ends[-1] == ended and sum(rewards) == 0


def test_also_the_last_observation_lies_in_the_space() -> None:
    task = Avoid()
    state = np.array([[0.0, -1.0, 0, 0]])
    for share in (0.5, 1.0):  # to y = -1.05, and beyond
        state, _, ended = task.step(state, np.array([[0.0, -share]]))
    assert ended[0] and task.observation_space.contains(state[0].astype(np.float32))


def test_only_the_goal_line_is_rewarded_and_ends_the_episode() -> None:
    _, rewards, ends = play(-0.85, [(0, 1)] * 19 + [(0, 0.9), (0, 0.5)])  # x = -0.85 passes both rows
    assert rewards == [0.0] * 20 + [1.0] and ends == [False] * 20 + [True]


def test_obstacles_have_a_radius_of_a_quarter() -> None:
    for x, hit in ((0.245, True), (0.255, False), (-0.245, True)):
        assert any(play(x, [(0, 1)] * 8)[2]) == hit
    points = np.array([[0.45, 0.16], [-0.45, 0.64], [0.0, 0.4]])
    assert Avoid().touched(points, points).tolist() == [True, True, False]


def test_routes_are_told_by_the_gap_of_each_row() -> None:
    task, number = Avoid(), 0
    for first in (-0.55, 0.55):
        for second in (-0.85, 0.0, 0.85):
            corners = np.array([[0, -1], [first, -0.5], [first, -0.2], [second, 0.1], [second, 1.0]])
            times = np.linspace(0, 4, 81)
            path = np.stack([np.interp(times, np.arange(5), corners[:, k]) for k in range(2)], axis=1)
            assert not task.touched(path[:-1], path[1:]).any()
            assert task.routes(path[:, None]).tolist() == [number]
            number += 1
    assert number == task.n_routes
    short = np.array([[[0.0, -1.0]], [[0.5, 0.3]]])
    assert task.routes(short).tolist() == [-1]


def test_the_crossing_of_a_row_is_interpolated() -> None:
    # Between the two positions the line x = 0.1 - 0.3 s crosses y = -0.4 at s = 2/3, x = -0.1: left of the obstacle.
    positions = np.array([[[0.1, -0.6]], [[-0.2, -0.3]], [[-0.8, 0.0]], [[-0.8, 1.0]]])
    assert Avoid().routes(positions).tolist() == [0]


def test_a_state_steps_the_same_alone_and_in_a_batch() -> None:
    task, rng = Avoid(), np.random.default_rng(0)
    states, actions = rng.uniform(-1, 1, (1003, 4)), rng.uniform(-1.2, 1.2, (1003, 2))
    together = task.step(states, actions)
    for i in range(len(states)):
        for one, many in zip(task.step(states[i : i + 1], actions[i : i + 1]), together, strict=True):
            np.testing.assert_array_equal(one[0], many[i], strict=True)


@pytest.mark.parametrize("env_kwargs", [{}, {"max_episode_steps": 9}])
def test_the_batch_equals_single_environments_to_the_last_bit(env_kwargs: dict[str, Any]) -> None:
    ours, theirs = make_vec(AVOID, 5, 3, **env_kwargs), make_vec(AVOID, 5, 3, "sync", **env_kwargs)
    assert isinstance(ours, AvoidVecEnv) and isinstance(theirs, DummyVecEnv)
    rng = np.random.default_rng(0)

    def draw() -> Any:
        sideways = rng.normal(0, 1, (5, 1)) + np.array([[-1], [-0.5], [0], [0.5], [1]])
        return np.concatenate([sideways, rng.normal(0.7, 0.5, (5, 1))], 1).clip(-1, 1).astype(np.float32)

    terminations, truncations, successes = count_ends(ours, theirs, draw, 400)
    assert terminations > 0 and (truncations > 0 or not env_kwargs) and (successes > 0 or env_kwargs)


def test_a_restored_state_goes_on_as_if_nothing_had_happened() -> None:
    env, other = AvoidVecEnv(AVOID, 3, max_episode_steps=9), AvoidVecEnv(AVOID, 3, max_episode_steps=9)
    actions = np.random.default_rng(0).uniform(-1, 1, (40, 3, 2)).astype(np.float32)
    env.seed(0)
    env.reset()
    other.reset()
    for action in actions[:13]:
        env.step(action)
    state = env.get_state()
    rest = [env.step(action)[:3] for action in actions[13:]]
    for target in (other, env):
        np.testing.assert_array_equal(target.set_state(state), state["observation"])
        for action, expected in zip(actions[13:], rest, strict=True):
            for got, want in zip(target.step(action)[:3], expected, strict=True):
                np.testing.assert_array_equal(np.asarray(got), np.asarray(want))
    with pytest.raises(ValueError, match="states of shape"):
        AvoidVecEnv(AVOID, 2).set_state(state)


def test_what_is_no_avoid_is_refused() -> None:
    with pytest.raises(ValueError, match=r"batched: got 'Hopper-v5', expected driftrl/Avoid-v0"):
        AvoidVecEnv("Hopper-v5", 1)
    env = gym.make(AVOID)
    with pytest.raises(ValueError, match="options: got"):
        env.reset(options={"x": 1})


@pytest.mark.parametrize("success", [1.0, 0.5, 0.0])
def test_demonstrations_show_all_routes_and_fail_as_often_as_asked(success: float) -> None:
    episodes: list[Any] = avoid_demonstrations(240, 0, success=success)
    longest = max(len(each.observations) for each in episodes)
    padded = [np.concatenate([e.observations, np.repeat(e.observations[-1:], longest - len(e.observations), 0)])
              for e in episodes]  # fmt: skip
    routes = Avoid().routes(np.stack(padded, 1)[..., :2])
    good = int(240 * success)
    assert np.bincount(routes + 1, minlength=7).tolist() == [240 - good, *[good // 6] * 6]
    assert sum(each.rewards.sum() for each in episodes) == good


@pytest.mark.parametrize("noise", [-0.1, math.inf, math.nan])
def test_noise_of_a_script_is_finite(noise: float) -> None:
    with pytest.raises(ValueError, match=rf"noise: got {noise}, expected a finite number of at least 0"):
        avoid_demonstrations(1, 0, noise=noise)


def test_demonstrations_are_courses_of_the_environment() -> None:
    env: Any = gym.make(AVOID).unwrapped
    episodes: list[Any] = avoid_demonstrations(12, 3, success=0.5)
    for episode in episodes:
        env.reset(seed=0)
        env.state[0] = episode.observations[0]  # rounded to float32, as what follows is
        for k, action in enumerate(episode.actions):
            obs, reward, terminated, _, _ = env.step(action)
            np.testing.assert_allclose(obs, episode.observations[k + 1], atol=1e-6)
            assert (reward, terminated) == (episode.rewards[k], episode.terminated[k])
        assert episode.terminated[-1] != episode.truncated[-1]
        assert env.action_space.contains(episode.actions[0]) and env.observation_space.contains(obs)


def test_the_same_seed_gives_the_same_demonstrations() -> None:
    first, again, other = (avoid_demonstrations(6, seed)[0].actions for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first[:10], other[:10])


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"episodes": 0}, "episodes: got 0"),
        ({"success": 1.5}, r"success: got 1.5, expected a number in \[0, 1\]"),
        ({"noise": -1.0}, "noise: got -1.0"),
    ],
)
def test_demonstrations_refuse_what_is_out_of_range(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        avoid_demonstrations(**{"episodes": 6, "seed": 0} | kwargs)
