"""Compiled stepping. Its oracle are the threads of Python, whose oracle are Gymnasium's environments."""

from __future__ import annotations

import copy
import pickle
from functools import partial
from pathlib import Path
from typing import Any

import mujoco
import numpy as np
import pytest

from driftrl.envs.mujoco_batch import MujocoVecEnv
from driftrl.envs.mujoco_tasks import TASKS
from driftrl.envs.python_threads import PythonThreads

from .pairs import assert_equal, assert_same, drawn, made, needs_compiler, physics

pytestmark = needs_compiler


def disturbed(env: MujocoVecEnv, what: int, i: int, seed: int) -> Any:
    """One of the things that users do between steps."""
    if what == 0:
        return env.env_method("reset", seed=seed, indices=[i])
    if what == 1:
        return env.set_state(env.get_state())
    if what == 2:
        env.seed(seed)
        return env.reset()
    if what == 3:
        return [data.xpos.copy() for data in env.get_attr("data", indices=[i])]
    if what == 4:
        env.get_attr("model", indices=[i])[0].body_mass[1] *= 1.01
        return env.get_attr("dt")
    return env.env_method("state_vector", indices=[i])


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("id", TASKS)
def test_every_task_is_that_of_pythons_threads(id: str, threads: int) -> None:
    # Ends by the time limit and by falling, disturbances at random, and the episodes after them.
    rng = np.random.default_rng(threads)
    limit = int(rng.integers(5, 25))
    envs = [made(id, 4, threads=threads, native=native, max_episode_steps=limit) for native in (True, False)]
    assert [env.native for env in envs] == [True, False]
    assert_same(envs, lambda env: env.reset(), "first observation")
    ends = 0
    for step, actions in enumerate(drawn(envs[0], 150, rng)):
        where = f"{id}, step {step}"
        if step % 10 == 9:  # what changes the models comes last: all later steps are then of another kind
            what, i, seed = int(rng.integers(0, 6 if step > 100 else 3)), int(rng.integers(4)), int(rng.integers(99))
            assert_same(envs, partial(disturbed, what=what, i=i, seed=seed), f"{where}, disturbance {what}")
        ends += int(assert_same(envs, partial(MujocoVecEnv.step, actions=actions), where)[2].sum())
        assert_same(envs, physics, f"{where}, state")
        assert_same(envs, lambda env: env.reset_infos, f"{where}, reset infos")
    assert ends > 8
    for env in envs:
        env.close()


@pytest.mark.parametrize("id", TASKS)
def test_it_is_the_compiled_code_that_steps(id: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any) -> None:
        raise AssertionError("threads of Python step")

    monkeypatch.setattr(PythonThreads, "run", refuse)
    env = made(id)
    env.reset()
    for a in drawn(env, 3, np.random.default_rng(0)):
        env.step(a)


def test_an_argument_that_is_set_later_counts_at_once() -> None:
    envs = [made("Ant-v5", native=native) for native in (True, False)]
    for env in envs:
        env.reset()
    actions = drawn(envs[0], 20, np.random.default_rng(0))
    for bounds in ((-1.0, 1.0), (-0.2, 0.1), (np.float64(0.0), 0.5), (-np.ones(6), np.ones(6))):
        for env in envs:
            env.set_attr("_contact_force_range", bounds)
        for a in actions:
            assert_same(envs, partial(MujocoVecEnv.step, actions=a), str(bounds))


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.int64])
def test_actions_are_taken_in_any_type_and_order(dtype: type) -> None:
    envs = [made("HalfCheetah-v5", native=native) for native in (True, False)]
    for env in envs:
        env.reset()
    for a in np.random.default_rng(0).uniform(-1.5, 1.5, (10, 6, 3)).astype(dtype):
        assert_same(envs, partial(MujocoVecEnv.step, actions=a.T), "step")


def test_observations_and_infos_are_not_overwritten_by_later_steps() -> None:
    env = made("Humanoid-v5")
    kept: list[Any] = [env.reset()]
    actions = drawn(env, 10, np.random.default_rng(0))
    for a in actions:
        kept.append(env.step(a))
    again = made("Humanoid-v5")
    assert_equal(kept[0], again.reset(), "first observation")
    for before, a in zip(kept[1:], actions, strict=True):
        assert_equal(before, again.step(a), "step")


def test_an_error_of_mujoco_is_raised_and_the_process_goes_on() -> None:
    for native in (True, False):
        env = made("Hopper-v5", 3, threads=2, native=native)
        env.reset()
        model = env.get_attr("model")[1]
        integrator, model.opt.integrator = model.opt.integrator, 99
        with pytest.raises(mujoco.FatalError, match="integrator"):
            env.step(np.zeros((3, 3)))
        model.opt.integrator = integrator
        env.reset()
        assert np.isfinite(env.step(np.zeros((3, 3)))[1]).all()
        env.close()


def test_callbacks_of_python_run_as_without_compiled_code() -> None:
    envs = [made("Swimmer-v5", threads=1, native=native) for native in (True, False)]
    for env in envs:
        env.reset()

    def control(model: Any, data: Any) -> None:
        data.ctrl[:] = 0.5

    def fail(model: Any, data: Any) -> None:
        raise ZeroDivisionError

    zeros = np.zeros((3, 2))
    try:
        mujoco.set_mjcb_control(control)
        assert_same(envs, lambda env: env.step(zeros), "step with a callback")
        assert (envs[0].simulators.datas[0].ctrl == 0.5).all()
        mujoco.set_mjcb_control(fail)
        for env in envs:
            with pytest.raises(ZeroDivisionError):
                env.step(zeros)
    finally:
        mujoco.set_mjcb_control(None)


def test_a_bad_state_is_warned_of_as_by_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logs = []
    for native in (True, False):
        folder = tmp_path / str(native)
        folder.mkdir()
        monkeypatch.chdir(folder)
        env = made("HalfCheetah-v5", threads=2, native=native)
        env.reset()
        for i in (0, 2):
            env.simulators.datas[i].qpos[1] = np.nan
        _, _, dones, infos = env.step(np.zeros((3, 6)))
        assert dones.tolist() == [True, False, True]
        assert [info.get("simulation_diverged", False) for info in infos] == [True, False, True]
        assert not env.step(np.zeros((3, 6)))[2].any()
        lines = (folder / "MUJOCO_LOG.TXT").read_text().splitlines() if list(folder.iterdir()) else []
        logs.append(sorted(line for line in lines if line.startswith("WARNING")))
    assert logs[0] == logs[1]


def test_batches_are_not_pickled_or_copied() -> None:
    env = made("Hopper-v5")
    for attempt in (pickle.dumps, copy.deepcopy, copy.copy):
        for what in (env, env.simulators, env.simulators.compiled):
            with pytest.raises(TypeError, match="take the state") as caught:
                attempt(what)
            assert "\n" not in str(caught.value)
