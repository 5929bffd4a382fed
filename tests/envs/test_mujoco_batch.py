"""The oracle of every number here is Gymnasium's own environment, in Stable-Baselines3's DummyVecEnv with Monitor."""

import warnings
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.envs.mujoco.mujoco_rendering import MujocoRenderer
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv

from driftrl.envs.mujoco_batch import MujocoVecEnv
from driftrl.envs.mujoco_tasks import TASKS

from .courses import assert_equal, assert_same_course, batched_env, gymnasium_env

HUMANOID_PARTS = {f"include_{part}_in_observation": False for part in ("cinert", "cvel", "qfrc_actuator", "cfrc_ext")}
OTHER_ARGUMENTS: list[tuple[str, dict[str, Any]]] = [
    ("HalfCheetah-v5", {"forward_reward_weight": 0.7, "ctrl_cost_weight": 0.3, "reset_noise_scale": 0.2}),
    ("HalfCheetah-v5", {"exclude_current_positions_from_observation": False, "frame_skip": 1, "max_episode_steps": 37}),
    ("Hopper-v5", {"healthy_reward": 2.5, "healthy_z_range": (0.9, 1.4), "healthy_angle_range": (-0.1, 0.15)}),
    ("Hopper-v5", {"healthy_state_range": (-2.0, 2.0), "exclude_current_positions_from_observation": False}),
    ("Hopper-v5", {"terminate_when_unhealthy": False, "max_episode_steps": 60}),
    ("Walker2d-v5", {"healthy_z_range": (1.0, 1.5), "healthy_angle_range": (-0.4, 0.4), "ctrl_cost_weight": 0.1}),
    ("Walker2d-v5", {"terminate_when_unhealthy": False, "exclude_current_positions_from_observation": False}),
    ("Swimmer-v5", {"ctrl_cost_weight": 0.05, "exclude_current_positions_from_observation": False}),
    ("Ant-v5", {"include_cfrc_ext_in_observation": False, "contact_cost_weight": 0.1, "main_body": "front_left_leg"}),
    ("Ant-v5", {"contact_force_range": (-0.2, 0.5), "healthy_z_range": (0.4, 0.8), "healthy_reward": 0.3}),
    ("Ant-v5", {"exclude_current_positions_from_observation": False, "terminate_when_unhealthy": False}),
    ("Humanoid-v5", HUMANOID_PARTS | {"contact_cost_range": (0.0, 1e-3), "contact_cost_weight": 1e-4}),
    ("Humanoid-v5", {"exclude_current_positions_from_observation": False, "healthy_z_range": (1.3, 1.5)}),
    ("HumanoidStandup-v5", HUMANOID_PARTS | {"uph_cost_weight": 2, "impact_cost_range": (0.0, 0.1)}),
    ("Reacher-v5", {"reward_dist_weight": 2, "reward_control_weight": 0.3}),
    ("Pusher-v5", {"reward_near_weight": 0.1, "reward_dist_weight": 2, "reward_control_weight": 0.3}),
    ("InvertedPendulum-v5", {"reset_noise_scale": 0.1, "max_episode_steps": 20}),
    ("InvertedDoublePendulum-v5", {"healthy_reward": 3.0, "reset_noise_scale": 0.3}),
]


@pytest.mark.parametrize("id", TASKS)
def test_every_task_is_gymnasiums_to_the_last_bit(id: str) -> None:
    # Time limits, terminations and resets included: the shortest limit is 50 steps, the longest 1000.
    assert assert_same_course(id, steps=1_010, n=2) > 0


@pytest.mark.slow
@pytest.mark.parametrize("id", TASKS)
def test_every_task_is_gymnasiums_over_ten_thousand_steps(id: str) -> None:
    assert assert_same_course(id, steps=1_250, n=8) > 0


@pytest.mark.parametrize(("id", "env_kwargs"), OTHER_ARGUMENTS)
def test_arguments_mean_what_they_mean_in_gymnasium(id: str, env_kwargs: dict[str, Any]) -> None:
    assert_same_course(id, steps=120, n=3, **env_kwargs)


def test_actions_in_float64_are_charged_in_float64() -> None:
    assert_same_course("HalfCheetah-v5", steps=20, n=2, dtype=np.float64)


def test_the_number_of_threads_changes_nothing() -> None:
    actions = np.random.default_rng(0).uniform(-1, 1, (50, 5, 6)).astype(np.float32)
    courses = []
    for threads in (1, 2, 5, 8):
        env = MujocoVecEnv("HalfCheetah-v5", 5, threads=threads)
        env.seed(0)
        env.reset()
        courses.append(np.stack([np.asarray(env.step(a)[0]) for a in actions]))
        env.close()
    for course in courses[1:]:
        np.testing.assert_array_equal(course, courses[0])


@pytest.mark.parametrize("id", ["Hopper-v5", "Ant-v5", "Humanoid-v5", "Pusher-v5"])
def test_a_restored_state_goes_on_as_if_nothing_had_happened(id: str) -> None:
    env, other = batched_env(id, 3), MujocoVecEnv(id, 3)
    assert isinstance(env.action_space, gym.spaces.Box)
    low, high = env.action_space.low, env.action_space.high
    actions = np.random.default_rng(0).uniform(low, high, (160, 3, len(low))).astype(np.float32)
    env.reset()
    other.reset()
    for a in actions[:30]:
        env.step(a)
    state = env.get_state()
    rest = [env.step(a) for a in actions[30:]]
    assert any(dones.any() for _, _, dones, _ in rest)  # resets draw the same random numbers
    for target in (other, env):  # into another batch, and back into the same one
        np.testing.assert_array_equal(target.set_state(state), state["observation"])
        again = [target.step(a) for a in actions[30:]]
        for (obs, rewards, dones, infos), (obs2, rewards2, dones2, infos2) in zip(rest, again, strict=True):
            assert_equal(obs2, obs, "observation")
            assert_equal(rewards2, rewards, "reward")
            assert_equal(dones2, dones, "done")
            for i in range(3):
                assert_equal(infos2[i], infos[i], "info")


def test_a_state_of_another_batch_is_refused() -> None:
    env, other = batched_env("Hopper-v5", 2), batched_env("Hopper-v5", 3)
    env.reset()
    with pytest.raises(ValueError, match="physics of shape"):
        other.set_state(env.get_state())


def test_an_unstable_simulation_ends_its_episode_alone(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # MuJoCo writes its warning into the current folder
    env, undisturbed = batched_env("HalfCheetah-v5", 3), batched_env("HalfCheetah-v5", 3)
    actions = np.random.default_rng(0).uniform(-1, 1, (6, 3, 6)).astype(np.float32)
    for batch in (env, undisturbed):
        batch.reset()
        for a in actions[:3]:
            last = np.asarray(batch.step(a)[0])
    env.simulators.datas[1].qvel[2] = np.inf
    obs, rewards, dones, infos = env.step(actions[3])
    expected_obs, expected_rewards, _, expected_infos = undisturbed.step(actions[3])
    assert dones.tolist() == [False, True, False]
    assert infos[1]["simulation_diverged"]
    assert not infos[1]["TimeLimit.truncated"]
    assert infos[1]["episode"]["l"] == 4
    assert rewards[1] == 0
    np.testing.assert_array_equal(infos[1]["terminal_observation"], last[1])
    assert env.diverged.tolist() == [0, 1, 0]
    for i in (0, 2):
        np.testing.assert_array_equal(np.asarray(obs)[i], np.asarray(expected_obs)[i])
        assert rewards[i] == expected_rewards[i]
        assert_equal(infos[i], expected_infos[i], "info")
    _, _, dones, infos = env.step(actions[4])  # the new episode is sound
    assert not dones.any()
    assert env.diverged.tolist() == [0, 1, 0]


def test_attributes_and_methods_reach_each_environment() -> None:
    env, reference = batched_env("Hopper-v5", 3), gymnasium_env("Hopper-v5", 3)
    env.reset()
    reference.reset()
    actions = np.random.default_rng(0).uniform(-1, 1, (5, 3, 3)).astype(np.float32)
    for a in actions:
        env.step(a)
        reference.step(a)
    assert env.get_attr("render_mode") == [None] * 3
    assert_equal(env.env_method("state_vector"), reference.env_method("state_vector"), "states")
    assert [data is env.simulators.datas[i] for i, data in enumerate(env.get_attr("data"))] == [True] * 3

    standing = (np.array([5.0, 1.2, 0, 0, 0, 0]), np.zeros(6))
    for batch in (env, reference):
        batch.env_method("set_state", *standing, indices=[1])
    env.set_attr("_ctrl_cost_weight", 0.7)
    for each in reference.get_attr("unwrapped"):
        each._ctrl_cost_weight = 0.7
    obs, rewards, _, infos = env.step(actions[0])
    expected_obs, expected_rewards, _, expected_infos = reference.step(actions[0])
    assert_equal(obs, expected_obs, "observation")
    assert_equal(rewards, expected_rewards, "reward")
    for i in range(3):
        assert_equal(infos[i], expected_infos[i], "info")
    with pytest.raises(ValueError, match="expected all"):
        env.set_attr("_ctrl_cost_weight", 0.0, indices=[0])
    assert env.env_is_wrapped(Monitor) == [True] * 3
    assert env.env_is_wrapped(gym.wrappers.TimeLimit, indices=1) == [True]
    assert env.env_is_wrapped(gym.wrappers.RecordVideo) == [False] * 3


def test_it_renders_all_environments_or_the_chosen_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def draw(renderer: Any, mode: str) -> np.ndarray:
        """A picture without OpenGL: the bytes of the state of the MjData that the renderer was made for."""
        return np.tile(np.frombuffer(renderer.data.qpos.tobytes(), np.uint8)[:, None], (4, 1, 3))

    monkeypatch.setattr(MujocoRenderer, "render", draw)
    env = batched_env("Hopper-v5", 3, render_mode="rgb_array")
    reference = gymnasium_env("Hopper-v5", 3, render_mode="rgb_array")
    env.reset()
    reference.reset()
    assert_equal(env.get_images(), reference.get_images(), "pictures")
    assert_equal(env.render(), reference.render(), "tiled pictures")
    for i in (2, 0):
        env.render_index = i
        picture = env.render()
        assert picture is not None
        assert picture[0, :, 0].tobytes() == env.simulators.datas[i].qpos.tobytes()
    env.close()
    reference.close()


def test_seeds_apply_once_and_differ_between_environments() -> None:
    env = batched_env("Swimmer-v5", 3)
    first, second = env.reset(), env.reset()
    assert len(np.unique(first[:, 0])) == 3
    assert not np.array_equal(first, second)
    env.seed(3)
    np.testing.assert_array_equal(env.reset(), first)


@pytest.mark.parametrize(
    ("id", "n", "env_kwargs", "message"),
    [
        ("CartPole-v1", 1, {}, "use another backend"),
        ("Hopper-v5", 0, {}, "at least 1"),
        ("Hopper-v5", 1, {"threads": 0}, "at least 1"),
        ("Hopper-v5", 1, {"render_mode": "human"}, "use the backend 'sync'"),
    ],
)
def test_bad_arguments_are_refused(id: str, n: int, env_kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MujocoVecEnv(id, n, **env_kwargs)


def test_actions_of_another_shape_are_refused() -> None:
    env = batched_env("Hopper-v5", 2)
    env.reset()
    with pytest.raises(ValueError, match=r"got shape \(3,\), expected \(2, 3\)"):
        env.step(np.zeros(3))


def test_gymnasiums_environments_are_the_fallback() -> None:
    from driftrl.envs import make_vec

    assert isinstance(make_vec("Hopper-v5", 2, 0), MujocoVecEnv)
    assert isinstance(make_vec("Hopper-v5", 2, 0, backend="sync"), DummyVecEnv)
    assert isinstance(make_vec("Pendulum-v1", 2, 0), DummyVecEnv)
    with pytest.raises(ValueError, match="use another backend"):
        make_vec("Pendulum-v1", 2, 0, backend="batched")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        env = make_vec("Hopper-v5", 2, 7, exclude_current_positions_from_observation=False)
    assert env.observation_space.shape == (12,)
    first = np.asarray(env.reset())
    np.testing.assert_array_equal(
        first, np.asarray(make_vec("Hopper-v5", 2, 7, "sync", exclude_current_positions_from_observation=False).reset())
    )
