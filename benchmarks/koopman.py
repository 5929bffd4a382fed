"""Is a learned model as stable as what it was fitted to? The picture of docs/recipes.md.

    OMP_NUM_THREADS=1 python benchmarks/koopman.py

Fits models to transitions of Hopper-v5 and compares them with held-out ones: eigenvalues of the best linear step (DMD
with control), those of the Jacobians along real trajectories, and the growth of differences over 20 steps. Takes two
minutes. Needs matplotlib (a dev dependency).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib
import torch
import tyro
from known_kinematics import Data, collect, errors
from torch import Tensor
from two_moons import IMAGES

from driftrl.agents.lipschitz_mbpo.diagnostics import growth, step_jacobians
from driftrl.agents.lipschitz_mbpo.model import build_model
from driftrl.agents.registry import AGENTS
from driftrl.dynamics.koopman import koopman_matrix

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.patches import Circle

TASK, STRETCH = "Hopper-v5", 20
MODELS: dict[str, dict[str, Any]] = {
    "preset": {},
    "Jacobian prior 0.1": {"model_jacobian_coef": 0.1},
    "Jacobian prior 1": {"model_jacobian_coef": 1.0},
    "preset, 300 transitions": {},
}


def stretches(data: Data, first: int) -> Tensor:
    """Rows of whole stretches from row `first` on, [T, B]."""
    whole = [i for i in range(first, len(data.obs) - STRETCH, STRETCH) if not data.starts[i + 1 : i + STRETCH].any()]
    return torch.tensor(whole) + torch.arange(STRETCH)[:, None]


@torch.no_grad()
def main(rows: int = 5000, held_out: int = 2000, folder: Path = IMAGES) -> None:
    """Fit, print the table, draw.

    Args:
        rows: transitions of a fit.
        held_out: transitions on which models are judged.
        folder: where the picture goes.
    """
    torch.set_num_threads(1)
    with torch.enable_grad():
        data = collect(TASK, rows + held_out, learned=20_000)
    _, config = AGENTS["mbpo"].settings(TASK, "standard")
    scale, places = 1 / data.obs[:rows].std(0), stretches(data, rows)
    obs, action = data.obs[rows:], data.action[rows:]
    real = torch.linalg.eigvals(koopman_matrix(obs, data.next_obs[rows:], action))
    print(f"largest eigenvalue of the best linear step of the data: {real.abs().max():.3f}")
    print("| model | largest eigenvalue of the best linear step | of d next_obs / d obs | growth | error, 20 steps |")
    print("|---" * 5 + "|")
    figure, axes = plt.subplots(1, len(MODELS), figsize=(3.2 * len(MODELS), 3.4), layout="constrained")
    for ax, (name, fields) in zip(axes, MODELS.items(), strict=True):
        used = 300 if "300" in name else rows
        torch.manual_seed(0)
        model = build_model(replace(config, **fields), obs.shape[1], action.shape[1], False)
        with torch.enable_grad():
            model.fit(
                *(part[:used] for part in data[:4]), generator=torch.Generator().manual_seed(0),
                max_epochs=config.model_epochs,
            )  # fmt: skip
        linear = torch.linalg.eigvals(koopman_matrix(obs, model.predict(obs, action)[0], action))
        local = torch.linalg.eigvals(step_jacobians(model, obs[::10], action[::10]))
        grown = growth(model, data.obs[places], data.action[places], scale)
        cells = linear.abs().max(), local.abs().amax(1).mean(), grown, errors(model, data, rows)[-1]
        print(f"| {name} | " + " | ".join(f"{cell:.3f}" for cell in cells) + " |", flush=True)
        ax.add_patch(Circle((0, 0), 1, fill=False, color="tab:gray", lw=0.6))
        ax.scatter(local.real, local.imag, s=2, alpha=0.3, linewidths=0, label="model, step by step")
        ax.scatter(real.real, real.imag, s=28, marker="x", color="black", label="data, best linear step")
        ax.scatter(linear.real, linear.imag, s=28, marker="+", color="tab:orange", label="model, best linear step")
        ax.set(title=name, xlim=(-0.6, 1.6), ylim=(-1.1, 1.1), aspect="equal", xlabel="real part")
    axes[0].set_ylabel("imaginary part")
    axes[0].legend(fontsize=6, loc="lower left")
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / "koopman.png", dpi=110)


if __name__ == "__main__":
    tyro.cli(main)
