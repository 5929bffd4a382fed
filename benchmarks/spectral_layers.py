"""Bounding one hidden layer of the critics or all of them (Gogianu et al., arXiv 2105.05246): docs/lipschitz_mbpo.md.

    OMP_NUM_THREADS=1 python benchmarks/spectral_layers.py

SAC alone on Pendulum-v1, three seeds an arm: deterministic return at the end, and how smooth the critics are. Takes
three minutes.
"""

from __future__ import annotations

from typing import Any

import torch
import tyro
from stable_baselines3.common.evaluation import evaluate_policy

from driftrl import LipschitzMBPO
from driftrl.envs import make_vec

ARMS: dict[str, dict[str, Any]] = {
    "no bound": {"regularizer": "none"},
    "all hidden layers, bound 1": {"regularizer": "spectral", "spectral_bound": 1.0},
    "the last hidden layer, bound 1": {"regularizer": "spectral", "spectral_bound": 1.0, "spectral_layers": "last"},
}


def main(total_timesteps: int = 4000, seeds: tuple[int, ...] = (0, 1, 2)) -> None:
    """Train and print the table.

    Args:
        total_timesteps: of each run.
        seeds: of each arm.
    """
    torch.set_num_threads(1)
    print("| critics | return | slope of Q | product of spectral norms |\n|---|---|---|---|")
    for name, fields in ARMS.items():
        columns: list[tuple[float, ...]] = []
        for seed in seeds:
            agent = LipschitzMBPO(
                "MlpPolicy", make_vec("Pendulum-v1", 1, seed), model="none", learning_starts=500, gradient_steps=1,
                learning_rate=1e-3, critic_hidden=(128, 128), actor_hidden=(128, 128), compile="off", device="cpu",
                diagnostics_interval=total_timesteps, seed=seed, **fields,
            )  # fmt: skip
            agent.learn(total_timesteps, log_interval=10**6)
            found = agent.logger.name_to_value
            score, _ = evaluate_policy(agent, make_vec("Pendulum-v1", 1, 1000), n_eval_episodes=20)
            assert isinstance(score, float)
            columns.append((score, found["lipschitz/slope"], found["lipschitz/spectral_product"]))
        returns, slopes, products = zip(*columns, strict=True)
        cells = [
            ", ".join(f"{each:.{digits}f}" for each in kind)
            for kind, digits in ((returns, 0), (slopes, 1), (products, 0))
        ]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    tyro.cli(main)
