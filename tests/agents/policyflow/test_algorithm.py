"""The agent in its ecosystem: training, determinism, saving, callbacks, bad input."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback, CheckpointCallback, EvalCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.envs import IdentityEnvBox
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.logger import Logger, configure
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecNormalize

from driftrl import PolicyFlow, PolicyFlowConfig
from driftrl.agents.common.program import tensors_in
from driftrl.agents.common.weights import Weights
from driftrl.agents.policyflow.diagnostics import flow_diagnostics
from driftrl.agents.policyflow.other_ratios import EndpointRatio
from driftrl.agents.policyflow.ratios import draw_epoch, record_references

PENDULUM = "InvertedPendulum-v5"
SMALL: dict[str, Any] = {"n_steps": 16, "batch_size": 16, "n_epochs": 2, "device": "cpu", "seed": 0}


def pendulum(n_envs: int = 2, seed: int = 0) -> VecEnv:
    return make_vec_env(PENDULUM, n_envs, seed=seed)


def weights(agent: PolicyFlow) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in agent.policy.state_dict().items()}


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("ratio", ["interpolation", "endpoint"])
@pytest.mark.parametrize("base", ["standard", "learned", "gaussian"])
def test_same_seed_gives_the_same_weights_bit_for_bit(ratio: str, base: str) -> None:
    def train(seed: int) -> dict[str, torch.Tensor]:
        fields = SMALL | {"ratio": ratio, "base": base, "seed": seed, "spread_coef": 0.01, "jacobian_coef": 0.01}
        return weights(PolicyFlow("MlpPolicy", pendulum(seed=seed), **fields).learn(32 * 4))

    first = train(0)
    assert equal(first, train(0))
    assert not equal(first, train(1))


NOISES: list[dict[str, Any]] = [
    {},
    {"exploration_noise": "ou"},
    {"exploration_noise": "fractional", "hurst": 0.8},
    {"langevin_eps": 0.3},
    {"langevin_eps": 1.0, "exploration_noise": "fractional", "hurst": 0.4},
]


@pytest.mark.parametrize("fields", NOISES[1:])
def test_same_seed_gives_the_same_weights_whatever_the_noise(fields: dict[str, Any]) -> None:
    def train(seed: int) -> dict[str, torch.Tensor]:
        agent = PolicyFlow("MlpPolicy", pendulum(), **SMALL | fields | {"seed": seed, "solver_error_coef": 1.0})
        return weights(agent.learn(32 * 4))

    assert equal(train(0), train(0))
    assert not equal(train(0), train(1))


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("ratio", ["interpolation", "endpoint"])
@pytest.mark.parametrize("base", ["standard", "learned", "gaussian"])
def test_ratio_of_a_stored_rollout_is_one_before_each_update(ratio: str, base: str, noise: dict[str, Any]) -> None:
    # The normaliser moves between rollout and update in the first iteration (a new field ignores observations) and
    # between updates later: neither may show in the ratio. Up to rounding: rollout and update differ in batch size.
    class FirstRatios(PolicyFlow):
        seen: ClassVar[list[float]] = []

        def train(self) -> None:
            actor, generator = self.policy.actor, torch.Generator()
            references = record_references(actor, self._ratio, self.samples, generator)
            terms = self._ratio.terms(actor, draw_epoch(actor, self._ratio, references, generator))
            self.seen.extend([terms.log_ratio.abs().max().item(), terms.kl.abs().max().item()])
            super().train()

    FirstRatios.seen.clear()
    FirstRatios("MlpPolicy", pendulum(), **SMALL | {"ratio": ratio, "base": base} | noise).learn(32 * 3)
    assert len(FirstRatios.seen) == 6
    assert max(FirstRatios.seen) < 1e-5


def test_training_goes_on_after_a_prediction() -> None:
    agent = PolicyFlow("MlpPolicy", pendulum(), **SMALL | {"ratio": "endpoint"})
    agent.predict(np.zeros(4, np.float32))  # what it keeps for the next call must not be without gradients
    agent.learn(32)


def test_measuring_does_not_change_training() -> None:
    def train(interval: int) -> dict[str, torch.Tensor]:
        agent = PolicyFlow("MlpPolicy", pendulum(), diagnostics_interval=interval, **SMALL)
        # the evaluation samples, that is, it draws from PyTorch's global generator
        callback = EvalCallback(pendulum(1), eval_freq=10, deterministic=False) if interval else None
        return weights(agent.learn(32 * 3, callback=callback))

    assert equal(train(0), train(1))


class IdentityDict(gym.ObservationWrapper[Any, Any, Any]):
    """The identity task with its observation in a Dict of three, one a number."""

    def __init__(self) -> None:
        super().__init__(IdentityEnvBox(eps=0.2, ep_length=100))
        box = self.env.observation_space
        nothing, number = spaces.Box(-1, 1, (2,)), spaces.Box(-1, 1, ())
        self.observation_space = spaces.Dict({"goal": box, "nothing": nothing, "number": number})

    def observation(self, observation: Any) -> dict[str, Any]:
        return {"goal": observation, "nothing": np.zeros(2, np.float32), "number": np.float32(0.5)}


@pytest.mark.parametrize(("ratio", "env"), [("interpolation", "box"), ("endpoint", "box"), ("interpolation", "dict")])
def test_learns_to_act_as_observed(ratio: str, env: str) -> None:
    # reward 1 where the action is within 0.2 of the observation; uniform random actions get about 0.18 of it
    task = IdentityDict if env == "dict" else lambda: IdentityEnvBox(eps=0.2, ep_length=100)
    envs = DummyVecEnv([lambda: Monitor(task())] * 8)
    agent = PolicyFlow(
        "MultiInputPolicy" if env == "dict" else "MlpPolicy", envs, n_steps=128, batch_size=128, gamma=0.5,
        learning_rate=1e-3, ratio=ratio, normalize_observation=False, seed=0, device="cpu",
    )  # fmt: skip
    agent.learn(8_000)
    mean, _ = evaluate_policy(agent, envs, 8)
    assert float(np.mean(mean)) > 90


@pytest.mark.slow
@pytest.mark.parametrize("ratio", ["interpolation", "endpoint"])
@pytest.mark.parametrize("noise", NOISES[:4])
def test_balances_the_pendulum(ratio: str, noise: dict[str, Any]) -> None:
    agent = PolicyFlow("MlpPolicy", pendulum(8), n_steps=64, batch_size=128, ratio=ratio, seed=0, device="cpu", **noise)
    agent.learn(40_000)
    mean, _ = evaluate_policy(agent, pendulum(1, seed=99), 5)
    assert mean == 1000


@pytest.mark.parametrize("fields", [{}, {"ema_decay": 0.9}, {"base": "gaussian", "activation": "tanh"}, *NOISES[2:4]])
def test_saved_agent_predicts_and_trains_on_as_before(tmp_path: Path, fields: dict[str, Any]) -> None:
    agent = PolicyFlow("MlpPolicy", pendulum(), **SMALL, **fields).learn(64)
    agent.save(tmp_path / "agent.zip")
    loaded = PolicyFlow.load(tmp_path / "agent.zip", env=pendulum(), device="cpu")
    obs = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)
    assert np.array_equal(agent.predict(obs, deterministic=True)[0], loaded.predict(obs, deterministic=True)[0])
    assert equal(weights(agent), weights(loaded))
    assert loaded.config == agent.config
    assert loaded.num_timesteps == 64
    optimizer, loaded_optimizer = agent.policy.optimizer.state_dict(), loaded.policy.optimizer.state_dict()
    assert optimizer["param_groups"] == loaded_optimizer["param_groups"]  # the adapted learning rate, too
    loaded.learn(64, reset_num_timesteps=False)
    assert loaded.num_timesteps == 128


def test_parameters_can_be_read_and_set() -> None:
    source, target = (PolicyFlow("MlpPolicy", pendulum(), **SMALL | {"seed": seed}) for seed in (0, 1))
    source.learn(32)
    target.set_parameters(source.get_parameters())
    assert set(source.get_parameters()) == {"policy", "policy.optimizer"}
    assert equal(weights(source), weights(target))


def test_environment_can_be_replaced() -> None:
    agent = PolicyFlow("MlpPolicy", pendulum(), **SMALL).learn(32)
    agent.set_env(pendulum(seed=5))
    agent.learn(32, reset_num_timesteps=False)
    assert agent.num_timesteps == 64


def test_callbacks_progress_bar_vecnormalize_and_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("rich")
    env, eval_env = VecNormalize(pendulum()), VecNormalize(pendulum(1), training=False, norm_reward=False)
    agent = PolicyFlow("MlpPolicy", env, tensorboard_log=str(tmp_path / "tb"), **SMALL)
    callbacks: list[BaseCallback] = [
        EvalCallback(eval_env, best_model_save_path=str(tmp_path), log_path=str(tmp_path), eval_freq=16, verbose=0),
        CheckpointCallback(16, str(tmp_path / "checkpoints")),
    ]
    agent.learn(64, callback=callbacks)
    assert (tmp_path / "best_model.zip").exists()
    assert (tmp_path / "evaluations.npz").exists()
    assert len(list((tmp_path / "checkpoints").iterdir())) == 2
    assert [path.name for path in (tmp_path / "tb").iterdir()] == ["PolicyFlow_1"]


def test_a_callback_can_end_training() -> None:
    class Stop(BaseCallback):
        def _on_step(self) -> bool:
            return self.num_timesteps < 10

    agent = PolicyFlow("MlpPolicy", pendulum(), **SMALL)
    before = weights(agent)
    agent.learn(64, callback=Stop())
    assert agent.num_timesteps == 10
    assert equal(before, weights(agent))


def test_log_holds_the_documented_names(tmp_path: Path) -> None:
    regularizers: dict[str, Any] = {
        "spread_coef": 1e-3,
        "target_entropy": (1.0, 0.0),
        "on_collapse": "rollback",
        "transport_coef": 1e-3,
        "jacobian_coef": 1e-3,
        "solver_error_coef": 1e-3,
        "langevin_eps": 0.1,
    }
    agent = PolicyFlow("MlpPolicy", pendulum(), diagnostics_interval=1, **regularizers, **SMALL)
    agent.set_logger(configure(str(tmp_path), ["csv"]))
    agent.learn(32 * 6)
    agent.logger.close()
    header = (tmp_path / "progress.csv").read_text().splitlines()[0]
    glossary = (Path(__file__).parents[3] / "docs" / "policyflow.md").read_text()
    names = set(header.split(","))
    assert {"rollout/ep_rew_mean", "train/approx_kl", "train/clip_fraction", "train/explained_variance", "time/fps",
            "flow/ratio_correlation", "flow/ratio_bias", "flow/exact_clip_fraction", "flow/jacobian_norm",
            "flow/sde_gap", "flow/entropy", "flow/target_entropy", "flow/spread_coef",
            "collapse/return_fall"} <= names  # fmt: skip
    assert [name for name in sorted(names) if f"`{name}`" not in glossary] == []


def test_learning_rate_follows_the_kl() -> None:
    agent = PolicyFlow("MlpPolicy", pendulum(), desired_kl=0.01, lr_max=4e-4, lr_min=1.5e-4, **SMALL)
    agent.set_logger(Logger(None, []))
    rates = []
    for kl in (0.021, 0.019, 0.006, 0.004, 0.004, 1.0, 1.0, 1.0):
        agent._adapt_learning_rate(kl)
        agent._update_learning_rate(agent.policy.optimizer)
        rates.append(agent.policy.optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([2e-4, 2e-4, 2e-4, 3e-4, 4e-4, 4e-4 / 1.5, 4e-4 / 2.25, 1.5e-4])


@pytest.mark.parametrize(("remaining", "goal"), [(1.0, 0.02), (0.5, 0.0125), (0.0, 0.005)])
def test_the_desired_kl_moves_to_its_end_over_training(remaining: float, goal: float) -> None:
    agent = PolicyFlow("MlpPolicy", pendulum(), desired_kl=0.02, desired_kl_end=0.005, **SMALL)
    agent._current_progress_remaining = remaining
    for factor, change in ((2.01, 1 / 1.5), (1.99, 1.0), (0.51, 1.0), (0.49, 1.5)):
        agent._rate = 1e-4
        agent._adapt_learning_rate(factor * goal)
        assert agent._rate == pytest.approx(change * 1e-4)


@pytest.mark.parametrize(
    ("arguments", "halfway"),
    [
        ({"lr_schedule": "linear"}, 1.5e-4),
        ({"lr_schedule": "constant"}, 3e-4),
        ({"learning_rate": lambda p: p**2}, 0.25),
    ],
)
def test_other_learning_rate_schedules(arguments: dict[str, Any], halfway: float) -> None:
    agent = PolicyFlow("MlpPolicy", pendulum(), **SMALL, **arguments)
    agent.learn(32)
    agent._current_progress_remaining = 0.5
    agent.train()
    assert agent.policy.optimizer.param_groups[0]["lr"] == pytest.approx(halfway)


def test_target_kl_ends_the_epochs() -> None:
    agent = PolicyFlow("MlpPolicy", pendulum(), **SMALL | {"n_epochs": 50, "target_kl": 1e-6, "learning_rate": 1e-2})
    agent.learn(32)
    assert agent._n_updates < 50


def test_weight_average_is_the_exponential_one_and_what_predict_uses(monkeypatch: pytest.MonkeyPatch) -> None:
    agent = PolicyFlow("MlpPolicy", pendulum(), ema_decay=0.5, **SMALL | {"n_epochs": 3, "batch_size": 32})
    course: list[torch.Tensor] = []
    first = agent.policy.actor.log_std.detach().clone()
    step = Weights.step

    def watch(weights: Weights, gradient: torch.Tensor) -> None:
        step(weights, gradient)
        course.append(agent.policy.actor.log_std.detach().clone())

    monkeypatch.setattr(Weights, "step", watch)
    agent.learn(32)
    average = agent.policy.averaged_actor
    assert average is not None
    assert not torch.equal(first, course[0])
    expected = 0.125 * first + 0.125 * course[0] + 0.25 * course[1] + 0.5 * course[2]
    torch.testing.assert_close(average.log_std.detach(), expected)
    obs = np.ones((1, 4), np.float32)
    before = agent.predict(obs, deterministic=True)[0]
    with torch.no_grad():
        agent.policy.actor.field.output.bias.add_(1)
    assert np.array_equal(before, agent.predict(obs, deterministic=True)[0])


def test_exact_ratio_has_no_bias_and_correlates_with_itself() -> None:
    agent = PolicyFlow("MlpPolicy", pendulum(), ratio="endpoint", **SMALL).learn(64)
    values = flow_diagnostics(agent.policy.actor, EndpointRatio(), agent.samples, 0.2)
    assert values["flow/ratio_correlation"] == pytest.approx(1)
    assert values["flow/ratio_bias"] == values["flow/ratio_error"] == 0


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"ratio": "exact"}, ValueError, "ratio: got 'exact', expected one of interpolation, endpoint"),
        ({"use_sde": True}, ValueError, "use_sde: got True, expected False; .*base_std"),
        ({"env": None}, ValueError, "env: got None"),
        ({"env": PENDULUM, "n_steps": 1, "batch_size": 1}, ValueError, "rollout of 1 sample"),
        (
            {"clip_range": lambda x: 0.1 * x},
            ValueError,
            "clip_range: got a schedule from 0.1 to 0.0, expected a number",
        ),
        ({"exploration_noise": "pink"}, ValueError, "exploration_noise: got 'pink', expected one of gaussian, ou, fr"),
        ({"noise_time": 0.0}, ValueError, "noise_time: got 0.0, expected a number above 0"),
        ({"hurst": 1.0}, ValueError, r"hurst: got 1.0, expected a number in \[0.3, 1\)"),
        ({"sampler": "sde"}, TypeError, "unknown argument: got sampler"),
        ({"clip_rnge": 0.1}, TypeError, r"unknown argument: got clip_rnge.*; did you mean clip_range\?"),
        ({"langevin_eps": -0.1}, ValueError, r"langevin_eps: got -0.1, expected a number in \[0, 1\]"),
        ({"langevin_eps": 1.5}, ValueError, r"langevin_eps: got 1.5, expected a number in \[0, 1\]"),
        ({"langevin_eps": 0.1, "solver": "rk4"}, ValueError, "solver: got 'rk4', expected euler with langevin_eps"),
        ({"langevin_eps": 0.1, "policy_kwargs": {"solver": "heun"}}, ValueError, "solver: got 'heun', expected euler"),
        ({"policy_kwargs": {"langevin_eps": 2.0}}, ValueError, r"langevin_eps: got 2.0, expected .* \[0, 1\]"),
        ({"solver_error_coef": -1.0}, ValueError, "solver_error_coef: got -1.0, expected a number of at least 0"),
        ({"hurst": 0.8}, ValueError, "hurst: got 0.8, which changes nothing without exploration_noise fractional"),
        ({"ratio_draws": 4}, ValueError, "ratio_draws: got 4, which changes nothing without ratio marginal, fpo"),
    ],
)
def test_impossible_arguments_are_refused(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        PolicyFlow("MlpPolicy", **{"env": pendulum()} | SMALL | arguments)


def test_deterministic_action_follows_the_ode_whatever_the_noise_of_the_flow() -> None:
    agents = [PolicyFlow("MlpPolicy", pendulum(), **SMALL | {"langevin_eps": eps}) for eps in (0.0, 0.1)]
    agents[0].learn(64)
    agents[1].policy.load_state_dict(agents[0].policy.state_dict())
    obs = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)
    first, second = (agent.predict(obs, deterministic=True)[0] for agent in agents)
    assert np.array_equal(first, second)
    action, _, _ = agents[1].policy(torch.as_tensor(obs), deterministic=True)
    np.testing.assert_allclose(agents[1].policy.unscale_action(action.detach().numpy().clip(-1, 1)), first, rtol=1e-5)
    assert not np.array_equal(agents[1].predict(obs)[0], agents[1].predict(obs)[0])


def test_discrete_actions_are_refused() -> None:
    with pytest.raises(ValueError, match="unsupported action space: got Discrete"):
        PolicyFlow("MlpPolicy", "CartPole-v1")


def test_config_and_keywords_combine() -> None:
    config = PolicyFlowConfig(gamma=0.9, n_steps=64)
    agent = PolicyFlow("MlpPolicy", pendulum(), config=config, n_steps=32, device="cpu")
    assert (agent.config.gamma, agent.config.n_steps) == (0.9, 32)
    assert config.n_steps == 64


def test_policy_arguments_take_precedence() -> None:
    agent = PolicyFlow("MlpPolicy", pendulum(), policy_kwargs={"net_arch": [8, 8, 8], "log_std_init": -2}, device="cpu")
    assert agent.policy.actor.field.output.in_features == 8
    assert len(agent.policy.actor.field.layers) == 2
    assert agent.policy.actor.log_std.tolist() == [-2]


@pytest.mark.gpu
@pytest.mark.parametrize(("ratio", "compile"), [("interpolation", "off"), ("endpoint", "off"), ("interpolation", "on")])
def test_training_on_cuda_keeps_everything_there(ratio: str, compile: str) -> None:
    fields = SMALL | {"device": "cuda", "ratio": ratio, "ema_decay": 0.9, "compile": compile}
    agent = PolicyFlow("MlpPolicy", pendulum(), **fields).learn(96)
    tensors = [*agent.policy.state_dict().values(), *tensors_in((agent.storage, agent.samples))]
    assert all(tensor.is_cuda for tensor in tensors)
    again = PolicyFlow("MlpPolicy", pendulum(), **fields).learn(96)
    assert equal(weights(agent), weights(again))


@pytest.mark.gpu
def test_cuda_and_cpu_predict_alike() -> None:
    agent = PolicyFlow("MlpPolicy", pendulum(), **SMALL | {"device": "cuda"}).learn(64)
    on_cpu = copy.deepcopy(agent.policy).to("cpu")
    obs = np.random.default_rng(0).normal(size=(64, 4)).astype(np.float32)
    np.testing.assert_allclose(
        agent.predict(obs, deterministic=True)[0], on_cpu.predict(obs, deterministic=True)[0], atol=1e-5
    )
