"""Does a penalty on the Fokker-Planck residual close the gap between sampling by ODE and by SDE? docs/recipes.md.

    OMP_NUM_THREADS=1 python benchmarks/fokker_planck.py

Fits flows to two moons and to transitions of Hopper-v5, without and with the penalty. Takes a minute and a half.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import tyro
from known_kinematics import collect
from torch import Tensor
from two_moons import energy_distance, minimise, two_moons

from driftrl.dynamics import (
    LINEAR,
    MLPField,
    VelocityField,
    flow_log_prob,
    flow_matching_loss,
    interpolant_sde,
    odeint,
    sdeint,
    standard_normal_log_prob,
)
from driftrl.dynamics.ensemble import Normalizer
from driftrl.dynamics.fields import Time
from driftrl.dynamics.fokker_planck import fokker_planck_residual
from driftrl.dynamics.paths import score_from_velocity

BATCH, PENALIZED, SAMPLES = 256, 128, 2000
LEVEL, STEPS = 10.0, 400
"""Of the SDE: noise 10 (1 - t), at which the samples come from the score rather than from the velocity."""
LATE = 0.9
"""Flow time at which the two scores are compared."""

Draw = Callable[[int, torch.Generator], tuple[Tensor, Tensor | None]]
"""Rows, generator -> data [n, D] and conditioning [n, C] or None."""


class Until(VelocityField):
    """The flow up to time `end`, in unit time."""

    def __init__(self, field: VelocityField, end: float) -> None:
        super().__init__(field.dim, field.cond_dim)
        self.field, self.end = field, end

    def forward(self, t: Time, x: Tensor, cond: Tensor | None = None) -> Tensor:
        return self.end * self.field(self.end * t, x, cond)

    def divergence_embedded(self, t: Time, x: Tensor, embedded: Any) -> tuple[Tensor, Tensor]:
        v, divergence = self.field.divergence(self.end * t, x, embedded)
        return self.end * v, self.end * divergence


def fit(draw: Draw, hidden: tuple[int, ...], iterations: int, coef: float) -> MLPField:
    generator = torch.Generator().manual_seed(0)
    data, cond = draw(1, generator)
    torch.manual_seed(0)
    field = MLPField(data.shape[1], 0 if cond is None else cond.shape[1], hidden)

    def loss() -> Tensor:
        data, cond = draw(BATCH, generator)
        z, t = torch.randn(data.shape, generator=generator), torch.rand(BATCH, generator=generator)
        matching = flow_matching_loss(field, LINEAR, z, data, t, cond).mean()
        if not coef:
            return matching
        x, left = LINEAR.sample(t, z, data)[:PENALIZED], 1 - t[:PENALIZED, None]
        given = None if cond is None else cond[:PENALIZED]
        residual = left.square() * fokker_planck_residual(field, t[:PENALIZED], x, given)
        return matching + coef * residual.square().sum(1).mean()

    minimise(field.parameters(), loss, iterations)
    return field


@torch.no_grad()
def gaps(field: MLPField, data: Tensor, cond: Tensor | None) -> list[float | None]:
    """Log-likelihood of data; energy distance of ODE and SDE, and of SDE and data; relative error of the score."""
    generator = torch.Generator().manual_seed(1)
    likelihood = flow_log_prob(field, data, base_log_prob=standard_normal_log_prob, steps=40, cond=cond).mean().item()
    noisy = interpolant_sde(field, lambda t: LEVEL * (1 - t))
    z, *others = torch.randn((4, *data.shape), generator=generator)
    ode, ode_again = (odeint(field, each, steps=60, cond=cond) for each in (z, others[0]))
    sde, sde_again = (sdeint(noisy, each, steps=STEPS, generator=generator, cond=cond) for each in others[1:])
    if cond is None:
        apart, from_data = energy_distance(ode, sde), energy_distance(sde, data)
    else:  # within each row: two samples of each kind given the same conditioning
        between, within = (ode - sde).norm(dim=1), ((ode - ode_again).norm(dim=1), (sde - sde_again).norm(dim=1))
        apart, from_data = (2 * between - sum(within)).mean().item(), None
    x = odeint(field, z, steps=60, cond=cond, t1=LATE)

    def log_density(y: Tensor) -> Tensor:
        flow, base = Until(field, LATE), standard_normal_log_prob
        return flow_log_prob(flow, y, base_log_prob=base, steps=40, cond=cond).sum()

    true: Tensor = torch.func.grad(log_density)(x)
    error = score_from_velocity(LINEAR, LATE, x, field(LATE, x, cond)) - true
    return [likelihood, apart, from_data, (error.square().sum() / true.square().sum()).sqrt().item()]


def moons(n: int, generator: torch.Generator) -> tuple[Tensor, None]:
    return two_moons(n, generator), None


def hopper_transitions(rows: int) -> tuple[Draw, Tensor, Tensor]:
    """What draws from the first rows; targets and inputs of the others. All normalised, as transition models do."""
    seen = collect("Hopper-v5", rows + SAMPLES, learned=20_000)
    inputs = torch.cat([seen.obs, seen.action], 1)
    targets = torch.cat([seen.reward[:, None], seen.next_obs - seen.obs], 1)
    scaled = []
    for columns in (inputs, targets):
        norm = Normalizer(columns.shape[1])
        norm.fit(columns[:rows])
        scaled.append(norm(columns))
    x, y = scaled

    def draw(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        chosen = torch.randint(rows, (n,), generator=generator)
        return y[chosen], x[chosen]

    return draw, y[rows:], x[rows:]


def main(iterations: int = 2000, coefs: tuple[float, ...] = (0.0, 0.1, 1.0), rows: int = 8000) -> None:
    """Fit and print the table.

    Args:
        iterations: minibatches of 256 of each fit.
        coefs: weights of the penalty.
        rows: transitions of Hopper-v5 to fit to.
    """
    torch.set_num_threads(1)
    held_out = two_moons(SAMPLES, torch.Generator().manual_seed(2))
    print("| task | weight | log-likelihood, nats | ODE to SDE | SDE to data | error of the score |")
    print("|---" * 6 + "|")
    transitions, targets, inputs = hopper_transitions(rows)
    tasks: dict[str, tuple[Draw, tuple[int, ...], Tensor, Tensor | None]] = {
        "two moons": (moons, (64, 64), held_out, None),
        "Hopper-v5": (transitions, (128, 128), targets, inputs),
    }
    for task, (draw, hidden, data, cond) in tasks.items():
        for coef in coefs:
            likelihood, *distances, score = gaps(fit(draw, hidden, iterations, coef), data, cond)
            cells = " | ".join("" if each is None else f"{each:.4f}" for each in distances)
            print(f"| {task} | {coef:g} | {likelihood:.2f} | {cells} | {score:.2f} |", flush=True)


if __name__ == "__main__":
    tyro.cli(main)
