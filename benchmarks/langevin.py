"""Error of Langevin samplers by the number of gradients: plain, adjusted, in the metric of other chains' gradients.

    OMP_NUM_THREADS=1 python benchmarks/langevin.py

Samples an ill-conditioned Gaussian and a banana by `overdamped` (ULA), `mala` and `levenberg_marquardt`, each with the
best of its steps, and prints the table of docs/recipes.md. Takes three minutes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import tyro
from torch import Tensor

from driftrl.dynamics import mala, overdamped
from driftrl.dynamics.levenberg_marquardt import levenberg_marquardt
from driftrl.dynamics.special_fields import PotentialField

DIM, CONDITION = 20, 1000.0
"""Of the Gaussian: curvatures from 1 to CONDITION, along random axes."""
BEND = 1.0
"""Of the banana ``x_2 ~ BEND (x_1^2 - 1) + N(0, 0.3^2)``, x_1 ~ N(0, 1)."""
CHAINS, SEEDS, STRIDE = 64, 3, 5
BUDGETS = (100, 500, 2000)
STEPS = {
    "overdamped": (0.01, 0.05, 0.5, 1.0, 1.5),
    "mala": (0.1, 0.3, 0.6, 1.0, 1.6),
    "levenberg_marquardt": (0.05, 0.2, 0.5, 0.8),
}
"""Steps tried: of the first two in units of 1 / largest curvature, of the last in Newton's."""


class Target(NamedTuple):
    """A density ``exp(-U)``, and the statistics whose error is measured."""

    energy: Callable[[Tensor, Tensor | None], Tensor]
    dim: int
    curvature: float  # largest, at the mode
    damping: float
    statistics: Callable[[Tensor], Tensor]  # x [..., D] -> [..., S], each of mean 1 under the density


def gaussian() -> Target:
    curvatures = torch.logspace(0, math.log10(CONDITION), DIM)
    axes, _ = torch.linalg.qr(torch.randn(DIM, DIM, generator=torch.Generator().manual_seed(0)))

    def energy(x: Tensor, cond: Tensor | None) -> Tensor:
        value: Tensor = 0.5 * (curvatures * (x @ axes).square()).sum(-1)
        return value

    return Target(energy, DIM, CONDITION, 1.0, lambda x: curvatures * (x @ axes).square())


def banana() -> Target:
    def energy(x: Tensor, cond: Tensor | None) -> Tensor:
        return 0.5 * (x[:, 0].square() + ((x[:, 1] - BEND * (x[:, 0].square() - 1)) / 0.3).square())

    def statistics(x: Tensor) -> Tensor:
        deviation = math.sqrt(2 * BEND**2 + 0.3**2)
        third = (x[..., 0].square() - 1) * x[..., 1] / (2 * BEND)
        return torch.stack([x[..., 0].square(), (x[..., 1] / deviation).square(), third], -1)

    return Target(energy, 2, 1 + 1 / 0.3**2, 0.3, statistics)


Advance = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Positions, noise, uniforms -> positions."""


def sampler(name: str, target: Target, step: float) -> tuple[Advance, int]:
    """What advances chains, and the gradients that it takes for `STRIDE` steps."""
    if name == "overdamped":
        move = partial(overdamped, PotentialField(target.energy, target.dim), step=step / target.curvature)
        return lambda x, z, u: move(x, z), STRIDE
    if name == "mala":
        adjusted = partial(mala, target.energy, step=step / target.curvature)
        return lambda x, z, u: adjusted(x, z, u)[0], STRIDE + 1
    damped = partial(levenberg_marquardt, target.energy, step=step, damping=target.damping)
    return lambda x, z, u: damped(x, z, u)[0], STRIDE + 1


def errors(name: str, target: Target, step: float) -> list[float]:
    """Root mean square error of the statistics after each budget, over the second half of the path."""
    advance, cost = sampler(name, target, step)
    squares = []
    for seed in range(SEEDS):
        generator = torch.Generator().manual_seed(seed)
        x, seen = torch.randn(CHAINS, target.dim, generator=generator), []
        for _ in range(BUDGETS[-1] // cost):
            noise = torch.randn(STRIDE, CHAINS, target.dim, generator=generator)
            x = advance(x, noise, torch.rand(STRIDE, CHAINS, generator=generator))
            seen.append(target.statistics(x).mean(0))
        counts = [budget // cost for budget in BUDGETS]
        means = torch.stack([torch.stack(seen[n // 2 : n]).mean(0) for n in counts])
        squares.append((means - 1).square().mean(1))
    found: list[float] = torch.stack(squares).mean(0).sqrt().tolist()
    return found


@torch.no_grad()
def main() -> None:
    """Sample and print the table."""
    torch.set_num_threads(1)
    print("| density | sampler | " + " | ".join(f"{budget} gradients" for budget in BUDGETS) + " |")
    print("|---" * (2 + len(BUDGETS)) + "|")
    for density, target in (("Gaussian", gaussian()), ("banana", banana())):
        for name, steps in STEPS.items():
            tried = [errors(name, target, step) for step in steps]
            cells = []
            for column in zip(*tried, strict=True):
                best = min(range(len(steps)), key=lambda i: column[i] if math.isfinite(column[i]) else math.inf)
                cells.append(f"{column[best]:.3f} ({steps[best]:g})")
            print(f"| {density} | `{name}` | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    tyro.cli(main)
