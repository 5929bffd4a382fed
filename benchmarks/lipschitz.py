"""The comparison of arXiv 2302.01244: models of the environment x regularizers of the critics, and SAC alone.

    python benchmarks/lipschitz.py --seeds 0 1 2 3 4                        # everything, what is missing of it
    python benchmarks/lipschitz.py --models none probabilistic ensemble --regularizers none robust --seeds 0 1 2

Presets "fast", runs and results as in `benchmarks/learning.py`: a run whose file exists is not repeated. The table goes
into docs/lipschitz_mbpo.md, the learning curves into a figure beside it.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path

import learning
import learning_arms
import numpy as np
import tyro

ROOT = Path(__file__).resolve().parent.parent

MODELS = {
    "none": "model=none",
    "deterministic": "model=deterministic",
    "probabilistic": "model=probabilistic",
    "flow": "model=flow",
    "langevin": "model=langevin",
    "ensemble": "model=probabilistic,members=7,elites=5",
}
REGULARIZERS = ("none", "robust", "spectral")


def arms(models: tuple[str, ...], regularizers: tuple[str, ...], gradient_steps: int) -> dict[str, str]:
    """Arms of `learning` and what they are called."""
    labels = {}
    for model in models:
        for regularizer in regularizers if model != "none" else ("none",):
            arm = f"mbpo:{MODELS[model]},regularizer={regularizer},gradient_steps={gradient_steps}"
            labels[arm] = f"{model}, {regularizer}" if model != "none" else "SAC alone"
    return labels


def table(env: str, labels: Mapping[str, str], total_timesteps: int) -> str:
    """Markdown: the last 100 training episodes and the final deterministic policy, IQM over seeds and every seed."""
    columns = [
        "model, regularizer",
        "training IQM [95 %]",
        "each seed",
        "final IQM [95 %]",
        "each seed",
        "CPU s per run",
    ]
    lines = [f"{env}, {total_timesteps:,} steps:", "", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for arm, label in labels.items():
        kept = learning.load(env, arm, total_timesteps)
        if not kept:
            continue
        cells = [label]
        training = [r["curve"][-1][1] for r in kept]
        final = [np.mean(r["evaluation"]["deterministic"]["returns"]) for r in kept]
        for scores in (training, final):
            cells += [learning.interval(np.array(scores)), ", ".join(f"{score:.0f}" for score in scores)]
        cells.append(f"{statistics.median(r['cpu_seconds'] for r in kept):.0f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def main(
    envs: tuple[str, ...] = ("Hopper-v5",),
    models: tuple[str, ...] = tuple(MODELS),
    regularizers: tuple[str, ...] = REGULARIZERS,
    seeds: tuple[int, ...] = (0, 1, 2),
    total_timesteps: int = 30_000,
    gradient_steps: int = 10,
    jobs: int = 2,
    table_only: bool = False,
    page: Path = ROOT / "docs" / "lipschitz_mbpo.md",
    figure: Path = ROOT / "docs" / "figures" / "lipschitz.png",
) -> None:
    """Run what is missing, write the table and draw the learning curves.

    Args:
        envs: environment ids.
        models: of MODELS; none is SAC alone, which is run without a regularizer only.
        regularizers: of REGULARIZERS.
        seeds: one run each; the table shows all that are kept.
        total_timesteps: length of a run, in environment steps.
        gradient_steps: updates per environment step.
        jobs: runs at a time, one thread each.
        table_only: only read the kept results.
        page: whose marked part is replaced.
        figure: where the learning curves are drawn.
    """
    labels = arms(models, regularizers, gradient_steps)
    if not table_only:
        runs = [learning_arms.Run(env, arm, seed, total_timesteps) for seed in seeds for env in envs for arm in labels]
        learning.run_missing(runs, jobs)
    text = "\n".join(table(env, labels, total_timesteps) for env in envs)
    print(text)
    learning.write_between(page, "models", text)
    learning_arms.LABELS |= labels
    learning.plot(envs, tuple(labels), total_timesteps, figure)


if __name__ == "__main__":
    tyro.cli(main)
