"""Stable neural SDEs on irregular data: accuracy where values are missing at test time. docs/recipes.md.

    OMP_NUM_THREADS=1 python benchmarks/irregular.py

Which way, and how fast, does a noisy point go round? Fits the three stable classes of arXiv 2402.14989 with their
control path, a neural ODE and plain neural SDEs to whole series, and tests them with more and more values missing.
Takes a minute.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import tyro
from torch import Tensor, nn
from torch.nn import functional as F

from driftrl.dynamics import SDE, LangevinSDE, MLPField, sdeint
from driftrl.dynamics.control import ControlPath
from driftrl.dynamics.fields import Time
from driftrl.dynamics.neural_sde import GeometricSDE, LinearNoiseSDE
from driftrl.dynamics.ode import FieldLike, bind
from driftrl.dynamics.sde import Drift

CLASSES, CHANNELS, LATENT, POINTS, STEPS = 4, 2, 16, 20, 20
MISSING = (0.0, 0.3, 0.5, 0.7)
NOISE, BATCH, DRAWS, LARGEST = 0.4, 128, 8, 5.0


class Series(NamedTuple):
    """Observations of rows at times of their own."""

    times: list[float]  # N
    values: Tensor  # [B, N, C], nan where missing
    label: Tensor  # [B]


def circling(n: int, missing: float, generator: torch.Generator) -> Series:
    """Points that go round once or twice, one way or the other, from a random place, seen at random times."""
    times = torch.cat([torch.rand(POINTS - 2, generator=generator), torch.tensor([0.0, 1.0])]).unique()
    label = torch.randint(CLASSES, (n,), generator=generator)
    turns = (1.0 + (label > 1)) * torch.where(label % 2 > 0, 1.0, -1.0)
    angle = 2 * math.pi * (torch.rand(n, 1, generator=generator) + turns[:, None] * times)
    clean = torch.stack([angle.cos(), angle.sin()], -1)
    values = clean + NOISE * torch.randn(clean.shape, generator=generator)
    gone = torch.rand(values.shape, generator=generator) < missing
    return Series(times.tolist(), values.masked_fill(gone, math.nan), label)


class PlainSDE(SDE):
    """``dz = f dt + g(t, z) dW`` with a network for g: no condition keeps it stable."""

    def __init__(self, drift: FieldLike, spread: MLPField) -> None:
        super().__init__()
        self.drift, self.spread = drift, spread

    def bind(self, cond: Tensor | None, times: object = ()) -> Drift:
        return bind(self.drift, cond)

    def diffusion(self, t: float | Tensor, x: Tensor) -> Tensor:
        return F.softplus(self.spread(t, x))


class Classifier(nn.Module):
    """Latent SDE that starts at the first observation and may be driven by the path of all; then a linear layer."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.start, self.end = nn.Linear(CHANNELS, LATENT), nn.Linear(LATENT, CLASSES)
        self.field = MLPField(LATENT, 0 if "without" in kind else CHANNELS, (64,), last_layer_scale=1.0)
        self.log_scale = nn.Parameter(torch.full((LATENT,), math.log(0.3)))
        self.spread = MLPField(LATENT, hidden=(64,), last_layer_scale=1.0) if "plain" in kind else None

    def equation(self, path: ControlPath) -> SDE:
        free: FieldLike = self.field if "without" in self.kind else path.drive(self.field)

        def drift(t: Time, z: Tensor, cond: Tensor | None) -> Tensor:  # bounded, as the paper's
            return LARGEST * torch.tanh(free(t, z, cond) / LARGEST)

        if self.spread is not None:
            return PlainSDE(drift, self.spread)
        if self.kind == "neural ODE":
            return LangevinSDE(drift, 0.0)
        classes = {"Langevin": LangevinSDE, "linear noise": LinearNoiseSDE, "geometric": GeometricSDE}
        return classes[self.kind](drift, self.log_scale.exp())

    def forward(self, series: Series, generator: torch.Generator) -> Tensor:
        path = ControlPath(series.times, series.values)
        z = self.start(path.at(0.0))
        z = F.softplus(z) + 0.1 if self.kind == "geometric" else z  # x stays positive there
        logits: Tensor = self.end(sdeint(self.equation(path), z, steps=STEPS, generator=generator))
        return logits


KINDS = ("Langevin", "linear noise", "geometric", "neural ODE", "plain", "plain, without control path")


def fit(kind: str, iterations: int, seed: int) -> Classifier:
    torch.manual_seed(seed)
    generator, model = torch.Generator().manual_seed(seed), Classifier(kind)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, iterations)
    for _ in range(iterations):
        series = circling(BATCH, 0.0, generator)
        loss = F.cross_entropy(model(series, generator), series.label)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model


@torch.no_grad()
def accuracy(model: Classifier, missing: float) -> float:
    """Share of 1,280 series named rightly, by the mean of the probabilities of several draws."""
    right, generator = 0, torch.Generator().manual_seed(10_000)
    for _ in range(10):
        series = circling(BATCH, missing, generator)
        draws = torch.stack([model(series, generator).softmax(-1) for _ in range(DRAWS)])
        right += int((draws.mean(0).argmax(1) == series.label).sum())
    return right / (10 * BATCH)


def main(iterations: int = 300, seeds: tuple[int, ...] = (0, 1, 2)) -> None:
    """Fit, test and print the table.

    Args:
        iterations: minibatches of 128 of each fit.
        seeds: fits of each kind.
    """
    torch.set_num_threads(1)
    print("| equation | " + " | ".join(f"{missing:.0%} missing" for missing in MISSING) + " |")
    print("|---" * (1 + len(MISSING)) + "|")
    for kind in KINDS:
        models = [fit(kind, iterations, seed) for seed in seeds]
        cells = []
        for missing in MISSING:
            shares = torch.tensor([accuracy(model, missing) for model in models])
            cells.append(f"{shares.mean():.2f} [{shares.min():.2f}, {shares.max():.2f}]")
        print(f"| {kind} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    tyro.cli(main)
