"""How spread actions are, against laws whose entropy is known, and the weight that steers it to a target."""

from __future__ import annotations

import math
from pathlib import Path
from types import ModuleType
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from stable_baselines3.common.vec_env import DummyVecEnv
from torch import Tensor

from driftrl import PolicyFlow
from driftrl.agents.policyflow.entropy import policy_entropy, steered_weight
from driftrl.agents.policyflow.policy import FlowActor, FlowNoise, FlowSample
from driftrl.dynamics import VelocityField


class Wide(gym.Env[np.ndarray, np.ndarray]):
    """Seventeen dimensions of action."""

    observation_space, action_space = spaces.Box(-1, 1, (1,)), spaces.Box(-1, 1, (17,))


GAUSSIAN = 0.5 * math.log(2 * math.pi * math.e)  # entropy of N(0, 1), in nats
OBS = torch.zeros(64, 1)


class Linear(VelocityField):
    """``v = A x`` with a dense A: a flow that turns, stretches and shrinks, whose samples are Gaussian."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim, 1)
        generator = torch.Generator().manual_seed(dim)
        self.matrix = torch.randn(dim, dim, generator=generator) / math.sqrt(dim)

    def forward(self, t: float | Tensor, x: Tensor, cond: Tensor | None = None) -> Tensor:
        return x @ self.matrix.T


class TwoModes(VelocityField):
    """Parts the first ``split`` coordinates around 0 and leaves the others."""

    def __init__(self, dim: int, split: int) -> None:
        super().__init__(dim, 1)
        self.split = split

    def forward(self, t: float | Tensor, x: Tensor, cond: Tensor | None = None) -> Tensor:
        parted = 2 * (torch.tanh(3 * x) - x)
        return torch.where(torch.arange(x.shape[1]) < self.split, parted, 0.0)


def make_actor(field: VelocityField, base_std: float, action_std: float, steps: int = 4) -> FlowActor:
    actor = FlowActor(
        1, field.dim, hidden=(4,), activation="silu", base="standard" if base_std == 0 else "learned",
        base_std=base_std, log_std_init=math.log(action_std), solver="euler", solver_steps=steps,
    )  # fmt: skip
    actor.field = field  # type: ignore[assignment]
    return actor


@pytest.mark.parametrize("dim", [1, 2, 3, 6, 11, 17, 21])
@pytest.mark.parametrize(("base_std", "action_std"), [(0.8, 0.2), (0.3, 0.3), (1.0, 0.05)])
def test_entropy_of_a_linear_flow_is_that_of_its_gaussian(dim: int, base_std: float, action_std: float) -> None:
    field = Linear(dim)
    step = torch.linalg.matrix_power(torch.eye(dim) + field.matrix / 4, 4)
    covariance = base_std**2 * step @ step.T + action_std**2 * torch.eye(dim)
    exact = dim * GAUSSIAN + 0.5 * torch.logdet(covariance).item()
    assert policy_entropy(make_actor(field, base_std, action_std), OBS).item() == pytest.approx(exact, abs=0.03)


@pytest.mark.parametrize("steps", [2, 14, 20])
def test_entropy_of_a_noisy_flow_of_many_steps_is_that_of_its_gaussian(steps: int) -> None:
    # (2 + steps) x 17 normals per action: more than the 256 actions of the estimate.
    agent = PolicyFlow(
        "MlpPolicy", DummyVecEnv([Wide]), n_steps=64, base_std=0.5, action_std=0.3, langevin_eps=0.5,
        solver_steps=steps, batch_size=64, device="cpu", seed=0,
    )  # fmt: skip
    actor, obs = agent.policy.actor, torch.zeros(64, 1)

    def end(normals: Tensor) -> Tensor:
        base, *path = normals.view(1 + steps, 1, 17)
        mean, log_std = actor.base(obs[:1])
        return actor.flow(mean + log_std.exp() * base, obs[:1], torch.stack(path))[0]

    jacobian = torch.autograd.functional.jacobian(end, torch.zeros((1 + steps) * 17))  # the flow is linear at first
    covariance = jacobian @ jacobian.T + 0.3**2 * torch.eye(17)
    exact = 17 * GAUSSIAN + 0.5 * torch.logdet(covariance).item()
    assert policy_entropy(actor, obs).item() == pytest.approx(exact, abs=0.03)


@pytest.mark.parametrize("dim", [1, 17])
def test_entropy_of_a_gaussian_policy_is_its_own(dim: int) -> None:
    # Without a latent there is one Gaussian, and second moments that are exact leave no error.
    exact = dim * (GAUSSIAN + math.log(0.3))
    assert policy_entropy(make_actor(Linear(dim), 0.0, 0.3), OBS).item() == pytest.approx(exact, abs=1e-4)


@pytest.mark.parametrize(("dim", "split"), [(1, 1), (2, 2), (6, 1), (17, 1)])
@pytest.mark.parametrize("action_std", [0.1, 0.3])
def test_entropy_of_separate_modes_is_that_of_numerical_integration(dim: int, split: int, action_std: float) -> None:
    # Coordinates are independent: the entropy of one that is parted, by integration, and of Gaussians.
    z = torch.linspace(-8, 8, 8001, dtype=torch.float64)
    weight = torch.exp(-0.5 * z.square()) / torch.exp(-0.5 * z.square()).sum()
    x = (0.5 * z).unsqueeze(1)
    for _ in range(4):
        x = x + TwoModes(1, 1)(0.0, x) / 4
    action = torch.linspace(-4, 4, 801, dtype=torch.float64)
    normal = torch.distributions.Normal(x, action_std)
    density = (weight.unsqueeze(1) * normal.log_prob(action).exp()).sum(0)
    parted = -(density * density.clamp(min=1e-300).log()).sum().item() * 8 / 800
    exact = split * parted + (dim - split) * (GAUSSIAN + 0.5 * math.log(0.5**2 + action_std**2))
    estimate = policy_entropy(make_actor(TwoModes(dim, split), 0.5, action_std), OBS).item()
    assert estimate == pytest.approx(exact, abs=0.1)


def test_entropy_counts_the_noise_along_the_flow(toy: ModuleType) -> None:
    obs = torch.zeros(10, 1, dtype=torch.float64)
    actor, chain = toy.make_actor("endpoint"), toy.make_actor("chain")
    for each in (actor, chain):
        assert policy_entropy(each, obs).item() == pytest.approx(toy.entropy(each).item(), abs=0.03)
    assert toy.entropy(chain) - toy.entropy(actor) > 0.1


def test_measuring_the_entropy_draws_nothing_from_torchs_generator(toy: ModuleType) -> None:
    actor, obs, state = toy.make_actor("endpoint"), torch.zeros(10, 1, dtype=torch.float64), torch.get_rng_state()
    assert policy_entropy(actor, obs) == policy_entropy(actor, obs)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("remaining", "error", "clipped"), [(1.0, -0.2, -0.2), (0.0, 0.3, 0.3), (0.5, 7.0, 1.0), (0.5, -7.0, -1.0)]
)
def test_weight_rises_while_the_entropy_is_below_its_target(remaining: float, error: float, clipped: float) -> None:
    entropy = 1.3
    goal = entropy + error
    target = (goal + 2 * (1 - remaining), goal - 2 * remaining)  # on a line that is at the goal now
    weight, metrics = steered_weight(entropy, 0.5, target, remaining)
    assert weight == pytest.approx(0.5 * math.exp(0.1 * clipped))
    assert metrics["flow/spread_coef"] == pytest.approx(weight * math.exp(2 * clipped))
    assert metrics["flow/entropy"] == pytest.approx(goal - error)
    assert metrics["flow/target_entropy"] == pytest.approx(goal)


@pytest.mark.parametrize(("weight", "target"), [(10.0, 99.0), (1e-4, -99.0)])
def test_weight_stays_within_bounds(weight: float, target: float) -> None:
    assert steered_weight(1.3, weight, (target, target), 1.0)[0] == weight


def test_steered_weight_is_saved_and_a_given_one_is_used(tmp_path: Path) -> None:
    agent = PolicyFlow(
        "MlpPolicy", "Pendulum-v1", n_steps=64, batch_size=64, n_epochs=2, spread="score", spread_coef=0.3,
        target_entropy=(9.0, 9.0), compile="off", seed=0, device="cpu",
    ).learn(128)  # fmt: skip
    assert agent._spread_coef == pytest.approx(0.3 * math.exp(0.2))
    agent.save(tmp_path / "agent")
    assert PolicyFlow.load(tmp_path / "agent")._spread_coef == agent._spread_coef
    assert PolicyFlow.load(tmp_path / "agent", spread_coef=0.7)._spread_coef == 0.7


@pytest.mark.parametrize(("steps", "envs"), [(2048, 4), (512, 8), (100, 1), (3, 1)])
def test_states_of_the_estimate_come_from_all_environments(steps: int, envs: int, monkeypatch: Any) -> None:
    seen: list[Tensor] = []
    actor = make_actor(Linear(1), 0.5, 0.3)
    original = actor.sample

    def spied(obs: Tensor, noise: FlowNoise) -> FlowSample:
        seen.append(obs)
        return original(obs, noise)

    monkeypatch.setattr(actor, "sample", spied)
    rows = torch.arange(envs, dtype=torch.float32).repeat(steps)[:, None].expand(-1, OBS.shape[1])
    policy_entropy(actor, rows.contiguous())
    counts = torch.bincount(seen[0][:, 0].long(), minlength=envs)
    assert len(counts) == envs and counts.min() > 0.4 * counts.float().mean()
