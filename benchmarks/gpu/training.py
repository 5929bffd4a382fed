"""A short training on HalfCheetah-v5: networks and rollout on the GPU, the simulators on the CPU.

Written without a GPU at hand: on CUDA it has never run.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from gpu.contenders import ENV_ID
from gpu.part import Report
from paired import spread
from stable_baselines3.common.callbacks import BaseCallback

FULL = {"n_envs": 64, "n_steps": 32, "timesteps": 61_440}
SMALL = {"n_envs": 4, "n_steps": 16, "timesteps": 320}
WARM_UP = 3
"""Iterations that do not count for the speed: compilation falls into the first."""


class Watch(BaseCallback):
    """Time, mean reward of a step and loss of each iteration; ends training when time is up."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.deadline = time.perf_counter() + seconds
        self.began: list[float] = []
        self.rewards: list[float] = []
        self.losses: list[float] = []

    def _on_rollout_start(self) -> None:
        self._take_loss()
        self.began.append(time.perf_counter())
        self._sum = self._count = 0.0

    def _on_step(self) -> bool:
        self._sum += float(np.sum(self.locals["rewards"]))
        self._count += len(self.locals["rewards"])
        return time.perf_counter() < self.deadline

    def _on_rollout_end(self) -> None:
        self.rewards.append(self._sum / self._count)

    def _on_training_end(self) -> None:
        self._take_loss()
        self.began.append(time.perf_counter())

    def _take_loss(self) -> None:
        loss = self.logger.name_to_value.get("train/loss")
        if loss is not None:
            self.losses.append(float(loss))


def speeds(began: Sequence[float], iteration: int) -> list[float]:
    """Steps per second [quartiles] of iterations of so many steps, by when each began; without the warm-up."""
    found = (iteration / np.diff(began)[WARM_UP if len(began) > WARM_UP + 2 else 0 :]).tolist()
    return list(spread(found)) if len(found) > 1 else found


def is_finite(agent: Any) -> bool:
    """Whether all weights and statistics are."""
    return all(bool(each.isfinite().all()) for each in agent.policy.state_dict().values() if each.is_floating_point())


def one(report: Report, device: str, seconds: float) -> dict[str, Any]:
    """Train on a device; the figures."""
    from learning_arms import preset

    from driftrl import PolicyFlow
    from driftrl.envs import make_vec

    size = SMALL if report.options.small else FULL
    _, config = preset(ENV_ID, n_steps=size["n_steps"], batch_size=32 if report.options.small else 256)
    env = make_vec(ENV_ID, size["n_envs"], 0)
    compile = "off" if report.options.small else "on"
    agent = PolicyFlow("MlpPolicy", env, config=config, compile=compile, seed=0, device=device)
    watch = Watch(seconds)
    agent.learn(size["timesteps"], watch)
    env.close()
    if not watch.rewards:
        raise ValueError(f"{device}: no rollout was finished in {seconds:.0f} s; compile={compile}")
    iteration = size["n_envs"] * size["n_steps"]
    edge = max(1, min(4, len(watch.rewards) // 3))
    first, last = (float(np.mean(each)) for each in (watch.rewards[:edge], watch.rewards[-edge:]))
    return {
        **size, "device": device, "threads": torch.get_num_threads(), "compile": compile,
        "done": agent.num_timesteps, "first_iteration_s": watch.began[1] - watch.began[0],
        "steps_per_second": speeds(watch.began, iteration),
        "reward_per_step": {"first": first, "last": last},
        "rewards": watch.rewards, "losses": watch.losses,
        "finite": is_finite(agent) and bool(np.isfinite(watch.losses).all()) and bool(watch.losses),
    }  # fmt: skip


def train(report: Report) -> None:
    """Train on the GPU, then on the CPU; the reward must rise and everything stay finite."""
    torch.set_num_threads(1)
    found: dict[str, dict[str, Any]] = {}
    for device in ("cuda", "cpu") if report.cuda else ("cpu",):
        seconds = report.left() - 5 if device == "cpu" else 0.6 * report.left()
        row = found[device] = one(report, device, seconds)
        speed = {name: each["steps_per_second"][len(each["steps_per_second"]) // 2] for name, each in found.items()}
        gain = "; ".join(
            f"{name}: {each['reward_per_step']['first']:.2f} to {each['reward_per_step']['last']:.2f} per step"
            for name, each in found.items()
        )
        headline = ", ".join(f"{value:,.0f} steps/s on {name}" for name, value in speed.items())
        report.keep(f"{headline}; {gain}" + ("" if report.cuda else "; no CUDA device"), **found)
        if not row["finite"]:
            raise ValueError(f"{device}: a loss or a weight is not finite, or there is no loss: {row['losses']}")
        learned = row["reward_per_step"]["last"] > row["reward_per_step"]["first"]
        if not (learned or report.options.small or row["done"] < row["timesteps"] // 2):
            raise ValueError(f"{device}: the reward did not rise: {row['reward_per_step']}")
