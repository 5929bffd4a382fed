"""The terms of PolicyFlow's objective against hand-made numbers and the flows they lead to."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from driftrl.agents.policyflow.algorithm import value_loss
from driftrl.agents.policyflow.config import PolicyFlowConfig
from driftrl.agents.policyflow.policy import FlowActor, FlowNoise
from driftrl.agents.policyflow.ratios import chord_point, chord_velocities, clipped_surrogate, draw_chord
from driftrl.agents.policyflow.regularizers import brownian_loss
from driftrl.agents.policyflow.rollout import Chord, Samples


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


def spread_after_training(form: str, std: float, base_std: float) -> float:
    """Train a one-dimensional flow on the Brownian regularizer alone and measure the spread of its endpoints."""
    torch.manual_seed(0)
    actor = FlowActor(
        1, 1, hidden=(32, 32), activation="silu", base="standard", base_std=base_std, log_std_init=-1.0,
        solver="midpoint", solver_steps=8,
    )  # fmt: skip
    optimizer = torch.optim.Adam(actor.parameters(), 3e-3)
    generator = torch.Generator().manual_seed(0)
    obs = torch.zeros(512, 1)

    def draw() -> tuple[Samples, Chord]:
        with torch.no_grad():
            sample = actor.sample(obs, FlowNoise.of(torch.randn(2, 512, 1, generator=generator)))
            samples = Samples.drawn(actor, obs, sample)
        chord = draw_chord(actor, chord_velocities(actor, samples), generator)
        return samples._replace(chord=chord), chord

    for _ in range(300):
        samples, (t, _) = draw()
        loss = brownian_loss(actor.field(t, chord_point(samples, t), obs), samples, form, std)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return torch.cat([draw()[0].x1 for _ in range(20)]).std().item()


def test_papers_brownian_regularizer_alone_drives_the_flow_to_e() -> None:
    assert spread_after_training("paper", std=0.0, base_std=1.0) == pytest.approx(math.e, rel=0.08)


@pytest.mark.parametrize(("base_std", "std"), [(1.0, 0.5), (1.0, 2.0), (0.2, 0.6)])
def test_consistent_brownian_regularizer_alone_drives_the_flow_to_its_target(base_std: float, std: float) -> None:
    assert spread_after_training("consistent", std, base_std) == pytest.approx(std, rel=0.05)


def test_both_forms_have_the_same_gradient_for_the_policy_that_acted_and_c_one() -> None:
    # At v = v_old the paper's residual is (1 - t) v - (x - t v) = v - x: its gradient is 2 (1 - t) (v - x), the
    # self-consistent form's with c = log(e / 1) = 1.
    torch.manual_seed(0)
    velocity = torch.randn(9, 2, dtype=torch.float64, requires_grad=True)
    z, x1 = torch.randn(2, 9, 2, dtype=torch.float64)
    zero, zeros = torch.zeros(9, 2, dtype=torch.float64), torch.zeros(9, dtype=torch.float64)
    chord = Chord(torch.rand(9, dtype=torch.float64), velocity.detach())
    batch = Samples(zero, z, x1, x1, zero, zero, zero, zeros, zeros, zeros, chord=chord)
    paper, consistent = (
        torch.autograd.grad(brownian_loss(velocity, batch, form, math.e), velocity)[0]
        for form in ("paper", "consistent")
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
