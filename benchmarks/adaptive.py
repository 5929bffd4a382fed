"""What `odeint_adaptive` gives beside the end state: states and events within its steps, and its errors as a penalty.

    OMP_NUM_THREADS=1 python benchmarks/adaptive.py --output benchmarks/results/adaptive.json

Writes the tables of docs/solvers.md.

within     64 harmonic oscillators over one period, in float64: the worst error of the end state, and of the state at 50
           times in between, by the interpolant; the calls per row, and those of as many solves that end at these times
events     64 balls thrown up from heights between 1 and 10: error of the time at which they meet the ground, and of its
           gradient by the first velocity, against the closed form with drag ``-k v``, whose root SciPy finds
penalties  a neural ODE that turns the plane by an angle of |x|, x ~ N(0, I), trained on its end state through the
           solver at a tolerance of 1e-3, with: no penalty; the sum of the error estimates over the solve (Pal et al.,
           arXiv 2105.03918); that of one step of 0.3 at a random time of the path (arXiv 2303.02262). Test error and
           calls at a tolerance of 1e-5, mean and range over seeds; processor time per update
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import tyro
from learning import write_between
from paired import machine, write
from scipy.optimize import brentq
from torch import Tensor

from driftrl.dynamics import MLPField, local_error_penalty, odeint_adaptive
from driftrl.dynamics.fields import Time

PAGE = Path(__file__).parents[1] / "docs" / "solvers.md"
F64 = torch.float64
DRAG, GRAVITY = 0.5, 9.81
STEP = 0.3
"""Of the one step at a random time."""
TOLERANCES = (1e-3, 1e-5, 1e-7, 1e-9)
ARMS = (("none", 0.0), ("sum", 100.0), ("random time", 1000.0))


def turning(t: Time, x: Tensor, cond: Tensor | None) -> Tensor:
    return torch.stack([x[:, 1], -x[:, 0]], 1)


def within() -> list[dict[str, Any]]:
    x = torch.randn(64, 2, generator=torch.Generator().manual_seed(0), dtype=F64)
    times, end = torch.linspace(0, 2 * math.pi, 52, dtype=F64)[1:-1], 2 * math.pi
    exact = torch.stack([times.cos()[:, None] * x[:, 0] + times.sin()[:, None] * x[:, 1],
                         times.cos()[:, None] * x[:, 1] - times.sin()[:, None] * x[:, 0]], 2)  # fmt: skip
    rows = []
    for tolerance in TOLERANCES:
        result = odeint_adaptive(turning, x, rtol=tolerance, atol=tolerance, t1=end, at=times)
        assert result.states is not None
        parts = [0.0, *times.tolist(), end]
        state, separate = x, 0.0
        for t0, t1 in pairwise(parts):
            piece = odeint_adaptive(turning, state, rtol=tolerance, atol=tolerance, t0=t0, t1=t1)
            state, separate = piece.checked(), separate + piece.calls.double().mean().item()
        rows.append(
            {
                "tolerance": tolerance,
                "end": (result.checked() - x).abs().max().item(),
                "within": (result.states - exact).abs().max().item(),
                "calls": result.calls.double().mean().item(),
                "separate": separate,
            }
        )
        print(rows[-1], flush=True)
    return rows


def flying(t: Time, x: Tensor, cond: Tensor | None) -> Tensor:
    return torch.stack([x[:, 1], -GRAVITY - DRAG * x[:, 1]], 1)


def landing(height: float, speed: float) -> float:
    """Time of the root of ``height - g t / k + (v + g / k) (1 - e^(-k t)) / k``."""
    return float(
        brentq(
            lambda t: height - GRAVITY * t / DRAG - (speed + GRAVITY / DRAG) * math.expm1(-DRAG * t) / DRAG, 1e-6, 99
        )
    )


def events() -> list[dict[str, Any]]:
    x = torch.stack([torch.linspace(1, 10, 64, dtype=F64), torch.linspace(0, 9, 64, dtype=F64)], 1)
    exact = torch.tensor([landing(h, v) for h, v in x.tolist()], dtype=F64)
    decay = torch.exp(-DRAG * exact)
    falling = x[:, 1] * decay - GRAVITY / DRAG * (1 - decay)
    by_speed = -(1 - decay) / DRAG / falling
    rows = []
    for tolerance in TOLERANCES:
        start = x.clone().requires_grad_()
        result = odeint_adaptive(
            flying, start, rtol=tolerance, atol=tolerance, t1=10.0, event=lambda t, x, cond: x[:, 0]
        )
        result.checked()
        (gradient,) = torch.autograd.grad(result.t.sum(), start)
        errors = (result.t - exact).abs().max().item(), (gradient[:, 1] - by_speed).abs().max().item()
        calls = result.calls.double().mean().item()
        rows.append({"tolerance": tolerance, "time": errors[0], "gradient": errors[1], "calls": calls})
        print(rows[-1], flush=True)
    return rows


def twisted(x: Tensor) -> Tensor:
    angle = x.norm(dim=1)
    return torch.stack([angle.cos() * x[:, 0] - angle.sin() * x[:, 1],
                        angle.sin() * x[:, 0] + angle.cos() * x[:, 1]], 1)  # fmt: skip


def train(penalty: str, coef: float, seed: int, updates: int) -> dict[str, Any]:
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    field = MLPField(2, hidden=(64, 64), last_layer_scale=1.0)
    optimizer = torch.optim.Adam(field.parameters(), 5e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, updates)
    seconds = time.process_time()
    for _ in range(updates):
        x = torch.randn(128, 2, generator=generator)
        moment = (1 - STEP) * torch.rand(1, generator=generator).item()
        wanted = (moment,) if penalty == "random time" else ()
        result = odeint_adaptive(field, x, rtol=1e-3, atol=1e-3, at=wanted)
        loss = (result.checked() - twisted(x)).square().sum(1).mean()
        if penalty == "sum":
            loss = loss + coef * result.error.mean()
        elif result.states is not None:
            loss = loss + coef * local_error_penalty(field, moment, result.states[0], h=STEP).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    seconds = time.process_time() - seconds
    with torch.no_grad():
        x = torch.randn(2000, 2, generator=torch.Generator().manual_seed(10**6))
        result = odeint_adaptive(field, x, rtol=1e-5, atol=1e-5)
        error = (result.checked() - twisted(x)).square().sum(1).mean().item()
    row = {"penalty": penalty, "coef": coef, "seed": seed, "error": error, "ms": 1e3 * seconds / updates}
    row["calls"] = result.calls.double().mean().item()
    print(row, flush=True)
    return row


def mean_and_range(values: Sequence[float], digits: str) -> str:
    return f"{sum(values) / len(values):{digits}} [{min(values):{digits}}, {max(values):{digits}}]"


def penalties_table(rows: list[dict[str, Any]]) -> str:
    lines = ["| penalty | coefficient | test error | calls per row | ms per update |", "|---|---|---|---|---|"]
    for penalty, coef in ARMS:
        seeds = [row for row in rows if (row["penalty"], row["coef"]) == (penalty, coef)]
        cells = [mean_and_range([row[key] for row in seeds], d) for key, d in (("error", ".3f"), ("calls", ".0f"))]
        lines.append(f"| {penalty} | {coef:g} | {' | '.join(cells)} | {min(row['ms'] for row in seeds):.0f} |")
    return "\n".join(lines)


def main(seeds: tuple[int, ...] = (0,), updates: int = 300, output: Path | None = None) -> None:
    """Print and write the tables.

    Args:
        seeds: of the penalties' trainings.
        updates: of each.
        output: also write the figures there, as JSON.
    """
    torch.set_num_threads(1)
    report: dict[str, Any] = {"machine": machine("torch"), "within": within(), "events": events(), "updates": updates}
    report["penalties"] = [train(penalty, coef, seed, updates) for seed in seeds for penalty, coef in ARMS]
    write(output, report)
    lines = ["| rtol = atol | error at the end | at 50 times | calls | calls of 51 solves |", "|---|---|---|---|---|"]
    for r in report["within"]:
        lines.append(
            f"| {r['tolerance']:g} | {r['end']:.1e} | {r['within']:.1e} | {r['calls']:.0f} | {r['separate']:.0f} |"
        )
    write_between(PAGE, "within", "\n".join(lines))
    lines = ["| rtol = atol | error of the time | of its gradient | calls |", "|---|---|---|---|"]
    for r in report["events"]:
        lines.append(f"| {r['tolerance']:g} | {r['time']:.1e} | {r['gradient']:.1e} | {r['calls']:.0f} |")
    write_between(PAGE, "events", "\n".join(lines))
    write_between(PAGE, "penalties", penalties_table(report["penalties"]))


if __name__ == "__main__":
    tyro.cli(main)
