"""The threads of compiled stepping: how they end, and what goes on beside them."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from driftrl.envs.mujoco_batch import MujocoVecEnv
from driftrl.envs.python_threads import PythonThreads

from .pairs import assert_equal, assert_same, drawn, made, needs_compiler, pair

pytestmark = needs_compiler


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


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="counts threads by /proc")
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
        before = threads_of_this_process()
        theirs.send([env.step(a)[0] for a in actions[30:]])
        assert threads_of_this_process() == before + 2
        env.close()

    process = fork.Process(target=child)
    process.start()
    assert ours.poll(60)
    forked = ours.recv()
    process.join(60)
    assert process.exitcode == 0
    assert_equal(forked, [env.step(a)[0] for a in actions[30:]], "in the forked process")


@pytest.mark.parametrize("threads", [1, 3])
def test_episodes_end_and_begin_after_close(threads: int) -> None:
    envs = pair("InvertedPendulum-v5", 8, threads=threads)
    ends = 0
    for round, actions in enumerate(drawn(envs[0], 60, np.random.default_rng(0))):
        ends += int(assert_same(envs, partial(MujocoVecEnv.step, actions=actions), f"step {round}")[2].sum())
        if round % 10 == 9:
            for env in envs:
                env.close()
    assert ends > 30


def test_more_threads_than_simulators_to_take_lose_nothing() -> None:
    envs = pair("InvertedPendulum-v5", 5, threads=5)  # many come late from the step before
    for step, actions in enumerate(drawn(envs[0], 500, np.random.default_rng(0))):
        assert_same(envs, partial(MujocoVecEnv.step, actions=actions), f"step {step}")


def test_batches_in_several_threads_of_python_do_not_disturb_each_other() -> None:
    def course(env: MujocoVecEnv, actions: np.ndarray) -> list[Any]:
        return [env.step(a)[0] for a in actions]

    actions = drawn(made("InvertedPendulum-v5", 6), 400, np.random.default_rng(0))
    alone = made("InvertedPendulum-v5", 6, native=False)
    alone.reset()
    expected = course(alone, actions)
    found: list[list[Any]] = []

    def work(native: bool) -> None:
        for _ in range(3):
            env = made("InvertedPendulum-v5", 6, threads=2, native=native)
            env.reset()
            found.append(course(env, actions))
            env.close()

    workers = [threading.Thread(target=work, args=(native,)) for native in (True, True, False)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(found) == 9
    for each in found:
        assert_equal(each, expected, "observations")


def test_a_batch_that_is_closed_while_it_steps_goes_on() -> None:
    envs = pair("InvertedPendulum-v5", 8, threads=3)
    stop = threading.Event()

    def close() -> None:
        while not stop.wait(1e-4):  # a closer that never waits would hold Python's lock most of the time
            envs[0].simulators.close()

    closer = threading.Thread(target=close)
    closer.start()
    try:
        for step, actions in enumerate(drawn(envs[0], 300, np.random.default_rng(0))):
            assert_same(envs, partial(MujocoVecEnv.step, actions=actions), f"step {step}")
    finally:
        stop.set()
        closer.join()


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no timers")
def test_an_interrupt_leaves_a_batch_that_can_be_reset() -> None:
    envs = pair("Hopper-v5", 8, threads=2)

    class TimeIsUpError(Exception):
        pass

    def interrupt(*arguments: Any) -> None:
        envs[0].simulators.close()  # a handler may do that, whatever it interrupts
        raise TimeIsUpError

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        for delay in np.random.default_rng(0).uniform(0.0005, 0.004, 40):
            with pytest.raises(TimeIsUpError):
                signal.setitimer(signal.ITIMER_REAL, delay)
                while True:
                    envs[0].step(np.zeros((8, 3), np.float32))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    for env in envs:
        env.seed(1)
    assert_same(envs, lambda env: env.reset(), "reset")
    for actions in drawn(envs[0], 30, np.random.default_rng(0)):
        assert_same(envs, partial(MujocoVecEnv.step, actions=actions), "step")


def test_threads_of_python_have_all_ended_when_an_error_is_raised() -> None:
    ended: list[slice] = []

    def work(chunk: slice) -> None:
        if chunk.start == 0:
            raise ZeroDivisionError
        time.sleep(0.1)
        ended.append(chunk)

    threads = PythonThreads(6, 3)
    with pytest.raises(ZeroDivisionError):
        threads.run(work)
    assert len(ended) == 2
    threads.close()
