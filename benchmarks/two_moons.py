"""The pictures of docs/dynamics.md: a flow fitted to two moons, its paths, its density, and the same flow as an SDE.

    OMP_NUM_THREADS=1 python benchmarks/two_moons.py

Takes two minutes. Needs matplotlib (a dev dependency).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import matplotlib
import torch
import tyro
from torch import Tensor

from driftrl.dynamics import (
    LINEAR,
    MLPField,
    flow_log_prob,
    flow_matching_loss,
    interpolant_sde,
    odeint,
    odeint_path,
    sdeint,
    sdeint_path,
    standard_normal_log_prob,
)
from driftrl.dynamics import Path as FlowPath
from driftrl.dynamics.paths import TRIG

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

IMAGES = Path(__file__).parents[1] / "docs" / "images"
LIMITS = (-2.6, 2.6)
NOISE_LEVELS = (0.0, 0.5, 2.0)
SDE_STEPS = 200


def two_moons(n: int, generator: torch.Generator) -> Tensor:
    """N points on two half circles with noise of standard deviation 0.1, [n, 2], centred."""
    angle = math.pi * torch.rand(n, generator=generator)
    side = torch.where(torch.rand(n, generator=generator) < 0.5, 1.0, -1.0)
    points = torch.stack([side * (torch.cos(angle) - 0.5), side * (torch.sin(angle) - 0.25)], 1)
    return 1.4 * points + 0.1 * torch.randn(n, 2, generator=generator)


def minimise(parameters: Iterable[Tensor], loss: Callable[[], Tensor], iterations: int) -> None:
    """Descend a loss that is drawn anew each time, by Adam whose rate falls to 0 by a cosine."""
    optimizer = torch.optim.Adam(parameters, lr=5e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, iterations)
    for _ in range(iterations):
        value = loss()
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        schedule.step()


def fit(iterations: int, generator: torch.Generator, path: FlowPath = LINEAR) -> MLPField:
    torch.manual_seed(0)
    field = MLPField(dim=2, hidden=(128, 128, 128))

    def loss() -> Tensor:
        data = two_moons(512, generator)
        z, t = torch.randn(512, 2, generator=generator), torch.rand(512, generator=generator)
        return flow_matching_loss(field, path, z, data, t).mean()

    minimise(field.parameters(), loss, iterations)
    return field


@torch.no_grad()
def main(iterations: int = 3000, folder: Path = IMAGES) -> None:
    """Fit and draw.

    Args:
        iterations: minibatches of 512.
        folder: where the pictures go.
    """
    torch.set_num_threads(1)
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    with torch.enable_grad():
        field = fit(iterations, generator)
    z = torch.randn(2000, 2, generator=generator)
    samples = odeint(field, z, steps=20)
    held_out = two_moons(2000, generator)
    log_prob = flow_log_prob(field, held_out, base_log_prob=standard_normal_log_prob, steps=40)
    print(f"mean log-likelihood of held-out points: {log_prob.mean():.3f} nats")

    figure, axes = plt.subplots(1, 3, figsize=(9, 3.1), layout="constrained")
    axes[0].scatter(*held_out.T, s=2, alpha=0.4, color="tab:gray", linewidths=0)
    axes[0].set_title("data")
    axes[1].scatter(*samples.T, s=2, alpha=0.4, linewidths=0)
    axes[1].plot(*odeint_path(field, z[:40], steps=40).permute(2, 0, 1), color="tab:orange", lw=0.6)
    axes[1].set_title("samples, and the paths of 40")
    ticks = torch.linspace(*LIMITS, 160)
    grid = torch.cartesian_prod(ticks, ticks)
    density = flow_log_prob(field, grid, base_log_prob=standard_normal_log_prob, steps=40).exp().reshape(160, 160)
    axes[2].imshow(density.T, origin="lower", extent=(*LIMITS, *LIMITS), cmap="magma")
    cell = (LIMITS[1] - LIMITS[0]) ** 2 / 159**2
    axes[2].set_title(f"density (sum over the grid: {density.sum() * cell:.3f})")
    print(f"integral of the density over the picture: {density.sum() * cell:.4f}")
    save(figure, folder / "two_moons.png")
    draw_sde(field, held_out, z, folder)
    with torch.enable_grad():
        by_trig = fit(iterations, torch.Generator().manual_seed(0), TRIG)
    compare_paths({LINEAR: field, TRIG: by_trig}, held_out, z)


def draw_sde(field: MLPField, data: Tensor, z: Tensor, folder: Path) -> None:
    """Samples at each noise level beside the data, with the paths of three; prints how far they are from the data."""
    figure, axes = plt.subplots(1, 1 + len(NOISE_LEVELS), figsize=(12, 3.2), layout="constrained")
    axes[0].scatter(*data.T, s=2, alpha=0.4, color="tab:gray", linewidths=0)
    axes[0].set_title("data")
    for ax, eps in zip(axes[1:], NOISE_LEVELS, strict=True):
        falling, generator = interpolant_sde(field, partial(fall, eps)), torch.Generator().manual_seed(1)
        samples = sdeint(falling, z, steps=SDE_STEPS, generator=generator)
        paths = sdeint_path(falling, z[10:13], steps=SDE_STEPS, generator=generator)
        ax.scatter(*samples.T, s=2, alpha=0.4, linewidths=0)
        ax.plot(*paths.permute(2, 0, 1), color="tab:orange", lw=0.5)
        ax.set_title(f"eps = {eps:g} (1 - t), and 3 paths" if eps else "eps = 0, and 3 paths")
        constant = sdeint(interpolant_sde(field, eps), z, steps=SDE_STEPS, generator=generator)
        far, farther = energy_distance(samples, data), energy_distance(constant, data)
        print(f"energy distance to the data: {far:.4f} at eps = {eps:g} (1 - t), {farther:.4f} at a constant eps")
    generator = torch.Generator().manual_seed(2)
    print(f"that of as many new points: {energy_distance(two_moons(len(data), generator), data):.4f}")
    save(figure, folder / "two_moons_sde.png")


def compare_paths(fields: dict[FlowPath, MLPField], data: Tensor, z: Tensor) -> None:
    """Print energy distances to the data, by ODE with 4 and 20 steps and by SDE, for each path."""
    print("| path | ODE, 4 steps | ODE, 20 steps | SDE, eps = 2 (1 - t) |\n|---|---|---|---|")
    for path, field in fields.items():
        sde, generator = interpolant_sde(field, partial(fall, 2.0), path), torch.Generator().manual_seed(1)
        ends = [*(odeint(field, z, steps=steps) for steps in (4, 20))]
        ends.append(sdeint(sde, z, steps=SDE_STEPS, generator=generator))
        print(f"| {path.name} | " + " | ".join(f"{energy_distance(end, data):.4f}" for end in ends) + " |")


def fall(eps: float, t: float) -> float:
    """Noise that ends with the flow."""
    return eps * (1 - t)


def energy_distance(a: Tensor, b: Tensor) -> float:
    """``2 E|a - b| - E|a - a'| - E|b - b'|``, which is 0 for equal distributions only."""
    between, within = torch.cdist(a, b).mean(), sum(torch.cdist(x, x).sum() / (len(x) * (len(x) - 1)) for x in (a, b))
    return float(2 * between - within)


def save(figure: Figure, path: Path) -> None:
    for ax in figure.axes:
        ax.set(xlim=LIMITS, ylim=LIMITS, aspect="equal", xticks=[], yticks=[])
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    tyro.cli(main)
