"""Episodes that begin by a state that is set. The oracle are Gymnasium's resets, by which Python's batches begin."""

from __future__ import annotations

from functools import partial
from typing import Any

import mujoco
import numpy as np
import pytest

from driftrl.envs.mujoco_batch import MujocoVecEnv
from driftrl.envs.mujoco_tasks import TASKS

from .pairs import assert_equal, assert_same, drawn, made, needs_compiler, pair, physics

pytestmark = needs_compiler
UNIFORM = [id for id, task in TASKS.items() if task.uniform_start]
SEEN = ("time", "qpos", "qvel", "act", "xpos", "cvel", "qacc", "qacc_warmstart", "qfrc_constraint", "ncon", "energy")


def step_both(envs: list[MujocoVecEnv], rng: np.random.Generator) -> int:
    """Compare a step and all that determines the next ones; returns the number of episodes that ended."""
    (actions,) = drawn(envs[0], 1, rng)
    ends = assert_same(envs, partial(MujocoVecEnv.step, actions=actions), "step")[2].sum()
    assert_same(envs, lambda env: env.reset_infos, "reset infos")
    assert_same(envs, physics, "state")
    return int(ends)


def sets_states(env: MujocoVecEnv) -> bool:
    """Whether the last episode to begin did so by a state that was set."""
    return bool(env._unready)


@pytest.mark.parametrize("id", UNIFORM)
def test_thousands_of_episodes_begin_as_by_gymnasium(id: str) -> None:
    rng, resets = np.random.default_rng(1), 0
    envs = pair(id, 64, max_episode_steps=2)
    for _ in range(60):
        ends = step_both(envs, rng)
        assert sets_states(envs[0]) == bool(ends)
        resets += ends
    assert resets >= 1_900


@pytest.mark.parametrize(
    "arguments", [{"reset_noise_scale": 0.3}, {"exclude_current_positions_from_observation": False}]
)
def test_episodes_begin_by_the_arguments(arguments: dict[str, Any]) -> None:
    rng = np.random.default_rng(1)
    envs = pair("Walker2d-v5", 4, max_episode_steps=5, **arguments)
    for step in range(40):
        if step == 20:
            for env in envs:
                env.set_attr("_reset_noise_scale", 0.01)
        ends = step_both(envs, rng)
        assert sets_states(envs[0]) == bool(ends)


@pytest.mark.parametrize("id", UNIFORM)
def test_who_looks_sees_what_follows_from_the_state(id: str) -> None:
    def bodies(env: MujocoVecEnv) -> list[Any]:
        return env.env_method("get_body_com", 1)

    def data(env: MujocoVecEnv) -> list[Any]:
        return env.get_attr("data")

    for asked in (bodies, data):
        rng = np.random.default_rng(1)
        envs = pair(id, 4, max_episode_steps=3)
        for _ in range(3):
            step_both(envs, rng)
        assert len(envs[0]._unready) == 4
        found = [asked(env) for env in envs]
        for _ in range(4):  # what was handed out stays right
            for mine, yours in zip(*found, strict=True):
                if isinstance(yours, mujoco.MjData):
                    for name in SEEN:
                        assert_equal(getattr(mine, name), getattr(yours, name), name)
                else:
                    assert_equal(mine, yours, "position")
            step_both(envs, rng)
            assert not sets_states(envs[0])


def test_pictures_show_what_follows_from_the_state(monkeypatch: pytest.MonkeyPatch) -> None:
    def draw(renderer: Any, mode: str) -> np.ndarray:
        """A picture without OpenGL: where the bodies are."""
        return np.tile(np.frombuffer(renderer.data.xpos.tobytes(), np.uint8)[:, None], (4, 1, 3))

    monkeypatch.setattr("gymnasium.envs.mujoco.mujoco_rendering.MujocoRenderer.render", draw)
    rng = np.random.default_rng(1)
    envs = pair("Hopper-v5", 3, max_episode_steps=2, render_mode="rgb_array")
    for _ in range(6):
        step_both(envs, rng)
        assert_same(envs, lambda env: env.get_images(), "pictures")


def test_what_training_asks_leaves_episodes_to_begin_by_states() -> None:
    (env, _), rng = pair("InvertedPendulum-v5", 4), np.random.default_rng(0)
    env.get_attr("render_mode")
    env.get_attr("spec")
    env.has_attr("_healthy_reward")
    env.set_options({})
    state = env.get_state()
    env.set_state(state)
    env.seed(1)
    env.reset()
    while not env.step(drawn(env, 1, rng)[0])[2].any():
        pass
    assert sets_states(env)


def test_a_reset_of_the_users_own_is_called() -> None:
    rng, starts = np.random.default_rng(0), [0, 0]
    envs = pair("InvertedPendulum-v5", 3, max_episode_steps=4)
    for which, env in enumerate(envs):

        def begin(theirs: Any = env._envs[1], which: int = which) -> Any:
            starts[which] += 1
            theirs.set_state(np.full(2, 0.01), np.zeros(2))
            return theirs._get_obs()

        env.set_attr("reset_model", begin, indices=[1])
    for _ in range(20):
        step_both(envs, rng)
    assert starts[0] == starts[1] > 3


def test_episodes_begin_while_python_code_is_hooked_into_mujoco() -> None:
    rng = np.random.default_rng(0)
    envs = pair("InvertedPendulum-v5", 5, threads=1)
    step_both(envs, rng)

    def control(model: Any, data: Any) -> None:
        data.ctrl[:] = 3

    try:
        mujoco.set_mjcb_control(control)
        kept = envs[0].step(np.zeros((5, 1)))[0]
        copy = np.array(kept)
        envs[1].step(np.zeros((5, 1)))
        assert sum(step_both(envs, rng) for _ in range(20)) > 10
        assert_equal(kept, copy, "what was returned before")
    finally:
        mujoco.set_mjcb_control(None)
    assert sum(step_both(envs, rng) for _ in range(20)) > 5


def test_warnings_are_reset_by_mujoco() -> None:
    rng = np.random.default_rng(0)
    envs = pair("Hopper-v5", 2, max_episode_steps=3)
    for env in envs:
        env.simulators.datas[1].warning.number[int(mujoco.mjtWarning.mjWARN_CONTACTFULL)] = 1
    for _ in range(3):
        step_both(envs, rng)
    for env in envs:
        assert not env.simulators.datas[1].warning.number.any()
    assert not sets_states(envs[0])
    for _ in range(3):
        step_both(envs, rng)
    assert sets_states(envs[0])


def test_the_clock_of_mujoco_runs_for_those_who_can_read_it() -> None:
    env, actions = made("Hopper-v5"), np.zeros((3, 3), np.float32)
    env.reset()
    data = env.simulators.datas[0]

    def timed(work: Any) -> bool:
        before = data.timer.duration.sum()
        work()
        return bool(data.timer.duration.sum() > before)

    assert mujoco.get_mjcb_time() is None
    assert not timed(lambda: env.step(actions))
    assert timed(lambda: mujoco.mj_step(env.simulators.model, data))
    assert env.get_attr("data")[0] is data
    assert timed(lambda: env.step(actions))
    try:  # a clock of the user's own
        mujoco.set_mjcb_time(lambda: 1.0)
        assert not timed(lambda: env.step(actions))
        assert mujoco.get_mjcb_time() is not None
    finally:
        mujoco.set_mjcb_time(None)
    assert mujoco.get_mjcb_time() is None
    made("Hopper-v5").reset()  # MuJoCo's bindings set theirs again
    assert timed(lambda: env.step(actions))
    assert timed(lambda: mujoco.mj_step(env.simulators.model, data))


def test_infos_can_be_those_of_ended_episodes_alone() -> None:
    rng = np.random.default_rng(0)
    for native in (True, False):
        envs = [made("Humanoid-v5", 3, native=native, max_episode_steps=7) for _ in range(2)]
        envs[1].all_infos = False
        for env in envs:
            env.reset()
        for actions in drawn(envs[0], 30, rng):
            (*ours, infos), (*theirs, some) = (env.step(actions) for env in envs)
            assert_equal(ours, theirs, "step")
            for done, info, other in zip(ours[2], infos, some, strict=True):
                assert_equal(other, info if done else {}, "info")
