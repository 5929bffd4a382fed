"""Whether a policy's field samples the same actions by ODE and by SDE."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from driftrl import PolicyFlow
from driftrl.agents.policyflow.noisy_flows import langevin_flow, sde_gap
from driftrl.dynamics import MLPField, VelocityField, odeint
from driftrl.dynamics.fields import Time

MEAN, STD = torch.tensor([0.5, -1.0], dtype=torch.float64), torch.tensor([0.1, 0.7], dtype=torch.float64)
TARGET, SPREAD = torch.tensor([-0.3, 0.4], dtype=torch.float64), torch.tensor([0.5, 0.3], dtype=torch.float64)


class ToGaussian(VelocityField):
    """``E[x1 - x0 | x_t]`` from N(MEAN, STD^2) to N(TARGET, SPREAD^2)."""

    def forward(self, t: Time, x: Tensor, cond: Tensor | None = None) -> Tensor:
        t = torch.as_tensor(t, dtype=x.dtype).reshape(-1, 1)
        variance = ((1 - t) * STD) ** 2 + (t * SPREAD) ** 2
        slope = (t * SPREAD**2 - (1 - t) * STD**2) / variance
        return TARGET - MEAN + slope * (x - (1 - t) * MEAN - t * TARGET)


def test_gap_is_zero_where_ode_and_sde_agree_and_one_for_a_field_that_is_zero() -> None:
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(20_000, 2, generator=generator, dtype=torch.float64)
    x, t = MEAN + STD * z, torch.rand(20_000, generator=generator).double()
    field, obs = ToGaussian(2, 3), torch.zeros(20_000, 3, dtype=torch.float64)
    base = MEAN.expand_as(x), STD.log().expand_as(x)
    assert sde_gap(field, t, x, obs, *base).item() < 1e-10
    zero = MLPField(2, 3, (8,), last_layer_scale=0.0).double()
    gap = sde_gap(zero, t, x, obs, *base).item()
    assert gap == pytest.approx(z.square().mean().sqrt().item(), rel=1e-9)
    path = torch.randn(100, 20_000, 2, generator=generator, dtype=torch.float64)
    for ends in (langevin_flow(field, x, obs, path, *base, 0.5), odeint(field, x, steps=50, cond=obs)):
        torch.testing.assert_close(ends.mean(0), TARGET, rtol=0, atol=0.03)  # what the gap of 0 promises
        torch.testing.assert_close(ends.std(0), SPREAD, rtol=0.1, atol=0)


class Stretched(VelocityField):
    """Another field seen through ``x = MEAN + STD y``."""

    def __init__(self, field: VelocityField) -> None:
        super().__init__(field.dim, field.cond_dim)
        self.field = field

    def forward(self, t: Time, x: Tensor, cond: Tensor | None = None) -> Tensor:
        return STD * self.field(t, (x - MEAN) / STD, cond)


def test_gap_is_in_units_of_the_base() -> None:
    torch.manual_seed(0)
    field = MLPField(2, 3, (8,), last_layer_scale=1.0).double()
    y, obs = torch.randn(50, 2).double(), torch.randn(50, 3).double()
    t, zeros = torch.rand(50).double(), torch.zeros_like(y)
    gap = sde_gap(Stretched(field), t, MEAN + STD * y, obs, MEAN.expand_as(y), STD.log().expand_as(y))
    torch.testing.assert_close(gap, sde_gap(field, t, y, obs, zeros, zeros), rtol=1e-10, atol=0)


def test_gap_is_logged_where_the_flow_is_noisy_and_changes_nothing() -> None:
    logged = []
    for eps, interval in ((0.2, 1), (0.2, 0), (0.0, 1)):
        agent = PolicyFlow(
            "MlpPolicy", "InvertedPendulum-v5", n_steps=32, batch_size=16, langevin_eps=eps, device="cpu", seed=0,
            diagnostics_interval=interval, compile="off",
        )  # fmt: skip
        agent.learn(64)
        logged.append((agent.logger.name_to_value, agent.policy.state_dict()))
    gap = logged[0][0]["flow/sde_gap"]
    assert 0.3 < gap < 3  # the field has hardly moved from 0
    assert all("flow/sde_gap" not in values for values, _ in logged[1:])
    assert all(torch.equal(logged[0][1][name], weight) for name, weight in logged[1][1].items())
