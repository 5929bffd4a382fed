"""A masked environment is the environment, but for what it shows."""

from __future__ import annotations

import os
import pickle
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import gymnasium as gym
import numpy as np
import pytest
from stable_baselines3.common.vec_env import DummyVecEnv

from driftrl.envs import ObservationMask, make_vec
from driftrl.envs.known import known_task, known_task_of, known_task_of_id, task_name
from driftrl.envs.make import Backend

MY_TASKS = """
import gymnasium
from driftrl.envs import ObservationMask

gymnasium.register(
    "test/HopperPositions-v0", "gymnasium.envs.mujoco.hopper_v5:HopperEnv", max_episode_steps=1000,
    additional_wrappers=(ObservationMask.wrapper_spec(hidden=slice(5, None)),),
)
"""


@pytest.fixture
def positions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An id of Hopper-v5 without velocities, with the module that registers it, in other processes, too."""
    (tmp_path / "masked_tasks.py").write_text(MY_TASKS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    yield "masked_tasks:test/HopperPositions-v0"
    gym.registry.pop("test/HopperPositions-v0", None)
    sys.modules.pop("masked_tasks", None)


@pytest.mark.parametrize(
    ("hidden", "shown"),
    [
        (slice(5, None), range(5)),
        (slice(None, None, 2), range(1, 11, 2)),
        ([0, -1], range(1, 10)),
        ((3,), [0, 1, 2, *range(4, 11)]),
    ],
)
def test_the_other_entries_stay_as_they_are(hidden: Any, shown: Any) -> None:
    bare, masked = gym.make("Hopper-v5"), ObservationMask(gym.make("Hopper-v5"), hidden)
    space, whole = cast(gym.spaces.Box, masked.observation_space), cast(gym.spaces.Box, bare.observation_space)
    assert space == gym.spaces.Box(whole.low[shown], whole.high[shown], dtype=np.float64)
    (obs, _), (seen, _) = bare.reset(seed=3), masked.reset(seed=3)
    bare.action_space.seed(0)
    for _ in range(20):
        assert np.array_equal(seen, obs[list(shown)])
        action = bare.action_space.sample()
        (obs, *expected), (seen, *found) = bare.step(action), masked.step(action)
        assert found[:3] == expected[:3]


def test_bounds_and_number_type_of_what_is_left() -> None:
    env = ObservationMask(gym.make("Pendulum-v1"), [1])
    assert env.observation_space == gym.spaces.Box(np.array([-1, -8], np.float32), np.array([1, 8], np.float32))


@pytest.mark.parametrize("backend", ["auto", "sync", "subproc"])
def test_every_backend_masks(positions: str, backend: Backend) -> None:
    """The batched form of the task does not know the mask: it steps aside."""
    with_velocities, env = make_vec("Hopper-v5", 2, 5, "batched"), make_vec(positions, 2, 5, backend)
    try:
        assert env.observation_space.shape == (5,)
        obs, seen = cast(Any, with_velocities.reset()), cast(Any, env.reset())
        for action in np.random.default_rng(0).uniform(-1, 1, (60, 2, 3)).astype(np.float32):
            assert np.array_equal(seen, obs[:, :5])
            (obs, reward, ended, infos), (seen, paid, over, others) = with_velocities.step(action), env.step(action)
            assert np.array_equal(reward, np.float32(paid))  # subproc gives float64
            assert np.array_equal(ended, over)
            for info, other in zip(infos, others, strict=True):
                assert ("terminal_observation" in info) == ("terminal_observation" in other)
                if "terminal_observation" in info:
                    assert np.array_equal(other["terminal_observation"], info["terminal_observation"][:5])
    finally:
        env.close()
        with_velocities.close()


def test_a_batch_is_refused_and_the_task_hidden(positions: str) -> None:
    make_vec(positions, 1, 0).close()  # registered from now on
    for backend in ("batched", "tensor"):
        with pytest.raises(ValueError, match=f"{backend}: got 'masked_tasks:test/HopperPositions-v0', another"):
            make_vec(positions, 2, 0, backend)
    assert known_task_of_id(positions) is None
    assert task_name(positions) == positions
    masked = ObservationMask(gym.make("Hopper-v5"), slice(5, None))
    assert known_task(masked.spec) is None  # so that no rule of termination reads what is hidden
    assert known_task_of(DummyVecEnv([lambda: masked])) is None


def test_a_spec_makes_the_same_environment() -> None:
    masked = ObservationMask(gym.make("Hopper-v5"), slice(5, None))
    again = gym.make(pickle.loads(pickle.dumps(masked.spec)))
    assert again.observation_space == masked.observation_space
    assert np.array_equal(again.reset(seed=1)[0], masked.reset(seed=1)[0])


@pytest.mark.parametrize(
    ("hidden", "message"),
    [
        ([11], r"hidden: got \[11\], expected indices of 11 entries, -11 to 10"),
        ([-12], r"hidden: got \[-12\], expected indices of 11 entries"),
        ([1, -10], r"hidden: got \[1, -10\], expected each of the 11 entries once at most"),
        ([], r"hidden: got \[\], none of 11 entries"),
        (slice(20, None), r"hidden: got slice\(20, None, None\), none of 11 entries"),
        (slice(None), r"hidden: got slice\(None, None, None\), all of 11 entries"),
        ([5.5], r"hidden: got \[5\.5\], expected integers, such as \[0, 3\], or a slice of them"),
        ([True], r"hidden: got \[True\], expected integers"),
        (5, "hidden: got 5, expected integers"),
        ("5", "hidden: got 5, expected integers"),
        (slice(0.5, None), r"hidden: got slice\(0\.5, None, None\), expected integers"),
    ],
)
def test_bad_entries_are_refused(hidden: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ObservationMask(gym.make("Hopper-v5"), hidden)


def test_other_observations_are_refused() -> None:
    pytest.importorskip("gymnasium_robotics")
    with pytest.raises(ValueError, match=r"expected a Box of one dimension; .*FlattenObservation"):
        ObservationMask(gym.make("driftrl/PointMazeMedium-v0"), [0])
    with pytest.raises(ValueError, match="got the observation space Discrete"):
        ObservationMask(gym.make("FrozenLake-v1"), [0])
