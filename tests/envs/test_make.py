import subprocess
import sys
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv

from driftrl.envs import check_env, make_vec, parse_env_kwargs
from driftrl.envs.make import has_time_limit


class SpacesOnly(gym.Env[Any, np.ndarray]):
    def __init__(self, kind: str) -> None:
        if kind == "failing":
            raise RuntimeError("no licence")
        vector = spaces.Box(-1, 1, (2,))
        image = spaces.Box(0, 255, (32, 32, 3), np.uint8)
        special: dict[str, spaces.Box] = {
            "unbounded": spaces.Box(-np.inf, np.inf, (1,)),
            "integers": spaces.Box(0, 10, (2,), np.int32),
            "half": spaces.Box(-1, 1, (2,), np.float16),
            "huge": spaces.Box(-3e38, 3e38, (1,)),
        }
        self.action_space = special.get(kind, spaces.Box(-1, 1, (1,)))
        observations: dict[str, spaces.Space[Any]] = {
            "image": image,
            "dict": spaces.Dict(a=vector, b=vector),
            "dict-image": spaces.Dict(a=vector, b=image),
            "tuple": spaces.Tuple((vector, vector)),
            "discrete": spaces.Discrete(3),
            "scalar": spaces.Box(-1, 1, ()),
            "dict-scalar": spaces.Dict(a=vector, b=spaces.Box(-1, 1, ())),
            "dict-discrete": spaces.Dict(a=vector, b=spaces.Discrete(3)),
        }
        self.observation_space = observations.get(kind, vector)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        return self.observation_space.sample(), {}

    def step(self, action: np.ndarray) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        return self.observation_space.sample(), 0.0, False, False, {}


gym.register("DriftRLTest/SpacesOnly-v0", lambda **kwargs: SpacesOnly(**kwargs))


def test_environments_are_monitored_and_seeded_one_by_one() -> None:
    env, again, other = (make_vec("InvertedPendulum-v5", 3, seed, "sync") for seed in (5, 5, 6))
    assert isinstance(env, DummyVecEnv)
    assert env.num_envs == 3
    assert all(env.env_is_wrapped(Monitor))
    first = env.reset()
    assert isinstance(first, np.ndarray)
    np.testing.assert_array_equal(first, again.reset())
    np.testing.assert_array_equal(first[1:], np.asarray(other.reset())[:2])  # environment i has seed + i
    assert len(np.unique(first[:, 0])) == 3


def test_arguments_reach_the_environment() -> None:
    env = make_vec("InvertedPendulum-v5", 1, 0, reset_noise_scale=0.0)
    np.testing.assert_array_equal(np.asarray(env.reset()), np.zeros((1, 4)))


@pytest.mark.parametrize("kind", ["dict", "scalar", "dict-scalar"])
def test_dicts_and_single_numbers_are_welcome(kind: str) -> None:
    check_env("DriftRLTest/SpacesOnly-v0", kind=kind)


@pytest.mark.parametrize(
    ("id", "message"),
    [
        ("HalfCheeta-v5", "got 'HalfCheeta-v5'.*did you mean HalfCheetah-v5"),
        ("HalfCheetah-v99", "did you mean HalfCheetah"),
        ("nothing like it", "expected a registered Gymnasium id; gymnasium.pprint_registry"),
        ("no_such_module:Name-v0", "needs a package"),
        ("CartPole-v1", "CartPole-v1: unsupported action space: got Discrete"),
    ],
)
def test_unusable_ids_are_refused(id: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_vec(id, 1, 0)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("unbounded", "unsupported action space"),
        ("integers", "unsupported action space: got numbers of type int32, expected float32 or float64"),
        ("half", "unsupported action space: got numbers of type float16"),
        ("huge", "unsupported action space: got bounds farther apart than float32 can express"),
        ("image", "got images"),
        ("dict-image", "got images"),
        ("tuple", "unsupported observation space"),
        ("discrete", "unsupported observation space"),
        ("dict-discrete", "unsupported observation space"),
    ],
)
def test_unusable_spaces_are_refused(kind: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_vec("DriftRLTest/SpacesOnly-v0", 1, 0, kind=kind)


def test_unusable_numbers_and_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="n_envs: got 0"):
        make_vec("InvertedPendulum-v5", 0, 0)
    with pytest.raises(ValueError, match="backend: got 'threads'"):
        make_vec("InvertedPendulum-v5", 1, 0, "threads")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"cannot be made with the arguments \{'foo': 1\}: TypeError"):
        make_vec("InvertedPendulum-v5", 1, 0, foo=1)


def test_a_failing_constructor_is_named() -> None:
    with pytest.raises(ValueError, match=r"SpacesOnly-v0' cannot be made .*'failing'.*: RuntimeError: no licence"):
        check_env("DriftRLTest/SpacesOnly-v0", kind="failing")


def test_env_kwargs_of_the_command_line() -> None:
    assert parse_env_kwargs(["a=1", "b=x=y", "c=[1, 2]", "d=true"]) == {"a": 1, "b": "x=y", "c": [1, 2], "d": True}
    assert parse_env_kwargs(['{"a": 0.5, "b": null}', "a=2"]) == {"a": 2, "b": None}
    for wrong in ("a", "3", "[1]", "{a: 1}"):
        with pytest.raises(ValueError, match="expected key=value or a JSON object"):
            parse_env_kwargs([wrong])


def test_options_of_workers_need_workers() -> None:
    with pytest.raises(ValueError, match="worker_timeout: got 3, which changes nothing without backend subproc"):
        make_vec("InvertedPendulum-v5", 1, 0, worker_timeout=3)
    with pytest.raises(ValueError, match="worker_restarts: got 1, which changes nothing"):
        make_vec("Pendulum-v1", 1, 0, backend="sync", worker_restarts=1)


def test_warp_without_its_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mujoco_warp", None)
    monkeypatch.delitem(sys.modules, "driftrl.envs.warp_batch", raising=False)
    with pytest.raises(ValueError, match=r"not installed, mujoco_warp; run pip install 'driftrl\[gpu\]'"):
        make_vec("Hopper-v5", 2, 0, "warp")


def test_options_of_warp_need_warp() -> None:
    for name, value in (("warp_solver", "newton"), ("warp_contacts", 9), ("warp_constraints", 9)):
        with pytest.raises(ValueError, match=f"{name}: got {value}, which changes nothing without backend warp"):
            make_vec("Hopper-v5", 2, 0, **{name: value})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="changes nothing without backend tensor or warp, got sync"):
        make_vec("Hopper-v5", 2, 0, "sync", device="cuda")


def test_a_limit_of_none_is_the_one_that_was_registered() -> None:
    assert has_time_limit("Hopper-v5", {"max_episode_steps": None})
    assert not has_time_limit("Hopper-v5", {"max_episode_steps": -1})
    env: Any = make_vec("driftrl/Avoid-v0", 1, 0, backend="tensor", device="cpu", max_episode_steps=None)
    assert env.task.limit == 50


def test_the_limit_of_an_id_is_known_before_its_package_is_imported() -> None:
    pytest.importorskip("gymnasium_robotics")
    code = "from driftrl.envs.make import has_time_limit; print(has_time_limit('FetchPush-v4', {}))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.split()[-1] == "True"
