"""No option is inert: another value of any field changes weights or logs within two iterations, or is refused."""

from __future__ import annotations

import dataclasses
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from stable_baselines3 import SAC
from stable_baselines3.common.logger import KVWriter, Logger
from stable_baselines3.common.utils import ConstantSchedule, FloatSchedule, LinearSchedule
from torch import Tensor, nn

from driftrl import LipschitzMBPO, LipschitzMBPOConfig, PolicyFlow, PolicyFlowConfig
from driftrl.agents.common.compiling import Compiled
from driftrl.agents.common.config import inert, without_inert
from driftrl.agents.common.demonstrations import Demonstrations
from driftrl.agents.registry import AGENTS
from driftrl.envs import make_vec

from .option_values import BASE, OTHERS

CASES = [
    *((PolicyFlow, name) for name in (field.name for field in dataclasses.fields(PolicyFlowConfig))),
    *((LipschitzMBPO, name) for name in (field.name for field in dataclasses.fields(LipschitzMBPOConfig))),
]


class Kept(KVWriter):
    """All that was logged but for times."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def write(self, key_values: dict[str, Any], key_excluded: dict[str, tuple[str, ...]], step: int = 0) -> None:
        self.rows.append({name: value for name, value in key_values.items() if not name.startswith("time/")})

    def close(self) -> None: ...


class OneBadReward(gym.Env[np.ndarray, np.ndarray]):
    """The reward of step 30 is not finite."""

    observation_space, action_space = spaces.Box(-1, 1, (2,)), spaces.Box(-1, 1, (1,))
    steps = 0

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        return np.zeros(2, np.float32), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.steps += 1
        return np.ones(2, np.float32), float("nan") if self.steps == 30 else 1.0, False, self.steps % 10 == 0, {}


def run(kind: type[Any], fields: dict[str, Any], name: str) -> list[Any]:
    """Weights and logs after two iterations, and the error if there is one."""
    env: Any = OneBadReward() if name == "nonfinite" else make_vec("InvertedPendulum-v5", 1, 0)
    torch.manual_seed(0)
    agent = kind("MlpPolicy", env, seed=0, device="cpu", **BASE[kind] | fields)
    if kind is PolicyFlow:
        obs = np.linspace(-0.1, 0.1, 4 * 40, dtype=np.float32).reshape(40, -1)
        if agent.config.bc_coef:
            agent.use_demonstrations(Demonstrations(obs, obs[:, :1], obs[:, 0], np.array([20, 20])))
    kept = Kept()
    agent.set_logger(Logger(None, [kept]))
    seen: list[Any] = []
    try:
        agent.learn(2 * agent.n_steps if kind is PolicyFlow else 60, log_interval=1)
    except ValueError as error:
        seen.append(str(error))
    agent.logger.dump(0)
    weights = {each: value.tolist() for each, value in agent.policy.state_dict().items()}
    monitor = (
        agent._monitor.drop if kind is PolicyFlow and agent._monitor else None
    )  # a fall takes hundreds of episodes
    return [*seen, weights, repr(kept.rows), isinstance(agent._step, Compiled), monitor]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize(("kind", "name"), CASES, ids=lambda value: getattr(value, "__name__", value))
def test_another_value_changes_something_or_is_refused(
    kind: type[Any], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    other, beside = OTHERS[kind][name]
    default = {field.name: field.default for field in dataclasses.fields(kind.config_class)}[name]
    assert other not in (default, BASE[kind].get(name, default))
    if beside:  # without what switches it on it is refused by name, or it matters already
        try:
            kind("MlpPolicy", make_vec("InvertedPendulum-v5", 1, 0), device="cpu", **BASE[kind] | {name: other})
        except ValueError as error:
            assert str(error).startswith(f"{name}: got") or "expected" in str(error)
    before = run(kind, beside, name)
    assert run(kind, beside, name) == before  # else a difference would prove nothing
    assert run(kind, beside | {name: other}, name) != before


OTHER_OPTIMIZER = {"optimizer_class": torch.optim.SGD}


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        (PolicyFlow, {"hurst": 0.6}, "hurst: got 0.6, which changes nothing without exploration_noise fractional"),
        (PolicyFlow, {"noise_time": 3.0}, "noise_time: got 3.0, which changes nothing without exploration_noise ou"),
        (PolicyFlow, {"spread_std": 0.3}, "spread_std: got 0.3, which changes nothing without spread_coef above 0"),
        (PolicyFlow, {"components": 3}, "components: got 3, which changes nothing without base mixture"),
        (PolicyFlow, {"ratio_draws": 3}, "ratio_draws: got 3, which changes nothing without ratio marginal, fpo"),
        (PolicyFlow, {"collapse_drop": 0.3}, "collapse_drop: got 0.3, which changes nothing without on_collapse"),
        (PolicyFlow, {"lr_schedule": "constant", "desired_kl": 0.1}, "desired_kl: got 0.1, which changes nothing"),
        (PolicyFlow, {"policy_kwargs": OTHER_OPTIMIZER, "weight_decay": 0.1}, "weight_decay: got 0.1, which changes"),
        (LipschitzMBPO, {"model": "none", "real_ratio": 0.2}, "real_ratio: got 0.2, which changes nothing without"),
        (LipschitzMBPO, {"adversary_steps": 3}, "adversary_steps: got 3, which changes nothing without"),
        (LipschitzMBPO, {"regularizer": "none", "robust_coef": 1.0}, "robust_coef: got 1.0, which changes nothing"),
        (LipschitzMBPO, {"spectral_bound": 1.0}, "spectral_bound: got 1.0, which changes nothing without regularizer"),
        (LipschitzMBPO, {"spectral_layers": "last"}, "spectral_layers: got 'last', which changes nothing"),
        (LipschitzMBPO, {"regularizer": "spectral", "critic_hidden": (8,), "spectral_layers": "last"}, "spectral_la"),
        (LipschitzMBPO, {"robust_coef": 0, "diagnostics_interval": 0, "robust_radius": 1.0}, "robust_radius: got 1.0,"),
        (LipschitzMBPO, {"rollout_start": 0, "rollout_end": 0, "rollout_min": 2}, "rollout_min: got 2, which changes"),
        (LipschitzMBPO, {"critic_hidden": (), "critic_layer_norm": True}, "critic_layer_norm: got True, which changes"),
        (LipschitzMBPO, {"actor_hidden": (), "critic_hidden": (), "activation": "elu"}, "activation: got 'elu', which"),
        (PolicyFlow, {"actor_hidden": (), "critic_hidden": (), "activation": "elu"}, "activation: got 'elu', which"),
        (PolicyFlow, {"vf_coef": 0, "critic_warmup": 2}, "critic_warmup: got 2, which changes nothing without vf_coef"),
        (PolicyFlow, {"vf_coef": 0, "critic_learning_rate": 0.1}, "critic_learning_rate: got 0.1, which changes nothi"),
        (PolicyFlow, {"gamma": 0, "gae_lambda": 0.5}, "gae_lambda: got 0.5, which changes nothing without gamma above"),
        (PolicyFlow, {"policy_kwargs": {"chained": True}}, "chained: got True, expected it elsewhere; choose "),
        (LipschitzMBPO, {"critic_hidden": (), "regularizer": "spectral"}, "regularizer: got 'spectral', expected none"),
        (LipschitzMBPO, {"real_ratio": 1.0}, "real_ratio: got 1.0, expected below 1 with a model"),
        (LipschitzMBPO, {"learn_temperature": False, "target_entropy": 1.0}, "target_entropy: got 1.0, which changes"),
    ],
)  # fmt: skip
def test_what_changes_nothing_is_refused_in_one_line_that_names_the_switch(
    kind: type[Any], fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        kind("MlpPolicy", make_vec("InvertedPendulum-v5", 1, 0), device="cpu", **fields)


def test_presets_hold_nothing_inert_once_the_users_choice_is_known() -> None:
    for name, spec in AGENTS.items():
        for preset, by_env in spec.presets.items():
            for env_id in [*by_env, "Pendulum-v1"]:
                _, config = spec.settings(env_id, preset)
                assert inert(config) == {}, (name, env_id)
    _, config = AGENTS["mbpo"].settings("Hopper-v5", "fast", model="none", regularizer="none")
    assert (config.model, inert(config)) == ("none", {})
    _, config = AGENTS["policyflow"].settings("driftrl/MultiGoal-v0", "standard", spread_coef=0, target_entropy=None)
    assert inert(config) == {}
    chosen = without_inert(PolicyFlowConfig(hurst=0.6), ["hurst"])
    assert inert(chosen) == {"hurst": "exploration_noise fractional"}


def small(kind: type[Any], **fields: Any) -> Any:
    return kind("MlpPolicy", make_vec("InvertedPendulum-v5", 1, 0), seed=0, device="cpu", **BASE[kind] | fields)


@pytest.mark.parametrize("kind", [PolicyFlow, LipschitzMBPO])
def test_attributes_are_the_configs_fields(kind: type[Any]) -> None:
    agent = small(kind)
    for field in dataclasses.fields(kind.config_class):
        if field.name not in ("lr_schedule", "target_entropy"):
            assert getattr(agent, field.name) == getattr(agent.config, field.name)
    agent.gamma = 0.5
    assert agent.config.gamma == agent.gamma == 0.5
    with pytest.raises(ValueError, match=r"gamma: got 2, expected a number in \[0, 1\]"):
        agent.gamma = 2
    with pytest.raises(ValueError, match=r"actor_hidden: got \(3,\), but it was fixed when the agent was made"):
        agent.actor_hidden = (3,)
    with pytest.raises(ValueError, match="which changes nothing without"):
        if kind is PolicyFlow:
            agent.collapse_drop = 0.2
        else:
            agent.adversary_steps = 3


@pytest.mark.parametrize("kind", [PolicyFlow, LipschitzMBPO])
def test_attributes_of_stable_baselines3_that_nothing_reads_are_refused_when_it_learns(kind: type[Any]) -> None:
    agent = small(kind)
    agent.use_sde = True
    with pytest.raises(ValueError, match="use_sde: got True, expected False; "):
        agent.learn(32)
    if kind is PolicyFlow:
        with pytest.raises(ValueError, match="critic_warmup: got 1, but it was fixed when the agent was made"):
            agent.critic_warmup = 1
        agent = small(kind, spread_coef=0.1, target_entropy=(1.0, 0.5))
        agent.target_entropy = None
        assert agent.config.target_entropy is None
        with pytest.raises(ValueError, match="critic_hidden: got 3, expected positive integers"):
            agent.critic_hidden = 3


def test_sacs_attributes_can_be_read() -> None:
    agent = small(LipschitzMBPO)
    assert (agent.ent_coef, agent.target_entropy) == ("auto", -1.0)
    assert small(LipschitzMBPO, temperature=0.2, learn_temperature=False).ent_coef == 0.2
    assert agent.actor is agent.policy.actor and agent.critic is agent.policy.critic
    assert agent.critic_target is agent.policy.target_critic
    assert agent.target_update_interval == SAC("MlpPolicy", "Pendulum-v1").target_update_interval


def test_an_assigned_weight_is_used_by_the_next_update() -> None:
    agents = [small(PolicyFlow), small(PolicyFlow), small(PolicyFlow, ent_coef=10.0)]
    agents[1].ent_coef = 10.0
    for agent in agents:
        agent.learn(32)
    stds = [agent.policy.actor.log_std.item() for agent in agents]
    assert stds[1] == stds[2] != stds[0]
    assert agents[1].config == agents[2].config


@pytest.mark.parametrize("kind", [PolicyFlow, LipschitzMBPO])
def test_the_learning_rate_is_what_is_set_and_shown(kind: type[Any]) -> None:
    agent = small(kind)
    agent.learning_rate = 1e-5
    agent._setup_lr_schedule()  # what SB3's users do after it
    assert agent.config.learning_rate == agent.learning_rate == agent.lr_schedule(1.0) == 1e-5
    agent.lr_schedule = lambda remaining: 2e-5 * remaining
    assert agent.config.lr_schedule == "function"
    assert (agent.config.learning_rate, agent.lr_schedule(0.5)) == (2e-5, 1e-5)
    agent.learn(32 if kind is PolicyFlow else 40)
    assert agent.policy.optimizer.param_groups[0]["lr"] <= 2e-5
    agent.learning_rate = ConstantSchedule(1e-4)
    assert (agent.config.learning_rate, agent.config.lr_schedule, agent.learning_rate) == (1e-4, "constant", 1e-4)
    agent.learning_rate = FloatSchedule(LinearSchedule(1e-3, 0.0, 1.0))
    assert (agent.config.learning_rate, agent.config.lr_schedule, agent.lr_schedule(0.25)) == (1e-3, "linear", 2.5e-4)
    agent.lr_schedule = "constant"
    assert agent.lr_schedule(0.25) == 1e-3
    with pytest.raises(ValueError, match="lr_schedule: got 'function', expected learning_rate to be one"):
        small(kind, lr_schedule="function")


@pytest.mark.parametrize("kind", [PolicyFlow, LipschitzMBPO])
def test_schedules_given_to_the_constructor_and_saved_files_tell_the_truth(kind: type[Any], tmp_path: Any) -> None:
    for rate, expected in (
        (ConstantSchedule(1e-4), (1e-4, "constant")),
        (LinearSchedule(1e-3, 0.0, 1.0), (1e-3, "linear")),
        (LinearSchedule(1e-3, 1e-4, 0.5), (1e-3, "function")),
        (2e-4, (2e-4, kind.config_class().lr_schedule)),
    ):
        agent = kind("MlpPolicy", make_vec("InvertedPendulum-v5", 1, 0), rate, seed=0, device="cpu", **BASE[kind])
        assert (agent.config.learning_rate, agent.config.lr_schedule) == expected
        agent.save(tmp_path / "agent")
        loaded = kind.load(tmp_path / "agent", device="cpu")
        assert loaded.config == agent.config
        assert loaded.lr_schedule(0.7) == agent.lr_schedule(0.7)


def test_policy_arguments_are_in_the_config() -> None:
    policy_kwargs = {
        "net_arch": {"pi": [5], "vf": [6, 7]}, "activation_fn": nn.Tanh, "log_std_init": -1.0, "base_std": 0.3,
        "optimizer_kwargs": {"weight_decay": 0.02},
    }  # fmt: skip
    config = PolicyFlow("MlpPolicy", make_vec("InvertedPendulum-v5", 1, 0), policy_kwargs=policy_kwargs).config
    assert (config.actor_hidden, config.critic_hidden, config.activation) == ((5,), (6, 7), "tanh")
    assert (config.base_std, config.weight_decay) == (0.3, 0.02)
    assert config.action_std == pytest.approx(np.exp(-1))
    policy_kwargs = {"net_arch": [5, 6], "activation_fn": nn.ELU, "tau": 0.1}
    other = LipschitzMBPO("MlpPolicy", make_vec("InvertedPendulum-v5", 1, 0), policy_kwargs=policy_kwargs).config
    assert (other.actor_hidden, other.critic_hidden, other.activation, other.tau) == ((5, 6), (5, 6), "elu", 0.1)


def test_entropy_does_not_push_a_base_whose_spread_is_at_its_bound() -> None:
    agent = small(PolicyFlow, ent_coef=1.0)
    actor, obs = agent.policy.actor, torch.zeros(1, agent.policy.obs_dim)
    for beyond in (-9.0, 9.0):
        with torch.no_grad():
            actor.base_log_std.fill_(beyond)
        actor.base_log_std.grad = None
        actor.joint_entropy(obs).backward()
        assert torch.equal(actor.base_log_std.grad, torch.zeros(1))
        assert torch.equal(actor.base_noise_log_std(), actor.base(obs)[1][0])


def test_entropy_reaches_all_learned_noises() -> None:
    agent = small(PolicyFlow, ratio="chain", solver_steps=3, ent_coef=1.0)
    entropy: Tensor = agent.policy.actor.joint_entropy(torch.zeros(1, agent.policy.obs_dim))
    entropy.backward()
    inner = agent.policy.actor.chain_log_std
    assert torch.equal(inner.grad, torch.ones_like(inner))
    assert torch.equal(agent.policy.actor.log_std.grad, torch.ones(1))
    assert torch.equal(agent.policy.actor.base_log_std.grad, torch.ones(1))
