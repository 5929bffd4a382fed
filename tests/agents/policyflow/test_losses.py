"""The terms of PolicyFlow's objective against hand-made numbers and the flows they lead to."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch

from driftrl.agents.policyflow.algorithm import value_loss
from driftrl.agents.policyflow.config import PolicyFlowConfig
from driftrl.agents.policyflow.policy import FlowActor, FlowNoise
from driftrl.agents.policyflow.ratios import (
    Chord,
    Samples,
    chord_point,
    chord_velocities,
    clipped_surrogate,
    draw_chord,
)
from driftrl.agents.policyflow.regularizers import brownian_loss, spread_rate
from driftrl.dynamics.ode import SOLVERS, odeint


def test_surrogate_is_ppos_on_all_four_sides_of_the_band() -> None:
    ratio = torch.tensor([1.5, 1.5, 0.5, 0.5], requires_grad=True)
    advantage = torch.tensor([1.0, -1.0, 1.0, -1.0])
    loss = clipped_surrogate(ratio.log(), advantage, 0.2)
    # min(rho A, clip(rho) A): 1.2, -1.5, 0.5, -0.8
    assert loss.item() == pytest.approx(-(1.2 - 1.5 + 0.5 - 0.8) / 4)
    loss.backward()
    assert ratio.grad is not None
    assert (ratio.grad != 0).tolist() == [False, True, True, False]


def test_value_loss_is_the_larger_of_the_clipped_and_the_plain_error() -> None:
    values = torch.tensor([0.1, 1.0, -1.0], requires_grad=True)
    loss = value_loss(values, torch.zeros(3), torch.tensor([0.5, 0.5, 0.5]), 0.2)
    # inside the band: (.1 - .5)^2; beyond it on the side of the return: max(.25, (.2 - .5)^2); on the other: 1.5^2
    assert loss.item() == pytest.approx((0.16 + 0.25 + 2.25) / 3)
    loss.backward()
    assert values.grad is not None
    # the trap of public code: without the maximum, the value that strayed to the wrong side would get no gradient
    assert values.grad[2] != 0
    assert value_loss(values, torch.zeros(3), torch.tensor([0.5, 0.5, 0.5]), None).item() == pytest.approx(
        (0.16 + 0.25 + 2.25) / 3
    )


def make_actor(base_std: float, solver: str, steps: int, dim: int = 1, **fields: Any) -> FlowActor:
    torch.manual_seed(0)
    return FlowActor(
        1, dim, hidden=(32, 32), activation="silu", base="learned", base_std=base_std, log_std_init=-1.0,
        solver=solver, solver_steps=steps, **fields,
    )  # fmt: skip


def spread_after_training(form: str, std: float, base_std: float, solver: str = "midpoint", steps: int = 8) -> float:
    """Train a one-dimensional flow on the Brownian regularizer alone and measure the spread of its endpoints."""
    actor = make_actor(base_std, solver, steps)
    optimizer = torch.optim.Adam(actor.field.parameters(), 3e-3)
    generator = torch.Generator().manual_seed(0)
    obs = torch.zeros(512, 1)

    def draw() -> tuple[Samples, Chord]:
        with torch.no_grad():
            sample = actor.sample(obs, FlowNoise.of(torch.randn(2, 512, 1, generator=generator)))
            samples = Samples.drawn(actor, obs, sample)
        chord = draw_chord(actor, chord_velocities(actor, samples), generator)
        return samples._replace(chord=chord, spread_rate=spread_rate(actor, std).expand(512, 1)), chord

    for _ in range(300):
        samples, (t, _) = draw()
        loss = brownian_loss(actor.field(t, chord_point(samples, t), obs), samples, form, steps)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return torch.cat([draw()[0].x1 for _ in range(20)]).std().item()


def test_papers_brownian_regularizer_alone_drives_the_flow_to_e() -> None:
    assert spread_after_training("paper", std=1.0, base_std=1.0) == pytest.approx(math.e, rel=0.08)


def test_papers_brownian_regularizer_alone_grows_the_base_as_its_solver_does() -> None:
    assert spread_after_training("paper", 1.0, 1.0, "euler", 2) == pytest.approx(1.5**2, rel=0.08)


@pytest.mark.parametrize(
    ("base_std", "std", "solver", "steps"),
    [
        (1.0, 0.5, "midpoint", 8), (1.0, 2.0, "midpoint", 8), (0.2, 0.6, "midpoint", 8), (0.1, 0.5, "euler", 2),
        (1.0, 0.5, "euler", 1), (0.2, 0.8, "heun", 1), (1.0, 0.4, "rk4", 1),
    ],
)  # fmt: skip
def test_consistent_brownian_regularizer_alone_drives_the_flow_to_its_target(
    base_std: float, std: float, solver: str, steps: int
) -> None:
    assert spread_after_training("consistent", std, base_std, solver, steps) == pytest.approx(std, rel=0.05)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("steps", [1, 2, 3, 10])
@pytest.mark.parametrize("std", [3.0, 0.5, 0.09, 0.06])
def test_linear_field_of_the_spread_rate_is_the_minimum_and_reaches_the_target(
    solver: str, steps: int, std: float
) -> None:
    actor = make_actor(0.1, solver, steps, dim=2).double()
    with torch.no_grad():
        actor.base_log_std[1] = math.log(0.08)  # a learned base moves, each dimension by itself
    rate, z = spread_rate(actor, std), torch.tensor([[0.1, 0.08]], dtype=torch.float64)
    end = odeint(lambda t, x, cond: rate * x, z, steps=steps, solver=solver)
    torch.testing.assert_close(end, torch.full_like(end, std), rtol=1e-6, atol=0)
    # The loss is a square, and 0 at that field whatever the point: there is no lower minimum.
    x1, half, zero = z.expand(7, 2) + 0.3, torch.full((7,), 0.5).double(), torch.zeros(7, 2).double()
    batch = Samples(zero, z.expand(7, 2), x1, x1, zero, zero, zero, half, half, half, chord=Chord(half, zero))
    batch = batch._replace(spread_rate=rate.expand(7, 2))
    assert brownian_loss(rate * chord_point(batch, half), batch, "consistent", steps) == 0


def test_spread_rate_is_eulers_in_closed_form() -> None:
    for std in (0.5, 0.02):
        assert spread_rate(make_actor(0.1, "euler", 2), std).item() == pytest.approx(2 * (math.sqrt(std / 0.1) - 1))


@pytest.mark.parametrize("noisy", [{"langevin_eps": 0.5}, {"chained": True}])
@pytest.mark.parametrize("std", [1.5, 0.6])
def test_spread_rate_counts_the_noise_along_the_flow(noisy: dict[str, Any], std: float) -> None:
    actor = make_actor(0.3, "euler", 3, **noisy)
    rate, size, generator = spread_rate(actor, std), 200_000, torch.Generator().manual_seed(0)
    z, path = torch.randn(size, 1, generator=generator), torch.randn(actor.path_length, size, 1, generator=generator)
    x1 = actor.flow(0.3 * z, torch.zeros(size, 1), path, lambda t, x, cond: rate * x)
    assert x1.std().item() == pytest.approx(std, rel=0.01)


def test_spread_rate_comes_as_near_as_it_can() -> None:
    # R(w) = 1 + w + w^2 / 2 of midpoint has its minimum, 1/2, at w = -1.
    assert spread_rate(make_actor(0.1, "midpoint", 2), 0.01).item() == pytest.approx(-2, abs=1e-2)


def test_spread_that_no_step_reaches_is_refused() -> None:
    fields: dict[str, Any] = {"spread_coef": 0.1, "spread_std": 0.02, "base_std": 0.1, "solver_steps": 2}
    PolicyFlowConfig(**fields)
    PolicyFlowConfig(**fields, solver="rk4")  # 0.0073
    with pytest.raises(ValueError, match=r"spread_std: got 0\.02, expected at least 0\.025, to which midpoint"):
        PolicyFlowConfig(**fields, solver="midpoint")


def test_both_forms_have_the_same_gradient_for_the_policy_that_acted_and_c_one() -> None:
    # At v = v_old the paper's residual is (1 - t) v - (x - t v) = v - x: its gradient is 2 (1 - t) (v - x), the
    # self-consistent form's with c = 1.
    torch.manual_seed(0)
    velocity = torch.randn(9, 2, dtype=torch.float64, requires_grad=True)
    z, x1 = torch.randn(2, 9, 2, dtype=torch.float64)
    zero, zeros = torch.zeros(9, 2, dtype=torch.float64), torch.zeros(9, dtype=torch.float64)
    chord = Chord(torch.rand(9, dtype=torch.float64), velocity.detach())
    batch = Samples(zero, z, x1, x1, zero, zero, zero, zeros, zeros, zeros, chord=chord, spread_rate=zero + 1)
    paper, consistent = (
        torch.autograd.grad(brownian_loss(velocity, batch, form, 4), velocity)[0] for form in ("paper", "consistent")
    )
    torch.testing.assert_close(paper, consistent)


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("learning_rate", -1.0, "at least 0"),
        ("learning_rate", math.nan, "at least 0"),
        ("learning_rate", "fast", "at least 0"),
        ("n_steps", 0, "integer of at least 1"),
        ("n_steps", 1.5, "integer of at least 1"),
        ("solver_steps", 0, "integer of at least 1"),
        ("batch_size", -1, "integer of at least 1"),
        ("gamma", 1.1, r"in \[0, 1\]"),
        ("ema_decay", 1.0, r"in \[0, 1\)"),
        ("clip_range_vf", 0.0, "above 0, or None"),
        ("ratio", "exact", "one of interpolation, endpoint"),
        ("solver", "rk5", "one of euler, midpoint, heun, rk4"),
        ("base", "uniform", "one of standard, learned, gaussian"),
        ("spread", "none", "one of paper, consistent"),
        ("actor_hidden", (0,), "positive integers"),
        ("actor_hidden", (64, 0), "positive integers"),
        ("normalize_reward", "yes", "True or False"),
        ("lr_max", 1e-7, "at least lr_min"),
    ],
)
def test_impossible_settings_are_named_with_what_is_expected(field: str, value: object, expected: str) -> None:
    with pytest.raises(ValueError, match=rf"{field}: got .*, expected .*{expected}"):
        PolicyFlowConfig(**{field: value})  # type: ignore[arg-type]


def test_every_setting_is_documented() -> None:
    source = __import__("inspect").getsource(PolicyFlowConfig)
    for field in dataclasses.fields(PolicyFlowConfig):
        line = next(i for i, text in enumerate(source.splitlines()) if text.startswith(f"    {field.name}:"))
        assert source.splitlines()[line + 1].startswith('    """'), field.name
