"""Data sets for an agent: what their metadata say of the task they were recorded on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces

from driftrl.agents.storage.datasets import write_minari
from driftrl.envs.episodes import Episode
from driftrl.runs.demonstrations import read_demonstrations

pytest.importorskip("h5py")

OBS, ACTIONS = spaces.Box(-9, 9, (1,)), spaces.Box(-1, 1, (2,))


def _episode() -> Episode:
    end = np.array([False, True])
    return Episode(np.zeros((3, 1)), np.zeros((2, 2)), np.zeros(2), end, end & False)


def data_set(folder: Path, space: spaces.Space[Any] = ACTIONS, env: str = "Hopper-v5", **changes: Any) -> Path:
    write_minari(folder / "set-v0", [_episode()], OBS, space, env_spec=gym.spec(env))
    path = folder / "set-v0" / "data" / "metadata.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder / "set-v0"


@pytest.fixture
def other_names() -> Iterator[None]:
    gym.register("test/Mine-v0", "gymnasium.envs.mujoco.hopper_v5:HopperEnv", max_episode_steps=50)
    yield
    gym.registry.pop("test/Mine-v0")


def test_data_of_another_environment_are_named(tmp_path: Path) -> None:
    folder = data_set(tmp_path)
    message = r"metadata\.json: env_spec: got episodes of 'Hopper-v5', expected those of Walker2d-v5; [^\n]*$"
    with pytest.warns(UserWarning, match=message):
        read_demonstrations(folder, OBS, ACTIONS, env_id="Walker2d-v5")
    with pytest.warns(UserWarning, match=r"got episodes of 'Hopper-v5', expected those of Hopper-v4"):
        read_demonstrations(folder, OBS, ACTIONS, env_id="Hopper-v4")


def test_data_of_the_same_environment_with_other_options_are_named(tmp_path: Path) -> None:
    env = gym.make("Hopper-v5", healthy_reward=2.0, render_mode="rgb_array")
    folder = data_set(tmp_path)
    write_minari(tmp_path / "other-v0", [_episode()], OBS, ACTIONS, env_spec=env.spec)
    read_demonstrations(folder, OBS, ACTIONS, env_id="Hopper-v5")
    read_demonstrations(tmp_path / "other-v0", OBS, ACTIONS, env_id="Hopper-v5", env_kwargs={"healthy_reward": 2.0})
    for data, kwargs, message in (
        (folder, {"healthy_reward": 2.0}, r"episodes with healthy_reward its default, expected 2.0"),
        (tmp_path / "other-v0", {}, r"episodes with healthy_reward 2.0, expected its default"),
    ):
        with pytest.warns(UserWarning, match=rf"metadata\.json: env_spec: got {message}"):
            read_demonstrations(data, OBS, ACTIONS, env_id="Hopper-v5", env_kwargs=kwargs)


@pytest.mark.usefixtures("other_names")
@pytest.mark.parametrize("env_id", ["Hopper-v5", "Hopper", "gymnasium:Hopper-v5", "test/Mine-v0", None])
def test_the_same_task_by_other_names_is_no_other(env_id: str | None, tmp_path: Path) -> None:
    assert len(read_demonstrations(data_set(tmp_path), OBS, ACTIONS, env_id=env_id).actions) == 2


@pytest.mark.parametrize("env_spec", [None, 5, "{", "[]", "{}", '{"id": 3}', "[" * 100_000])
def test_a_spec_that_says_nothing_is_none(env_spec: Any, tmp_path: Path) -> None:
    folder = data_set(tmp_path, env_spec=env_spec)
    assert len(read_demonstrations(folder, OBS, ACTIONS, env_id="Walker2d-v5").actions) == 2


def test_other_bounds_of_the_actions_are_refused(tmp_path: Path) -> None:
    folder = data_set(tmp_path, spaces.Box(np.array([-1.0, -0.4], np.float32), np.array([1.0, 0.4], np.float32)))
    message = (
        r"metadata\.json: action_space: got \[-0\.4, 0\.4\] in dimension 1, expected the environment's \[-1, 1\]; "
    )
    with pytest.raises(ValueError, match=message) as caught:
        read_demonstrations(folder, OBS, ACTIONS)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "declared",
    [
        spaces.Box(-np.inf, np.inf, (2,)),
        spaces.Box(-1.00001, 1.0, (2,), np.float64),
        {"type": "Box", "low": [[1], 2], "high": 1},
        {"type": "Box", "low": [10**400], "high": [1]},
        {"type": "Box"},
        {"type": "Discrete", "n": 3},
        "?",
    ],
    ids=str,
)
def test_bounds_that_say_nothing_are_no_others(declared: Any, tmp_path: Path) -> None:
    known = isinstance(declared, spaces.Box)
    changes = {} if known else {"action_space": json.dumps(declared)}
    folder = data_set(tmp_path, declared if known else ACTIONS, **changes)
    assert len(read_demonstrations(folder, OBS, ACTIONS).actions) == 2
