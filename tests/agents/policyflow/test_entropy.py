"""How spread actions are, against laws whose entropy is known, and the weight that steers it to a target."""

from __future__ import annotations

import math
from pathlib import Path
from types import ModuleType

import pytest
import torch

from driftrl import PolicyFlow
from driftrl.agents.policyflow.entropy import nearest_neighbour_entropy, policy_entropy, steered_weight

GAUSSIAN = 0.5 * math.log(2 * math.pi * math.e)  # entropy of N(0, 1), in nats


@pytest.mark.parametrize("dim", [1, 2, 3])
@pytest.mark.parametrize("neighbour", [1, 3])
def test_nearest_neighbours_tell_the_entropy_of_a_gaussian(dim: int, neighbour: int) -> None:
    std = torch.tensor([0.5, 1.0, 2.0])[:dim]
    samples = std * torch.randn(20, 500, dim, generator=torch.Generator().manual_seed(0))
    estimate = nearest_neighbour_entropy(samples, neighbour)
    error = estimate.std().item() / math.sqrt(20)
    assert estimate.shape == (20,)
    assert estimate.mean().item() == pytest.approx(dim * GAUSSIAN + std.log().sum().item(), abs=4 * error + 0.03)


def test_nearest_neighbours_tell_the_entropy_of_separate_squares() -> None:
    # Six squares of side 0.1: log(6 x 0.01), which no Gaussian fitted to the samples would tell.
    generator = torch.Generator().manual_seed(0)
    corner = torch.randint(6, (10, 1000, 1), generator=generator).expand(-1, -1, 2) * torch.tensor([1.0, 0.0])
    samples = corner + 0.1 * torch.rand(10, 1000, 2, generator=generator)
    assert nearest_neighbour_entropy(samples).mean().item() == pytest.approx(math.log(0.06), abs=0.1)


def test_entropy_of_a_linear_flow_is_that_of_its_gaussian(toy: ModuleType) -> None:
    actor = toy.make_actor("endpoint")
    estimate = policy_entropy(actor, torch.zeros(10, 1, dtype=torch.float64), samples=1000).item()
    assert estimate == pytest.approx(toy.entropy(actor).item(), abs=0.04)
    chain = toy.make_actor("chain")  # with the noise of its steps
    estimate = policy_entropy(chain, torch.zeros(10, 1, dtype=torch.float64), samples=1000).item()
    assert estimate == pytest.approx(toy.entropy(chain).item(), abs=0.04)
    assert toy.entropy(chain) - toy.entropy(actor) > 0.1


@pytest.mark.parametrize(
    ("remaining", "error", "clipped"), [(1.0, -0.2, -0.2), (0.0, 0.3, 0.3), (0.5, 7.0, 1.0), (0.5, -7.0, -1.0)]
)
def test_weight_rises_while_the_entropy_is_below_its_target(
    toy: ModuleType, remaining: float, error: float, clipped: float
) -> None:
    actor, obs = toy.make_actor("endpoint"), torch.zeros(100, 1, dtype=torch.float64)
    goal = policy_entropy(actor, obs).item() + error
    target = (goal + 2 * (1 - remaining), goal - 2 * remaining)  # on a line that is at the goal now
    weight, metrics = steered_weight(actor, obs, 0.5, target, remaining)
    assert weight == pytest.approx(0.5 * math.exp(0.1 * clipped))
    assert metrics["flow/spread_coef"] == pytest.approx(weight * math.exp(2 * clipped))
    assert metrics["flow/entropy"] == pytest.approx(goal - error)
    assert metrics["flow/target_entropy"] == pytest.approx(goal)


@pytest.mark.parametrize(("weight", "target"), [(10.0, 99.0), (1e-4, -99.0)])
def test_weight_stays_within_bounds(toy: ModuleType, weight: float, target: float) -> None:
    actor, obs = toy.make_actor("endpoint"), torch.zeros(100, 1, dtype=torch.float64)
    assert steered_weight(actor, obs, weight, (target, target), 1.0)[0] == weight


def test_steered_weight_is_saved_and_a_given_one_is_used(tmp_path: Path) -> None:
    agent = PolicyFlow(
        "MlpPolicy", "Pendulum-v1", n_steps=64, batch_size=64, n_epochs=2, spread="score", spread_coef=0.3,
        target_entropy=(9.0, 9.0), compile="off", seed=0, device="cpu",
    ).learn(128)  # fmt: skip
    assert agent._spread_coef == pytest.approx(0.3 * math.exp(0.2))
    agent.save(tmp_path / "agent")
    assert PolicyFlow.load(tmp_path / "agent")._spread_coef == agent._spread_coef
    assert PolicyFlow.load(tmp_path / "agent", spread_coef=0.7)._spread_coef == 0.7
