"""Does it help a model of the environment's step to know how positions follow from velocities?

    OMP_NUM_THREADS=1 python benchmarks/known_kinematics.py

Fits the model of the preset of value gradients to transitions of one sampled policy, without and with `known_step`, and
prints its errors. Takes five minutes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import torch
import tyro
from torch import Tensor

from driftrl import PolicyFlow
from driftrl.agents.lipschitz_mbpo.model import build_model
from driftrl.agents.registry import AGENTS
from driftrl.envs import make_vec

PLACES = {"Hopper-v5": 5, "Walker2d-v5": 8, "HalfCheetah-v5": 8}
"""Positions that the observation begins with; velocities follow, that of the hidden x first."""
STEPS = (1, 5, 20)


class Data(NamedTuple):
    """Transitions in the order in which they were seen."""

    obs: Tensor  # [N, O]
    action: Tensor  # [N, A]
    reward: Tensor  # [N]
    next_obs: Tensor  # [N, O]
    starts: Tensor  # whether an episode begins, bool [N]


def collect(env_id: str, rows: int, learned: int = 150_000) -> Data:
    """Transitions of a policy that has learned for so many steps, sampled."""
    torch.manual_seed(0)
    agent = PolicyFlow("MlpPolicy", make_vec(env_id, 16, 0), n_steps=64, batch_size=128, seed=0, device="cpu")
    agent.learn(learned)
    env, seen = gym.make(env_id), list[tuple[Any, ...]]()
    obs, start = env.reset(seed=1)[0], True
    while len(seen) < rows:
        action, _ = agent.predict(obs.astype(np.float32), deterministic=False)
        next_obs, reward, terminated, truncated, _ = env.step(action)
        seen.append((obs, action, reward, next_obs, start))
        obs, start = next_obs, terminated or truncated
        if start:
            obs = env.reset()[0]
    columns = (torch.as_tensor(np.array(each), dtype=torch.float32) for each in zip(*seen, strict=True))
    state, actions, rewards, after, starts = columns
    return Data(state, actions, rewards, after, starts > 0)


def moved(env_id: str) -> Callable[[Tensor, Tensor], Tensor]:
    """Where velocities lead: position + dt x velocity; velocities as they are."""
    places, dt = PLACES[env_id], gym.make(env_id).unwrapped.dt  # type: ignore[attr-defined]
    return lambda obs, action: torch.cat(
        [obs[:, :places] + dt * obs[:, places + 1 : 2 * places + 1], obs[:, places:]], 1
    )


@torch.no_grad()
def errors(model: Any, data: Data, first: int) -> list[float]:
    """Root mean square error after `STEPS` along real actions, from rows `first` on, in states' deviations."""
    scale, found = data.obs[:first].std(0), []
    for steps in STEPS:
        rows = torch.tensor(
            [i for i in range(first, len(data.obs) - steps) if not data.starts[i + 1 : i + steps].any()]
        )
        obs = data.obs[rows]
        for k in range(steps):
            obs, _ = model.predict(obs, data.action[rows + k])
        error = (obs - data.next_obs[rows + steps - 1]) / scale
        found.append(error.square().mean().sqrt().item())
    return found


def main(fits: int = 2, rows: int = 5000, held_out: int = 2000) -> None:
    """Fit and print a table.

    Args:
        fits: models per task and kind.
        rows: transitions of a fit.
        held_out: transitions on which errors are measured.
    """
    torch.set_num_threads(1)
    print("| task | known | " + " | ".join(f"{k} step{'s' * (k > 1)}" for k in STEPS) + " |\n|---|---|" + "---|" * 3)
    for env_id in PLACES:
        data = collect(env_id, rows + held_out)
        _, config = AGENTS["mbpo"].settings(env_id, "standard")
        for name, known in (("the state", None), ("position + dt x velocity", moved(env_id))):
            table = []
            for seed in range(fits):
                torch.manual_seed(seed)
                model = build_model(config, data.obs.shape[1], data.action.shape[1], False, known)
                head = (part[:rows] for part in data[:4])
                model.fit(*head, generator=torch.Generator().manual_seed(seed), max_epochs=config.model_epochs)
                table.append(errors(model, data, rows))
            cells = [", ".join(f"{each:.3f}" for each in column) for column in zip(*table, strict=True)]
            print(f"| {env_id} | {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    tyro.cli(main)
