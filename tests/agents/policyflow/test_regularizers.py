"""What spreads actions and what keeps the flow short, against the closed forms of a linear flow and by what they do."""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from stable_baselines3.common.env_util import make_vec_env

from driftrl import PolicyFlow
from driftrl.agents.policyflow.entropy import policy_entropy
from driftrl.agents.policyflow.policy import FlowActor, FlowNoise
from driftrl.agents.policyflow.posterior import posterior_noise
from driftrl.agents.policyflow.ratios import Samples
from driftrl.agents.policyflow.regularizers import score_loss, transport_cost


@pytest.mark.parametrize("ratio", ["endpoint", "chain"])
def test_posterior_mean_of_the_noise_is_tweedies(toy: ModuleType, ratio: str) -> None:
    # Of a Gaussian action, -std^2 score = std^2 covariance^-1 (a - mean). What is left with 16 latents is noise.
    actor, generator = toy.make_actor(ratio), torch.Generator().manual_seed(0)
    batch = toy.roll_out(actor, 500, generator)
    with torch.no_grad():
        mean, covariance = toy.moments(actor)
        exact = toy.ACTION_STD**2 * torch.linalg.solve(covariance, (batch.action - mean).T).T
    errors = [(posterior_noise(actor, batch, generator, n) - exact).norm() / exact.norm() for n in (2, 16, 2000)]
    assert errors[0] > 1.5 * errors[1] > 3 * errors[2]
    assert errors[2] < 0.06


def test_posterior_noise_of_a_gaussian_policy_is_its_noise() -> None:
    agent = make(base_std=0.0, ratio="endpoint", spread="score", spread_coef=0.1).learn(512)
    samples = agent.samples
    noise = posterior_noise(agent.policy.actor, samples, torch.Generator().manual_seed(0))
    assert torch.equal(noise, samples.action - samples.x1)


@pytest.mark.parametrize("dim", [1, 2, 6, 17])
@pytest.mark.parametrize(("base_std", "action_std"), [(0.8, 0.2), (0.3, 0.3)])
def test_score_loss_spreads_the_flow_and_hardly_the_noise(dim: int, base_std: float, action_std: float) -> None:
    # A new flow is the identity: H = sum log(base_std^2 + action_std^2) / 2, so per dimension the gradients of the log
    # deviations are the shares of the variance.
    torch.manual_seed(0)
    actor = FlowActor(
        1, dim, hidden=(8,), activation="silu", base="learned", base_std=base_std, log_std_init=math.log(action_std),
        solver="euler", solver_steps=2,
    )  # fmt: skip
    obs, generator = torch.zeros(20_000, 1), torch.Generator().manual_seed(0)
    with torch.no_grad():
        drawn = actor.sample(obs, FlowNoise.of(torch.randn(2, len(obs), dim, generator=generator)))
        samples = Samples.drawn(actor, obs, drawn)
    samples = samples._replace(posterior_noise=posterior_noise(actor, samples, generator))
    base, noise = torch.autograd.grad(-score_loss(actor, samples), [actor.base_log_std, actor.log_std])
    share = base_std**2 / (base_std**2 + action_std**2)
    assert base.mean().item() == pytest.approx(share, abs=0.05)
    assert noise.mean().item() == pytest.approx(1 - share, abs=0.03)


def test_gradient_of_the_score_loss_is_that_of_the_entropy(toy: ModuleType) -> None:
    actor, generator = toy.make_actor("endpoint", "learned"), torch.Generator().manual_seed(0)
    names = ("field.matrix", "base_log_std", "log_std")  # an offset does not change the entropy
    learned = [toy.parameters(actor)[name] for name in names]
    exact = torch.autograd.grad(toy.entropy(actor), learned)
    for latents, size in ((500, 4_000), (16, 50_000)):
        batch = toy.roll_out(actor, size, generator)
        parts = [batch.rows(slice(i, i + 1000)) for i in range(0, len(batch.z), 1000)]
        noise = torch.cat([posterior_noise(actor, part, generator, latents) for part in parts])
        estimate = torch.autograd.grad(-score_loss(actor, batch._replace(posterior_noise=noise)), learned)
        for name, ours, theirs in zip(names, estimate, exact, strict=True):
            assert torch.cosine_similarity(ours.flatten(), theirs.flatten(), dim=0) > 0.99, name
            if name != "log_std":
                assert (ours.norm() / theirs.norm()).item() == pytest.approx(1, abs=0.05), name


def test_transport_cost_of_a_linear_flow(toy: ModuleType) -> None:
    # x1 = M z + m: E|x1 - z|^2 = |m|^2 + |(M - 1) diag(base_std)|^2, whatever the base's std was when z was drawn.
    actor, generator = toy.make_actor("endpoint", "learned"), torch.Generator().manual_seed(0)
    batch, unit = toy.roll_out(actor, 400_000, generator), torch.eye(2, dtype=torch.float64)
    learned = [actor.field.matrix, actor.field.offset, actor.base_log_std]
    for base_std in (toy.BASE_STD, 0.8):
        with torch.no_grad():
            actor.base_log_std.fill_(math.log(base_std))
        step = torch.linalg.matrix_power(unit + actor.field.matrix / toy.STEPS, toy.STEPS)
        spread = ((step - unit) * actor.base_log_std.exp()).square().sum()
        exact, cost = toy.moments(actor)[0].square().sum() + spread, transport_cost(actor, batch)
        assert cost.item() == pytest.approx(exact.item(), rel=0.01)
        for ours, theirs in zip(torch.autograd.grad(cost, learned), torch.autograd.grad(exact, learned), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.01)


class Bandit(gym.Env[Any, Any]):
    """Reward ``-|action|^2``, which calls for no spread at all; observations tell nothing."""

    observation_space = spaces.Box(-1, 1, (1,), np.float32)
    action_space = spaces.Box(-1, 1, (2,), np.float32)
    scale = 1.0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.steps = 0
        return np.zeros(1, np.float32), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.steps += 1
        reward = -self.scale * float(np.square(action).sum())
        return np.zeros(1, np.float32), reward, False, self.steps >= 50, {}


def make(**fields: Any) -> PolicyFlow:
    settings: dict[str, Any] = {
        "n_steps": 64, "batch_size": 128, "n_epochs": 4, "gamma": 0.0, "base": "standard", "base_std": 0.5,
        "action_std": 0.3, "actor_hidden": (16, 16), "critic_hidden": (16,), "compile": "off",
    }  # fmt: skip
    return PolicyFlow("MlpPolicy", make_vec_env(Bandit, 8, seed=0), seed=0, device="cpu", **settings | fields)


def train(iterations: int, **fields: Any) -> PolicyFlow:
    return make(**fields).learn(512 * iterations, log_interval=10**6)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["score", "paper", "consistent"])
def test_target_entropy_is_met_against_what_the_task_rewards(form: str) -> None:
    fields: dict[str, Any] = {"spread": form, "spread_coef": 1.0}
    fields |= {"spread_std": 2.0} if form == "consistent" else {}
    fixed = train(25, **fields | {"spread_coef": 0.01})
    steered = train(60, **fields, target_entropy=(0.5, 0.5))
    obs = torch.zeros(64, 1)
    assert policy_entropy(fixed.policy.actor, obs) < 0.25
    assert policy_entropy(steered.policy.actor, obs).item() == pytest.approx(0.5, abs=0.15)


@pytest.mark.parametrize("ratio", ["interpolation", "endpoint"])
def test_transport_cost_leaves_actions_to_the_base_where_nothing_is_rewarded(ratio: str) -> None:
    def move(**fields: Any) -> float:
        agent = make(ratio=ratio, desired_kl=0.05, **fields)
        with torch.no_grad():
            agent.policy.actor.field.output.bias.fill_(0.3)
        agent.get_env().env_method("set_wrapper_attr", "scale", 0.0)  # type: ignore[union-attr]
        agent.learn(512 * 10, log_interval=10**6)
        mean, _ = agent.predict(np.zeros((1, 1), np.float32), deterministic=True)
        return float(np.abs(mean).max())

    assert move() > 0.2
    assert move(transport_coef=0.5) < 0.05
