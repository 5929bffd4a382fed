"""The oracle of every number here is Gymnasium-Robotics' own environment, in Stable-Baselines3's DummyVecEnv."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

pytest.importorskip("gymnasium_robotics", reason="needs the extra maze")

from gymnasium.envs.mujoco.mujoco_rendering import MujocoRenderer
from stable_baselines3.common.vec_env import DummyVecEnv

from driftrl import PolicyFlow
from driftrl.envs import make_vec
from driftrl.envs.fetch_batch import FetchVecEnv
from driftrl.envs.fetch_demonstrations import FETCH
from driftrl.envs.known import FETCH_TASKS, bare_task_of_id

from .courses import assert_equal, assert_same_course, batched_env, gymnasium_env


def scripted(id: str) -> Callable[[Any], np.ndarray]:
    """Actions that solve the task, with noise beyond their bounds: there are contacts."""
    rng = np.random.default_rng(0)

    def act(obs: dict[str, np.ndarray]) -> np.ndarray:
        rows = [{name: values[i] for name, values in obs.items()} for i in range(len(obs["desired_goal"]))]
        actions = np.stack([FETCH[id](row, row["desired_goal"]) for row in rows])
        return actions + rng.standard_normal(actions.shape) * 0.3

    return act


def test_every_fetch_task_of_gymnasium_robotics_is_known() -> None:
    for task in FETCH_TASKS:
        assert bare_task_of_id(task) == task
        assert isinstance(batched_env(task, 1), FetchVecEnv)


@pytest.mark.parametrize("id", FETCH_TASKS)
def test_random_actions(id: str) -> None:
    assert assert_same_course(id, steps=102, n=2) == 4


@pytest.mark.parametrize("id", FETCH)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_actions_that_touch_things(id: str, dtype: type) -> None:
    assert assert_same_course(id, steps=110, n=3, dtype=dtype, act=scripted(id)) == 6


def test_arguments_mean_what_they_mean_there() -> None:
    assert_same_course("FetchPushDense-v4", steps=52, n=2)
    assert_same_course("FetchReach-v4", steps=20, n=2, max_episode_steps=7, reward_type="dense")


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("threads", [1, 2])
def test_threads_change_nothing(native: bool, threads: int) -> None:
    ours, theirs = FetchVecEnv("FetchPush-v4", 3, threads, native), gymnasium_env("FetchPush-v4", 3)
    ours.seed(3)
    assert_equal(ours.reset(), theirs.reset(), "first observation")
    for actions in np.random.default_rng(0).uniform(-1, 1, (30, 3, 4)).astype(np.float32):
        assert_equal(ours.step(actions)[0], theirs.step(actions)[0], "observation")


@pytest.mark.parametrize("id", FETCH)
def test_a_restored_state_goes_on_as_if_nothing_had_happened(id: str) -> None:
    env, other, act = batched_env(id, 3), FetchVecEnv(id, 3), scripted(id)
    obs = env.reset()
    other.reset()
    for _ in range(20):
        obs = env.step(act(obs))[0]
    state, actions, rest = env.get_state(), [], []
    for _ in range(60):  # beyond the end of the episode: resets draw the same random numbers
        actions.append(act(obs))
        rest.append(env.step(actions[-1]))
        obs = rest[-1][0]
    for target in (other, env):
        restored = target.set_state(state)
        assert_equal(np.concatenate([*restored.values()], axis=1), state["observation"], "restored")
        for action, (obs, rewards, dones, infos) in zip(actions, rest, strict=True):
            obs2, rewards2, dones2, infos2 = target.step(action)
            for again, first in ((obs2, obs), (rewards2, rewards), (dones2, dones)):
                assert_equal(again, first, "course")
            for again, first in zip(infos2, infos, strict=True):
                assert_equal(again, first, "info")


def test_an_unstable_simulation_ends_its_episode_alone(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # MuJoCo writes its warning into the current folder
    env = batched_env("FetchPush-v4", 2)
    env.reset()
    last = env.step(np.zeros((2, 4)))[0]
    env.simulators.datas[1].qvel[2] = np.inf
    obs, rewards, dones, infos = env.step(np.zeros((2, 4)))
    assert dones.tolist() == [False, True]
    assert infos[1]["simulation_diverged"] and "simulation_diverged" not in infos[0]
    assert rewards[1] == 0
    for name, values in infos[1]["terminal_observation"].items():
        assert_equal(values, last[name][1], name)
    assert np.isfinite(obs["observation"]).all()


def test_each_environment_has_a_goal_of_its_own() -> None:
    env, reference = batched_env("FetchPush-v4", 3), gymnasium_env("FetchPush-v4", 3)
    for each in (env, reference):
        each.reset()
        each.step(np.zeros((3, 4)))
        for base in each.get_attr("unwrapped", [1]):
            base.goal = np.array([1.3, 0.7, 0.42])
    assert_equal(env.step(np.ones((3, 4)))[0], reference.step(np.ones((3, 4)))[0], "observation")
    env.set_attr("goal", np.array([1.2, 0.8, 0.42]), [2])
    assert env.step(np.ones((3, 4)))[0]["desired_goal"][1:].tolist() == [[1.3, 0.7, 0.42], [1.2, 0.8, 0.42]]
    with pytest.raises(ValueError, match="a batch shares"):
        env.get_attr("unwrapped", [0])[0].distance_threshold = 1.0
    rewards = env.env_method("compute_reward", np.zeros((4, 3)), np.eye(4, 3) * 0.06, {}, indices=[0])[0]
    assert rewards.tolist() == [-1, -1, -1, 0]  # as hindsight relabelling asks


def test_pictures_show_each_environments_own_goal(monkeypatch: pytest.MonkeyPatch) -> None:
    def draw(renderer: Any, mode: str) -> np.ndarray:
        """A picture without OpenGL: the bytes of where sites are."""
        return np.tile(np.frombuffer(renderer.data.site_xpos.tobytes(), np.uint8)[:, None], (4, 1, 3))

    monkeypatch.setattr(MujocoRenderer, "render", draw)
    ours, theirs = (make("FetchPush-v4", 3, render_mode="rgb_array") for make in (batched_env, gymnasium_env))
    for env in (ours, theirs):
        env.reset()
        env.step(np.ones((3, 4)))
    assert_equal(ours.get_images(), theirs.get_images(), "pictures")
    assert_equal(ours.get_images(), theirs.get_images(), "pictures again")


def test_an_agent_trains_on_the_batch_as_on_single_environments() -> None:
    ours, theirs = (
        PolicyFlow("MultiInputPolicy", env, seed=0, n_steps=16, batch_size=16).learn(64).policy.state_dict()
        for env in (make_vec("FetchPush-v4", 2, 0), make_vec("FetchPush-v4", 2, 0, "sync"))
    )
    assert all((ours[name] == theirs[name]).all() for name in theirs)
    assert isinstance(make_vec("FetchPush-v4", 1, 0, "sync"), DummyVecEnv)
