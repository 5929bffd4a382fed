"""How right each importance ratio is where the answer is known: gradient, mean and bias on a flow that is linear.

    OMP_NUM_THREADS=1 python benchmarks/ratio_gradients.py

Takes a minute and prints the tables of docs/flow_ratios.md. The flow is that of tests/oracles/affine_flow.py.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import tyro

from driftrl.agents.policyflow.other_ratios import RATIOS

sys.path.append(str(Path(__file__).parents[1] / "tests" / "oracles"))

from affine_flow import MATRIX, gradient, marginal_bias, mean_ratio

SCALED = ("interpolation", "adjoint", "fpo")  # compared over the strength of the field


def main(samples: int = 400_000) -> None:
    """Print the tables.

    Args:
        samples: of each estimate.
    """
    print("| ratio | cosine | length | noise | E[rho] |\n|---|---|---|---|---|")
    for name in RATIOS:
        each, (mean, error) = gradient(name, samples), mean_ratio(name, samples)
        row = f"{each.cosine():.4f} | {each.length():.3f} | {each.noise(samples):.1f} | {mean:.4f} +- {error:.4f}"
        print(f"| `{name}` | {row} |", flush=True)
    print("\n| norm of dv/dx | " + " | ".join(SCALED) + " |\n|---|" + "---|" * len(SCALED))
    for scale in (0.0, 0.1, 0.3, 0.6, 1.0):
        norm = torch.tensor(MATRIX).norm().item() * scale
        cosines = [f"{gradient(name, samples, scale=scale).cosine():.3f}" for name in SCALED]
        print(f"| {norm:.2f} | {' | '.join(cosines)} |", flush=True)
    print("\n| M | relative error of the log-ratio | mean error, nats | noise of the gradient |\n|---|---|---|---|")
    for draws in (1, 2, 4, 8, 16, 32, 128):
        relative, bias = marginal_bias(draws, 20_000)
        noise = gradient("marginal", samples // 10, draws=draws).noise(samples // 10)
        print(f"| {draws} | {relative:.3f} | {bias:+.4f} | {noise:.1f} |", flush=True)


if __name__ == "__main__":
    tyro.cli(main)
