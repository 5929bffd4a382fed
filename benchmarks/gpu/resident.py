"""Training with environments, networks and updates on one device: MultiGoal as a program of tensors.

Written without a GPU at hand: on CUDA it has never run.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from gpu.part import Report, synchronize
from gpu.training import is_finite, speeds
from stable_baselines3.common.callbacks import BaseCallback

ENV_ID = "driftrl/MultiGoal-v0"
FULL = {"n_envs": 4096, "n_steps": 32, "batch_size": 32_768, "timesteps": 12_000_000}
SMALL = {"n_envs": 16, "n_steps": 8, "batch_size": 64, "timesteps": 1024}


class Watch(BaseCallback):
    """When each iteration began, and the mean return of the latest episodes; looks at nothing in between."""

    def __init__(self, device: str, seconds: float) -> None:
        super().__init__()
        self.device, self.deadline = device, time.perf_counter() + seconds
        self.began: list[float] = []
        self.returns: list[float] = []

    def _on_rollout_start(self) -> None:
        synchronize(self.device)
        self.began.append(time.perf_counter())

    def _on_step(self) -> bool:
        return time.perf_counter() < self.deadline

    def _on_rollout_end(self) -> None:
        episodes: Any = self.model.ep_info_buffer
        self.returns.append(float(np.mean([each["r"] for each in episodes])) if episodes else float("nan"))


def one(report: Report, device: str, backend: str, seconds: float) -> dict[str, Any]:
    """Train on a device; the figures."""
    from driftrl import PolicyFlow
    from driftrl.envs import make_vec

    small = report.options.small
    size = SMALL if small else FULL
    where: dict[str, Any] = {"device": device} if backend == "tensor" else {}
    env = make_vec(ENV_ID, size["n_envs"], 0, backend=backend, **where)  # type: ignore[arg-type]
    agent = PolicyFlow(
        "MlpPolicy", env, n_steps=size["n_steps"], batch_size=size["batch_size"], n_epochs=5, learning_rate=1e-3,
        gamma=0.95, base="standard", base_std=0.5, ratio="endpoint", compile="off" if small else "on", seed=0,
        device=device,
    )  # fmt: skip
    watch = Watch(device, seconds)
    agent.learn(size["timesteps"], watch)
    iteration = size["n_envs"] * size["n_steps"]
    if len(watch.began) < 2:
        raise ValueError(f"{backend} on {device}: no iteration was finished in {seconds:.0f} s")
    return {
        **size, "device": device, "backend": backend, "done": agent.num_timesteps, "finite": is_finite(agent),
        "steps_per_second": speeds(watch.began, iteration), "returns": watch.returns,
    }  # fmt: skip


def resident(report: Report) -> None:
    """Environments as tensors on the device, then as arrays on the CPU, with the networks where they are."""
    device, found = report.options.device, dict[str, dict[str, Any]]()
    for backend in ("tensor", "batched"):
        row = found[backend] = one(report, device, backend, 0.45 * report.left())
        speed = {name: each["steps_per_second"][len(each["steps_per_second"]) // 2] for name, each in found.items()}
        what = ", ".join(f"{value:,.0f} steps/s, {name}" for name, value in speed.items())
        last = "; ".join(f"{name}: return {each['returns'][-1]:.2f}" for name, each in found.items())
        report.keep(f"MultiGoal: {what}; {last}" + ("" if report.cuda else "; no CUDA device"), **found)
        if not row["finite"]:
            raise ValueError(f"{backend} on {device}: a weight is not finite")
