"""From two moons to eight Gaussians by stochastic interpolants, and by a Schroedinger bridge: docs/interpolants.md.

    OMP_NUM_THREADS=1 python benchmarks/interpolants.py

Fits a velocity and a denoiser on a path with noise, between independent pairs and between pairs of entropic optimal
transport, and samples at several noise levels. Takes two minutes. Needs matplotlib (a dev dependency).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import matplotlib
import torch
import tyro
from torch import Tensor
from two_moons import IMAGES, energy_distance, minimise, two_moons

from driftrl.dynamics import MLPField, flow_matching_loss, interpolant_sde, sdeint_path
from driftrl.dynamics.coupling import entropic_plan
from driftrl.dynamics.girsanov import girsanov_kl
from driftrl.dynamics.paths import brownian_bridge, denoising_loss

matplotlib.use("Agg")
from matplotlib import pyplot as plt

SCALE = 1.0
"""Of the paths' noise and, in its sense, of the Schroedinger bridge."""
LEVELS = (0.0, 0.1, 0.5, 2.0)
BRIDGE_LEVEL = SCALE**2 / 2
PLAN_POINTS, BATCH = 2000, 512
STEPS, START = 200, 1e-3

Pairs = Callable[[], tuple[Tensor, Tensor]]


class Fit(NamedTuple):
    """Velocity without noise and denoiser."""

    velocity: MLPField
    denoiser: MLPField


def eight_gaussians(n: int, generator: torch.Generator) -> Tensor:
    """N points around eight centres on a circle of radius 2, standard deviation 0.15, [n, 2]."""
    angle = math.pi / 4 * torch.randint(8, (n,), generator=generator)
    return 2 * torch.stack([angle.cos(), angle.sin()], 1) + 0.15 * torch.randn(n, 2, generator=generator)


def entropic_pairs(generator: torch.Generator) -> Pairs:
    """Pairs drawn from the plan of two large samples."""
    x0, x1 = two_moons(PLAN_POINTS, generator), eight_gaussians(PLAN_POINTS, generator)
    plan = entropic_plan(x0, x1, SCALE)

    def draw() -> tuple[Tensor, Tensor]:
        rows = torch.randint(PLAN_POINTS, (BATCH,), generator=generator)
        return x0[rows], x1[torch.multinomial(plan[rows], 1, generator=generator)[:, 0]]

    return draw


def fit(pairs: Pairs, iterations: int, generator: torch.Generator) -> Fit:
    torch.manual_seed(0)
    fields = Fit(MLPField(2, hidden=(128, 128, 128)), MLPField(2, hidden=(128, 128, 128)))
    path = brownian_bridge(SCALE)

    def loss() -> Tensor:
        x0, x1 = pairs()
        t, z = torch.rand(BATCH, generator=generator), torch.randn(BATCH, 2, generator=generator)
        matching = flow_matching_loss(fields.velocity, path, x0, x1, t, z=z)
        return (matching + denoising_loss(fields.denoiser, path, x0, x1, t, z)).mean()

    minimise([*fields.velocity.parameters(), *fields.denoiser.parameters()], loss, iterations)
    return fields


@torch.no_grad()
def main(iterations: int = 2000, folder: Path = IMAGES) -> None:
    """Fit, print the table, draw.

    Args:
        iterations: minibatches of 512 of each fit.
        folder: where the picture goes.
    """
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    couplings: dict[str, Pairs] = {
        "independent": lambda: (two_moons(BATCH, generator), eight_gaussians(BATCH, generator)),
        "entropic": entropic_pairs(generator),
    }
    x0, data = two_moons(2000, generator), eight_gaussians(2000, generator)
    print(f"energy distance of as many new points: {energy_distance(eight_gaussians(2000, generator), data):.4f}")
    print("| pairs | eps | energy distance | mean square distance moved | KL to the reference, nats |")
    print("|---" * 5 + "|")
    drawn = {}
    for name, pairs in couplings.items():
        with torch.enable_grad():
            fields = fit(pairs, iterations, generator)
        for eps in LEVELS:
            sde = interpolant_sde(fields.velocity, eps, brownian_bridge(SCALE), fields.denoiser)
            noise = torch.Generator().manual_seed(1)
            path = sdeint_path(sde, x0, steps=STEPS, generator=noise, t0=START)
            far, moved = energy_distance(path[-1], data), (path[-1] - x0).square().sum(1).mean()
            cell = ""
            if eps == BRIDGE_LEVEL:
                cell = f"{girsanov_kl(sde, lambda t, x, cond: torch.zeros_like(x), path, t0=START).mean():.2f}"
                drawn[f"{name} pairs, eps = {eps:g}"] = path
            if eps == 0 and name == "independent":
                drawn["independent pairs, eps = 0"] = path
            print(f"| {name} | {eps:g} | {far:.4f} | {moved:.2f} | {cell} |", flush=True)
    draw(drawn, folder)


def draw(paths: dict[str, Tensor], folder: Path) -> None:
    figure, axes = plt.subplots(1, len(paths), figsize=(3.2 * len(paths), 3.4), layout="constrained")
    for ax, (title, path) in zip(axes, paths.items(), strict=True):
        ax.scatter(*path[0].T, s=2, alpha=0.3, color="tab:gray", linewidths=0)
        ax.scatter(*path[-1].T, s=2, alpha=0.4, linewidths=0)
        ax.plot(*path[:, :12].permute(2, 0, 1), color="tab:orange", lw=0.6)
        ax.set_title(title)
        ax.set(xlim=(-3, 3), ylim=(-3, 3), aspect="equal", xticks=[], yticks=[])
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / "interpolants.png", dpi=110)


if __name__ == "__main__":
    tyro.cli(main)
