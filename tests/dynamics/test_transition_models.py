"""What every model of a step must do, and the flow and the SDE by themselves."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from driftrl.dynamics.fields import Time, VelocityField
from driftrl.dynamics.flow_transition import FlowTransition
from driftrl.dynamics.langevin_transition import LangevinTransition
from driftrl.dynamics.transition import TRANSITIONS, GaussianTransition
from driftrl.dynamics.transition_base import TransitionModel
from driftrl.dynamics.transition_settings import TransitionSettings

from .linear_system import MATRIX, NOISE, REWARD_NOISE, gaussian, generator, linear_system


def build(kind: str, seed: int = 0, obs_dim: int = 2, **settings: float) -> TransitionModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return TRANSITIONS[kind](obs_dim, 1, TransitionSettings(**settings), hidden=(32, 32))  # type: ignore[arg-type]


def same(a: nn.Module, b: nn.Module) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("kind", ["ensemble", *TRANSITIONS])
def test_state_dict_holds_all_that_sampling_and_the_next_fit_need(kind: str) -> None:
    make: Callable[[int], TransitionModel] = (
        partial(gaussian, 3, 2, True) if kind == "ensemble" else partial(build, kind)
    )
    model, data = make(0), linear_system(600)
    model.fit(*(part[:400] for part in data), generator=generator(), max_epochs=3)
    twin = make(5)
    twin.load_state_dict(model.state_dict())
    twin.optimizer.load_state_dict(copy.deepcopy(model.optimizer.state_dict()))
    for ours, theirs in zip(
        model.sample(data[0], data[1], generator(3)), twin.sample(data[0], data[1], generator(3)), strict=True
    ):
        assert torch.equal(ours, theirs)
    metrics = [m.fit(*data, generator=generator(4), max_epochs=3) for m in (model, twin)]
    assert metrics[0] == metrics[1] and same(model, twin)


@pytest.mark.parametrize("kind", TRANSITIONS)
def test_results_depend_on_the_generator_alone(kind: str) -> None:
    models = [build(kind) for _ in range(3)]
    state = torch.get_rng_state()
    metrics = []
    for model, seed in zip(models, (0, 0, 1), strict=True):
        rng = generator(seed)
        metrics.append(model.fit(*linear_system(300), generator=rng, max_epochs=2))
        metrics[-1]["sample"] = model.sample(torch.zeros(4, 2), torch.zeros(4, 1), rng)[1].sum().item()
    assert torch.equal(torch.get_rng_state(), state)
    assert metrics[0] == metrics[1] != metrics[2]
    assert same(models[0], models[1]) and not same(models[0], models[2])


def two_outcomes(n: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One observation that jumps by -1 (30 %) or by 1 (70 %), with noise 0.1 in jump and reward."""
    rng = generator(seed)
    obs, action = torch.randn(n, 1, generator=rng), 2 * torch.rand(n, 1, generator=rng) - 1
    jump = torch.where(torch.rand(n, 1, generator=rng) < 0.3, -1.0, 1.0)
    next_obs = obs + jump + 0.1 * torch.randn(n, 1, generator=rng)
    return obs, action, action[:, 0] + 0.1 * torch.randn(n, generator=rng), next_obs


@pytest.mark.parametrize("kind", TRANSITIONS)
def test_flow_and_sde_find_both_outcomes_where_a_gaussian_lies_between(kind: str) -> None:
    model = build(kind, obs_dim=1, min_gain=1e-3, learning_rate=3e-3, patience=20)
    model.fit(*two_outcomes(4000), generator=generator(1), max_epochs=100)
    obs, action, reward, next_obs = two_outcomes(1000, seed=9)
    sampled = model.sample(obs.repeat(5, 1), action.repeat(5, 1), generator(2))[0] - obs.repeat(5, 1)
    down, between = sampled[sampled < 0], (sampled.abs() < 0.5).float().mean().item()
    assert sampled.mean().item() == pytest.approx(0.4, abs=0.1)
    entropy = 2 * (0.5 * math.log(2 * math.pi * math.e) + math.log(0.1)) - 0.3 * math.log(0.3) - 0.7 * math.log(0.7)
    log_prob = model.log_prob(obs, action, reward, next_obs).mean().item()
    if kind == "gaussian":
        assert between > 0.3 and log_prob < -entropy - 1
    else:
        assert between < 0.1 and log_prob > -entropy - 0.4
        assert len(down) / len(sampled) == pytest.approx(0.3, abs=0.06)
        assert down.median().item() == pytest.approx(-1, abs=0.1)
        assert sampled[sampled > 0].median().item() == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("kind", TRANSITIONS)
def test_density_integrates_to_one_in_the_units_of_the_data(kind: str) -> None:
    model = build(kind, obs_dim=1)
    obs, action, reward, next_obs = two_outcomes(500)
    model.fit(10 * obs, action, 0.1 * reward, 10 * next_obs, generator=generator(1), max_epochs=5)
    reward, move = torch.meshgrid(torch.linspace(-1, 1, 101), torch.linspace(-80, 80, 101), indexing="ij")
    at = torch.tensor([[3.0]]).expand(reward.numel(), 1)
    with torch.no_grad():
        log_prob = model.log_prob(at, 0 * at, reward.flatten(), at + move.reshape(-1, 1))
    assert log_prob.exp().sum().item() * (2 / 100) * (160 / 100) == pytest.approx(1, rel=0.03)


def test_flow_predicts_without_noise_and_follows_a_linear_system() -> None:
    model = build("flow", min_gain=1e-3, learning_rate=3e-3, patience=10)
    model.fit(*linear_system(4000), generator=generator(1), max_epochs=100)
    obs, action, _, _ = linear_system(1000, seed=3)
    mean = obs @ MATRIX.T + action
    assert (model.predict(obs, action)[0] - mean).square().mean().sqrt() < 0.1
    next_obs, _ = model.sample(obs, action, generator(2))
    torch.testing.assert_close((next_obs - mean).std(0), NOISE, rtol=0.25, atol=0)


class Decay(VelocityField):
    """``v = rate (target(cond) - x)``: with it the SDE's chain is Gaussian."""

    def forward(self, t: Time, x: Tensor, cond: Tensor | None = None) -> Tensor:
        assert cond is not None
        return 0.8 * (0.5 * cond[:, :1] - x)


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_langevin_chain_of_a_linear_drift_has_its_closed_form(steps: int, residual: bool) -> None:
    model = LangevinTransition(2, 1, TransitionSettings(residual=residual), hidden=(8,), steps=steps, bridges=4000)
    data = linear_system(200)
    model.fit(*data, generator=generator(), max_epochs=1)
    model.field = Decay(3, 3)  # type: ignore[assignment]
    with torch.no_grad():
        model.log_scale.copy_(torch.linspace(-1, 0.2, 3 * steps).view(1, steps, 3))
    obs, action, reward, next_obs = (part[:20] for part in data)
    h, scale = 1 / steps, model.log_scale[0].detach().exp()
    y = model.targets(torch.cat([torch.zeros(20, 1), torch.zeros(20, 2) if residual else obs], 1))
    var = torch.zeros(3)
    for k in range(steps):  # the moments of y' = y + 0.8 h (m - y) + s sqrt(h) noise
        y, var = y + 0.8 * h * (0.5 * model._x(obs, action)[:, :1] - y), (1 - 0.8 * h) ** 2 * var + scale[k] ** 2 * h
    normal = torch.distributions.Normal(
        model.targets.inverse(y) + (torch.cat([torch.zeros(20, 1), obs], 1) if residual else 0),
        var.sqrt() * model.targets.scale,
    )
    log_prob = model.log_prob(obs, action, reward, next_obs)
    expected = normal.log_prob(torch.cat([reward[:, None], next_obs], 1)).sum(1)
    torch.testing.assert_close(log_prob, expected, rtol=0, atol=1e-4 if steps == 1 else 0.3)
    torch.testing.assert_close(log_prob.mean(), expected.mean(), rtol=0, atol=1e-4 if steps == 1 else 0.03)

    model.low.fill_(-math.inf)
    model.high.fill_(math.inf)
    sampled, rewards = model.sample(obs[:1].expand(20000, -1), action[:1].expand(20000, -1), generator(1))
    outcome = torch.cat([rewards[:, None], sampled], 1)
    torch.testing.assert_close(outcome.std(0), normal.stddev[0], rtol=0.03, atol=0)
    torch.testing.assert_close(outcome.mean(0), normal.mean[0], rtol=0, atol=0.04 * normal.stddev.max().item())


def test_langevin_recovers_mean_and_variance_of_a_linear_system() -> None:
    model = build("langevin", learning_rate=3e-3)
    model.fit(*linear_system(4000), generator=generator(1), max_epochs=80)
    obs, action, _, _ = linear_system(2000, seed=3)
    mean = obs @ MATRIX.T + action
    assert (model.predict(obs, action)[0] - mean).square().mean().sqrt() < 0.1
    next_obs, reward = model.sample(obs, action, generator(2))
    torch.testing.assert_close((next_obs - mean).std(0), NOISE, rtol=0.15, atol=0)
    assert (reward - obs[:, 0] + action[:, 0]).std().item() == pytest.approx(REWARD_NOISE, rel=0.15)


@pytest.mark.parametrize("kind", TRANSITIONS)
def test_density_of_a_row_does_not_depend_on_its_batch(kind: str) -> None:
    model, data = build(kind), linear_system(50)
    model.fit(*data, generator=generator(), max_epochs=1)
    alone = model.log_prob(*(part[7:8] for part in data))
    torch.testing.assert_close(model.log_prob(*data)[7:8], alone, rtol=1e-4, atol=1e-4)


def test_bad_options_are_refused() -> None:
    with pytest.raises(ValueError, match="jacobian_coef: got -1, expected >= 0"):
        TransitionSettings(jacobian_coef=-1)
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        FlowTransition(2, 1, steps=0)
    with pytest.raises(ValueError, match="steps must be at least 1, got -1"):
        FlowTransition(2, 1, likelihood_steps=-1)
    with pytest.raises(ValueError, match="solver must be one of"):
        FlowTransition(2, 1, solver="magic")
    with pytest.raises(ValueError, match="steps and bridges must be at least 1, got 0 and 32"):
        LangevinTransition(2, 1, steps=0)


@pytest.mark.parametrize("kind", TRANSITIONS)
def test_loss_is_traced_as_one_graph(kind: str) -> None:
    model = build(kind)
    x, y = torch.randn(1, 16, 3, generator=generator()), torch.randn(1, 16, 3, generator=generator(1))
    noise = model._noise(x, generator())
    compiled = torch.compile(model._loss, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x, y, noise), model._loss(x, y, noise))


@pytest.mark.parametrize("kind", ["ensemble", "homoscedastic", "dropout", "known step", *TRANSITIONS])
def test_a_step_is_the_sample_of_its_noise_and_its_gradient_that_of_finite_differences(kind: str) -> None:
    special: dict[str, dict[str, Any]] = {
        "ensemble": {"members": 4, "elites": 3},
        "homoscedastic": {"homoscedastic": True, "layer_norm": True},
        "dropout": {"members": 4, "elites": 3, "dropout": 0.3, "rollout_dropout": True},
        "known step": {"settings": TransitionSettings(known_step=lambda obs, action: obs.sin() * action)},
    }
    if kind in special:
        torch.manual_seed(0)
        model: TransitionModel = TRANSITIONS["gaussian"](2, 1, hidden=(32, 32), **special[kind])
    else:
        model = build(kind)
    model.fit(*linear_system(400), generator=generator(), max_epochs=3)
    obs, action = (part[:7] for part in linear_system(400)[:2])
    noise = model.draw(7, generator(3))
    for ours, theirs in zip(model.step(obs, action, noise), model.sample(obs, action, generator(3)), strict=True):
        assert torch.equal(ours, theirs)
    model.double()
    noise = tuple(each.double() if each.is_floating_point() else each for each in noise)
    obs, action = obs.double().requires_grad_(), action.double().requires_grad_()
    model.low.fill_(-math.inf)  # a clipped component has no gradient
    model.high.fill_(math.inf)
    assert torch.autograd.gradcheck(lambda s, a: model.step(s, a, noise), (obs, action))


@pytest.mark.parametrize("kind", TRANSITIONS)
def test_what_is_known_of_a_step_need_not_be_learned(kind: str) -> None:
    # A folded step that 100 rows do not teach a network, and what it adds to it: a pull of 0.1.
    rng = generator(5)
    obs, action = 2 * torch.randn(600, 2, generator=rng), torch.rand(600, 1, generator=rng)

    def folded(obs: Tensor, action: Tensor) -> Tensor:
        return (4 * obs).sin() + action

    next_obs = folded(obs, action) - 0.1 * obs
    errors = []
    for known in (None, folded):
        torch.manual_seed(0)
        model = TRANSITIONS[kind](2, 1, TransitionSettings(known_step=known), hidden=(32, 32))
        model.fit(obs[:100], action[:100], obs[:100, 0], next_obs[:100], generator=generator(), max_epochs=200)
        inside = (next_obs[100:].abs() < 1).all(1)  # predictions are clipped to the range of the data
        predicted, _ = model.predict(obs[100:], action[100:])
        errors.append((predicted - next_obs[100:])[inside].square().mean().sqrt().item())
    assert errors[1] < 0.1 < 0.4 < errors[0]
    with pytest.raises(ValueError, match=r"known_step: got \[3, 1\], expected next_obs \[3, 2\]"):
        TRANSITIONS[kind](2, 1, TransitionSettings(known_step=lambda obs, _: obs[:, :1])).predict(obs[:3], action[:3])


def test_a_homoscedastic_model_finds_the_noise_of_each_output() -> None:
    torch.manual_seed(0)
    model = TRANSITIONS["gaussian"](2, 1, hidden=(32, 32), homoscedastic=True, layer_norm=True)
    data = linear_system(4000)
    model.fit(*data, generator=generator(), max_epochs=60)
    state, act = torch.tensor([[0.3, -0.2]]).expand(4000, -1), torch.zeros(4000, 1)
    next_obs, reward = model.sample(state, act, generator(5))
    torch.testing.assert_close(next_obs.std(0), NOISE, rtol=0.1, atol=0.0)
    assert reward.std().item() == pytest.approx(REWARD_NOISE, rel=0.1)


def test_dropout_falls_to_zero_over_the_layers_and_leaves_the_mean() -> None:
    model = GaussianTransition(2, 1, hidden=(64, 64), dropout=0.4)
    first, second = model._noise(torch.zeros(1, 2000, 3), generator())
    for mask, share in ((first, 0.4), (second, 0.2)):
        assert (mask == 0).double().mean().item() == pytest.approx(share, abs=0.01)
        assert mask.mean().item() == pytest.approx(1.0, abs=0.01)
    x = torch.randn(1, 5, 3)
    torch.testing.assert_close(model.net(x, masks=[torch.ones(1, 5, 64)] * 2), model.net(x))
    assert not torch.equal(model.net(x, masks=[first[:, :5], second[:, :5]]), model.net(x))
    with pytest.raises(ValueError, match="dropout must be in"):
        GaussianTransition(2, 1, dropout=1.0)
    with pytest.raises(ValueError, match="rollout_dropout"):
        GaussianTransition(2, 1, rollout_dropout=True)


@pytest.mark.parametrize("members", [1, 3])
def test_dropout_in_rollouts_has_its_closed_form(members: int) -> None:
    # One hidden layer: each unit by itself is 0 with probability p, else silu of its input / (1 - p).
    p, rows = 0.3, 30_000
    torch.manual_seed(0)
    model = GaussianTransition(
        2, 1, hidden=(16,), dropout=p, rollout_dropout=True, probabilistic=False, members=members, elites=members
    )
    state, act = torch.tensor([[0.7, -1.2]]), torch.tensor([[0.4]])
    layers = [each.detach() for each in (*model.net.weights, *model.net.biases)]
    unit = nn.functional.silu((torch.cat([state, act], 1) @ layers[0] + layers[2]) / (1 - p))  # [M, 1, 16]
    mean = unit @ layers[1] * (1 - p) + layers[3]  # [M, 1, T]
    within = unit.square() @ layers[1].square() * p * (1 - p)
    variance = (within + mean.square()).mean(0) - mean.mean(0).square()
    next_obs, reward = model.sample(state.expand(rows, -1), act.expand(rows, -1), generator(1))
    drawn = torch.cat([reward[:, None], next_obs - state], 1)
    torch.testing.assert_close(drawn.mean(0), mean.mean(0)[0], rtol=0.0, atol=0.01)
    torch.testing.assert_close(drawn.var(0), variance[0], rtol=0.05, atol=0.0)

    spread = model.disagreement(state.expand(rows, -1), act.expand(rows, -1))  # of eight draws about their own mean
    torch.testing.assert_close(spread.square().mean((0, 1)) * 8 / 7, variance[0, 1:], rtol=0.05, atol=0.0)
    noise = tuple(torch.zeros_like(each) if each.is_floating_point() else each for each in model.draw(1, generator()))
    if members == 1:  # without its noise a step is the prediction
        torch.testing.assert_close(model.step(state, act, noise), model.predict(state, act))


def test_noise_of_the_outcome_does_not_count_as_disagreement() -> None:
    model = GaussianTransition(2, 1, hidden=(16,), dropout=0.1, rollout_dropout=True, homoscedastic=True)
    assert model.log_std is not None
    spread = model.disagreement(torch.ones(50, 2), torch.ones(50, 1))
    model.log_std.fill_(3.0)
    assert torch.equal(model.disagreement(torch.ones(50, 2), torch.ones(50, 1)), spread)


def test_decoupled_decay_rises_from_layer_to_layer_and_spares_biases() -> None:
    settings = TransitionSettings(weight_decay=0.4, decoupled=True, learning_rate=0.5)
    model = GaussianTransition(2, 1, settings, hidden=(4, 4, 4))
    before = {name: each.detach().clone() for name, each in model.named_parameters()}
    for each in model.parameters():
        each.grad = torch.zeros_like(each)  # Adam's step is 0 then: what moves is the decay
    model.optimizer.step()
    assert isinstance(model.optimizer, torch.optim.AdamW)
    for k in range(4):
        after = dict(model.named_parameters())[f"net.weights.{k}"]
        torch.testing.assert_close(after.detach(), before[f"net.weights.{k}"] * (1 - 0.5 * 0.4 * (k + 1) / 4))
    assert all(torch.equal(each, before[name]) for name, each in model.named_parameters() if "weight" not in name)


@pytest.mark.parametrize("kind", ["flow", "langevin"])
def test_decoupled_decay_counts_the_layers_of_each_network(kind: str) -> None:
    settings = TransitionSettings(weight_decay=1.2, decoupled=True, terminal_head=True)
    model = TRANSITIONS[kind](2, 1, settings, hidden=(4, 4))
    decays = {id(group["params"][0]): group["weight_decay"] for group in model.optimizer.param_groups[1:]}
    found = {name: decays[id(each)] for name, each in model.named_parameters() if id(each) in decays}
    expected = dict.fromkeys(("x_weight", "cond_weight", "time_weight"), 0.4)
    expected |= {"layers.0.weight": 0.8, "output.weight": 1.2}
    expected = {f"field.{name}": value for name, value in expected.items()}
    expected |= {f"terminal_net.weights.{k}": 0.4 * (k + 1) for k in range(3)}
    assert found == pytest.approx(expected)
