"""The importance ratios given z against torch.distributions, Monte Carlo and the closed form of a linear flow."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, Normal, kl_divergence

from driftrl.agents.policyflow.other_ratios import EndpointRatio
from driftrl.agents.policyflow.policy import FlowActor, FlowNoise, FlowSample
from driftrl.agents.policyflow.ratios import (
    Chord,
    InterpolationRatio,
    PastNoise,
    Ratio,
    Samples,
    draw_epoch,
    quadrature,
    record_references,
)
from driftrl.dynamics import VelocityField
from driftrl.dynamics.fields import MLPField
from driftrl.dynamics.special_fields import AffineField

OBS_DIM, ACTION_DIM = 3, 2
RATIOS: dict[str, type[Ratio]] = {"interpolation": InterpolationRatio, "endpoint": EndpointRatio}
BASES = ("standard", "learned", "gaussian")


def make_actor(
    base: str = "learned", solver: str = "euler", steps: int = 4, seed: int = 0, langevin_eps: float = 0.0
) -> FlowActor:
    """An actor in float64 whose parameters are all away from their initial values."""
    torch.manual_seed(seed)
    actor = FlowActor(
        OBS_DIM, ACTION_DIM, hidden=(16, 16), activation="silu", base=base, base_std=0.4,
        log_std_init=math.log(0.3), solver=solver, solver_steps=steps, langevin_eps=langevin_eps,
    ).double()  # fmt: skip
    perturb(actor, 0.3)
    return actor


def perturb(module: nn.Module, scale: float, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.add_(scale * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))


def roll_out(actor: FlowActor, size: int = 64, correlated: bool = False) -> Samples:
    generator = torch.Generator().manual_seed(2)
    obs = torch.randn(size, OBS_DIM, generator=generator, dtype=torch.float64)
    noise = torch.randn(actor.draws, size, ACTION_DIM, generator=generator, dtype=torch.float64)
    path, past = noise[2:].transpose(0, 1) if actor.langevin_eps else None, None
    if correlated:
        mean = torch.randn(size, ACTION_DIM, generator=generator, dtype=torch.float64)
        scale = 0.6 + 0.4 * torch.rand(size, 1, generator=generator, dtype=torch.float64)
        noise[1] = mean + scale * noise[1]
        past = PastNoise(mean, scale)
    with torch.no_grad():
        return Samples.drawn(actor, obs, actor.sample(obs, FlowNoise.of(noise)), path=path, past=past)


def recorded(name: str, actor: FlowActor, batch: Samples, seed: int = 0) -> Samples:
    """What a minibatch of the ratio holds."""
    generator = torch.Generator().manual_seed(seed)
    references = record_references(actor, RATIOS[name](), batch, generator)
    return draw_epoch(actor, RATIOS[name](), references, generator)


@pytest.mark.parametrize("name", RATIOS)
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("solver", ["euler", "midpoint", "heun", "rk4"])
def test_ratio_is_exactly_one_and_kl_exactly_zero_for_the_policy_that_acted(name: str, base: str, solver: str) -> None:
    actor = make_actor(base, solver)
    batch = roll_out(actor)
    for seed in range(5):  # other interpolation times each
        terms = RATIOS[name]().terms(actor, recorded(name, actor, batch, seed))
        assert torch.equal(terms.log_ratio, torch.zeros(64, dtype=torch.float64))
        assert torch.equal(terms.kl, torch.zeros(64, dtype=torch.float64))


@pytest.mark.parametrize("name", RATIOS)
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize(("langevin_eps", "correlated"), [(0.0, True), (0.3, False), (0.3, True), (1.0, True)])
def test_ratio_is_exactly_one_with_a_memory_and_along_a_path(
    name: str, base: str, langevin_eps: float, correlated: bool
) -> None:
    actor = make_actor(base, langevin_eps=langevin_eps)
    batch = roll_out(actor, correlated=correlated)
    for seed in range(5):
        terms = RATIOS[name]().terms(actor, recorded(name, actor, batch, seed))
        assert torch.equal(terms.log_ratio, torch.zeros(64, dtype=torch.float64))
        assert torch.equal(terms.kl, torch.zeros(64, dtype=torch.float64))


def euler_maruyama(actor: FlowActor, batch: Samples) -> Tensor:
    """x1 along the recorded path, in action units: the oracle of the SDE."""
    assert batch.path is not None
    with torch.no_grad():
        mean, log_std = actor.base(batch.obs)
        x, eps, steps = batch.z, actor.langevin_eps, actor.solver_steps
        for k in range(steps):
            t, std = k / steps, log_std.exp()
            velocity = actor.field(t, x, batch.obs)
            score = (t * velocity - (x - mean)) / (1 - t) / std**2
            drift = velocity + eps * std**2 * score
            x = x + drift / steps + std * math.sqrt(2 * eps / steps) * batch.path[:, k]
    return x


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("langevin_eps", [0.1, 1.0])
def test_endpoint_ratio_given_path_and_memory_is_that_of_the_distributions(base: str, langevin_eps: float) -> None:
    actor = make_actor(base, langevin_eps=langevin_eps)
    batch = roll_out(actor, correlated=True)
    past = batch.past
    assert past is not None
    torch.testing.assert_close(batch.x1, euler_maruyama(actor, batch))

    def distributions() -> tuple[Distribution, Distribution]:
        with torch.no_grad():
            mean, log_std = actor.base(batch.obs)
            x1, std = euler_maruyama(actor, batch), actor.noise_log_std().exp()
        action = Normal(x1 + std * past.mean, std * past.scale)
        return Independent(Normal(mean, log_std.exp()), 1), Independent(action, 1)

    old_base, old_action = distributions()
    perturb(actor, 0.05, seed=3)
    new_base, new_action = distributions()
    terms = EndpointRatio().terms(actor, batch)
    expected = new_action.log_prob(batch.action) - old_action.log_prob(batch.action)
    expected += new_base.log_prob(batch.z) - old_base.log_prob(batch.z)
    torch.testing.assert_close(terms.log_ratio, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(terms.kl, kl_divergence(old_action, new_action) + kl_divergence(old_base, new_base))
    assert expected.abs().mean() > 0.05


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("langevin_eps", [0.1, 0.6, 1.0])
def test_both_ratios_agree_along_a_path_when_the_velocity_depends_on_the_observation_alone(
    base: str, langevin_eps: float
) -> None:
    actor = make_actor(base, langevin_eps=langevin_eps)

    def flatten() -> None:
        assert isinstance(actor.field, MLPField)
        with torch.no_grad():
            actor.field.x_weight.zero_()
            actor.field.time_weight.zero_()

    flatten()
    batch = roll_out(actor, correlated=True)
    batches = {name: recorded(name, actor, batch) for name in RATIOS}
    perturb(actor, 0.05, seed=3)  # the base, too
    flatten()
    terms = {name: RATIOS[name]().terms(actor, batches[name]) for name in RATIOS}
    torch.testing.assert_close(terms["interpolation"].log_ratio, terms["endpoint"].log_ratio)
    torch.testing.assert_close(terms["interpolation"].kl, terms["endpoint"].kl)


@pytest.mark.parametrize("langevin_eps", [0.0, 0.2, 0.9, 1.0])
def test_quadrature_weighs_velocities_by_their_share_in_the_endpoint(langevin_eps: float) -> None:
    # The derivative of x1 by a change of v in one step, where v does not depend on x; the shares sum to 1.
    actor = make_actor(langevin_eps=langevin_eps)
    times, weights = quadrature(actor)
    assert sum(weights) == pytest.approx(1)
    batch = roll_out(actor, size=1)
    path = None if batch.path is None else batch.path.transpose(0, 1)
    for k in range(4):
        field = _Pulse(k / 4)
        actor.field = field  # type: ignore[assignment]
        moved = actor.flow(batch.z, batch.obs, path)
        field.t = -1.0
        share = (moved - actor.flow(batch.z, batch.obs, path)).mean().item()
        assert share == pytest.approx(weights[times.index(k / 4)] if k / 4 in times else 0, abs=1e-12)


class _Pulse(VelocityField):
    """v = 1 at one time, 0 at others."""

    def __init__(self, t: float) -> None:
        super().__init__(ACTION_DIM, OBS_DIM)
        self.t = t

    def forward(self, t: float | Tensor, x: Tensor, cond: Tensor | None = None) -> Tensor:
        return torch.full_like(x, float(t == self.t))


@pytest.mark.parametrize("t", [0.0, 0.125, 0.5, 1.0])
def test_interpolation_ratio_is_one_at_any_flow_time(t: float) -> None:
    actor = make_actor()
    batch, times = roll_out(actor), torch.full((64,), t, dtype=torch.float64)
    with torch.no_grad():
        velocity = actor.field(times, torch.lerp(batch.z, batch.x1, t), batch.obs)
    batch = batch._replace(chord=Chord(times, velocity))
    assert torch.equal(InterpolationRatio().terms(actor, batch).log_ratio, torch.zeros(64, dtype=torch.float64))


@pytest.mark.parametrize("name", RATIOS)
@pytest.mark.parametrize("base", BASES)
def test_gaussian_ppo_is_recovered_when_the_velocity_depends_on_the_observation_alone(name: str, base: str) -> None:
    # v = mu(s), so the action given z is N(z + mu(s), std^2); the oracle is torch.distributions.
    actor = make_actor(base)
    assert isinstance(actor.field, MLPField)
    with torch.no_grad():
        actor.field.x_weight.zero_()
        actor.field.time_weight.zero_()
    batch = recorded(name, actor, roll_out(actor))

    def distributions() -> tuple[Distribution, Distribution]:
        with torch.no_grad():
            mean, log_std = actor.base(batch.obs)
            shift = actor.field(0.0, batch.z, batch.obs)
            std = actor.noise_log_std().exp()
        return Independent(Normal(mean, log_std.exp()), 1), Independent(Normal(batch.z + shift, std), 1)

    old_base, old_action = distributions()
    perturb(actor, 0.05, seed=3)
    assert isinstance(actor.field, MLPField)
    with torch.no_grad():
        actor.field.x_weight.zero_()
        actor.field.time_weight.zero_()
    new_base, new_action = distributions()
    terms = RATIOS[name]().terms(actor, batch)
    expected = new_action.log_prob(batch.action) - old_action.log_prob(batch.action)
    expected += new_base.log_prob(batch.z) - old_base.log_prob(batch.z)
    torch.testing.assert_close(terms.log_ratio, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(terms.kl, kl_divergence(old_action, new_action) + kl_divergence(old_base, new_base))
    assert expected.abs().mean() > 0.05


@pytest.mark.parametrize("name", RATIOS)
@pytest.mark.parametrize(("langevin_eps", "correlated"), [(0.0, False), (0.0, True), (0.3, True)])
def test_ratio_has_mean_one_over_the_action_noise_given_z(name: str, langevin_eps: float, correlated: bool) -> None:
    size = 200_000
    actor = make_actor(langevin_eps=langevin_eps)
    batch = roll_out(actor, size=1, correlated=correlated).rows(torch.zeros(size, dtype=torch.long))
    noise = torch.randn(size, ACTION_DIM, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    if batch.past is not None:
        noise = batch.past.mean + batch.past.scale * noise
    batch = recorded(name, actor, batch._replace(action=batch.x1 + batch.log_std.exp() * noise))
    # z is held fixed: only the parameters of the field and of the action noise move.
    perturb(actor.field, 0.02, seed=6)  # small: the tails of the ratio must be sampled
    with torch.no_grad():
        actor.log_std.sub_(0.1)
        ratio = RATIOS[name]().terms(actor, batch).log_ratio.exp()
    standard_error = ratio.std().item() / math.sqrt(size)
    assert ratio.std() > 0.05
    assert ratio.mean().item() == pytest.approx(1, abs=4 * standard_error)


class _Constant(VelocityField):
    """v = offset, everywhere."""

    def __init__(self) -> None:
        super().__init__(ACTION_DIM)
        self.offset = nn.Parameter(torch.zeros(ACTION_DIM, dtype=torch.float64))

    def forward(self, t: float | Tensor, x: Tensor, cond: Tensor | None = None) -> Tensor:
        return self.offset.expand_as(x)


class _WithoutCondition(VelocityField):
    """A field that ignores the observation."""

    def __init__(self, inner: VelocityField) -> None:
        super().__init__(ACTION_DIM, OBS_DIM)
        self.inner = inner

    def forward(self, t: float | Tensor, x: Tensor, cond: Tensor | None = None) -> Tensor:
        return self.inner(t, x)


@pytest.mark.parametrize("rate", [-1.5, -0.5, 0.5, 1.5])
def test_shift_of_a_linear_flow_and_its_approximation(rate: float) -> None:
    # dx/dt = L x + d moves the endpoint by d (e^L - 1) / L: the endpoint ratio sees just that, the interpolation
    # ratio sees d. A shift is read off the derivative of the log-ratio by the action: (new - old mean) / std^2.
    actor = make_actor(solver="rk4", steps=32)
    linear = AffineField(ACTION_DIM).double()
    nn.init.eye_(linear.output.weight).data.mul_(rate)
    actor.field = _WithoutCondition(linear)  # type: ignore[assignment]
    d = torch.tensor([0.02, -0.03], dtype=torch.float64)
    variance = actor.noise_log_std().detach().exp().square()
    shifts = {}
    for name, ratio in (("endpoint", EndpointRatio()), ("interpolation", InterpolationRatio())):
        with torch.no_grad():
            linear.output.bias.zero_()
        batch = roll_out(actor)
        batch = recorded(name, actor, batch)
        with torch.no_grad():
            linear.output.bias.copy_(d)
        batch.action.requires_grad_()
        (slope,) = torch.autograd.grad(ratio.terms(actor, batch).log_ratio.sum(), batch.action)
        shifts[name] = slope * variance
    torch.testing.assert_close(shifts["endpoint"], (d * math.expm1(rate) / rate).expand(64, -1), rtol=1e-6, atol=0)
    torch.testing.assert_close(shifts["interpolation"], d.expand(64, -1), rtol=1e-9, atol=0)


def test_no_gradient_reaches_the_velocity_of_the_policy_that_acted() -> None:
    actor = make_actor()
    batch = recorded("interpolation", actor, roll_out(actor))
    assert batch.chord is not None
    assert not batch.chord.velocity.requires_grad
    # At the policy that acted log rho = n . dv / var to first order, so d(log rho)/d(v) is n / var: had the second
    # velocity a gradient too, the two would cancel.
    terms = InterpolationRatio().terms(actor, batch)
    assert terms.velocity is not None
    (slope,) = torch.autograd.grad(terms.log_ratio.sum(), terms.velocity)
    variance = actor.noise_log_std().detach().exp().square()
    torch.testing.assert_close(slope, (batch.action - batch.x1) / variance)


@pytest.mark.parametrize(
    ("solver", "times"), [("euler", {0, 0.25, 0.5, 0.75}), ("midpoint", {0.125, 0.375, 0.625, 0.875})]
)
def test_interpolation_times_are_the_solvers_quadrature_nodes(solver: str, times: set[float]) -> None:
    actor = make_actor(solver=solver, steps=4)
    batch = recorded("interpolation", actor, roll_out(actor, 4000))
    assert batch.chord is not None
    drawn, counts = batch.chord.t.unique(return_counts=True)
    assert set(drawn.tolist()) == times
    assert counts.float() / 4000 == pytest.approx([0.25] * 4, abs=0.03)


@pytest.mark.parametrize("name", RATIOS)
def test_gradient_is_that_of_the_expected_return_of_the_process_with_its_memory(name: str) -> None:
    # Three steps of Ornstein-Uhlenbeck noise with decay rho. The memory is rho (a - x1_old) / std_old of the step
    # before, the acting policy's filter, whatever policy acts: so the return of a policy is differentiable through
    # the process, and its gradient is the one that sum_t grad log_ratio_t times the return estimates.
    size, rho, steps, blocks = 200_000, 0.8, 3, 40
    actor = make_actor()
    constant = _Constant()
    actor.field = _WithoutCondition(constant)  # type: ignore[assignment]
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(steps, 2, size, ACTION_DIM, generator=generator, dtype=torch.float64)
    obs = torch.zeros(size, OBS_DIM, dtype=torch.float64)
    parameters = [constant.offset, actor.log_std, actor.base_log_std]
    with torch.no_grad():
        constant.offset.copy_(torch.tensor([0.3, -0.2]))
        old_shift, old_std = constant.offset.clone(), actor.noise_log_std().exp()

    def act() -> tuple[Tensor, list[Samples]]:
        """Returns [size] differentiable through the process, and the batch of each step."""
        memory, total, squares = torch.zeros(3, size, ACTION_DIM, dtype=torch.float64).unbind()
        batches: list[Samples] = []
        for t in range(steps):
            mean, log_std = actor.base(obs)
            scale = torch.full((size, 1), 1.0 if t == 0 else math.sqrt(1 - rho**2), dtype=torch.float64)
            z = mean + log_std.exp() * noise[t, 0]
            action = z + constant.offset + actor.noise_log_std().exp() * (memory + scale * noise[t, 1])
            sample = FlowSample(*(each.detach() for each in (z, z + old_shift, action)))
            with torch.no_grad():
                batches.append(Samples.drawn(actor, obs, sample, past=PastNoise(memory.detach(), scale)))
            # The filter knows z and takes the acting policy's flow to be x1 = z + old_shift.
            memory = rho * (action - z - old_shift) / old_std
            total, squares = total + action, squares + (t + 1) * action.square()
        return (total - 0.5 * total.square() + 0.1 * squares).sum(-1), batches

    returns, batches = act()
    advantage = (returns - returns.mean()).detach()

    def errors(forget: bool) -> Tensor:
        """Estimated less exact gradient in each block of samples, in standard errors over the blocks."""
        log_ratio = torch.zeros(size, dtype=torch.float64)
        for batch in batches:
            kept = batch._replace(past=None) if forget else batch
            log_ratio = log_ratio + RATIOS[name]().terms(actor, recorded(name, actor, kept)).log_ratio
        assert log_ratio.abs().max() < 1e-12
        difference = (log_ratio * advantage - returns).view(blocks, -1).mean(1)
        parts = [torch.cat(torch.autograd.grad(d, parameters, retain_graph=True)) for d in difference]
        error = torch.stack(parts)
        return error.mean(0) / (error.std(0) / math.sqrt(blocks))

    assert errors(forget=False).abs().max() < 4
    assert errors(forget=True).abs().max() > 20  # the same samples estimate something else without the memory
