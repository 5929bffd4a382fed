"""Compiled stepping. Its oracle are the threads of Python, whose oracle are Gymnasium's environments."""

from __future__ import annotations

import copy
import gc
import multiprocessing
import os
import pickle
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import mujoco
import numpy as np
import pytest

from driftrl.envs.mujoco_batch import MujocoVecEnv
from driftrl.envs.mujoco_tasks import TASKS
from driftrl.envs.native.build import find_compiler

STATE = int(mujoco.mjtState.mjSTATE_INTEGRATION)

pytestmark = pytest.mark.skipif(find_compiler() is None or os.name != "posix", reason="needs a C++ compiler")


def made(id: str, n: int = 3, seed: int = 3, **arguments: Any) -> MujocoVecEnv:
    env = MujocoVecEnv(id, n, **{"native": True, **arguments})
    env.seed(seed)
    return env


def drawn(env: MujocoVecEnv, steps: int, rng: np.random.Generator) -> np.ndarray:
    space: Any = env.action_space
    actions: np.ndarray = rng.uniform(space.low, space.high, (steps, env.num_envs, *space.shape)).astype(np.float32)
    return actions


def assert_equal(ours: Any, theirs: Any, where: str) -> None:
    """Equal to the last bit, the signs of zeros included; times of day apart."""
    if isinstance(theirs, dict):
        assert list(ours) == list(theirs), where
        for key in set(theirs) - {"t"}:
            assert_equal(ours[key], theirs[key], f"{where} {key}")
    elif isinstance(theirs, list | tuple):
        assert len(ours) == len(theirs), where
        for i, (mine, yours) in enumerate(zip(ours, theirs, strict=True)):
            assert_equal(mine, yours, f"{where} {i}")
    else:
        assert type(ours) is type(theirs), where
        mine, yours = np.asarray(ours), np.asarray(theirs)
        assert mine.dtype == yours.dtype, where
        assert mine.shape == yours.shape, where
        assert mine.tobytes() == yours.tobytes(), f"{where}: {ours} {theirs}"


def assert_same(envs: Sequence[MujocoVecEnv], script: Callable[[MujocoVecEnv], Any], where: str) -> Any:
    """Do the same with both; returns the first one's result."""
    first, second = (script(env) for env in envs)
    assert_equal(first, second, where)
    return first


def physics(env: MujocoVecEnv) -> np.ndarray:
    """The state of every simulator, [N, S]."""
    model = env.simulators.model
    states = np.empty((env.num_envs, mujoco.mj_stateSize(model, STATE)))
    for row, data in zip(states, env.simulators.datas, strict=True):
        mujoco.mj_getState(model, data, row, STATE)
    return states


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


def threads_of_this_process() -> int:
    return len(os.listdir("/proc/self/task"))


def threads_become(count: int) -> bool:
    """Whether so many are left, soon: the system lists a thread for a moment after it was joined."""
    for _ in range(200):
        if threads_of_this_process() == count:
            return True
        time.sleep(0.05)
    return False


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="counts threads by /proc")
def test_threads_end_with_the_batch() -> None:
    gc.collect()  # batches of other tests
    before = threads_of_this_process()
    env, other = made("Hopper-v5", 8, threads=4), made("Hopper-v5", 8, threads=3)
    assert threads_of_this_process() == before + 5
    env.close()
    env.close()
    assert threads_become(before + 2)
    del other
    gc.collect()
    assert threads_become(before)
    env.reset()  # as DummyVecEnv, whose environments can be used after close
    env.step(np.zeros((8, 3)))
    env.close()
    assert threads_become(before)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("native", [True, False])
def test_a_forked_process_steps_by_threads_of_its_own(native: bool) -> None:
    env = made("Hopper-v5", 6, threads=3, native=native)
    env.reset()
    actions = drawn(env, 60, np.random.default_rng(0))
    for a in actions[:30]:
        env.step(a)
    fork = multiprocessing.get_context("fork")
    ours, theirs = fork.Pipe(duplex=False)

    def child() -> None:
        theirs.send([env.step(a)[0] for a in actions[30:]])
        env.close()

    process = fork.Process(target=child)
    process.start()
    assert ours.poll(60)
    forked = ours.recv()
    process.join(60)
    assert process.exitcode == 0
    assert_equal(forked, [env.step(a)[0] for a in actions[30:]], "in the forked process")


def test_batches_are_not_pickled_or_copied() -> None:
    env = made("Hopper-v5")
    for attempt in (pickle.dumps, copy.deepcopy, copy.copy):
        with pytest.raises(TypeError, match="take the state over"):
            attempt(env)
