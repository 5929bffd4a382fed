"""Does a learned Hurst exponent come near? An SDE driven by fractional noise, fitted by a lower bound of the evidence.

    OMP_NUM_THREADS=1 python benchmarks/fractional.py --output benchmarks/results/fractional.json

Writes the table of docs/solvers.md. Data: 64 paths of fractional Brownian motion of type II with known H, exact in law
(Cholesky factor of the covariance, by quadrature; not our approximation), seen at 16 times over [0, 1] with noise of
standard deviation 0.1. Model: ``dx = scale dB``, H and scale learned from 0.6 and 1.5. The control is linear in the
state, the processes beneath and the next four observations, with weights of its own at each of 512 steps (Daems et al.,
arXiv 2310.12975, have a network; a Gaussian posterior needs no more). As an oracle the maximum of the exact likelihood
of the same data over H and scale.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
import tyro
from learning import write_between
from paired import machine, write
from scipy import integrate, optimize
from torch import Tensor, nn

from driftrl.dynamics.fractional import FractionalNoise, fractional_sdeint

PAGE = Path(__file__).parents[1] / "docs" / "solvers.md"
PATHS, SEEN, STEPS, AHEAD, NOISE = 64, 16, 512, 4, 0.1
F64 = torch.float64


def covariance(hurst: float) -> Tensor:
    """``E[B_s B_t]`` at the times seen, [SEEN, SEEN], by quadrature of the product of the kernels."""
    a, times = hurst - 0.5, [(k + 1) / SEEN for k in range(SEEN)]
    entries = torch.zeros(SEEN, SEEN, dtype=F64)
    for i, s in enumerate(times):
        entries[i, i] = s ** (2 * hurst) / (2 * hurst)
        for j in range(i + 1, SEEN):
            gap = times[j] - s
            # The singularity at the kernel's end is handed to the quadrature as an algebraic weight.
            value = integrate.quad(lambda u, gap=gap: (gap + u) ** a, 0, s, weight="alg", wvar=(a, 0))[0]
            entries[i, j] = entries[j, i] = value
    return entries / math.gamma(hurst + 0.5) ** 2


def evidence(hurst: float, scale: float, data: Tensor) -> float:
    """Exact log-likelihood of a path, in the mean over the paths [PATHS, SEEN]."""
    total = scale**2 * covariance(hurst) + NOISE**2 * torch.eye(SEEN, dtype=F64)
    law = torch.distributions.MultivariateNormal(torch.zeros(SEEN, dtype=F64), total)
    return float(law.log_prob(data.double()).mean().item())


class Posterior(nn.Module):
    """The model and its control."""

    def __init__(self) -> None:
        super().__init__()
        self.noise = FractionalNoise(0.6, learnable=True)
        self.log_scale = nn.Parameter(torch.tensor(math.log(1.5)))
        # At first that of a Brownian bridge from the expected state at the next observation to what is observed.
        gains = torch.tensor([1.0] * (len(self.noise.rates) + 1) + [0.0] * (AHEAD - 1))
        self.gains = nn.Parameter(gains.repeat(STEPS, 1))

    def bound(self, data: Tensor, normal: Tensor) -> Tensor:
        """Lower bound of the evidence of each path, [PATHS], in nats."""
        per_seen = STEPS // SEEN
        padded = torch.cat([data, data[:, -1:].expand(-1, AHEAD)], 1)
        rates, weights, scale = self.noise.rates, self.noise.weights.detach(), self.log_scale.exp()

        def control(t: float, x: Tensor, y: Tensor) -> Tensor:
            step = round(t * STEPS)
            left = (torch.arange(1, AHEAD + 1) * per_seen - step % per_seen) / STEPS
            ahead = padded[:, step // per_seen : step // per_seen + AHEAD] - x
            falls = weights * -torch.expm1(-rates * left[0]) * y.squeeze(1)  # of the processes, until the next
            known = torch.cat([falls / left[0], ahead / (scale.detach() * (left + NOISE**2))], 1)
            return known @ self.gains[step].unsqueeze(1)

        path, divergence = fractional_sdeint(
            self.noise,
            lambda t, x: torch.zeros_like(x),
            torch.zeros_like(data[:, :1]),
            normal,
            dt=1 / STEPS,
            scale=scale,
            control=control,
        )
        seen = path[per_seen::per_seen, :, 0].mT
        fit: Tensor = torch.distributions.Normal(seen, NOISE).log_prob(data).sum(1)
        return fit - divergence


def fit(hurst: float, seed: int, updates: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(PATHS, SEEN, 2, generator=generator, dtype=F64)
    data = (z[..., 0] @ torch.linalg.cholesky(covariance(hurst)).mT + NOISE * z[..., 1]).float()
    best = optimize.minimize(
        lambda p: -evidence(p[0], math.exp(p[1]), data),
        [hurst, 0.0],
        bounds=[(0.3, 0.99), (-1, 1)],
        options={"maxiter": 12},
    )
    model = Posterior()
    groups = [{"params": [model.gains], "lr": 0.02}, {"params": [model.noise.logit, model.log_scale], "lr": 0.01}]
    optimizer = torch.optim.Adam(groups)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, updates)
    bounds = []
    for _ in range(updates):
        half = torch.randn(STEPS, PATHS, 1, len(model.noise.rates), generator=generator)
        loss = -model.bound(data, half).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        optimizer.step()
        schedule.step()
        bounds.append(-loss.item())
    row = {
        "hurst": hurst,
        "seed": seed,
        "oracle": float(best.x[0]),
        "oracle_scale": math.exp(best.x[1]),
        "evidence": -best.fun,
        "fitted": model.noise.hurst.item(),
        "scale": model.log_scale.exp().item(),
        "bound": sum(bounds[-50:]) / 50,
    }
    print(row, flush=True)
    return row


def table(rows: list[dict[str, Any]]) -> str:
    """In Markdown."""
    lines = [
        "| H of the data | seed | H, exact likelihood | H, bound | scale, exact | scale, bound | evidence | bound |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        exponents, scales = f"{r['oracle']:.2f} | {r['fitted']:.2f}", f"{r['oracle_scale']:.2f} | {r['scale']:.2f}"
        nats = f"{r['evidence']:.1f} | {r['bound']:.1f}"
        lines.append(f"| {r['hurst']:g} | {r['seed']} | {exponents} | {scales} | {nats} |")
    return "\n".join(lines)


def main(
    hursts: tuple[float, ...] = (0.35, 0.5, 0.7, 0.9),
    seeds: tuple[int, ...] = (0,),
    updates: int = 1500,
    output: Path | None = None,
) -> None:
    """Print and write the table.

    Args:
        hursts: of the data.
        seeds: of data and training.
        updates: of each fit.
        output: also write the figures there, as JSON.
    """
    torch.set_num_threads(1)
    report: dict[str, Any] = {"machine": machine("torch", "scipy"), "updates": updates}
    report["rows"] = [fit(hurst, seed, updates) for hurst in hursts for seed in seeds]
    write(output, report)
    write_between(PAGE, "fractional", table(report["rows"]))


if __name__ == "__main__":
    tyro.cli(main)
