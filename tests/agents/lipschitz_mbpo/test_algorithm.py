"""LipschitzMBPO: the robust term in closed form, model rollouts, schedule, persistence, learning."""

from __future__ import annotations

import math
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import gymnasium as gym
import numpy as np
import pytest
import torch
from scipy.stats import kstest
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize
from torch import Tensor, nn

from driftrl import LipschitzMBPO, LipschitzMBPOConfig
from driftrl.agents.lipschitz_mbpo.critic_regularizers import adversary, value_gap
from driftrl.agents.lipschitz_mbpo.diagnostics import model_diagnostics, spectral_product, value_diagnostics
from driftrl.agents.lipschitz_mbpo.replay import Minibatch, Search
from driftrl.agents.lipschitz_mbpo.sac import StackedLinear
from driftrl.agents.registry import AGENTS
from driftrl.envs import make_vec

SMALL: dict[str, Any] = {
    "learning_starts": 40, "gradient_steps": 2, "batch_size": 32, "actor_hidden": (16, 16), "critic_hidden": (16, 16),
    "diagnostics_interval": 20, "compile": "off", "seed": 0, "device": "cpu",
}  # fmt: skip
SMALL_MODEL: dict[str, Any] = {
    "model_interval": 20, "model_hidden": (16,), "model_epochs": 2, "model_rollouts": 4, "model_retain": 40,
    "rollout_min": 2, "rollout_max": 2,
}  # fmt: skip
MODELS = ("deterministic", "probabilistic", "homoscedastic", "flow", "langevin")


def agent(env: str = "InvertedPendulum-v5", n_envs: int = 1, **fields: Any) -> LipschitzMBPO:
    defaults = SMALL if fields.get("model") == "none" else SMALL | SMALL_MODEL
    return LipschitzMBPO("MlpPolicy", make_vec(env, n_envs, 0), **(defaults | fields))


def weights(learner: LipschitzMBPO) -> Tensor:
    return nn.utils.parameters_to_vector(learner.policy.weights.parameters).detach()


class Linear(nn.Module):
    """Q_i = w_i . s + b . a for two critics."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight = nn.Parameter(torch.randn(2, dim, dtype=torch.float64))
        self.b = nn.Parameter(torch.randn(1, dtype=torch.float64))

    def forward(self, obs: Tensor, action: Tensor) -> Tensor:
        return self.weight @ obs.T + action @ self.b


@pytest.mark.parametrize("method", ["fgsm", "pgd"])
def test_the_robust_term_and_its_gradient_are_those_of_a_linear_critic(method: str) -> None:
    # Over |s~ - s| <= r the change w.(s~ - s) is largest at a corner, r.|w|: the squares add up to sum_i (r.|w_i|)^2
    # where the slopes of both critics agree in sign, which proportional weights make sure of.
    critic, unit = Linear(3), torch.tensor([0.1, 1.0, 5.0], dtype=torch.float64)
    with torch.no_grad():
        critic.weight.abs_()
        critic.weight[1] = 2 * critic.weight[0]
    policy: Any = SimpleNamespace(critic=critic, actor=None)
    generator = torch.Generator().manual_seed(0)
    sizes = {"obs": 3, "action": 1, "start": 3}
    drawn = {name: 2 * torch.rand(40, n, dtype=torch.float64, generator=generator) - 1 for name, n in sizes.items()}
    radius = 0.2 * unit
    search, batch = Search(radius, drawn.pop("start")), cast(Minibatch, SimpleNamespace(**drawn))
    gap = value_gap(policy, batch.obs, batch.action, critic(batch.obs, batch.action), "same_action")
    states = adversary(gap, batch.obs, search, method, steps=8)
    assert ((states - batch.obs).abs() <= radius * (1 + 1e-12)).all()
    penalty = gap(states).mean()
    reach = critic.weight.detach() @ radius
    assert penalty.item() == pytest.approx(reach.square().sum().item())
    (slope,) = torch.autograd.grad(penalty, critic.weight)
    torch.testing.assert_close(slope, 2 * reach[:, None] * radius)
    for name, parameter in critic.named_parameters():
        assert parameter.grad is None, name


@pytest.mark.parametrize("method", ["fgsm", "pgd", "langevin"])
@pytest.mark.parametrize("actions", ["paper", "same_action", "policy"])
def test_adversaries_stay_in_their_ball_and_raise_the_gap(actions: str, method: str) -> None:
    learner = agent(adversary=method, robust_actions=actions, model="none").learn(60)
    policy, config = learner.policy, learner.config
    batch = learner._minibatches(1, 256)[0]
    assert batch.search is not None
    gap = value_gap(policy, batch.obs, batch.action, policy.critic(batch.obs, batch.action), actions)
    radius = 0.3 * policy.obs_std()
    search = batch.search._replace(radius=radius)
    states = adversary(gap, batch.obs, search, method, config.adversary_steps, 1e-3)
    assert ((states - batch.obs).abs() <= radius * (1 + 1e-5) + 1e-6).all()
    if method != "langevin":  # which only leans towards high values, at a temperature
        assert gap(states).mean() > gap(batch.obs).mean()
        assert gap(states).mean() > gap(batch.obs + radius * batch.search.start).mean()
    gradients = torch.autograd.grad(gap(states).mean(), policy.weights.parameters, allow_unused=True)
    pairs: list[tuple[str, Tensor | None]] = list(zip(policy.weights.names, gradients, strict=True))
    reached = {name.split(".")[0] for name, gradient in pairs if gradient is not None}
    assert reached == {"critic"}


def test_robust_actions_are_compared_as_they_say() -> None:
    learner = agent(model="none").learn(60)
    policy, batch = learner.policy, learner._minibatches(1, 32)[0]
    obs, action = batch.obs, batch.action
    there, values = obs + 0.1, policy.critic(obs, action)
    pairs = {
        "paper": (policy.actor(there), action), "same_action": (action, action),
        "policy": (policy.actor(there), policy.actor(obs)),
    }  # fmt: skip
    for actions, (far, near) in pairs.items():
        expected = (policy.critic(there, far) - policy.critic(obs, near)).square().sum(0)
        torch.testing.assert_close(value_gap(policy, obs, action, values, actions)(there), expected)


def test_hidden_layers_of_critics_keep_their_spectral_bound_and_the_last_is_free() -> None:
    learner = agent(regularizer="spectral", spectral_bound=0.5, model="none").learn(80)
    for critics in (learner.policy.critic, learner.policy.target_critic):
        *hidden, last = (layer for layer in critics.layers if isinstance(layer, StackedLinear))
        for layer in hidden:
            slopes = layer(torch.eye(layer.weight.shape[1]).expand(2, -1, -1)) - layer.bias  # as it is applied
            norms = torch.linalg.matrix_norm(slopes, 2)
            assert (norms <= 0.5 * 1.02).all()  # power iteration comes from below
            raw = torch.linalg.matrix_norm(layer.weight, 2)
            assert (raw > 0.5).all()  # the weights themselves are free
        assert last.spectral_bound is None


def test_the_last_hidden_layer_can_be_the_only_one_that_is_bounded() -> None:
    fields: dict[str, Any] = {
        "regularizer": "spectral",
        "spectral_bound": 0.2,
        "model": "none",
        "critic_hidden": (8, 8, 8),
    }
    learner = agent(**fields, spectral_layers="last").learn(40)
    for critics in (learner.policy.critic, learner.policy.target_critic):
        layers = [layer for layer in critics.layers if isinstance(layer, StackedLinear)]
        assert [layer.spectral_bound for layer in layers] == [None, None, 0.2, None]
        norms = [torch.linalg.matrix_norm(layer.weight, 2).tolist() for layer in layers]
        norms[2] = [min(norm, 0.2) for norm in norms[2]]
        torch.testing.assert_close(spectral_product(critics), torch.tensor(norms).prod(0))


@pytest.mark.parametrize(("model", "termination"), [("none", "auto"), *product(MODELS, ("auto", "learned"))])
def test_every_model_trains_and_its_rollouts_do_not_count(model: str, termination: str) -> None:
    learner = agent(model=model, termination=termination).learn(
        100, log_interval=10**6
    )  # no dump, which clears the log
    assert learner.num_timesteps == 100
    assert learner._n_updates == 2 * 60
    assert learner.replay_buffer is not None and learner.replay_buffer.size() == 100
    logged = learner.logger.name_to_value
    assert all(math.isfinite(value) for name, value in logged.items() if not name.startswith("time/")), logged
    wanted = {"lipschitz/penalty", "lipschitz/slope", "lipschitz/adversarial_gain", "lipschitz/spectral_product"}
    if model != "none":
        wanted |= {"model/holdout_mse", "model/value_error", "model/rollout_error", "model/terminated_share"}
        imagined = learner.model_buffer.all()
        assert 80 < len(learner.model_buffer) <= 2 * 4 * 40
        assert (imagined.action.abs() <= 1).all()
    assert wanted <= logged.keys()


def test_model_rollouts_end_where_the_task_ends() -> None:
    learner = agent(rollout_min=6, rollout_max=6).learn(60)
    imagined = learner.model_buffer.all()
    ended = imagined.next_obs[:, 1].abs() > 0.2
    assert torch.equal(imagined.terminated > 0, ended) and ended.any()
    assert (imagined.obs[:, 1].abs() <= 0.2).all()  # none goes on from there
    never = agent(rollout_min=6, rollout_max=6, termination="never").learn(60)
    assert not never.model_buffer.all().terminated.any()


def test_model_rollouts_draw_their_actions_from_the_actor() -> None:
    learner = agent(model_rollouts=100).learn(41)
    assert learner.transition is not None
    for parameter in learner.policy.actor.parameters():
        nn.init.zeros_(parameter)  # actions are tanh(N(0, 1))
    learner._imagine(learner.transition, 1)
    buffer = learner.model_buffer
    drawn = buffer.unpack(buffer.newest(2000)).action.double().atanh().flatten()
    assert kstest(drawn.numpy(), "norm").pvalue > 0.01


@pytest.mark.parametrize("ratio", [0.05, 0.5, 0.99])
def test_the_share_of_real_transitions_is_exact(ratio: float) -> None:
    learner = agent(real_ratio=ratio).learn(60)
    learner.model_buffer.rows[:, -2] = 777.0
    real = sum((batch.reward != 777).sum().item() for _ in range(5) for batch in learner._minibatches(10, 32))
    assert real == pytest.approx(ratio * 32 * 50, abs=1)


def test_the_horizon_grows_as_scheduled() -> None:
    config = LipschitzMBPOConfig(rollout_start=20_000, rollout_end=150_000, rollout_min=1, rollout_max=15)
    steps = {0: 1, 20_000: 1, 29_000: 1, 30_000: 2, 85_000: 8, 150_000: 15, 10**6: 15}
    assert {step: config.rollout_length(step) for step in steps} == steps
    assert LipschitzMBPOConfig(rollout_min=3, rollout_max=3).rollout_length(0) == 3


def test_truncation_bootstraps() -> None:
    learner = LipschitzMBPO("MlpPolicy", DummyVecEnv([lambda: gym.make("Pendulum-v1")]), **SMALL, model="none")
    learner.learn(410)
    assert learner.replay_buffer is not None
    seen = learner.replay_buffer.transitions.unpack(learner.replay_buffer.transitions.newest(410))
    assert not seen.terminated.any()
    jumps = (seen.next_obs[:-1] != seen.obs[1:]).any(1).nonzero().flatten().tolist()
    assert jumps == [199, 399]  # the state reached is kept, not the first one of the next episode


def test_a_model_that_breaks_stops_with_its_reason() -> None:
    learner = agent().learn(60)
    assert learner.replay_buffer is not None and learner.transition is not None
    before = {name: value.clone() for name, value in learner.transition.state_dict().items()}
    learner.replay_buffer.transitions.rows[:50, 0] = math.nan
    with pytest.raises(ValueError, match="finite"):
        learner.learn(60, reset_num_timesteps=False)
    assert all(torch.equal(before[name], value) for name, value in learner.transition.state_dict().items())


def test_diagnostics_of_a_perfect_model_and_a_linear_value() -> None:
    learner = agent("InvertedPendulum-v5", model="deterministic").learn(100)
    assert learner.replay_buffer is not None
    real = learner.replay_buffer.transitions
    seen = real.unpack(real.newest(100))
    table = {tuple(o.tolist()): (n, r) for o, n, r in zip(seen.obs, seen.next_obs, seen.reward, strict=True)}

    def replayed(obs: Tensor, action: Tensor, generator: object = None) -> tuple[Tensor, Tensor]:
        known = [table.get(tuple(row.tolist()), (row, torch.tensor(0.0))) for row in obs]
        return torch.stack([n for n, _ in known]), torch.stack([r for _, r in known])

    perfect: Any = SimpleNamespace(
        sample=replayed, predict=replayed, elite_members=[0], draw=lambda *_: (),
        step=lambda obs, action, noise: (0.5 * obs, action[:, 0]),
        disagreement=lambda obs, action: torch.zeros(1, *obs.shape),
    )  # fmt: skip
    found = model_diagnostics(perfect, learner.policy, real, 1)
    assert found.pop("model/spectral_radius") == pytest.approx(0.5)
    assert found.pop("model/koopman_radius") == found.pop("model/koopman_radius_real") > 0.5
    assert found.keys() >= {"model/value_error", "model/rollout_error_1", "model/rollout_error"}
    assert set(found.values()) == {0.0}
    critic = Linear(4).float()
    learner.policy.critic = critic  # type: ignore[assignment]
    slope = value_diagnostics(learner.policy, real, 0.1)["lipschitz/slope"]
    w = critic.weight.detach() * learner.policy.obs_std()
    draws = torch.empty(100_000, 4).uniform_(-1, 1)
    assert slope == pytest.approx((draws @ w.T).abs().mean().item(), rel=0.1)  # of 256 states


@pytest.mark.parametrize("fields", [{}, {"model": "none"}, {"members": 3, "elites": 2}, {"termination": "learned"}])
def test_saving_and_loading_keeps_everything(tmp_path: Path, fields: dict[str, Any]) -> None:
    learner = agent(**fields).learn(60)
    learner.save(tmp_path / "agent.zip")
    learner.save_replay_buffer(tmp_path / "replay.pkl")
    loaded = LipschitzMBPO.load(tmp_path / "agent.zip", env=make_vec("InvertedPendulum-v5", 1, 0), device="cpu")
    loaded.load_replay_buffer(tmp_path / "replay.pkl")
    obs = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)
    assert np.array_equal(learner.predict(obs, deterministic=True)[0], loaded.predict(obs, deterministic=True)[0])
    if learner.transition is not None:
        assert loaded.transition is not None
        tensors = torch.from_numpy(obs), torch.zeros(5, 1)
        ours, theirs = (
            m.sample(*tensors, torch.Generator().manual_seed(0)) for m in (learner.transition, loaded.transition)
        )
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert loaded.replay_buffer is not None and loaded.replay_buffer.size() == 60
    assert (tmp_path / "replay.pkl").stat().st_size < 20_000  # not the room for a million
    loaded.learn(20, reset_num_timesteps=False)
    assert loaded.num_timesteps == 80 and loaded._n_updates > learner._n_updates


def test_without_its_replay_buffer_an_agent_sees_something_first(tmp_path: Path) -> None:
    learner = agent().learn(60)
    learner.save(tmp_path / "agent.zip")
    loaded = LipschitzMBPO.load(tmp_path / "agent.zip", env=make_vec("InvertedPendulum-v5", 1, 0), device="cpu")
    loaded.learn(39, reset_num_timesteps=False)
    assert loaded._n_updates == learner._n_updates
    loaded.learn(20, reset_num_timesteps=False)
    assert loaded._n_updates > learner._n_updates


def test_same_seed_same_agent() -> None:
    one, two = (weights(agent().learn(60)) for _ in range(2))
    assert torch.equal(one, two)


@pytest.mark.slow
@pytest.mark.parametrize("adversary", ["fgsm", "langevin"])
def test_compiled_as_eager(adversary: str) -> None:
    eager, compiled = (
        weights(agent(model="none", learning_starts=20, compile=compile, adversary=adversary).learn(30))
        for compile in ("off", "on")
    )
    torch.testing.assert_close(compiled, eager, rtol=1e-3, atol=1e-4)


def test_observation_statistics_settle_as_the_learning_rate_falls_to_0() -> None:
    counts = {}
    for schedule in ("constant", "linear", "function"):
        learner = agent(learning_starts=10, normalize_observation=True)
        if schedule == "function":
            learner.learning_rate = lambda remaining: 3e-4 * remaining
        else:
            learner.lr_schedule = schedule
        learner.learn(100)
        counts[schedule] = learner.policy.obs_norm.count.item()
    assert counts["constant"] > 90
    assert 0.45 < counts["linear"] / counts["constant"] < 0.65  # the mean of 1 - t / 100, and the first steps at once
    assert counts["function"] == counts["linear"]


def test_several_environments_get_updates_per_step() -> None:
    learner = agent(n_envs=4, learning_starts=40).learn(80)
    assert learner._n_updates == 2 * 40 and learner.num_timesteps == 80


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"rollout_start": 5, "rollout_end": 1}, "rollout_end: got 1, expected at least rollout_start = 5"),
        ({"members": 2, "elites": 3}, "elites: got 3, expected at most members = 2"),
        ({"members": 2, "model": "flow"}, "members: got 2, expected 1 for the model flow"),
        ({"model_retain": 10, "model_interval": 20}, "model_retain: got 10, expected at least the interval"),
        ({"robust_radius": 0.0}, "robust_radius: got 0.0, expected a number above 0"),
        ({"real_ratio": 1.5}, r"real_ratio: got 1.5, expected a number in \[0, 1\]"),
        ({"adversary": "none"}, "adversary: got 'none', expected one of fgsm, pgd, langevin"),
    ],
)
def test_bad_hyperparameters_are_refused(fields: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        LipschitzMBPOConfig(**fields)


def test_what_cannot_work_is_refused() -> None:
    with pytest.raises(ValueError, match="env: got None"):
        LipschitzMBPO()
    with pytest.raises(TypeError, match="unknown argument: got entropy, expected fields of LipschitzMBPOConfig"):
        agent(entropy=0.1)
    with pytest.raises(ValueError, match="termination: got task, but no rule of this environment is known"):
        LipschitzMBPO("MlpPolicy", "Pendulum-v1", termination="task", device="cpu")
    with pytest.raises(ValueError, match="env: got a VecNormalize, expected raw observations"):
        LipschitzMBPO("MlpPolicy", VecNormalize(make_vec("InvertedPendulum-v5", 1, 0)), device="cpu")


@pytest.mark.slow
def test_the_pendulum_is_learned_in_5000_steps() -> None:
    fields = AGENTS["mbpo"].preset("InvertedPendulum-v5", "standard")
    steps, n_envs = fields.pop("total_timesteps"), fields.pop("n_envs")
    learner = LipschitzMBPO("MlpPolicy", make_vec("InvertedPendulum-v5", n_envs, 0), seed=0, device="cpu", **fields)
    learner.learn(steps)
    mean = evaluate_policy(learner, make_vec("InvertedPendulum-v5", 5, 99), n_eval_episodes=10)[0]
    assert isinstance(mean, float) and mean >= 950


@pytest.mark.parametrize("model", MODELS)
def test_jacobian_prior_reaches_every_model_and_is_saved(model: str, tmp_path: Path) -> None:
    learner = agent(model=model, model_jacobian_coef=0.1).learn(60)
    assert learner.transition is not None and learner.transition.prior is not None
    learner.save(tmp_path / "agent")
    loaded = LipschitzMBPO.load(tmp_path / "agent", device="cpu")
    assert loaded.transition is not None
    ours, theirs = learner.transition.state_dict(), loaded.transition.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours) and any("prior" in name for name in ours)


def test_jacobian_prior_without_a_model_is_refused() -> None:
    with pytest.raises(ValueError, match=r"model_jacobian_coef: got 0\.1, expected 0 without a model"):
        LipschitzMBPOConfig(model="none", model_jacobian_coef=0.1)


def test_replaced_weights_of_the_model_learn_and_a_frozen_model_is_refused() -> None:
    agent = LipschitzMBPO(
        "MlpPolicy", make_vec("InvertedPendulum-v5", 1, 0), learning_starts=20, gradient_steps=1, model_rollouts=2,
        model_hidden=(8,), model_epochs=2, model_interval=20, batch_size=8, actor_hidden=(8,), critic_hidden=(8,),
        seed=0, device="cpu", compile="off",
    )  # fmt: skip
    agent.learn(21)
    model = agent.transition
    assert model is not None
    model.load_state_dict({name: each.clone() for name, each in model.state_dict().items()}, assign=True)
    before = {name: each.detach().clone() for name, each in model.named_parameters()}
    agent.learn(40, reset_num_timesteps=False)
    assert [name for name, each in model.named_parameters() if torch.equal(each, before[name])] == []
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="weights: got a model none of which learns"):
        agent.learn(1, reset_num_timesteps=False)
