"""The rival ratios against closed forms of a linear flow, torch.distributions and hand-made numbers."""

from __future__ import annotations

import itertools
import math
import re
from pathlib import Path
from types import ModuleType
from typing import Any, get_args

import numpy as np
import pytest
import torch
from stable_baselines3.common.envs import IdentityEnvBox
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv
from torch import Tensor
from torch.distributions import Distribution, Independent, Normal, kl_divergence

from driftrl import PolicyFlow, PolicyFlowConfig
from driftrl.agents.policyflow.other_ratios import (
    RATIOS,
    AdjointRatio,
    ChainRatio,
    ChainSteps,
    ChainStepsRatio,
    EndpointRatio,
    FlowMatchingPairs,
    FPOPlusPlusRatio,
    FPORatio,
    MarginalRatio,
    RatioName,
)
from driftrl.agents.policyflow.policy import FlowActor, FlowNoise
from driftrl.agents.policyflow.ratios import (
    Chord,
    InterpolationRatio,
    PastNoise,
    Ratio,
    References,
    Samples,
    draw_epoch,
    record_references,
)

RIVALS = [name for name in RATIOS if name not in ("interpolation", "endpoint")]
BASE = {"fpo": "standard", "fpo++": "standard", "mixture": "mixture"}  # of the ratios that take one alone
MIXTURE = {"base": "mixture", "ratio": "mixture"}
OBS_DIM, ACTION_DIM, STEPS = 3, 2, 3


def make_actor(name: str = "adjoint", base: str | None = None, steps: int = STEPS) -> FlowActor:
    """An actor in float64 whose parameters are all away from their initial values."""
    torch.manual_seed(0)
    actor = FlowActor(
        OBS_DIM, ACTION_DIM, hidden=(16, 16), activation="silu", base_std=0.4, log_std_init=math.log(0.3),
        base=base or BASE.get(name, "learned"), solver="euler", solver_steps=steps,
        chained=name.startswith("chain"),
    ).double()  # fmt: skip
    perturb(actor, 0.3)
    return actor


def perturb(actor: FlowActor, scale: float, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in actor.parameters():
            if parameter.requires_grad:
                parameter.add_(scale * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))


def roll_out(actor: FlowActor, size: int = 64, correlated: bool = False) -> Samples:
    generator = torch.Generator().manual_seed(2)
    obs = torch.randn(size, OBS_DIM, generator=generator, dtype=torch.float64)
    noise = torch.randn(actor.draws, size, ACTION_DIM, generator=generator, dtype=torch.float64)
    path, past = noise[2:].transpose(0, 1) if actor.path_length else None, None
    if correlated:
        mean, scale = torch.randn(size, ACTION_DIM, generator=generator, dtype=torch.float64), 0.7
        noise[1] = mean + scale * noise[1]
        past = PastNoise(mean, torch.full((size, 1), scale, dtype=torch.float64))
    with torch.no_grad():
        return Samples.drawn(actor, obs, actor.sample(obs, FlowNoise.of(noise)), path=path, past=past)


def recorded(name: str, actor: FlowActor, batch: Samples, draws: int = 8) -> Samples:
    ratio, generator = RATIOS[name](draws), torch.Generator().manual_seed(3)
    return draw_epoch(actor, ratio, record_references(actor, ratio, batch, generator), generator)


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize(
    ("name", "base"),
    [
        (name, base)
        for name in RIVALS
        for base in ((BASE[name],) if name in BASE else ("standard", "learned", "gaussian"))
    ],
)
def test_ratio_is_exactly_one_and_kl_exactly_zero_for_the_policy_that_acted(name: str, base: str, steps: int) -> None:
    actor = make_actor(name, base, steps)
    terms = RATIOS[name]().terms(actor, recorded(name, actor, roll_out(actor)))
    assert torch.equal(terms.log_ratio, torch.zeros_like(terms.log_ratio))
    assert torch.equal(terms.kl, torch.zeros(64, dtype=torch.float64))


@pytest.mark.parametrize(
    ("name", "base"),
    [
        *itertools.product(("endpoint", "adjoint", "marginal", "chain", "chain_steps"), ("standard", "learned")),
        ("mixture", "mixture"),
    ],
)
def test_gradient_is_the_policy_gradient(toy: ModuleType, name: str, base: str) -> None:
    gradient = toy.gradient(name, 100_000, draws=4, base=base)
    share = 1 / (1 + toy.STEPS) if name == "chain_steps" else 1  # its surrogate is a mean over z and the steps
    names = {"field.matrix", "field.offset", "log_std"} | ({"base_log_std"} if base == "learned" else set())
    names |= {"points.places", "points.logits.2.bias"} if base == "mixture" else set()
    assert names <= set(gradient.exact)
    for parameter, exact in gradient.exact.items():
        assert (gradient.estimate[parameter] - share * exact).abs().lt(4.5 * gradient.error[parameter]).all(), parameter
    assert gradient.cosine() > 0.99


def documented(name: str) -> tuple[float, float]:
    """Cosine and E[rho] of the page."""
    page = (Path(__file__).parents[3] / "docs" / "flow_ratios.md").read_text()
    found = re.search(rf"\| `{re.escape(name)}` \| ([\d.]+) \| [\d.]+ \| [\d.]+ \| ([\d.]+) ", page)
    assert found is not None
    return float(found[1]), float(found[2])


@pytest.mark.parametrize("name", ["interpolation", "fpo", "fpo++"])
def test_gradient_of_the_others_leans_away_by_what_the_page_says(toy: ModuleType, name: str) -> None:
    gradient = toy.gradient(name, 100_000)
    assert gradient.cosine() < 0.98
    assert gradient.cosine() == pytest.approx(documented(name)[0], abs=0.015)
    if name.startswith("fpo"):
        assert torch.equal(gradient.estimate["log_std"], torch.zeros(2, dtype=torch.float64))


@pytest.mark.parametrize("name", RATIOS)
def test_mean_of_the_ratio_is_one_where_it_is_one_of_densities(toy: ModuleType, name: str) -> None:
    estimate, error = toy.mean_ratio(name, 100_000)
    if name.startswith("fpo"):
        assert estimate - 1 > 10 * error
        assert estimate == pytest.approx(documented(name)[1], abs=5 * error)
    else:
        assert estimate == pytest.approx(1, abs=4 * error)
    assert error < 0.03


def at_step(actor: FlowActor, ratio: Ratio, references: References, k: int) -> Samples:
    """An epoch's samples where the time drawn is that of Euler step k for all of them."""
    samples, velocities = references
    assert velocities is not None
    times = torch.full((len(samples.obs),), k / STEPS, dtype=torch.float64)
    samples = samples._replace(chord=Chord(times, velocities[:, k]))
    return samples._replace(recorded=ratio.for_epoch(actor, samples))


def test_adjoint_gives_the_endpoints_gradient_to_first_order() -> None:
    # The mean over its times is the derivative of the discrete flow, with a memory of the noise, too.
    actor = make_actor()
    batch = roll_out(actor, correlated=True)
    learned = [*actor.field.parameters(), actor.log_std, actor.base_log_std]
    weight = torch.randn(64, generator=torch.Generator().manual_seed(5), dtype=torch.float64)

    def slopes(objective: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad((weight * objective).sum(), learned))

    ratio, references = AdjointRatio(), record_references(actor, AdjointRatio(), batch, torch.Generator())
    at_times = [at_step(actor, ratio, references, k) for k in range(STEPS)]
    mean = torch.stack([ratio.terms(actor, each).log_ratio for each in at_times]).mean(0)
    exact = EndpointRatio().terms(actor, batch).log_ratio
    for ours, theirs in zip(slopes(mean), slopes(exact), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("size", [1e-2, 1e-3])
def test_error_of_the_adjoint_shift_is_of_second_order(size: float) -> None:
    # Against the interpolation ratio, whose error is of first order: it does not fall relative to the shift.
    errors = {}
    for name, ratio in (("adjoint", AdjointRatio()), ("interpolation", InterpolationRatio())):
        actor = make_actor()
        batch = roll_out(actor)
        references = record_references(actor, ratio, batch, torch.Generator())
        perturb(actor, size, seed=7)
        shifts = []
        for k in range(STEPS):
            at = at_step(actor, ratio, references, k)
            at = at._replace(action=at.action.clone().requires_grad_())
            (slope,) = torch.autograd.grad(ratio.terms(actor, at).log_ratio.sum(), at.action)
            old = (at.action - at.x1).detach() * (actor.log_std.mul(-2).exp() - at.log_std.mul(-2).exp())
            shifts.append((slope + old).detach() * actor.log_std.detach().mul(2).exp())
        with torch.no_grad():
            exact = actor.flow(batch.z, batch.obs) - batch.x1
        errors[name] = ((torch.stack(shifts).mean(0) - exact).norm() / exact.norm()).item()
    assert errors["adjoint"] < 4 * size
    assert errors["interpolation"] > 0.02


def test_marginal_ratio_of_one_latent_is_the_endpoints() -> None:
    actor = make_actor(base="standard")
    batch = recorded("marginal", actor, roll_out(actor), draws=1)
    perturb(actor, 0.05, seed=3)
    expected = EndpointRatio().terms(actor, batch).log_ratio
    assert expected.abs().mean() > 0.05
    torch.testing.assert_close(MarginalRatio(1).terms(actor, batch).log_ratio, expected)


def test_marginal_ratio_approaches_that_of_the_actions(toy: ModuleType) -> None:
    errors = [toy.marginal_bias(draws, 4000)[0] for draws in (1, 8, 64, 512)]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 1.5 and errors[-1] < 0.25


@pytest.mark.parametrize("steps", [1, 3])
def test_chain_ratio_is_that_of_the_distributions(steps: int) -> None:
    actor = make_actor("chain", steps=steps)
    batch = recorded("chain", actor, roll_out(actor))
    chain: ChainSteps = batch.recorded
    states = [*chain.states.unbind(1), batch.action]
    torch.testing.assert_close(states[0], batch.z)

    def distributions() -> list[Distribution]:
        """Of z, then of each state given the one before."""
        assert actor.chain_log_std is not None
        with torch.no_grad():
            mean, log_std = actor.base(batch.obs)
            scales = [*actor.chain_log_std.exp(), actor.log_std.exp()]
            means = [x + actor.field(k / steps, x, batch.obs) / steps for k, x in enumerate(states[:-1])]
            each = [Normal(m, s.expand_as(m)) for m, s in zip(means, scales, strict=True)]
        return [Independent(Normal(mean, log_std.exp()), 1), *(Independent(normal, 1) for normal in each)]

    torch.testing.assert_close(chain.means[:, -1], batch.x1)  # the rollout's chain, again
    old = distributions()
    perturb(actor, 0.05, seed=4)
    new = distributions()
    terms = ChainRatio().terms(actor, batch)
    pairs = list(zip(old, new, states, strict=True))
    each_ratio = torch.stack([after.log_prob(x) - before.log_prob(x) for before, after, x in pairs], 1)
    torch.testing.assert_close(terms.log_ratio, each_ratio.sum(1))
    torch.testing.assert_close(terms.kl, torch.stack([kl_divergence(p, q) for p, q, _ in pairs], 1).sum(1))
    torch.testing.assert_close(ChainStepsRatio().terms(actor, batch).log_ratio, each_ratio)
    assert each_ratio.abs().mean() > 0.01


def test_noise_of_the_chain_has_the_deviation_of_each_step() -> None:
    actor = make_actor("chain")
    size = 100_000
    obs = torch.zeros(size, OBS_DIM, dtype=torch.float64)
    noise = torch.randn(actor.draws, size, ACTION_DIM, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with torch.no_grad():
        states = actor.chain(noise[0], obs, noise[2:])
        steps = [states[k + 1] - states[k] - actor.field(k / STEPS, states[k], obs) / STEPS for k in range(STEPS)]
    assert actor.chain_log_std is not None
    for k in range(STEPS - 1):
        torch.testing.assert_close(steps[k].std(0), actor.chain_log_std[k].exp(), rtol=0.01, atol=0)
    assert steps[-1].abs().max() < 1e-12  # the last step's noise is the action's
    assert actor.mode(obs[:1]).equal(actor.flow(actor.base(obs[:1])[0], obs[:1]))


def test_fpo_compares_losses_of_flow_matching() -> None:
    # v = c: the loss of a pair is t^2 mean((c - (a - e))^2) / base_std^2.
    actor = make_actor("fpo")
    with torch.no_grad():
        for parameter in actor.field.parameters():
            parameter.zero_()
    batch = recorded("fpo", actor, roll_out(actor, 5), draws=3)
    with torch.no_grad():
        actor.field.output.bias.copy_(torch.tensor([0.1, -0.2]))
    pairs: FlowMatchingPairs = batch.recorded
    t, gap = pairs.t.numpy(), (batch.action.unsqueeze(1) - pairs.z).numpy()
    fall = t**2 * (gap**2 - (np.array([0.1, -0.2]) - gap) ** 2).mean(-1) / 0.4**2
    np.testing.assert_allclose(FPORatio(3).terms(actor, batch).log_ratio.detach(), fall.mean(1), rtol=1e-6)
    np.testing.assert_allclose(FPOPlusPlusRatio(3).terms(actor, batch).log_ratio.detach(), fall, rtol=1e-6)
    assert pairs.z.shape == (5, 3, 2)
    with torch.no_grad():
        actor.field.output.bias.fill_(100.0)
    assert FPOPlusPlusRatio(3).terms(actor, batch).log_ratio.min() == -10


def test_surrogate_of_fpo_plus_plus_clips_gains_and_pulls_back_losses() -> None:
    ratio = torch.tensor([[1.5, 0.5], [1.5, 0.5]], requires_grad=True)
    loss = FPOPlusPlusRatio().surrogate(ratio.log(), torch.tensor([2.0, -2.0]), 0.25)
    # A = 2: min(rho A, clip(rho) A) = 2.5, 1; A = -2: rho A - |A| (rho - 1)^2 / (2 eps) = -3 - 1, -1 - 1
    assert loss.item() == pytest.approx(-(2.5 + 1 - 4 - 2) / 4)
    loss.backward()
    assert ratio.grad is not None
    # no gradient beyond the band for a gain; for a loss A - |A| (rho - 1) / eps = -6 and 2, that is, back to the band
    torch.testing.assert_close(ratio.grad, -torch.tensor([[0.0, 2.0], [-6.0, 2.0]]) / 4)


def test_every_ratio_can_be_chosen() -> None:
    assert list(RATIOS) == list(get_args(RatioName))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"ratio": "adjoint", "langevin_eps": 0.1}, "langevin_eps: got 0.1, expected 0.0 with ratio adjoint"),
        ({"ratio": "adjoint", "solver": "rk4"}, "solver: got 'rk4', expected euler with ratio adjoint"),
        ({"ratio": "chain", "solver": "heun"}, "solver: got 'heun', expected euler with ratio chain"),
        ({"ratio": "marginal", "exploration_noise": "ou"}, "exploration_noise: got 'ou', expected gaussian with ratio"),
        ({"ratio": "fpo"}, "base: got 'learned', expected standard with ratio fpo"),
        ({"ratio": "fpo++", "base": "standard", "ent_coef": 0.1}, "ent_coef: got 0.1, expected 0 with ratio fpo"),
        ({"base_std": 0.0, "base": "standard"}, "ratio: got 'interpolation', expected endpoint with base_std 0"),
        ({"base_std": 0.0, "ratio": "endpoint"}, "base: got 'learned', expected standard with base_std 0"),
        (
            {"base_std": 0.0, "base": "standard", "ratio": "endpoint", "spread_coef": 0.1},
            "spread: got 'consistent', expected score with base_std 0",
        ),
        ({"base": "mixture"}, "ratio: got 'interpolation', expected mixture with base mixture"),
        ({"base": "mixture", "ratio": "chain"}, "ratio: got 'chain', expected mixture with base mixture"),
        ({"ratio": "mixture"}, "base: got 'learned', expected mixture with ratio mixture"),
        (MIXTURE | {"langevin_eps": 0.1}, "langevin_eps: got 0.1, expected 0.0 with ratio mixture"),
        (MIXTURE | {"exploration_noise": "ou"}, "exploration_noise: got 'ou', expected gaussian with ratio mixture"),
        (MIXTURE | {"spread_coef": 0.1}, "spread_coef: got 0.1, expected 0 with base mixture"),
        (MIXTURE | {"transport_coef": 0.1}, "transport_coef: got 0.1, expected 0 with base mixture"),
        (MIXTURE | {"freeze_flow": True}, "base: got 'mixture', expected learned or gaussian with freeze_flow"),
        (MIXTURE | {"base_std": 0.0}, "base: got 'mixture', expected standard with base_std 0"),
        (MIXTURE | {"components": 1}, "components: got 1, expected an integer of at least 2"),
        ({"base_std": -0.1}, "base_std: got -0.1, expected a number of at least 0"),
        ({"ratio_draws": 0}, "ratio_draws: got 0, expected an integer of at least 1"),
        ({"target_entropy": (1.0, 0.0)}, "spread_coef: got 0.0, expected a number above 0 with target_entropy"),
        ({"target_entropy": (1.0,), "spread_coef": 1.0}, "target_entropy: got .* expected two numbers, or None"),
    ],
)
def test_what_does_not_go_together_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PolicyFlowConfig(**fields)


def test_without_latent_the_policy_and_its_ratio_are_those_of_gaussian_ppo() -> None:
    agent = PolicyFlow(
        "MlpPolicy", "Pendulum-v1", base="standard", base_std=0.0, ratio="endpoint", action_std=0.4, n_steps=64,
        batch_size=32, diagnostics_interval=1, seed=0, device="cpu",
    ).learn(128)  # fmt: skip
    actor, batch = agent.policy.actor, agent.samples  # of the rollout before the last update
    assert batch.z.abs().max() == 0
    old = Independent(Normal(batch.x1, batch.log_std.exp()), 1)
    new = Independent(Normal(actor.mode(batch.obs), actor.log_std.exp().expand_as(batch.x1)), 1)
    terms = EndpointRatio().terms(actor, batch)
    torch.testing.assert_close(terms.log_ratio, new.log_prob(batch.action) - old.log_prob(batch.action))
    torch.testing.assert_close(terms.kl, kl_divergence(old, new), rtol=1e-3, atol=1e-6)
    assert terms.kl.mean() > 1e-3
    action, _, log_prob = agent.policy(torch.zeros(2, 3))
    here = Normal(actor.mode(agent.policy.obs_norm(torch.zeros(2, 3))), actor.log_std.exp())
    torch.testing.assert_close(log_prob, here.log_prob(action).sum(-1))


def settings(name: str) -> dict[str, Any]:
    return {"ratio": name, "base_std": 0.3} | ({"base": BASE[name]} if name in BASE else {})


@pytest.mark.parametrize("name", RIVALS)
def test_trains_reproducibly_and_loads(name: str, tmp_path: Path) -> None:
    spreading: dict[str, Any] = {} if name == "mixture" else {"spread_coef": 0.01, "transport_coef": 0.01}

    def train(seed: int) -> PolicyFlow:
        agent = PolicyFlow(
            "MlpPolicy", "Pendulum-v1", n_steps=32, batch_size=16, n_epochs=2, jacobian_coef=0.01,
            diagnostics_interval=1, seed=seed, device="cpu", **spreading, **settings(name),
        )  # fmt: skip
        return agent.learn(96)

    def vector(agent: PolicyFlow) -> Tensor:
        weights = agent.policy.weights.vector
        assert weights is not None
        return weights

    first, second, other = (vector(train(seed)) for seed in (0, 0, 1))
    assert torch.isfinite(first).all()
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    train(0).save(tmp_path / "agent")
    assert torch.equal(vector(PolicyFlow.load(tmp_path / "agent", device="cpu")), first)


@pytest.mark.slow
@pytest.mark.parametrize("name", RIVALS)
def test_learns_to_act_as_observed(name: str) -> None:
    # reward 1 where the action is within 0.2 of the observation; uniform random actions get about 0.18 of it
    envs = DummyVecEnv([lambda: Monitor(IdentityEnvBox(eps=0.2, ep_length=100))] * 8)
    agent = PolicyFlow(
        "MlpPolicy", envs, n_steps=128, batch_size=128, gamma=0.5, learning_rate=1e-3, normalize_observation=False,
        seed=0, device="cpu", **settings(name),
    )  # fmt: skip
    agent.learn(16_000)
    mean, _ = evaluate_policy(agent, envs, 8)
    assert float(np.mean(mean)) > 80
