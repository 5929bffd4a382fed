"""How much MultiGoal's return cares where a policy divides its goals, and how much the entropy of the goals does.

    python benchmarks/multigoal_centre.py RUN_OR_FILE...

A trained policy is shown positions p + d exp(-|p|^2 / (2 WIDTH^2)) in place of p: near the origin its map of actions is
moved by -d, elsewhere it stays. Against the policy as it is, with the same random numbers: the discounted return of
training from starts within NEAR of the origin (50 steps; 6.4 % of the task's starts), and, as `evaluate.py` measures
it, the entropy of the goals reached from the origin. Eight directions of d; the error is that of one direction.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
import tyro
from numpy.typing import NDArray
from paired import write
from stable_baselines3.common.type_aliases import PolicyPredictor

from driftrl.analysis.multimodality import multimodality
from driftrl.envs.multigoal import GOAL_TASKS
from driftrl.runs.folder import load_agent

TASK_ID = "driftrl/MultiGoal-v0"
WIDTH, NEAR = 1.5, 2.0


class Moved:
    """A policy whose map of actions is moved near the origin by -shift, [2]."""

    def __init__(self, policy: PolicyPredictor, shift: NDArray[Any]) -> None:
        self.policy, self.shift = policy, shift

    def predict(
        self, observation: NDArray[Any], state: Any = None, episode_start: Any = None, deterministic: bool = False
    ) -> Any:
        """As the policy, at positions that are moved."""
        moved = observation.copy()
        distance = np.square(observation[:, :2]).sum(axis=1, keepdims=True)
        moved[:, :2] += self.shift * np.exp(-distance / (2 * WIDTH**2))
        return self.policy.predict(moved, deterministic=deterministic)


def near_returns(policy: Any, number: int, gamma: float) -> NDArray[Any]:
    """Discounted returns [number] of the sampled policy from starts at rest, uniform within NEAR of the origin."""
    task, rng = GOAL_TASKS[TASK_ID], np.random.default_rng(0)
    torch.manual_seed(0)
    radius, angle = NEAR * np.sqrt(rng.uniform(size=number)), rng.uniform(0, 2 * np.pi, number)
    state = task.at_rest(np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1))
    returns, alive = np.zeros(number), np.ones(number, dtype=bool)
    steps = gym.spec(TASK_ID).max_episode_steps
    assert steps is not None
    for step in range(steps):
        action, _ = policy.predict(state.astype(np.float32), deterministic=False)
        state, reward, terminated = task.step(state, action.astype(np.float64))
        returns += gamma**step * alive * reward
        alive &= ~terminated
    return returns


def goal_bits(policy: Any) -> float:
    """Entropy of the goals that the sampled policy reaches from the origin, bits."""
    torch.manual_seed(0)
    bits: float = multimodality(policy, TASK_ID, {}, (0, 0), 0, deterministic=False)["entropy_bits"]
    return bits


def main(
    runs: tyro.conf.Positional[tuple[Path, ...]], distances: tuple[float, ...] = (0.1, 0.25, 0.5, 0.75),
    number: int = 16_000, output: Path | None = None,
) -> None:  # fmt: skip
    """Print the table.

    Args:
        runs: run folders or saved files.
        distances: by which the map is moved, metres.
        number: starts near the origin.
        output: also write the rows there, as JSON.
    """
    torch.set_num_threads(1)
    rows = []
    print("| run | moved by, m | return: mean and best of 8 directions | bits: mean, lowest, highest |")
    print("|---|---|---|---|")
    for index, run in enumerate(runs):
        agent = load_agent(run, "cpu")
        policy, gamma = agent.policy, agent.gamma
        before = near_returns(policy, number, gamma)
        bits = [goal_bits(policy)]
        print(f"| {index} | 0 | {before.mean():.3f} | {bits[0]:.2f} |", flush=True)
        rows.append({"run": index, "distance": 0.0, "near_return": float(before.mean()), "bits": bits})
        for distance in distances:
            angles = np.pi / 4 * np.arange(8)
            moved = [Moved(policy, distance * np.array([np.cos(angle), np.sin(angle)])) for angle in angles]
            changes = np.array([near_returns(other, number, gamma) - before for other in moved])  # [8, number]
            change = changes.mean(axis=1) / before.mean()
            error = changes.std(axis=1).mean() / np.sqrt(number) / before.mean()
            bits = [goal_bits(other) for other in moved]
            cells = [f"{change.mean():.2%}, {change.max():.2%} (+- {error:.2%})"]
            cells.append(f"{np.mean(bits):.2f}, {min(bits):.2f}, {max(bits):.2f}")
            print(f"| {index} | {distance:g} | {' | '.join(cells)} |", flush=True)
            rows.append({"run": index, "distance": distance, "change": change.tolist(), "error": error, "bits": bits})
    write(output, rows)


if __name__ == "__main__":
    tyro.cli(main)
