"""The density of actions against closed forms: an affine flow's actions are Gaussian."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from stable_baselines3.common.vec_env import DummyVecEnv
from torch.distributions import MultivariateNormal

from driftrl import PolicyFlow
from driftrl.agents.policyflow.density import fixed_normals, marginal_log_prob
from driftrl.agents.policyflow.policy import FlowNoise

LOW, HIGH = np.array([[-2.0, 0.0], [2.0, 1.0]], np.float32)


class Task(gym.Env[Any, Any]):
    """Rewards nothing; observes two numbers, or a Dict of them."""

    def __init__(self, keys: bool = False) -> None:
        box = spaces.Box(-np.inf, np.inf, (2,))
        self.keys = keys
        self.observation_space = spaces.Dict({"b": spaces.Box(-1, 1, (1,)), "a": box}) if keys else box
        self.action_space = spaces.Box(LOW, HIGH)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        vector = np.ones(2, np.float32)
        return ({"b": vector[:1], "a": vector} if self.keys else vector), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        return self.reset()[0], 0.0, False, False, {}


def make(keys: bool = False, **fields: Any) -> PolicyFlow:
    given: dict[str, Any] = {"n_steps": 8, "batch_size": 8, "seed": 0, "device": "cpu"} | fields
    return PolicyFlow("MultiInputPolicy" if keys else "MlpPolicy", DummyVecEnv([lambda: Task(keys)]), **given)


def affine(**fields: Any) -> tuple[PolicyFlow, torch.Tensor, torch.Tensor]:
    """An agent whose flow is x1 = M z + C s: two Euler steps of v = A x + C' s; and M and C."""
    agent = make(policy_kwargs={"net_arch": []}, normalize_observation=False, **fields)
    weight = agent.policy.actor.field.output.weight
    with torch.no_grad():
        weight.copy_(torch.tensor([[0.5, -1.0, 0.3, 0.0], [1.0, -0.4, 0.1, -0.2]]))
    a, c = weight.detach().split(2, dim=1)
    step = torch.eye(2) + a / 2
    return agent, step @ step, (step + torch.eye(2)) @ c / 2


@pytest.mark.parametrize(("base_std", "accuracy"), [(0.1, 0.03), (0.3, 0.1)])
def test_an_affine_flow_has_the_density_of_its_gaussian(base_std: float, accuracy: float) -> None:
    agent, m, c = affine(base_std=base_std, action_std=0.4)
    generator = torch.Generator().manual_seed(0)
    obs, normal = torch.randn(2, 500, 2, generator=generator)
    covariance = base_std**2 * m @ m.T + 0.4**2 * torch.eye(2)
    normalised = obs @ c.T + normal @ torch.linalg.cholesky(covariance).T  # as the policy draws
    units = torch.from_numpy(LOW + (HIGH - LOW) * (normalised.numpy() + 1) / 2)
    values, log_prob, entropy = agent.policy.evaluate_actions(obs, units)
    exact = MultivariateNormal(obs @ c.T, covariance).log_prob(normalised) - np.log(2.0) - np.log(0.5)
    assert (log_prob - exact).square().mean().sqrt() < accuracy
    assert entropy is None
    assert torch.equal(values, agent.policy.predict_values(obs))
    few = agent.policy.evaluate_actions(obs, units, latents=8)[1]
    assert (few - exact).abs().mean() > (log_prob - exact).abs().mean()


def test_without_latents_the_density_is_exact() -> None:
    agent, _, c = affine(base_std=0.0, base="standard", ratio="endpoint", action_std=0.4)
    obs, action = torch.randn(20, 2), torch.randn(20, 2)
    exact = MultivariateNormal(obs @ c.T, 0.16 * torch.eye(2)).log_prob(action)
    assert torch.allclose(marginal_log_prob(agent.policy.actor, obs, action), exact, atol=1e-5)


@pytest.mark.parametrize("fields", [{"langevin_eps": 0.5}, {"ratio": "chain", "solver_steps": 3}])
def test_a_noisy_flow_has_the_density_of_its_samples(fields: dict[str, Any]) -> None:
    agent = make(base_std=0.2, action_std=0.3, **fields)
    actor, obs = agent.policy.actor, torch.zeros(40_000, 2)
    normals = torch.randn(actor.draws, len(obs), 2, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        drawn = actor.sample(obs, FlowNoise.of(normals)).action
        gaussian = MultivariateNormal(drawn.mean(0), torch.cov(drawn.T))  # a new flow is affine: so are the samples
        log_prob = marginal_log_prob(actor, obs[:100], drawn[:100], latents=512)
    assert (log_prob - gaussian.log_prob(drawn[:100])).abs().mean() < 0.05


def test_the_fixed_normals_are_normal_and_leave_random_numbers_alone() -> None:
    before = torch.get_rng_state()
    normals = fixed_normals(1024, 3)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(normals, fixed_normals(1024, 3))
    assert normals.mean(0).abs().max() < 0.01
    assert torch.allclose(torch.cov(normals.T), torch.eye(3, dtype=torch.float64), atol=0.02)


def test_the_policy_can_be_fitted_to_demonstrations() -> None:
    # What behaviour cloning does: maximise the density of the expert's actions, here 0.8 s_1 in the first dimension.
    policy = make(normalize_observation=False).policy
    obs = torch.rand(256, 2, generator=torch.Generator().manual_seed(0)) * 2 - 1
    actions = torch.stack([1.6 * obs[:, 0], torch.full((256,), 0.5)], 1)
    optimizer = torch.optim.Adam(policy.parameters(), lr=3e-3)
    before = policy.evaluate_actions(obs, actions)[1].mean().item()
    for _ in range(150):
        loss = -policy.evaluate_actions(obs, actions, latents=8)[1].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert policy.evaluate_actions(obs, actions)[1].mean().item() > before + 1
    chosen = policy.predict(obs.numpy(), deterministic=True)[0]
    assert np.abs(chosen - actions.numpy()).mean() < 0.1


def test_a_dimension_of_zero_width_counts_for_nothing() -> None:
    policy = make().policy
    policy.action_space = spaces.Box(np.array([-2, 1], np.float32), np.array([2, 1], np.float32))
    obs, action = torch.zeros(3, 2), torch.tensor([[0.5, 1.0]]).expand(3, 2)
    assert torch.equal(policy.to_normalised(action), torch.tensor([[0.25, 0.0]]).expand(3, 2))
    # Of a Gaussian policy the density of the dimension that has a width, in its units.
    gaussian = make(base_std=0, base="standard", ratio="endpoint").policy
    gaussian.action_space = policy.action_space
    mode, std = gaussian.actor.mode(gaussian.obs_norm(obs))[:, 0], gaussian.actor.noise_log_std().exp()[0]
    expected = torch.distributions.Normal(2 * mode, 2 * std).log_prob(torch.tensor(0.5))
    torch.testing.assert_close(gaussian.evaluate_actions(obs, action)[1], expected)


def test_actions_of_another_width_and_no_latents_are_refused() -> None:
    policy = make().policy
    obs = torch.zeros(4, 2)
    for actions, latents in ((torch.zeros(4, 1), 64), (torch.zeros(4, 3), 64), (torch.zeros(4, 2), 0)):
        with pytest.raises(ValueError, match=r"actions and latents: got .* expected \[B, 2\] and at least 1"):
            policy.evaluate_actions(obs, actions, latents)
    double = policy.evaluate_actions(obs.double(), torch.zeros(4, 2, dtype=torch.float64))[1]
    assert torch.equal(double, policy.evaluate_actions(obs, torch.zeros(4, 2))[1])
