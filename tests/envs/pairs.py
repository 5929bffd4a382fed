"""A batch that compiled code steps and one that threads of Python step, and the same done to both."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import mujoco
import numpy as np
import pytest

from driftrl.envs.mujoco_batch import MujocoVecEnv
from driftrl.envs.native.build import find_compiler
from driftrl.envs.simulators import STATE

needs_compiler = pytest.mark.skipif(find_compiler() is None or os.name != "posix", reason="needs a C++ compiler")


def pair(id: str, n: int = 3, **arguments: Any) -> list[MujocoVecEnv]:
    """Both batches, with the same seeds, reset."""
    envs = [made(id, n, native=native, **arguments) for native in (True, False)]
    assert_same(envs, lambda env: env.reset(), "first observation")
    return envs


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
