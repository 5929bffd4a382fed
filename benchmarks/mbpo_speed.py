"""Gradient updates: our SAC and LipschitzMBPO against Stable-Baselines3's SAC, batch 256, two layers of 256.

    OMP_NUM_THREADS=1 python benchmarks/mbpo_speed.py --output benchmarks/results/mbpo_speed.json

Contenders take turns; medians [quartiles] of the ratios. Models against ensembles: benchmarks/transition_speed.py.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import tyro
from paired import machine, ratio, spread, take_turns, write
from stable_baselines3 import SAC

from driftrl import LipschitzMBPO
from driftrl.envs import make_vec

CONTENDERS: dict[str, dict[str, Any]] = {
    "SAC": {"regularizer": "none"},
    "robust, (pi, a)": {"regularizer": "robust"},
    "robust, (a, a)": {"regularizer": "robust", "pairing": "same_action"},
    "spectral": {"regularizer": "spectral"},
}
BASELINE = "Stable-Baselines3 SAC"


def main(env_id: str = "Hopper-v5", updates: int = 20, rounds: int = 11, output: Path | None = None) -> None:
    """Print the table.

    Args:
        env_id: whose sizes the networks have.
        updates: in a turn; of LipschitzMBPO those of one environment step.
        rounds: turns of each contender.
        output: also write the figures there, as JSON.
    """
    torch.set_num_threads(1)
    env = make_vec(env_id, 1, seed=0)
    baseline = SAC("MlpPolicy", env, learning_starts=300, device="cpu", seed=0)
    baseline.learn(310)
    contenders: dict[str, Callable[[], object]] = {BASELINE: partial(baseline.train, updates, 256)}
    for name, fields in CONTENDERS.items():
        for compile in ("off", "on"):
            agent = LipschitzMBPO(
                "MlpPolicy", env, model="none", learning_starts=300, gradient_steps=1, compile=compile,
                diagnostics_interval=0, device="cpu", seed=0, **fields,
            ).learn(310)  # fmt: skip
            contenders[f"{name}, {'compiled' if compile == 'on' else 'eager'}"] = partial(agent.train, updates, 256)
    seconds = take_turns(contenders, rounds)
    report: dict[str, Any] = {"machine": machine("torch", "stable-baselines3", "numpy"), "env_id": env_id, "rows": {}}
    print(report["machine"])
    print(f"| contender | ms per update | updates/s over {BASELINE}'s |")
    print("|---|---|---|")
    for name, times in seconds.items():
        row = {"ms": 1e3 * spread(times).median / updates, "speed": ratio(seconds[BASELINE], times)}
        report["rows"][name] = row
        print(f"| {name} | {row['ms']:.2f} | {row['speed']} |")
    write(output, report)


if __name__ == "__main__":
    tyro.cli(main)
