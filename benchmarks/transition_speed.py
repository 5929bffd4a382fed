"""Time of a batched ensemble of dynamics models against separate networks, and against a single one.

    OMP_NUM_THREADS=1 python benchmarks/transition_speed.py --output benchmarks/results/transition_speed.json

They take turns in one process, at the sizes of Hopper. "separate" is as many single models as the ensemble has members
or elites: a gradient step of each, and each row of a sample given to one of them. Ratios round by round: median and
quartiles. The flow and the SDE stand beside them, with their default networks.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import tyro
from paired import machine, ratio, spread, take_turns, write
from torch import Tensor

from driftrl.dynamics.flow_transition import FlowTransition
from driftrl.dynamics.langevin_transition import LangevinTransition
from driftrl.dynamics.transition import GaussianTransition
from driftrl.dynamics.transition_base import TransitionModel


def main(
    obs_dim: int = 11,
    action_dim: int = 3,
    members: int = 7,
    elites: int = 5,
    batch_size: int = 256,
    samples: tuple[int, ...] = (400, 5000, 20000),
    rounds: int = 31,
    output: Path | None = None,
) -> None:
    """Print the table.

    Args:
        obs_dim: size of an observation.
        action_dim: size of an action.
        members: of the ensemble.
        elites: of the ensemble.
        batch_size: rows of a gradient step, per member.
        samples: rows of a call of `sample`.
        rounds: turns of each contender.
        output: also write the figures there, as JSON.
    """
    torch.set_num_threads(1)
    report: dict[str, Any] = {"machine": machine("torch"), "members": members, "elites": elites, "rows": []}
    print(report["machine"])
    models: dict[str, TransitionModel] = {
        "ensemble": GaussianTransition(obs_dim, action_dim, members=members, elites=elites),
        "single": GaussianTransition(obs_dim, action_dim),
        "flow": FlowTransition(obs_dim, action_dim),
        "langevin": LangevinTransition(obs_dim, action_dim),
    }
    separate: list[TransitionModel] = [GaussianTransition(obs_dim, action_dim) for _ in range(members)]
    generator = torch.Generator().manual_seed(0)
    steps = {name: step_of([model], batch_size, generator) for name, model in models.items()}
    parts = {f"gradient step, {batch_size} rows": steps | {"separate": step_of(separate, batch_size, generator)}}
    for rows in samples:
        obs, action = torch.randn(rows, obs_dim), torch.rand(rows, action_dim)
        turns = {name: sample_of([model], obs, action, generator) for name, model in models.items()}
        turns["separate"] = sample_of(separate[:elites], obs, action, generator)
        parts[f"sample of {rows} rows"] = turns
    print("| what | contender | median ms | separate / it | it / single |")
    print("|---|---|---|---|---|")
    for what, contenders in parts.items():
        seconds = take_turns(contenders, rounds, warmup=3)
        for name, values in seconds.items():
            row = {"what": what, "contender": name, "ms": 1e3 * spread(values).median}
            row |= {
                "separate_over": ratio(seconds["separate"], values),
                "over_single": ratio(values, seconds["single"]),
            }
            report["rows"].append(row)
            print(f"| {what} | {name} | {row['ms']:.2f} | {row['separate_over']} | {row['over_single']} |", flush=True)
    write(output, report)


def step_of(models: list[TransitionModel], rows: int, generator: torch.Generator) -> Callable[[], None]:
    """A gradient step of each model, as `fit` makes it."""
    members, inputs = models[0].members, models[0].obs_dim + models[0].action_dim
    x, y = torch.randn(members, rows, inputs), torch.randn(members, rows, 1 + models[0].obs_dim)

    def turn() -> None:
        for model in models:
            loss = model._loss(x, y, model._noise(x, generator)).sum()
            model.optimizer.zero_grad()
            loss.backward()
            model.optimizer.step()

    return turn


def sample_of(
    models: list[TransitionModel], obs: Tensor, action: Tensor, generator: torch.Generator
) -> Callable[[], None]:
    """A sample for all rows: each row from one of the models, drawn at random."""

    def turn() -> None:
        if len(models) == 1:
            models[0].sample(obs, action, generator)
            return
        chosen = torch.randint(len(models), (len(obs),), generator=generator)
        next_obs = torch.empty_like(obs)
        for k, model in enumerate(models):
            rows = (chosen == k).nonzero()[:, 0]
            next_obs[rows] = model.sample(obs[rows], action[rows], generator)[0]

    return turn


if __name__ == "__main__":
    tyro.cli(main)
