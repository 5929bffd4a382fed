"""The Config tells the truth: what is assigned, or given to `load`, is used or refused."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.utils import ConstantSchedule, LinearSchedule
from torch.nn.utils import parameters_to_vector as vector

from driftrl import LipschitzMBPO, PolicyFlow
from driftrl.agents.storage.values import CheckpointError

from .test_weights import both, learn, make


def rate(remaining: float) -> float:
    return 1e-3 * remaining


@both
def test_another_config_is_used_or_refused(kind: type[Any]) -> None:
    agent = make(kind)
    agent.config = dataclasses.replace(agent.config, gamma=0.5)
    assert agent.gamma == 0.5
    terms = agent._gradient.__self__.losses
    assert terms.keywords["config"] is agent.config
    with pytest.raises(ValueError, match=r"actor_hidden: got \(3,\), but it was fixed"):
        agent.config = dataclasses.replace(agent.config, actor_hidden=(3,))
    other = LipschitzMBPO if kind is PolicyFlow else PolicyFlow
    with pytest.raises(ValueError, match=f"config: got a {other.config_class.__name__}, expected a"):
        agent.config = other.config_class()
    assert agent.gamma == 0.5
    agent.actor_hidden = [8, 8]  # the same
    agent.actor_hidden = np.array([8, 8])


@both
def test_a_schedule_and_its_name_agree(kind: type[Any]) -> None:
    agent = make(kind, learning_rate=rate)
    assert agent.lr_schedule(0.5) == 5e-4
    with pytest.raises(ValueError, match=r"learning_rate: got 0.0001, but lr_schedule is 'function'"):
        agent.config = dataclasses.replace(agent.config, learning_rate=1e-4)
    agent.lr_schedule = "constant"
    assert (agent.lr_schedule(0.5), agent.config.lr_schedule) == (1e-3, "constant")
    message = "lr_schedule: got 'function', expected learning_rate to be one"
    with pytest.raises(ValueError, match=message):
        agent.lr_schedule = "function"
    with pytest.raises(ValueError, match="lr_schedule: got 'function', but learning_rate stands for 'constant'"):
        make(kind, learning_rate=1e-3, lr_schedule="function")
    assert make(kind, learning_rate=lambda remaining: 1e-3 * (1 - remaining)).lr_schedule(0.0) == 1e-3  # a warm-up


@both
def test_a_function_left_out_of_the_file_is_asked_for(kind: type[Any], tmp_path: Any) -> None:
    make(kind, learning_rate=rate).save(tmp_path / "agent", exclude=["learning_rate"])
    with pytest.raises(CheckpointError, match=r"lr_schedule: got 'function', expected learning_rate to be one"):
        kind.load(tmp_path / "agent", device="cpu")
    assert kind.load(tmp_path / "agent", device="cpu", learning_rate=rate).learning_rate is rate
    assert kind.load(tmp_path / "agent", device="cpu", learning_rate=1e-4).lr_schedule(0.1) == 1e-4


@pytest.mark.parametrize(
    "schedule", [LinearSchedule(1e-3, 0, 1), LinearSchedule(1e-3, 1e-4, 0.5), ConstantSchedule(1e-3)]
)
def test_what_lost_its_effect_stands_in_nobodys_way(schedule: Any) -> None:
    agent = make(PolicyFlow, lr_schedule="adaptive", desired_kl=0.02)
    agent.learning_rate = schedule
    assert agent.lr_schedule(0.25) == schedule(0.25)
    agent.ent_coef = 0.1
    with pytest.raises(ValueError, match=r"desired_kl: got 0.03, which changes nothing without"):
        agent.desired_kl = 0.03
    agent.lr_schedule = "adaptive"
    assert agent.desired_kl == 0.02


def test_a_callback_may_anneal_a_weight_to_nothing() -> None:
    class Anneal(BaseCallback):
        def _on_step(self) -> bool:
            return True

        def _on_rollout_start(self) -> None:
            self.model.spread_coef = 0.0  # type: ignore[attr-defined]

    agent = make(PolicyFlow, spread_coef=0.1, spread="score")
    learn(agent, Anneal())
    assert (agent.spread_coef, agent.spread) == (0.0, "score")


def test_an_adapted_rate_is_reset_by_assignment() -> None:
    agent = make(PolicyFlow, lr_schedule="adaptive", desired_kl=1e-9)
    learn(agent)
    assert agent.lr_schedule(1.0) < 3e-4
    agent.learning_rate = 3e-4
    assert agent.lr_schedule(1.0) == 3e-4


def test_a_batch_larger_than_the_rollout_is_the_rollout_with_a_warning_at_any_time() -> None:
    agent, same = make(PolicyFlow), make(PolicyFlow)
    same.batch_size = same.n_steps * same.n_envs
    with pytest.warns(UserWarning, match="batch_size: got 1000000, more than the rollout's n_steps x environments"):
        agent.batch_size = 10**6
    steps = agent.n_steps * agent.n_envs
    weights = [vector(each.learn(2 * steps).policy.parameters()) for each in (agent, same)]
    assert torch.equal(*weights)


INERT = {"noise_time": 9.0, "spread_std": 0.2, "ratio_draws": 3, "collapse_drop": 0.2, "hurst": 0.6, "components": 3}
MADE = {"weight_decay": 0.1, "action_std": 0.1, "base_std": 0.4, "critic_gain": 0.1, "actor_hidden": (3,)}


@pytest.mark.parametrize(("name", "value"), [*INERT.items(), *MADE.items()])
def test_load_takes_no_field_that_it_could_not_use(name: str, value: Any, tmp_path: Any) -> None:
    make(PolicyFlow).save(tmp_path / "agent")
    reason = "which changes nothing without" if name in INERT else "but the saved weights were made with"
    with pytest.raises(
        CheckpointError, match=rf"{name}: got {value!r}, {reason}".replace("(", r"\(").replace(")", r"\)")
    ):
        PolicyFlow.load(tmp_path / "agent", device="cpu", **{name: value})
    assert PolicyFlow.load(tmp_path / "agent", device="cpu", n_steps=64, gamma=0.9).config.n_steps == 64


def test_load_does_not_change_a_fixed_temperature(tmp_path: Any) -> None:
    make(LipschitzMBPO, learn_temperature=False, temperature=0.2).save(tmp_path / "agent")
    with pytest.raises(CheckpointError, match=r"temperature: got 0.5, but the saved weights were made with 0.2"):
        LipschitzMBPO.load(tmp_path / "agent", device="cpu", temperature=0.5)


@pytest.mark.parametrize("value", ["automatic", float("nan"), "x", [1]])
def test_a_target_entropy_that_is_no_number_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match=r"target_entropy: got .*, expected a number, or None"):
        make(LipschitzMBPO, target_entropy=value)


@pytest.mark.parametrize("fields", [{"n_epochs": 1, "target_kl": 0.1}, {"vf_coef": 0.0, "clip_range_vf": 0.1}], ids=str)
def test_more_that_changes_nothing_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="which changes nothing without"):
        make(PolicyFlow, **fields)
    with pytest.raises(ValueError, match="adversary: got 'pgd', which changes nothing without"):
        make(LipschitzMBPO, robust_coef=0.0, adversary="pgd", adversary_steps=9)


@both
@pytest.mark.parametrize("schedule", ["adaptive", "constant"])
def test_a_rate_given_by_a_config_is_used(kind: type[Any], schedule: str, tmp_path: Any) -> None:
    if kind is LipschitzMBPO and schedule == "adaptive":
        pytest.skip("it has no such schedule")
    agent = make(kind, lr_schedule=schedule)
    agent.save(tmp_path / "a")
    other = dataclasses.replace(agent.config, learning_rate=2e-3)
    agent.config = other
    assert agent.lr_schedule(1.0) == agent.learning_rate == 2e-3
    loaded = kind.load(tmp_path / "a", config=other, device="cpu")
    assert loaded.lr_schedule(1.0) == loaded.learning_rate == 2e-3


@both
def test_load_refuses_what_is_no_attribute(kind: type[Any], tmp_path: Any) -> None:
    make(kind).save(tmp_path / "a")
    with pytest.raises(TypeError, match="unknown argument: got clip_rnage, expected attributes of"):
        kind.load(tmp_path / "a", device="cpu", clip_rnage=0.1)
    assert kind.load(tmp_path / "a", device="cpu", verbose=1, gamma=0.5).gamma == 0.5


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"learning_rate": ConstantSchedule(1e-3), "lr_schedule": "adaptive"}, "lr_schedule: got 'adaptive', but"),
        ({"actor_hidden": (8,), "policy_kwargs": {"net_arch": [32]}}, r"actor_hidden: got \(8,\), but policy_kwargs"),
        ({"action_std": 0.2, "policy_kwargs": {"log_std_init": 0.0}}, "action_std: got 0.2, but policy_kwargs"),
        ({"activation": "relu", "policy_kwargs": {"activation_fn": "tanh"}}, "activation: got 'relu', but"),
    ],
)
def test_arguments_that_contradict_each_other_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PolicyFlow("MlpPolicy", "Pendulum-v1", device="cpu", **fields)


@both
def test_a_config_does_not_change(kind: type[Any]) -> None:
    widths = [8, 8]
    config = kind.config_class(actor_hidden=widths)
    widths.append(99)
    assert config == kind.config_class(actor_hidden=(8, 8)) and hash(config)


def test_the_adaptive_rate_begins_within_its_bounds() -> None:
    cases: list[dict[str, Any]] = [{"learning_rate": 0.1}, {"learning_rate": 1e-4, "lr_min": 1e-3}]
    for bounds in cases:
        with pytest.raises(ValueError, match=r"learning_rate: got .*, expected lr_min to lr_max"):
            PolicyFlow.config_class(**bounds)
    PolicyFlow.config_class(learning_rate=0.0)  # to act only
    PolicyFlow.config_class(learning_rate=0.1, lr_schedule="constant")
