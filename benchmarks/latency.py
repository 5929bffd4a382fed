"""Time of `predict` for one observation on a CPU: PolicyFlow against Stable-Baselines3's PPO.

    OMP_NUM_THREADS=1 python benchmarks/latency.py --output benchmarks/results/latency.json

The two take turns in one process, a block of calls at a time. Same widths and activation. What a control loop waits for
is the 99th percentile of single calls; the ratio is our time over PPO's, block by block: median and quartiles.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from paired import machine, ratio, take_turns, write
from stable_baselines3 import PPO
from torch import nn

from driftrl import PolicyFlow


def main(
    env_id: str = "HalfCheetah-v5",
    widths: tuple[int, ...] = (64, 128, 256),
    solver_steps: tuple[int, ...] = (1, 2, 4),
    calls: int = 200,
    rounds: int = 31,
    output: Path | None = None,
) -> None:
    """Print the table.

    Args:
        env_id: Gymnasium id.
        widths: of both hidden layers.
        solver_steps: Euler steps of the flow.
        calls: calls in a block.
        rounds: blocks of each contender.
        output: also write the figures there, as JSON.
    """
    torch.set_num_threads(1)
    report: dict[str, Any] = {"machine": machine("torch", "stable-baselines3", "numpy"), "env_id": env_id, "rows": []}
    print(report["machine"])
    print("| width | mode | agent | median us | 99 % us | time / PPO's |")
    print("|---|---|---|---|---|---|")
    for width in widths:
        agents: dict[str, Any] = {
            "PPO": PPO(
                "MlpPolicy", env_id, policy_kwargs={"net_arch": [width, width], "activation_fn": nn.SiLU}, device="cpu"
            )
        }
        for steps in solver_steps:
            agents[f"PolicyFlow, {steps} Euler steps"] = PolicyFlow(
                "MlpPolicy", env_id, actor_hidden=(width, width), solver_steps=steps, device="cpu"
            )
        obs = agents["PPO"].observation_space.sample()
        for deterministic in (True, False):
            single: dict[str, list[float]] = {name: [] for name in agents}
            blocks = {
                name: partial(block, partial(agent.predict, obs, deterministic=deterministic), calls, single[name])
                for name, agent in agents.items()
            }
            seconds = take_turns(blocks, rounds)
            mode = "deterministic" if deterministic else "sampled"
            for name in agents:
                median, late = (1e6 * float(np.quantile(single[name], q)) for q in (0.5, 0.99))
                row = {"width": width, "mode": mode, "agent": name, "median_us": median, "p99_us": late}
                row["over_ppo"] = ratio(seconds[name], seconds["PPO"])
                report["rows"].append(row)
                print(f"| {width} | {mode} | {name} | {median:.0f} | {late:.0f} | {row['over_ppo']} |", flush=True)
    write(output, report)


def block(predict: Callable[[], object], calls: int, seconds: list[float]) -> None:
    """Call predict; the time of each call goes to seconds."""
    for _ in range(calls):
        start = time.perf_counter()
        predict()
        seconds.append(time.perf_counter() - start)


if __name__ == "__main__":
    tyro.cli(main)
