"""Any schedule trains, is saved and goes on; what other pipelines always pass to `load` is accepted."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from stable_baselines3.common.utils import ConstantSchedule, FloatSchedule, LinearSchedule

from driftrl import LipschitzMBPO, PolicyFlow
from driftrl.envs import make_vec

FLOW: dict[str, Any] = {"n_steps": 16, "batch_size": 16, "n_epochs": 1, "actor_hidden": (4,), "critic_hidden": (4,)}
MODEL: dict[str, Any] = {
    "learning_starts": 8, "gradient_steps": 1, "batch_size": 8, "actor_hidden": (4,), "critic_hidden": (4,),
    "model": "none", "compile": "off", "diagnostics_interval": 0,
}  # fmt: skip
both = pytest.mark.parametrize(("kind", "fields"), [(PolicyFlow, FLOW), (LipschitzMBPO, MODEL)])


class SimpleLinearSchedule:
    """As rl_zoo3's, which it makes of "lin_3e-4"."""

    def __init__(self, initial_value: float) -> None:
        self.initial_value = initial_value

    def __call__(self, remaining: float) -> float:
        return remaining * self.initial_value


def closure(initial: float) -> Callable[[float], float]:
    """As in the documentation of Stable-Baselines3."""

    def schedule(remaining: float) -> float:
        return initial * 0.5 * (1 - math.cos(math.pi * remaining))

    return schedule


SCHEDULES: list[Any] = [
    ConstantSchedule(3e-4), FloatSchedule(3e-4), LinearSchedule(3e-4, 1e-4, 0.5),
    FloatSchedule(LinearSchedule(1, 0, 1)), SimpleLinearSchedule(3e-4), FloatSchedule(SimpleLinearSchedule(3e-4)),
    closure(3e-4), lambda remaining: 3e-4,
]  # fmt: skip


@both
@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda value: type(value).__name__)
def test_schedules_are_saved_and_go_on(kind: type[Any], fields: dict[str, Any], schedule: Any, tmp_path: Path) -> None:
    env = make_vec("InvertedPendulum-v5", 1, 0)
    agent = kind("MlpPolicy", env, schedule, seed=0, device="cpu", **fields)
    agent.learn(32)
    agent.save(tmp_path / "agent")
    loaded = kind.load(tmp_path / "agent", env=env, device="cpu")
    assert loaded.config == agent.config
    for remaining in (1.0, 0.9, 0.512345, 0.5, 0.1, 0.0):
        assert loaded.lr_schedule(remaining) == pytest.approx(schedule(remaining), rel=1e-4, abs=1e-9)
    loaded.learn(32, reset_num_timesteps=False)
    again = kind.load(tmp_path / "agent", env=env, device="cpu", learning_rate=schedule)
    assert again.lr_schedule(0.512345) == schedule(0.512345)


@both
def test_what_rl_zoo3s_enjoy_always_passes_loads(kind: type[Any], fields: dict[str, Any], tmp_path: Path) -> None:
    kind("MlpPolicy", make_vec("InvertedPendulum-v5", 1, 0), seed=0, device="cpu", **fields).save(tmp_path / "agent")
    custom = {
        "learning_rate": 0.0,
        "lr_schedule": lambda _: 0.0,
        "clip_range": lambda _: 0.0,
        "no_such_thing": object(),
    }
    agent = kind.load(tmp_path / "agent", custom_objects=custom, device="cpu")
    assert (agent.learning_rate if not callable(agent.learning_rate) else agent.learning_rate(0.5)) == 0.0
    assert agent.predict(np.zeros(4))[0].shape == (1,)


@both
def test_no_schedule_is_asked_for_less_than_nothing(kind: type[Any], fields: dict[str, Any]) -> None:
    asked = list[float]()

    def schedule(remaining: float) -> float:
        asked.append(remaining)
        return 1e-3 * remaining

    steps = {"n_steps": 48} if kind is PolicyFlow else {}
    agent = kind("MlpPolicy", make_vec("InvertedPendulum-v5", 3, 0), schedule, seed=0, device="cpu", **fields | steps)
    agent.learn(100)  # the last rollout goes on to 102, or 144
    assert agent.num_timesteps > 100 and min(asked) == 0


@pytest.mark.parametrize("rate", [1e-3, 2e-3])
def test_a_rate_given_to_load_takes_the_place_of_the_adapted_one(rate: float, tmp_path: Path) -> None:
    agent = PolicyFlow("MlpPolicy", make_vec("InvertedPendulum-v5", 1, 0), 1e-3, device="cpu", **FLOW)
    agent._rate = 1e-5
    agent.save(tmp_path / "agent")
    assert PolicyFlow.load(tmp_path / "agent").lr_schedule(0.5) == 1e-5
    assert PolicyFlow.load(tmp_path / "agent", learning_rate=rate).lr_schedule(0.5) == rate


def test_ppos_arguments_that_say_nothing_are_accepted() -> None:
    env = make_vec("InvertedPendulum-v5", 1, 0)
    agent: Any = PolicyFlow(
        "MlpPolicy", env, use_sde=False, sde_sample_freq=-1, rollout_buffer_class=None, rollout_buffer_kwargs=None,
        clip_range=ConstantSchedule(0.3), clip_range_vf=lambda _: 0.4, **FLOW,
    )  # fmt: skip
    assert (agent.clip_range, agent.clip_range_vf) == (0.3, 0.4)
    with pytest.raises(ValueError, match="use_sde: got True, expected False"):
        PolicyFlow("MlpPolicy", env, use_sde=True)
    with pytest.raises(ValueError, match=r"clip_range: got a schedule from 0.2 to 0.0, expected a number"):
        PolicyFlow("MlpPolicy", env, clip_range=LinearSchedule(0.2, 0.0, 1.0))
