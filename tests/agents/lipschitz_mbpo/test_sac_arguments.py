"""What a pipeline gives to SAC is understood by LipschitzMBPO, or refused by the name of what it has instead."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from stable_baselines3 import SAC
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.noise import NormalActionNoise

from driftrl import LipschitzMBPO
from driftrl.envs import make_vec

SMALL: dict[str, Any] = {
    "learning_starts": 10, "batch_size": 8, "model_hidden": (8,), "model_epochs": 1, "model_rollouts": 2,
    "model_interval": 20, "model_retain": 20, "compile": "off", "device": "cpu", "seed": 0,
}  # fmt: skip


def make(n_envs: int = 1, **arguments: Any) -> LipschitzMBPO:
    given = SMALL | {"gradient_steps": 1, "policy_kwargs": {"net_arch": [8]}} | arguments
    return LipschitzMBPO("MlpPolicy", make_vec("InvertedPendulum-v5", n_envs, 0), **given)


def test_the_defaults_of_sac_are_accepted() -> None:
    sac = SAC("MlpPolicy", "Pendulum-v1", device="cpu")
    same = (
        "action_noise replay_buffer_kwargs optimize_memory_usage n_steps ent_coef use_sde sde_sample_freq "
        "use_sde_at_warmup target_update_interval tau gamma buffer_size batch_size"
    )
    given = {name: getattr(sac, name) for name in same.split()}
    policy_kwargs = {"net_arch": [8], "n_critics": 2, "use_sde": False, "share_features_extractor": False}
    agent = make(
        **given | {"batch_size": 8}, replay_buffer_class=None, target_entropy="auto", train_freq=1,
        policy_kwargs=policy_kwargs, stats_window_size=7,
    )  # fmt: skip
    assert agent.config == make().config
    agent.learn(12)
    assert agent.ep_info_buffer is not None and agent.ep_info_buffer.maxlen == 7


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"action_noise": NormalActionNoise(np.zeros(1), np.ones(1))}, "action_noise: got .*None; .*target_entropy"),
        ({"replay_buffer_class": ReplayBuffer}, "replay_buffer_class: got .*expected None; .*buffer_size"),
        ({"replay_buffer_kwargs": {"handle_timeout_termination": False}}, "replay_buffer_kwargs: got .*buffer_size"),
        ({"optimize_memory_usage": True}, "optimize_memory_usage: got True, expected False; .*buffer_size"),
        ({"n_steps": 3}, "n_steps: got 3, expected 1; .*rollout_max"),
        ({"target_update_interval": 2}, "target_update_interval: got 2, expected 1; .*tau"),
        ({"use_sde": True}, "use_sde: got True, expected False; .*temperature"),
        ({"ent_coef": "automatic"}, "ent_coef: got 'automatic', expected a number above 0, auto"),
        ({"ent_coef": "auto_x"}, "ent_coef: got 'auto_x', expected a number above 0, auto"),
        ({"ent_coef": 0.0}, "ent_coef: got 0.0, expected a number above 0"),
        ({"ent_coef": True}, "ent_coef: got True, expected a number above 0"),
        ({"ent_coef": "auto_nan"}, "ent_coef: got 'auto_nan', expected a number above 0"),
        ({"policy_kwargs": {"bounded_values": True}}, "bounded_values: got True, .*value_gradient"),
        ({"policy_kwargs": {"spectral_bound": 1.0}}, "spectral_bound: got 1.0, .*regularizer"),
        ({"policy_kwargs": {"log_std_init": 0}}, "log_std_init: got 0, expected -3; .*temperature"),
        ({"ent_coef": 0.1, "temperature": 0.1}, "ent_coef: got it beside temperature, expected one of them"),
        ({"gradient_steps": -2}, "gradient_steps: got -2, expected an integer of at least 1, or -1"),
        ({"train_freq": (1, "close")}, "unit of the `train_freq`"),
    ],
)
def test_what_is_not_available_is_refused_by_our_name(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**arguments)


@pytest.mark.parametrize(
    ("ent_coef", "temperature", "learns"), [("auto", 1.0, True), ("auto_0.1", 0.1, True), (0.25, 0.25, False)]
)
def test_ent_coef_is_the_temperature(ent_coef: float | str, temperature: float, learns: bool) -> None:
    agent = make(ent_coef=ent_coef)
    assert (agent.config.temperature, agent.config.learn_temperature) == (temperature, learns)
    assert agent.ent_coef_tensor.item() == pytest.approx(temperature)
    assert (agent.log_ent_coef is not None) == learns
    assert agent.ent_coef == ("auto" if learns else temperature)
    agent.learn(15)
    assert (agent.ent_coef_tensor.item() != pytest.approx(temperature, rel=1e-6)) == learns


@pytest.mark.parametrize(("n_envs", "train_freq"), [(1, 4), (2, (3, "step"))])
def test_minus_one_gradient_step_is_an_update_for_each_transition(n_envs: int, train_freq: Any) -> None:
    steps = 4 if n_envs == 1 else 3
    agent = make(n_envs, train_freq=train_freq, gradient_steps=-1, learning_starts=0)
    agent.learn(2 * steps * n_envs)
    assert agent._n_updates == 2 * steps * n_envs
    other = make(n_envs, train_freq=train_freq, gradient_steps=2, learning_starts=0)
    other.learn(2 * steps * n_envs)
    assert other._n_updates == 2 * 2 * n_envs  # two per environment and call


def test_updates_may_follow_episodes_and_go_on_after_load(tmp_path: Any) -> None:
    agent = make(train_freq=(1, "episode"), learning_starts=5)
    ends: list[int] = []

    def count(variables: dict[str, Any], _: Any) -> bool:
        ends.extend(variables["dones"].nonzero()[0])
        return True

    agent.learn(30, callback=count)
    assert ends and agent._n_updates in (len(ends), len(ends) - 1)  # the first may lie before learning_starts
    agent.save(tmp_path / "agent")
    loaded = LipschitzMBPO.load(tmp_path / "agent", env=agent.get_env(), device="cpu")
    assert loaded.train_freq == agent.train_freq
    again = LipschitzMBPO.load(tmp_path / "agent", env=agent.get_env(), device="cpu", train_freq=4)
    again.learn(8)
    assert again.train_freq.frequency == 4  # type: ignore[union-attr]


@pytest.mark.parametrize("model", ["none", "probabilistic"])
def test_learning_may_start_at_once(model: str) -> None:
    given: dict[str, Any] = {"model": "none", "learning_starts": 0, "gradient_steps": 1, "device": "cpu"}
    agent = make(learning_starts=0) if model != "none" else LipschitzMBPO("MlpPolicy", "InvertedPendulum-v5", **given)
    agent.learn(4)
    assert agent._n_updates == (4 if model == "none" else 3)  # a model needs a transition to hold out


def test_networks_may_be_linear() -> None:
    agent = make(policy_kwargs={"net_arch": []})
    agent.learn(12)
    assert len(agent.policy.critic.layers) == 1
    obs, action = torch.randn(3, 4), torch.rand(3, 1)
    with torch.no_grad():
        values = [agent.policy.critic(scale * obs, scale * action) for scale in (0.0, 1.0, 2.0)]
    assert torch.allclose(values[2] - values[1], values[1] - values[0], atol=1e-5)
