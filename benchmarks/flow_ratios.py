"""All importance ratios of flow policies, and Gaussian PPO, on one code base: four tasks, equal steps, equal tuning.

    python benchmarks/flow_ratios.py --seeds 0 1 2            # what is missing, then the tables and figures
    python benchmarks/flow_ratios.py --table-only             # tables and figures from the kept results

Every ratio runs with PolicyFlow's preset of the task. Each setting of `grid` is tried once, at half the length, with
TUNING_SEED; the one of the highest return of the sampled policy is run with the seeds that are reported. Runs and
results as in `benchmarks/learning.py`: a run whose file exists is not repeated. The tables go into docs/flow_ratios.md.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import learning
import learning_arms
import numpy as np
import tyro

from driftrl.analysis.multimodality import has_several_solutions
from driftrl.analysis.statistics import interquartile_mean

ROOT = Path(__file__).parents[1]
STEPS = {
    "driftrl/MultiGoal-v0": 1_200_000,  # its preset takes 8,000,000
    "driftrl/SoftMultiGoal-v0": 600_000,  # half of what its preset takes
    "HalfCheetah-v5": 200_000,
    "Hopper-v5": 200_000,
}
# MultiGoal's preset as it was when all ratios were compared.
EARLIER = {"driftrl/MultiGoal-v0": ",transport_coef=0,n_envs=1024,batch_size=4096"}
FPO_STD = 0.1  # FPO's ratios cannot shrink the action noise: it is small, and the flow explores, as in its papers
ARMS = {
    "interpolation": "ratio=interpolation",
    "endpoint": "ratio=endpoint",
    "adjoint": "ratio=adjoint",
    "marginal": "ratio=marginal",
    "chain": "ratio=chain",
    "chain_steps": "ratio=chain_steps",
    "fpo": "ratio=fpo,base=standard",
    "fpo++": "ratio=fpo++,base=standard",
    # Plain PPO. The goal tasks' regularizers spread the flow, of which there is none; the score would widen its noise.
    "gaussian": "ratio=endpoint,base=standard,base_std=0,brownian_coef=0,target_entropy=null",
}
TUNING_SEED = 100
BIAS_TASKS = ("driftrl/MultiGoal-v0", "HalfCheetah-v5")
BIAS = {
    "flow/ratio_correlation": "correlation with the exact log-ratio",
    "flow/ratio_error": "error over the exact log-ratio, RMS",
    "train/clip_fraction": "clipped",
    "flow/exact_clip_fraction": "clipped by the exact ratio",
}


def grid(env: str) -> tuple[str, ...]:
    """What is tried for every ratio on a task; the KL is what an adaptive learning rate aims at."""
    _, config = learning_arms.preset(env)
    rate = "" if config.lr_schedule == "adaptive" else "lr_schedule=adaptive,"
    return tuple(f"{rate}desired_kl={kl},clip_range={clip}" for kl, clip in ((0.01, 0.2), (0.02, 0.2), (0.01, 0.1)))


def setting(env: str, ratio: str, values: str) -> str:
    """The arm of `learning.py` that is this ratio with these values of the grid.

    All ratios explore as much at first. A chain has noise at each of its K steps: a K-th of the variance each. FPO's
    flow has the variance that others have in base and action noise together.
    """
    _, config = learning_arms.preset(env)
    noise = ""
    if ratio.startswith("chain"):
        noise = f",action_std={config.action_std / math.sqrt(config.solver_steps):.3g}"
    elif ratio.startswith("fpo"):
        base_std = math.sqrt(config.base_std**2 + config.action_std**2 - FPO_STD**2)
        noise = f",base_std={base_std:.3g},action_std={FPO_STD}"
    return f"policyflow:{ARMS[ratio]}{noise},{values}{EARLIER.get(env, '')}"


def score(result: dict[str, Any]) -> float:
    """What tuning looks at: the mean return of the sampled policy, which is the one that all ratios train."""
    return float(np.mean(result["evaluation"]["sampled"]["returns"]))


def tuned(env: str, ratio: str) -> str | None:
    """The values of the grid with the best run; None until all of them have been tried."""
    tried: dict[str, float] = {}
    for values in grid(env):
        for result in learning.load(env, setting(env, ratio, values), STEPS[env] // 2):
            tried[values] = score(result)
    return max(tried, key=lambda values: tried[values]) if len(tried) == len(grid(env)) else None


def results(env: str, ratio: str) -> list[dict[str, Any]]:
    """All kept results of a ratio as it was tuned."""
    chosen = tuned(env, ratio)
    return learning.load(env, setting(env, ratio, chosen), STEPS[env]) if chosen else []


def table(env: str, ratios: Sequence[str]) -> list[str]:
    """Markdown lines: IQM over seeds with a 95 % bootstrap interval, every seed, cost, and goals where there are."""
    goals = has_several_solutions(env)
    columns = ["ratio", "KL, clip range", "sampled IQM [95 %]", "each seed", "deterministic"]
    columns += ["reached", "goals found", "entropy, bits"] if goals else []
    columns.append("CPU s per run")
    lines = [f"{env}, {STEPS[env]:,} steps:", "", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for ratio in ratios:
        kept = results(env, ratio)
        if not kept:
            continue
        scores = np.array([score(r) for r in kept])
        digits = 0 if np.abs(scores).max() >= 100 else 1
        other = interquartile_mean(np.array([np.mean(r["evaluation"]["deterministic"]["returns"]) for r in kept]))
        cells = [
            f"`{ratio}`",
            f"{kept[0]['settings']['desired_kl']}, {kept[0]['settings']['clip_range']}",
            learning.interval(scores, digits),
            ", ".join(f"{value:.{digits}f}" for value in scores),
            f"{other:.{digits}f}",
        ]
        if goals:
            found = [r["evaluation"]["sampled"]["multimodality"] for r in kept]
            cells.append(", ".join(f"{f['reached']:.0%}" for f in found))
            cells.append(", ".join(str(f["goals_found"]) for f in found))
            cells.append(", ".join(f"{f['entropy_bits']:.2f}" for f in found))
        cells.append(f"{np.median([r['cpu_seconds'] for r in kept]):.0f}")
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


def bias_table(ratios: Sequence[str]) -> list[str]:
    """Markdown lines: the measurements against the exact ratio in the first, middle and last third of training."""
    lines = ["| task | ratio | " + " | ".join(BIAS.values()) + " |", "|---|---" + "|---" * len(BIAS) + "|"]
    for env in BIAS_TASKS:
        for ratio in ratios:
            kept = results(env, ratio)
            if not kept:
                continue
            cells = []
            for name in BIAS:
                thirds = zip(*(np.array_split([value for _, value in r["logged"][name]], 3) for r in kept), strict=True)
                cells.append(", ".join(f"{np.mean(np.concatenate(third)):.2f}" for third in thirds))
            lines.append(f"| {env} | `{ratio}` | {' | '.join(cells)} |")
    return [*lines, ""]


def plot_bias(ratios: Sequence[str], path: Path) -> None:
    """The measurements of `BIAS` over training, mean over seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(len(BIAS_TASKS), len(BIAS), figsize=(16, 6.5), squeeze=False, layout="constrained")
    for row, env in zip(axes, BIAS_TASKS, strict=True):
        for axis, (name, label) in zip(row, BIAS.items(), strict=True):
            for i, ratio in enumerate(ratios):
                if kept := results(env, ratio):
                    series = np.mean([r["logged"][name] for r in kept], axis=0)
                    axis.plot(series[:, 0] / 1e3, series[:, 1], color=f"C{i}", label=ratio)
            axis.set(title=f"{env}: {label}", xlabel="thousand environment steps")
            axis.title.set_fontsize(9)
            axis.grid(alpha=0.3)
        row[1].set_yscale("log")
    axes[0][0].legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main(
    envs: tuple[str, ...] = tuple(STEPS),
    ratios: tuple[str, ...] = tuple(ARMS),
    seeds: tuple[int, ...] = (0, 1, 2),
    jobs: int = 2,
    table_only: bool = False,
    page: Path = ROOT / "docs" / "flow_ratios.md",
    figures: Path = ROOT / "docs" / "figures",
) -> None:
    """Tune, run what is missing, write the tables and draw the figures.

    Args:
        envs: of STEPS.
        ratios: of ARMS.
        seeds: one run each, beside those of the tuning; the tables show all that are kept.
        jobs: runs at a time, one thread each.
        table_only: only read the kept results.
        page: whose marked parts are replaced.
        figures: folder of the figures.
    """
    for env in envs if not table_only else ():
        tuning = [
            learning_arms.Run(env, setting(env, r, v), TUNING_SEED, STEPS[env] // 2) for r in ratios for v in grid(env)
        ]
        learning.run_missing(tuning, jobs)
        best = {r: values for r in ratios if (values := tuned(env, r))}
        runs = [learning_arms.Run(env, setting(env, r, v), seed, STEPS[env]) for seed in seeds for r, v in best.items()]
        learning.run_missing(runs, jobs)

    text = "\n".join(line for env in envs for line in table(env, ratios))
    print(text)
    learning.write_between(page, "tasks", text)
    inexact = tuple(ratio for ratio in ratios if ratio not in ("endpoint", "gaussian"))
    learning.write_between(page, "bias", "\n".join(bias_table(inexact)))
    plot_bias(inexact, figures / "ratio_bias.png")
    labels = {setting(env, r, values): r for env in envs for r in ratios if (values := tuned(env, r))}
    learning_arms.LABELS |= labels
    learning.plot(envs, tuple(labels), STEPS, figures / "flow_ratios.png", columns=2)


if __name__ == "__main__":
    tyro.cli(main)
