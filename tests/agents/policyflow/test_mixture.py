"""A base of points makes the policy a mixture of Gaussians: density, draws, ratio and pretraining against oracles."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import Tensor
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal, kl_divergence

from driftrl import PolicyFlow
from driftrl.agents.policyflow.density import marginal_log_prob
from driftrl.agents.policyflow.diagnostics import flow_diagnostics
from driftrl.agents.policyflow.entropy import policy_entropy
from driftrl.agents.policyflow.other_ratios import MixtureRatio
from driftrl.agents.policyflow.policy import FlowActor, FlowNoise, FlowPolicy, FlowSample
from driftrl.agents.policyflow.pretraining import Expert, imitation_loss
from driftrl.agents.policyflow.ratios import Samples
from driftrl.dynamics.ode import odeint

OBS, DIM, COUNT = 3, 2, 4
MIXTURE: dict[str, Any] = {"base": "mixture", "ratio": "mixture"}
ACTIONS = spaces.Box(np.array([-2.0, 0.0], np.float32), np.array([2.0, 2.0], np.float32))


def make_actor(dtype: torch.dtype = torch.float64, seed: int = 0) -> FlowActor:
    """An actor whose parameters are all away from their initial values."""
    torch.manual_seed(seed)
    actor = FlowActor(
        OBS, DIM, hidden=(16,), activation="silu", base="mixture", base_std=0.8, log_std_init=math.log(0.3),
        solver="midpoint", solver_steps=2, components=COUNT,
    ).to(dtype)  # fmt: skip
    perturb(actor, 0.3)
    return actor


def perturb(actor: FlowActor, scale: float) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for each in actor.parameters():
            if each.requires_grad:
                each.add_(scale * torch.randn(each.shape, generator=generator, dtype=each.dtype))


def parts(actor: FlowActor, obs: Tensor) -> tuple[Categorical, Any]:
    """The choice [B] and the Gaussians [B, K] of the actions, by torch.distributions, one point at a time."""
    assert actor.points is not None
    x1 = [
        odeint(actor.field, place.expand(len(obs), -1), steps=2, solver="midpoint", cond=obs)
        for place in actor.points.places
    ]
    gaussians = Independent(Normal(torch.stack(x1, 1), actor.log_std.exp()), 1)
    return Categorical(logits=actor.points.logits(obs)), gaussians


def draw(actor: FlowActor, obs: Tensor, seed: int = 2) -> FlowSample:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        return actor.sample(
            obs, FlowNoise.of(torch.randn(2, len(obs), DIM, generator=generator, dtype=torch.float64).to(obs))
        )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_density_is_that_of_torchs_mixture_and_so_is_its_gradient(dtype: torch.dtype) -> None:
    actor, obs = make_actor(dtype), torch.randn(50, OBS, dtype=dtype)
    sample = draw(actor, obs)
    oracle = MixtureSameFamily(*parts(actor, obs)).log_prob(sample.action)
    learned = [each for each in actor.parameters() if each.requires_grad]
    exact = torch.autograd.grad(oracle.sum(), learned)
    for density in (actor.log_prob(obs, sample), marginal_log_prob(actor, obs, sample.action)):
        torch.testing.assert_close(density, oracle)
        for one, other in zip(torch.autograd.grad(density.sum(), learned), exact, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    expert = Expert(obs, sample.action, sample.z, obs[:, 0])
    torch.testing.assert_close(imitation_loss(actor, expert), -oracle.mean() / DIM)


def test_the_policy_tells_the_density_in_units_of_the_environment() -> None:
    torch.manual_seed(0)
    policy = FlowPolicy(spaces.Box(-1, 1, (OBS,)), ACTIONS, lambda _: 1e-3, base="mixture", base_std=0.5)
    perturb(policy.actor, 0.2)
    obs = torch.rand(400_000, OBS)[:1].expand(400_000, -1)
    # Over a box that holds all of the mass the density integrates to 1.
    low, high = torch.tensor([-12.0, -6.0]), torch.tensor([12.0, 8.0])
    with torch.no_grad():
        action = low + (high - low) * torch.rand(400_000, 2, generator=torch.Generator().manual_seed(0))
        density = policy.evaluate_actions(obs, action)[1].exp() * (high - low).prod()
    assert density.mean().item() == pytest.approx(1, abs=4 * density.std().item() / math.sqrt(len(density)))
    assert density.std() < 10


def test_points_are_drawn_with_their_probabilities_and_the_action_has_the_mixtures_moments() -> None:
    actor, size = make_actor(), 200_000
    assert actor.points is not None
    obs = torch.randn(1, OBS, dtype=torch.float64).expand(size, -1)
    sample = draw(actor, obs)
    hits = (sample.z.unsqueeze(1) == actor.points.places).all(-1)
    assert (hits.sum(1) == 1).all()
    choice, gaussians = parts(actor, obs[:1])
    weight = choice.probs[0].detach()
    error = (weight * (1 - weight) / size).sqrt()
    assert weight.min() > 0.02 and weight.max() - weight.min() > 0.1
    assert ((hits.double().mean(0) - weight).abs() < 4 * error).all()
    oracle = MixtureSameFamily(choice, gaussians)
    error = (oracle.variance[0] / size).sqrt()
    assert ((sample.action.mean(0) - oracle.mean[0]).abs() < 4 * error).all()
    torch.testing.assert_close(sample.action.var(0), oracle.variance[0].detach(), rtol=0.02, atol=0)


def test_every_noise_chooses_a_point() -> None:
    actor = make_actor(torch.float32)
    assert actor.points is not None
    normal = torch.tensor([-40.0, -4.0, 0.0, 4.0, 40.0]).unsqueeze(1).expand(-1, DIM)
    with torch.no_grad():
        z = actor.points.draw(torch.zeros(5, OBS), normal)
        assert torch.equal(z[0], actor.points.places[0]) and torch.equal(z[-1], actor.points.places[-1])
        actor.get_parameter("points.logits.2.bias").copy_(
            torch.tensor([-200.0, 0.0, -200.0, -200.0])
        )  # one alone is left
        assert torch.equal(actor.points.draw(torch.zeros(3, OBS), normal[1:4]), actor.points.places[1].expand(3, -1))


def test_the_deterministic_action_is_the_flow_of_the_most_probable_point() -> None:
    actor, obs = make_actor(), torch.randn(100, OBS, dtype=torch.float64)
    choice, gaussians = parts(actor, obs)
    best = choice.probs.argmax(1)
    assert len(best.unique()) > 1
    torch.testing.assert_close(actor.mode(obs), gaussians.mean[torch.arange(100), best])


def test_a_new_mixture_chooses_evenly_among_points_that_lie_apart() -> None:
    torch.manual_seed(0)
    actor = FlowActor(
        OBS, DIM, hidden=(8,), activation="silu", base="mixture", base_std=0.5, log_std_init=-1.0, solver="euler",
        solver_steps=2, components=500,
    )  # fmt: skip
    assert actor.points is not None
    assert torch.equal(actor.points.logits(torch.randn(5, OBS)), torch.zeros(5, 500))
    assert actor.points.places.std(0).tolist() == pytest.approx([0.5, 0.5], rel=0.15)
    assert not actor.base_log_std.requires_grad


@torch.no_grad()
def drawn(actor: FlowActor, obs: Tensor) -> Samples:
    samples = Samples.drawn(actor, obs, draw(actor, obs))
    return samples._replace(recorded=MixtureRatio().record(actor, samples, torch.Generator()))


def test_the_ratio_is_that_of_the_densities_and_the_kl_that_of_point_and_action() -> None:
    actor, obs = make_actor(), torch.randn(50, OBS, dtype=torch.float64)
    samples, (old_choice, old) = drawn(actor, obs), parts(actor, obs)
    before = MixtureSameFamily(old_choice, old).log_prob(samples.action)
    old = Independent(Normal(old.mean.detach(), old.stddev.detach().clone()), 1)
    old_choice = Categorical(probs=old_choice.probs.detach())
    perturb(actor, 0.1)
    choice, new = parts(actor, obs)
    after = MixtureSameFamily(choice, new).log_prob(samples.action)
    terms = MixtureRatio().terms(actor, samples)
    torch.testing.assert_close(terms.log_ratio, after - before)
    exact = kl_divergence(old_choice, choice) + (old_choice.probs * kl_divergence(old, new)).sum(1)
    torch.testing.assert_close(terms.kl, exact)
    assert (after - before).abs().mean() > 0.1


def test_the_kl_bounds_that_of_the_actions_and_the_ratio_has_mean_one() -> None:
    actor, size = make_actor(), 200_000
    samples = drawn(actor, torch.randn(1, OBS, dtype=torch.float64).expand(size, -1))
    perturb(actor, 0.1)
    with torch.no_grad():
        log_ratio, kl, _ = MixtureRatio().terms(actor, samples)
    ratio = log_ratio.exp()
    assert ratio.std() > 0.2
    assert ratio.mean().item() == pytest.approx(1, abs=4 * ratio.std().item() / math.sqrt(size))
    assert 0.02 < -log_ratio.mean() < kl[0]
    assert torch.equal(kl, kl[:1].expand(size))  # the state's: no noise of actions


def test_entropies_are_those_of_the_choice_and_of_the_actions() -> None:
    actor, obs = make_actor(), torch.randn(64, OBS, dtype=torch.float64)
    choice, gaussians = parts(actor, obs)
    both = choice.entropy().mean() + gaussians.entropy().mean()
    constant = DIM * math.log(2 * math.pi * math.e) / 2  # what a base without spread adds
    assert actor.joint_entropy(obs).item() == pytest.approx(both.item() + constant)
    # by integration over a grid that holds all of the mass
    grid = torch.linspace(-7, 7, 281, dtype=torch.float64)
    action = torch.cartesian_prod(grid, grid).unsqueeze(1)
    with torch.no_grad():
        log_prob = MixtureSameFamily(*parts(actor, obs[:8])).log_prob(action)
    exact = -(log_prob.exp() * log_prob).sum(0).mean() * 0.05**2
    assert policy_entropy(actor, obs[:8], actions=20_000).item() == pytest.approx(exact.item(), abs=0.03)


def test_diagnostics_say_how_many_components_are_in_use() -> None:
    actor, obs = make_actor(), torch.randn(40, OBS, dtype=torch.float64)
    found = flow_diagnostics(actor, MixtureRatio(), drawn(actor, obs), 0.2)
    assert set(found) == {"flow/jacobian_norm", "flow/entropy", "flow/components"}
    assert found["flow/components"] == pytest.approx(parts(actor, obs)[0].entropy().mean().exp().item())
    for name in ("weight", "bias"):
        torch.nn.init.zeros_(actor.get_parameter(f"points.logits.2.{name}"))
    found = flow_diagnostics(actor, MixtureRatio(), drawn(actor, obs), 0.2)
    assert found["flow/components"] == pytest.approx(COUNT)


@pytest.mark.parametrize("part", ["act", "loss"])
def test_draws_and_losses_compile_into_one_graph(part: str) -> None:
    actor, obs = make_actor(), torch.randn(12, OBS, dtype=torch.float64)
    samples = drawn(actor, obs)
    perturb(actor, 0.1)
    noise = torch.randn(2, 12, DIM, dtype=torch.float64)
    expert = Expert(obs, samples.action, samples.z, obs[:, 0])

    def function() -> Tensor:
        if part == "act":
            return torch.stack(actor.sample(obs, FlowNoise.of(noise)))
        loss = MixtureRatio().loss(actor, samples, 0.2)[0]
        return loss + actor.joint_entropy(obs) + imitation_loss(actor, expert)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(), function())


def agent(**fields: Any) -> PolicyFlow:
    defaults: dict[str, Any] = {
        "n_steps": 32, "batch_size": 16, "n_epochs": 2, "actor_hidden": (8,), "critic_hidden": (8,), "components": 3,
        "base_std": 0.5, "ema_decay": 0.5, "diagnostics_interval": 1,
    }  # fmt: skip
    return PolicyFlow("MlpPolicy", "Pendulum-v1", seed=0, device="cpu", **defaults | MIXTURE | fields)


def test_an_agent_is_saved_to_the_last_bit_and_learns_on(tmp_path: Path) -> None:
    first = agent(ent_coef=0.01).learn(64)
    first.save(tmp_path / "agent")
    loaded = PolicyFlow.load(tmp_path / "agent", env=gym.make("Pendulum-v1"), device="cpu")
    assert (loaded.config.base, loaded.config.components) == ("mixture", 3)
    saved = loaded.policy.state_dict()
    assert {"actor.points.places", "averaged_actor.points.places"} <= saved.keys()
    for name, each in first.policy.state_dict().items():
        assert torch.equal(each, saved[name]), name
    places = saved["actor.points.places"].clone()
    loaded.learn(64)
    assert not torch.equal(loaded.policy.actor.points.places, places)  # type: ignore[union-attr]


def test_chunks_and_regularizers_of_the_field_work_with_it() -> None:
    trained = agent(chunk=2, jacobian_coef=0.01, solver_error_coef=0.01).learn(64)
    assert trained.policy.actor.points is not None and trained.policy.actor.points.places.shape == (3, 2)
    action, values, log_prob = trained.policy(torch.zeros(4, 3), deterministic=True)
    assert (action.shape, values.shape, log_prob.shape) == ((4, 2), (4, 1), (4,))


def test_what_a_mixture_cannot_do_is_refused_by_the_policy() -> None:
    for fields in ({"components": 1}, {"langevin_eps": 0.1}, {"chained": True}):
        with pytest.raises(
            ValueError, match=r"base: got mixture with langevin_eps .*; expected 0, False and at least 2"
        ):
            FlowPolicy(spaces.Box(-1, 1, (OBS,)), ACTIONS, lambda _: 1e-3, base="mixture", **fields)
    with pytest.raises(ValueError, match="base_std: got 0, expected a number above 0, or 0 with base standard"):
        FlowPolicy(spaces.Box(-1, 1, (OBS,)), ACTIONS, lambda _: 1e-3, base="mixture", base_std=0)
    with pytest.raises(ValueError, match="base: got 'points', expected standard, learned, gaussian or mixture"):
        FlowPolicy(spaces.Box(-1, 1, (OBS,)), ACTIONS, lambda _: 1e-3, base="points")
