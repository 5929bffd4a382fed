"""Workers that die, hang or raise: what training sees, how often, and what is left."""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from stable_baselines3.common.monitor import Monitor

from driftrl.envs import make_vec
from driftrl.envs.workers import SupervisedVecEnv

multiprocessing.set_forkserver_preload(["driftrl.envs.workers"])  # workers start in no time


def counter(number: int, faults: dict[int, str], folder: Path) -> Callable[[], gym.Env[Any, Any]]:
    """Maker of an environment that observes (its number, steps of its episode) and ends after 10 steps.

    At the steps of its life (all its processes together) that faults names it dies, hangs or raises.
    """

    class Counter(gym.Env[Any, Any]):  # local, so that it travels to the workers by value
        observation_space = spaces.Box(-np.inf, np.inf, (2,))
        action_space = spaces.Box(-1, 1, (1,))

        def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict[str, Any]]:
            super().reset(seed=seed)
            self.count = 0
            return np.array([number, 0], np.float32), {}

        def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
            with (folder / str(number)).open("a") as life:
                life.write(".")
                step = life.tell()
            fault = faults.get(step)
            if fault == "dies":
                os._exit(7)
            elif fault == "hangs":
                time.sleep(60)
            elif fault == "raises":
                raise RuntimeError("broken")
            self.count += 1
            return np.array([number, self.count], np.float32), 1.0, self.count == 10, False, {}

    return lambda: Monitor(Counter())


@pytest.fixture
def supervised(tmp_path: Path) -> Iterator[Callable[..., SupervisedVecEnv]]:
    """Maker of two supervised environments, the second with faults."""
    made: list[SupervisedVecEnv] = []

    def make(faults: dict[int, str], **options: Any) -> SupervisedVecEnv:
        makers = [counter(0, {}, tmp_path), counter(1, faults, tmp_path)]
        made.append(SupervisedVecEnv(makers, **options))
        return made[-1]

    yield make
    for env in made:
        env.close()
        assert not any(process.is_alive() for process in env.processes)


def step(env: SupervisedVecEnv) -> tuple[np.ndarray, np.ndarray, np.ndarray, Any]:
    obs, rewards, ended, infos = env.step(np.zeros((2, 1), np.float32))
    assert isinstance(obs, np.ndarray)
    return obs, rewards, ended, infos


@pytest.mark.parametrize(
    ("fault", "what"),
    [("dies", "died, exit code 7"), ("hangs", "no answer within 1 s"), ("raises", "died, exit code 1")],
)
def test_a_worker_that_fails_ends_its_episode_as_truncated(
    supervised: Callable[..., SupervisedVecEnv], fault: str, what: str
) -> None:
    env = supervised({3: fault}, timeout=1.0)
    env.reset()
    for count in (1, 2):
        assert step(env)[0].tolist() == [[0, count], [1, count]]
    with pytest.warns(RuntimeWarning, match=re.escape(f"environment 1: its worker failed ({what}); restart 1 of 10")):
        obs, rewards, ended, infos = step(env)
    assert obs.tolist() == [[0, 3], [1, 0]]  # a new episode beside one that goes on
    assert rewards.tolist() == [1, 0]
    assert ended.tolist() == [False, True]
    assert infos[1]["terminal_observation"].tolist() == [1, 2]
    assert infos[1]["TimeLimit.truncated"]
    assert infos[1]["worker_restarted"]
    assert not {"terminal_observation", "worker_restarted"} & infos[0].keys()
    assert env.restarts == 1
    for count in range(1, 10):
        obs, _, ended, infos = step(env)
        assert obs[1].tolist() == [1, count]
    obs, _, ended, infos = step(env)  # and the new episode ends as others do
    assert ended.tolist() == [False, True]
    assert (infos[1]["episode"]["l"], infos[1]["TimeLimit.truncated"]) == (10, False)


def test_after_so_many_restarts_the_next_fault_is_an_error(supervised: Callable[..., SupervisedVecEnv]) -> None:
    env = supervised({2: "dies", 3: "dies", 4: "dies"}, max_restarts=2)
    env.reset()
    step(env)
    with pytest.warns(RuntimeWarning, match="restart 1 of 2"):
        step(env)
    with pytest.warns(RuntimeWarning, match="restart 2 of 2"):
        step(env)
    with pytest.raises(
        ChildProcessError, match=r"environment 1: its worker failed \(died, exit code 7\), .* 2 restarts"
    ):
        step(env)


def test_a_worker_that_was_killed_between_steps_is_restarted(supervised: Callable[..., SupervisedVecEnv]) -> None:
    env = supervised({})
    env.reset()
    step(env)
    os.kill(env.processes[0].pid or 0, signal.SIGINT)  # Ctrl-C reaches all processes, and means the trainer
    os.kill(env.processes[1].pid or 0, signal.SIGKILL)
    env.processes[1].join()
    with pytest.warns(RuntimeWarning, match="exit code -9"):
        assert step(env)[0].tolist() == [[0, 2], [1, 0]]
    os.kill(env.processes[1].pid or 0, signal.SIGKILL)
    env.processes[1].join()
    with pytest.warns(RuntimeWarning, match="restart 2 of 10"):
        assert np.asarray(env.reset()).tolist() == [[0, 0], [1, 0]]


class ArrayReward(gym.Wrapper[Any, Any, Any, Any]):
    """Gives the reward as an array of one element."""

    def step(self, action: Any) -> Any:
        obs, reward, *rest = self.env.step(action)
        return obs, np.array([reward], np.float32), *rest


def array_reward() -> gym.Env[Any, Any]:
    return ArrayReward(gym.make("Reacher-v5"))


def test_rewards_that_are_arrays_of_one_element() -> None:
    env = SupervisedVecEnv([array_reward, array_reward])
    try:
        env.reset()
        assert np.asarray(env.step(np.zeros((2, 2), np.float32))[1]).shape == (2,)
    finally:
        env.close()


@pytest.mark.parametrize("id", ["Reacher-v5", "driftrl/MultiGoal-v0"])
def test_a_batch_takes_actions_as_lists(id: str) -> None:
    steps: list[Any] = []
    for actions in ([[0.1, -0.2], [0.3, 0.4]], np.array([[0.1, -0.2], [0.3, 0.4]])):
        env = make_vec(id, 2, 0)
        env.reset()
        steps.append(env.step(actions)[0])  # type: ignore[arg-type]
    assert np.array_equal(*steps)
    with pytest.raises(ValueError, match=r"actions: got shape \(1, 2\), expected \(2, 2\)"):
        env.step([[0.1, 0.2]])  # type: ignore[arg-type]


def test_questions_to_a_dead_worker_are_errors_and_leave_no_answer_behind(
    supervised: Callable[..., SupervisedVecEnv],
) -> None:
    env = supervised({})
    env.reset()
    step(env)
    with pytest.raises(
        ChildProcessError, match="environment 0: its worker died, got no answer to env_method 'no_such'"
    ):
        env.env_method("no_such", indices=[0])  # raises there, which ends the worker
    questions: list[Callable[[], Any]] = [
        lambda: env.get_attr("count"), lambda: env.set_attr("other", 5), lambda: env.env_method("close"),
        lambda: env.has_attr("count"), lambda: env.env_is_wrapped(Monitor),
    ]  # fmt: skip
    for question in questions:
        with pytest.raises(ChildProcessError, match="environment 0: its worker died"):
            question()
    assert env.get_attr("action_space", indices=[1]) == [env.action_space]
    with pytest.warns(RuntimeWarning, match="exit code 1"):
        assert step(env)[0].tolist() == [[0, 0], [1, 2]]
    assert env.env_is_wrapped(Monitor) == [True, True]


def test_pictures_of_a_dead_worker_are_an_error(supervised: Callable[..., SupervisedVecEnv]) -> None:
    env = supervised({})
    env.render_mode = "rgb_array"
    env.reset()
    env.processes[1].kill()
    env.processes[1].join()
    with pytest.raises(ChildProcessError, match="its worker died, got no answer to render"):
        env.render()


def test_a_restart_keeps_what_was_set(supervised: Callable[..., SupervisedVecEnv]) -> None:
    env = supervised({2: "dies"})
    env.reset()
    env.set_attr("level", 4)
    env.set_attr("level", 5, indices=[1])
    step(env)
    with pytest.warns(RuntimeWarning, match="restart 1 of"):
        step(env)
    assert env.get_attr("level") == [4, 5]


def test_environments_stay_in_their_processes() -> None:
    env = make_vec("InvertedPendulum-v5", 1, 0, "subproc")
    with pytest.raises(ValueError, match="get_attr: got 'unwrapped', an environment, which stays in its process"):
        env.get_attr("unwrapped")
    env.close()


def test_closing_does_not_wait_for_a_worker_that_hangs(
    supervised: Callable[..., SupervisedVecEnv], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("driftrl.envs.workers._FAREWELL", 0.2)
    env = supervised({1: "hangs"})
    env.reset()
    env.step_async(np.zeros((2, 1), np.float32))
    start = time.monotonic()
    env.close()
    assert time.monotonic() - start < 10  # the worker would sleep for 60 s


@pytest.mark.parametrize("id", ["InvertedPendulum-v5", "driftrl/MultiGoal-v0"])  # the latter is registered there too
def test_subprocesses_give_the_same_observations(id: str) -> None:
    sync, subproc = make_vec(id, 2, 1, "sync"), make_vec(id, 2, 1, "subproc")
    assert isinstance(subproc, SupervisedVecEnv)
    np.testing.assert_array_equal(np.asarray(sync.reset()), np.asarray(subproc.reset()))
    shape = (2, *(sync.action_space.shape or ()))
    for _ in range(30):  # episodes of some 10 steps
        actions = np.random.default_rng(0).uniform(-1, 1, shape).astype(np.float32)
        for one, other in zip(sync.step(actions)[:3], subproc.step(actions)[:3], strict=True):
            np.testing.assert_array_equal(one, np.asarray(other, np.asarray(one).dtype))  # rewards are rounded there
    subproc.close()


def test_unusable_limits_are_refused() -> None:
    for options, message in [({"timeout": 0}, "timeout: got 0"), ({"max_restarts": -1}, "max_restarts: got -1")]:
        with pytest.raises(ValueError, match=message):
            SupervisedVecEnv([], **options)
