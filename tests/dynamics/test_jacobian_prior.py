"""The prior on the Jacobian of a rollout's step: what it penalises, and what it does to steep and smooth regions."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from driftrl.dynamics.jacobian_prior import BOUND, JacobianPrior
from driftrl.dynamics.transition import TRANSITIONS, GaussianTransition
from driftrl.dynamics.transition_base import TransitionModel
from driftrl.dynamics.transition_settings import TransitionSettings

from .linear_system import MATRIX, generator, linear_system


def bent(obs: Tensor, action: Tensor) -> Tensor:
    """Something known of a step that is neither linear nor without the action."""
    return 0.5 * obs + obs.sin() * obs.flip(1).cos() + action


def build(kind: str, **settings: float) -> TransitionModel:
    torch.manual_seed(0)
    return TRANSITIONS[kind](2, 1, TransitionSettings(**settings), hidden=(16,))  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", TRANSITIONS)
@pytest.mark.parametrize("known", [{"residual": True}, {"residual": False}, {"known_step": bent}])
def test_penalised_is_the_jacobian_of_the_next_state_in_units_of_its_deviation(
    kind: str, known: dict[str, Any]
) -> None:
    # Against differences of what a rollout makes of the state, from the same noise.
    model = build(kind, jacobian_coef=0.1, **known)
    obs, action, reward, next_obs = linear_system(300)
    scale = torch.tensor([10.0, 0.1])  # of the states
    model.fit(obs * scale, action, reward, next_obs * scale, generator=generator(), max_epochs=5)
    model.low.fill_(-math.inf)
    model.high.fill_(math.inf)
    at, probe = (obs * scale)[:5], torch.randn(1, 5, 2, generator=generator(3))

    def rolled(state: Tensor) -> Tensor:
        if kind == "flow":  # the noise that the step draws is part of it
            y = model._push(model._x(state, action[:5]), (torch.zeros(5, 3),))
            return model._outcome(state, action[:5], y)[0]
        return model.predict(state, action[:5])[0]

    x, noise = model._x(at, action[:5])[None].requires_grad_(), (torch.zeros(5, 3), torch.zeros(5))
    step = model._next_state(x, noise)
    (pulled,) = torch.autograd.grad(step, x, probe)
    with torch.no_grad():
        for j in range(2):
            move = 0.01 * model.inputs.scale[j] * torch.eye(2)[j]
            slope = (rolled(at + move) - rolled(at - move)) / (0.02 * model.inputs.scale[:2])
            torch.testing.assert_close(pulled[0, :, j], (probe[0] * slope).sum(1), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("coef", [0.01, 1.0])
def test_precision_is_the_inverse_square_of_the_slope_within_its_bound(coef: float) -> None:
    # A diagonal step of slope 0.5 where the first input is below 0, 4 above it, and flat: w = 4, 1/16, the bound.
    torch.manual_seed(0)
    prior, optimizer_steps = JacobianPrior(1, 2, 1), 400
    optimizer = torch.optim.Adam(prior.parameters(), 1e-2)
    x = torch.rand(1, 500, 2, generator=generator()) * 2 - 1
    for flat in (False, True):
        for _ in range(optimizer_steps):
            slope = torch.where(x[..., 1:] < 0, 0.5, 4.0) * (0.0 if flat else 1.0)
            loss = prior(lambda x, slope=slope: slope * x[..., :1], x, torch.ones(1, 500, 1), coef).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        low, high = (prior.log_precision(x)[0][side].mean().item() for side in (x[0, :, 1] < -0.3, x[0, :, 1] > 0.3))
        if flat:
            assert BOUND - 0.3 < low <= BOUND and BOUND - 0.3 < high <= BOUND
        else:
            assert low == pytest.approx(math.log(4), abs=0.2)
            assert high == pytest.approx(-math.log(16), abs=0.3)


def test_without_a_prior_a_fit_draws_nothing_more() -> None:
    draws = generator(1)
    model = GaussianTransition(2, 1, hidden=(8,))
    assert model.prior is None and not any("prior" in name for name in model.state_dict())
    model.fit(*linear_system(200), generator=draws, max_epochs=2)
    again, twin = generator(1), GaussianTransition(2, 1, TransitionSettings(jacobian_coef=0.1), hidden=(8,))
    twin.fit(*linear_system(200), generator=again, max_epochs=2)
    assert not torch.equal(draws.get_state(), again.get_state())


def truth(state: Tensor) -> Tensor:
    """Smooth where the first coordinate is below -0.25, a step of slope 4.5 between two stable points above it."""
    first = state[:, :1]
    step = torch.where(first < -0.25, -2 + 0.9 * (first + 2), 1.5 + 1.5 * torch.tanh(3 * (first - 1.5)))
    return torch.cat([step, 0.97 * state[:, 1:]], 1)


def starts(rows: int, seed: int, smooth: Tensor | bool) -> Tensor:
    rng = generator(seed)
    unit = torch.rand(rows, 1, generator=rng)
    first = torch.where(torch.as_tensor(smooth), -3.25 + 2.5 * unit, 3 * unit)
    return torch.cat([first, torch.randn(rows, 1, generator=rng)], 1)


def fitted(coef: float, seed: int) -> TransitionModel:
    state = starts(300, seed, torch.rand(300, 1, generator=generator(1000 + seed)) < 0.5)
    settings = TransitionSettings(jacobian_coef=coef, batch_size=32, learning_rate=1e-2, patience=15, weight_decay=0.0)
    torch.manual_seed(seed)
    model = GaussianTransition(2, 1, settings, hidden=(64, 64))
    next_state = truth(state) + 0.1 * torch.randn(300, 2, generator=generator(100 + seed))
    model.fit(state, 0 * state[:, :1], 0 * state[:, 0], next_state, generator=generator(seed), max_epochs=60)
    return model


def rollout(model: TransitionModel, state: Tensor, steps: int = 20) -> Tensor:
    states = [state]
    for _ in range(steps):
        states.append(model.predict(states[-1], 0 * states[-1][:, :1])[0])
    return torch.stack(states)


@pytest.mark.slow
def test_prior_spares_the_steep_region_and_steadies_rollouts() -> None:
    # Means of eight fits: errors of rollouts, and by how much the worst small change has grown at their end.
    change, found = 0.01 * torch.randn(300, 2, generator=generator(7)), []
    for coef in (0.0, 1.0):
        rows = []
        for seed in range(8):
            model, row = fitted(coef, seed), list[float]()
            for smooth in (True, False):
                state = starts(300, 99, smooth)
                exact = [state]
                for _ in range(20):
                    exact.append(truth(exact[-1]))
                rolled = rollout(model, state)
                row.append((rolled - torch.stack(exact)).square().mean().sqrt().item())
                grown = (rollout(model, state + change) - rolled)[-1].norm(dim=1) / change.norm(dim=1)
                row.append(grown.log().max().item())
            if model.prior is not None:
                steep = torch.cat([torch.linspace(1.3, 1.7, 300).unsqueeze(1), starts(300, 5, True)[:, 1:]], 1)
                for at in (starts(300, 99, True), steep):
                    row.append(model.prior.log_precision(model._x(at, 0 * at[:, :1])[None]).mean().item())
            rows.append(row)
        found.append(torch.tensor(rows).mean(0).tolist())
    (error, growth, steep_error, steep_growth), with_prior = found
    assert with_prior[5] < with_prior[4] - 0.08  # the weight's logarithm, steep against smooth
    assert with_prior[0] < 1.15 * error  # the standard error of their difference is 15 %
    assert with_prior[2] < steep_error
    assert with_prior[1] < growth
    assert with_prior[3] < steep_growth - 1


def test_strong_prior_does_not_end_the_fit_of_a_flow() -> None:
    # As the penalty on dv/dx of the flow's noise did: at 0.3 the best epoch was the second.
    torch.manual_seed(0)
    settings = TransitionSettings(min_gain=1e-3, learning_rate=3e-3, jacobian_coef=0.3)
    model = TRANSITIONS["flow"](2, 1, settings, hidden=(32, 32))
    metrics = model.fit(*linear_system(1000), generator=generator(1), max_epochs=25)
    obs, action, _, _ = linear_system(500, seed=3)
    assert metrics["model/epochs"] > 10
    assert (model.predict(obs, action)[0] - obs @ MATRIX.T - action).square().mean().sqrt() < 0.2
