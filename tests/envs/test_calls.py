"""What is called on environments of a batch, one or all, does what it does in Stable-Baselines3's DummyVecEnv."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.envs.mujoco.mujoco_rendering import MujocoRenderer
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv

from driftrl.envs import make_vec
from driftrl.envs.batch import BatchVecEnv

MULTI, SOFT = "driftrl/MultiGoal-v0", "driftrl/SoftMultiGoal-v0"
COUNTS = ("_elapsed_steps", "_has_reset", "rewards", "total_steps", "episode_returns", "episode_lengths", "needs_reset")
METHODS = ("get_total_steps", "get_episode_rewards", "get_episode_lengths")


@pytest.fixture(autouse=True)
def pictures_without_opengl(monkeypatch: pytest.MonkeyPatch) -> None:
    """A picture is the state of the MjData that the renderer was made for, byte by byte."""

    def draw(self: Any, mode: str) -> np.ndarray:
        return np.tile(np.frombuffer(self.data.qpos.tobytes(), np.uint8)[:, None], (4, 1, 3))

    monkeypatch.setattr(MujocoRenderer, "render", draw)


def both(id: str, backend: Any = "batched", n: int = 3, **env_kwargs: Any) -> tuple[VecEnv, VecEnv]:
    ours, theirs = (make_vec(id, n, 3, each, **env_kwargs) for each in (backend, "sync"))
    assert isinstance(theirs, DummyVecEnv)
    return ours, theirs


def played(env: VecEnv, script: Callable[[VecEnv], Any]) -> Any:
    """What a script returns, or the kind of error it raises."""
    try:
        return script(env)
    except (AttributeError, RuntimeError, AssertionError, gym.error.Error) as error:
        return type(error)


def assert_same(ours: Any, theirs: Any, where: str) -> None:
    """Equal to the last bit; times of day apart."""
    if isinstance(theirs, dict):
        assert set(ours) == set(theirs), where
        for key in set(theirs) - {"t"}:
            assert_same(ours[key], theirs[key], f"{where} {key}")
    elif isinstance(theirs, list | tuple):
        assert len(ours) == len(theirs), where
        for i, (mine, yours) in enumerate(zip(ours, theirs, strict=True)):
            assert_same(mine, yours, f"{where} {i}")
    else:
        np.testing.assert_array_equal(
            np.asarray(ours, np.asarray(theirs).dtype), theirs, err_msg=where
        )  # workers: float64


def steps(count: int, seed: int = 0) -> Callable[[VecEnv], Any]:
    """Random actions of full strength."""

    def run(env: VecEnv) -> Any:
        rng = np.random.default_rng(seed)
        space: Any = env.action_space
        shape = (count, env.num_envs, *space.shape)
        return [env.step(a) for a in rng.uniform(space.low, space.high, shape).astype(np.float32)]

    return run


def call(name: str, *arguments: Any, **keywords: Any) -> Callable[[VecEnv], Any]:
    return lambda env: getattr(env, name)(*arguments, **keywords)


def state_of_all(env: VecEnv) -> Any:
    """All that can be compared of every environment."""
    attributes = [env.get_attr(name) for name in COUNTS]
    generators = [rng.bit_generator.state["state"] for rng in env.get_attr("np_random")]
    return attributes, [env.env_method(name) for name in METHODS], generators, env.get_attr("np_random_seed")


def script(action: Any) -> list[Callable[[VecEnv], Any]]:
    """Calls as users make them."""
    return [
        call("get_attr", "_elapsed_steps"),
        call("env_method", "render"),
        call("step", np.stack([action] * 3)),
        call("reset"), state_of_all, steps(12), state_of_all,
        call("env_method", "reset", seed=5, indices=[1]), state_of_all, call("env_method", "render"), steps(15),
        call("env_method", "step", action, indices=[2]), state_of_all, steps(20), state_of_all,
        call("env_method", "reset", indices=2), steps(3), call("env_method", "reset", options={}), steps(5),
        call("env_method", "set_wrapper_attr", "_elapsed_steps", 17, indices=[0]), steps(4), state_of_all,
        lambda env: env.get_attr("env")[1].get_wrapper_attr("_elapsed_steps"),
        call("env_is_wrapped", Monitor), call("env_is_wrapped", gym.wrappers.TimeLimit, indices=1),
        call("env_is_wrapped", gym.wrappers.RecordVideo), call("has_attr", "_elapsed_steps"), call("has_attr", "none"),
        call("get_attr", "spec"), call("get_attr", "render_mode"), call("get_attr", "no_such"),
        call("seed", 11), call("reset"), state_of_all, call("set_options", {}), call("reset"), steps(7),
        call("set_attr", "my_own", 4, indices=[1]), call("get_attr", "my_own", indices=[1]),
        lambda env: setattr(env.get_attr("unwrapped")[2], "np_random", np.random.default_rng(9)),
        call("env_method", "reset"), state_of_all, steps(30),
        lambda env: [each.render() for each in env.get_attr("unwrapped")], call("get_images"), call("render"),
        lambda env: env.get_attr("unwrapped")[1].reset(seed=8)[0], steps(25), state_of_all,
        lambda env: env.get_attr("action_space")[1].seed(4),
        lambda env: [space.sample() for space in env.get_attr("action_space")[1:2]],
    ]  # fmt: skip


@pytest.mark.parametrize("id", ["Hopper-v5", "Humanoid-v5", "Reacher-v5", "Pusher-v5", "Ant-v5", MULTI, SOFT])
def test_the_same_calls_have_the_same_results(id: str) -> None:
    ours, theirs = both(id, max_episode_steps=20, render_mode="rgb_array")
    assert isinstance(theirs.action_space, gym.spaces.Box)
    for number, part in enumerate(script(0.5 * theirs.action_space.high)):
        assert_same(played(ours, part), played(theirs, part), f"{id}, call {number}")
    ours.close()
    theirs.close()


def test_the_same_calls_have_the_same_results_in_workers() -> None:
    ours, theirs = both(SOFT, "subproc", max_episode_steps=20, render_mode="rgb_array")
    action = np.ones(2, np.float32)
    parts = [
        call("reset"), state_of_all, steps(12), call("env_method", "reset", seed=5, indices=[1]), state_of_all,
        steps(15), call("env_method", "render"), call("get_images"), call("render"), state_of_all,
        call("env_method", "step", action, indices=[2]), steps(20), state_of_all, call("env_is_wrapped", Monitor),
        call("seed", 11), call("reset"), state_of_all, call("set_attr", "my_own", 4, indices=[1]),
        call("get_attr", "my_own", indices=[1]),
    ]  # fmt: skip
    try:
        for number, part in enumerate(parts):
            assert_same(played(ours, part), played(theirs, part), f"call {number}")
    finally:
        ours.close()


def test_what_a_reset_draws_belongs_to_its_environment() -> None:
    for id, names in {"Reacher-v5": ["goal"], "Pusher-v5": ["cylinder_pos", "goal_pos"]}.items():
        ours, theirs = both(id)
        for part in (call("reset"), *(call("get_attr", name) for name in names)):
            assert_same(played(ours, part), played(theirs, part), id)


@pytest.mark.parametrize("id", ["Hopper-v5", "Ant-v5", "Humanoid-v5", "HumanoidStandup-v5"])
def test_what_is_written_into_metadata_is_written_for_one(id: str) -> None:
    ours, theirs = both(id, terminate_when_unhealthy=False) if id != "HumanoidStandup-v5" else both(id)
    for env in (ours, theirs):
        env.reset()
        env.get_attr("unwrapped")[1].metadata["mine"] = 1
    assert [["mine" in each for each in env.get_attr("metadata")] for env in (ours, theirs)] == 2 * [
        [False, True, False]
    ]


@pytest.mark.parametrize("id", ["Hopper-v5", "Ant-v5", "Humanoid-v5", "HumanoidStandup-v5"])
def test_simulators_and_models_that_are_handed_out_are_those_of_one_environment(id: str) -> None:
    ours, theirs = both(id, terminate_when_unhealthy=False) if id != "HumanoidStandup-v5" else both(id)

    def heavier(env: VecEnv) -> None:
        env.get_attr("model")[1].body_mass[1] *= 1.5

    def faster(env: VecEnv) -> None:
        env.get_attr("unwrapped")[2].model.opt.timestep *= 0.5

    def shifted(env: VecEnv) -> None:
        env.get_attr("data")[0].qpos[0] += 0.25

    def dt(env: VecEnv) -> Any:
        return env.get_attr("dt")

    for number, part in enumerate(
        (call("reset"), steps(3), heavier, steps(3), faster, dt, steps(3), shifted, steps(3))
    ):
        assert_same(played(ours, part), played(theirs, part), f"{id}, call {number}")


def test_what_a_batch_shares_is_not_set_for_one() -> None:
    env = make_vec("Hopper-v5", 3, 0, backend="batched")
    env.reset()
    with pytest.raises(ValueError, match="expected all: a batch shares _ctrl_cost_weight; use the backend 'sync'"):
        env.set_attr("_ctrl_cost_weight", 0.0, indices=[0])
    with pytest.raises(ValueError, match="_ctrl_cost_weight: got a value for one environment"):
        env.get_attr("unwrapped")[0]._ctrl_cost_weight = 0.0
    with pytest.raises(ValueError, match="_ctrl_cost_weight: got a value for one environment"):
        env.env_method("set_wrapper_attr", "_ctrl_cost_weight", 0.0, indices=[0])
    with pytest.raises(ValueError, match="got data, which the batch steps itself"):
        env.set_attr("data", None)
    env.set_attr("_ctrl_cost_weight", 0.7)
    assert env.get_attr("_ctrl_cost_weight") == [0.7] * 3


def test_pictures_without_a_render_mode_are_warned_of() -> None:
    env = make_vec(MULTI, 2, 0)
    assert isinstance(env, BatchVecEnv)
    with pytest.warns(UserWarning, match="render_mode: got None"):
        assert env.get_images() == [None, None]


def test_an_id_that_adds_wrappers_is_not_batched() -> None:
    limit = gym.wrappers.TimeLimit.wrapper_spec(max_episode_steps=4)
    entry = "gymnasium.envs.mujoco.hopper_v5:HopperEnv"
    gym.register("test/Short-v0", entry, max_episode_steps=1000, additional_wrappers=(limit,))
    try:
        env = make_vec("test/Short-v0", 1, 0)
        assert isinstance(env, DummyVecEnv)
        env.reset()
        assert [bool(env.step(np.zeros((1, 3)))[2][0]) for _ in range(4)] == [False, False, False, True]
    finally:
        del gym.registry["test/Short-v0"]
