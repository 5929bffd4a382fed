"""The comparison of arXiv 2302.01244: models of the environment x regularizers of the critics, and SAC alone.

    python benchmarks/lipschitz.py --seeds 0 1 2 3 4                        # everything, what is missing of it
    python benchmarks/lipschitz.py --models none probabilistic ensemble --regularizers none robust --seeds 0 1 2

Presets "fast", runs and results as in `benchmarks/learning.py`: a run whose file exists is not repeated.
"""

from __future__ import annotations

from pathlib import Path

import learning
import tyro

MODELS = {
    "none": "model=none",
    "deterministic": "model=deterministic",
    "probabilistic": "model=probabilistic",
    "flow": "model=flow",
    "langevin": "model=langevin",
    "ensemble": "model=probabilistic,members=7,elites=5",
}
REGULARIZERS = ("none", "robust", "spectral")


def main(
    envs: tuple[str, ...] = ("Hopper-v5",),
    models: tuple[str, ...] = tuple(MODELS),
    regularizers: tuple[str, ...] = REGULARIZERS,
    seeds: tuple[int, ...] = (0, 1, 2),
    total_timesteps: int = 30_000,
    gradient_steps: int = 10,
    jobs: int = 2,
    table_only: bool = False,
    figure: Path = Path("docs/figures/lipschitz.png"),
) -> None:
    """Run what is missing, print the table and draw the learning curves.

    Args:
        envs: environment ids.
        models: of MODELS; none is SAC alone, which is run without a regularizer only.
        regularizers: of REGULARIZERS.
        seeds: one run each.
        total_timesteps: length of a run, in environment steps.
        gradient_steps: updates per environment step.
        jobs: runs at a time, one thread each.
        table_only: only read the kept results.
        figure: where the learning curves are drawn.
    """
    arms = []
    for model in models:
        for regularizer in regularizers if model != "none" else ("none",):
            arm = f"mbpo:{MODELS[model]},regularizer={regularizer},gradient_steps={gradient_steps}"
            label = f"{model} model, {regularizer}" if model != "none" else "SAC alone"
            learning.LABELS[arm] = label
            arms.append(arm)
    learning.main(envs, tuple(arms), seeds, total_timesteps, jobs, table_only, figure)


if __name__ == "__main__":
    tyro.cli(main)
