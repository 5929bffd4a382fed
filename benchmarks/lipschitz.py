r"""Models of the environment x regularizers of the critics x steps of value gradients, and SAC alone.

    python benchmarks/lipschitz.py --seeds 0 1 2 3 4         # the grid of value gradients, what is missing of it
    python benchmarks/lipschitz.py --models single --regularizers none robust --horizons 5 --seeds 0 1 2 3 4
    python benchmarks/lipschitz.py --models single --regularizers none --horizons 5 --seeds 0 1 \
        --total-timesteps 100000 --envs HalfCheetah-v5 Walker2d-v5 Ant-v5 Humanoid-v5
    python benchmarks/lipschitz.py --horizons --seeds 0 1 2  # SAC alone and on model rollouts (arXiv 2302.01244)

The last command, without horizons, is the only one that runs SAC alone and MBPO's models. Presets "standard" (value
gradients; 0 steps: SAC on the same rollouts) and "fast" (MBPO). Runs and results as in `benchmarks/learning.py`: a run
whose file exists is not repeated, one that was interrupted goes on. The tables go into docs/lipschitz_mbpo.md, the
learning curves into figures beside it. Neither is replaced where the page shows a task that was not asked for, or where
a new table has no rows.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping, Sequence
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
VALUE_GRADIENT_MODELS = {
    "single": "",
    "3 members": "members=3,elites=3",
    "8 members": "members=8,elites=8",
    "8 snapshots": "snapshots=8",
    "flow": "model=flow",
    "langevin": "model=langevin",
}
HORIZONS = (0, 1, 3, 5)
RECORDED = {
    "value-gradient:observation_noise=0.05": "H = 5, single, none, float32",
    "value-gradient": "H = 5, single, none, former preset",
    "value-gradient:regularizer=robust": "H = 5, single, robust, former preset",
}
"""Shown, not run again: in float32; and from before `observation_noise` and statistics that settle with the rate."""
FIGURE = ROOT / "docs" / "figures" / "lipschitz.png"
SHORT = 30_000
"""Steps of the comparison; longer runs have parts of the page of their own."""
NOISE = {
    "value-gradient:observation_noise=0.05": "none",
    "value-gradient:observation_noise=0.05,late_noise=1e-5": "1e-5",
}
"""Arms of `learning` and the temperature of the Langevin noise on the actor's weights in the last part of a run."""


def check(envs: Sequence[str], models: Sequence[str], regularizers: Sequence[str], horizons: Sequence[int]) -> None:
    """Raise ValueError if there is nothing to compare, or a name is not known."""
    if not envs:
        raise ValueError("envs: got none, expected at least one environment id")
    if not regularizers:
        raise ValueError(f"regularizers: got an empty list, expected at least one of {', '.join(REGULARIZERS)}")
    known = VALUE_GRADIENT_MODELS if horizons else MODELS
    hint = "; SAC alone (none) and MBPO's models need --horizons empty" if horizons else " where --horizons is empty"
    for name, given, expected, remark in (
        ("models", models, known, hint), ("regularizers", regularizers, REGULARIZERS, ""),
    ):  # fmt: skip
        if unknown := [each for each in given if each not in expected]:
            raise ValueError(f"{name}: got {', '.join(unknown)}, expected some of {', '.join(expected)}{remark}")


def value_gradient_arms(
    models: tuple[str, ...], regularizers: tuple[str, ...], horizons: tuple[int, ...]
) -> dict[str, str]:
    """Arms of `learning` and what they are called; the noise on observations is the preset's, products in bfloat16."""
    labels = {}
    for horizon in horizons:
        for model in models:
            for regularizer in regularizers:
                given = [f"observation_noise={0.05 if horizon else 0}"]
                given += [f"value_gradient={horizon}"] * (horizon != 5) + [VALUE_GRADIENT_MODELS[model]]
                given += [f"regularizer={regularizer}"] * (regularizer != "none") + ["precision=bfloat16"]
                arm = f"value-gradient:{','.join(filter(None, given))}"
                labels[arm] = f"H = {horizon}, {model}, {regularizer}, bfloat16"
    return labels


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
    rows = []
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
        rows.append(cells)
    return markdown(env, total_timesteps, columns, rows)


def averages(env: str, total_timesteps: int) -> str:
    """Markdown: policies with and without the average of their weights, after the last step and shortly before it."""
    columns = ["noise", "weights", "final IQM [95 %]", "each seed", "spread of ten looks", "lowest look of each seed"]
    rows = []
    for arm, noise in NOISE.items():
        kept = learning.load(env, arm, total_timesteps)
        weights = (("average", "averaged", "deterministic"), ("last", "last", "last weights"))
        for name, late, mode in weights if kept else ():
            final = [np.mean(r["evaluation"][mode]["returns"]) for r in kept]
            looks = [[look[late] for look in r["late"]] for r in kept]
            spread = statistics.median(np.std(each) for each in looks)
            cells = [noise, name, learning.interval(np.array(final)), ", ".join(f"{each:.0f}" for each in final)]
            cells += [f"{spread:.0f}", ", ".join(f"{min(each):.0f}" for each in looks)]
            rows.append(cells)
    return markdown(env, total_timesteps, columns, rows)


def markdown(env: str, total_timesteps: int, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of one task."""
    lines = [f"| {' | '.join(cells)} |" for cells in (columns, *rows)]
    return "\n".join([f"{env}, {total_timesteps:,} steps:", "", lines[0], "|---" * len(columns) + "|", *lines[1:], ""])


def publish(page: Path, mark: str, tables: Mapping[str, str]) -> bool:
    """Print tables by their task and put them into a part of the page, unless that loses a table; whether it did."""
    text = "\n".join(tables.values())
    print(text)
    part = page.read_text().partition(f"<!-- {mark} -->\n")[2].partition(f"<!-- /{mark} -->")[0]
    lost = [env for env in re.findall(r"^(\S+), [\d,]+ steps:$", part, re.MULTILINE) if env not in tables]
    empty = [env for env, each in tables.items() if each.count("\n| ") < 2]  # but for the head
    reasons = [f"it shows {', '.join(lost)}, not among the given envs"] * bool(lost)
    reasons += [f"there are no results of {', '.join(empty)}"] * bool(empty)
    if reasons:
        print(f"{page}, part {mark!r}, is left as it is: {'; '.join(reasons)}")
    else:
        learning.write_between(page, mark, text)
    return not reasons


def main(
    envs: tuple[str, ...] = ("Hopper-v5",),
    models: tuple[str, ...] = (),
    regularizers: tuple[str, ...] = REGULARIZERS,
    seeds: tuple[int, ...] = (0, 1, 2),
    horizons: tuple[int, ...] = HORIZONS,
    total_timesteps: int = SHORT,
    gradient_steps: int = 10,
    jobs: int = 2,
    table_only: bool = False,
    page: Path = ROOT / "docs" / "lipschitz_mbpo.md",
    figure: Path = FIGURE,
) -> None:
    """Run what is missing, write the table and draw the learning curves.

    Args:
        envs: environment ids.
        models: of VALUE_GRADIENT_MODELS, or without horizons of MODELS; none is SAC alone, which is run without a
            regularizer only. By default all of them.
        regularizers: of REGULARIZERS.
        seeds: one run each; the table shows all that are kept.
        horizons: steps of value gradients; none: SAC on model rollouts by the preset fast.
        total_timesteps: length of a run, in environment steps.
        gradient_steps: updates per environment step, by the preset fast.
        jobs: runs at a time, one thread each.
        table_only: only read the kept results.
        page: whose marked part is replaced, if it shows no other environments and every new table has rows.
        figure: where the learning curves are drawn; the page's own are left as they are where its table is.

    Raises:
        ValueError: if there is nothing to compare, or a model or regularizer is not known.
    """
    check(envs, models, regularizers, horizons)
    labels = (
        value_gradient_arms(models or tuple(VALUE_GRADIENT_MODELS), regularizers, horizons)
        if horizons
        else arms(models or tuple(MODELS), regularizers, gradient_steps)
    )
    if not table_only:
        runs = [learning_arms.Run(env, arm, seed, total_timesteps) for seed in seeds for env in envs for arm in labels]
        learning.run_missing(runs, jobs)
    if horizons:
        labels |= RECORDED
    name = "value gradients" if horizons else "models"
    mark = name if total_timesteps == SHORT else f"{name}, {total_timesteps} steps"
    replaced = publish(page, mark, {env: table(env, labels, total_timesteps) for env in envs})
    if horizons and total_timesteps == SHORT:
        publish(page, "averages", {env: averages(env, total_timesteps) for env in envs})
    if not replaced and figure == FIGURE:
        return
    learning_arms.LABELS |= labels
    stem = "value_gradients" if horizons else figure.stem
    picture = figure.with_stem(stem if total_timesteps == SHORT else f"{stem}_{total_timesteps}")
    learning.plot(envs, tuple(labels), total_timesteps, picture)


if __name__ == "__main__":
    tyro.cli(main)
