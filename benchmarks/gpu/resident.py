"""Training with environments, networks and updates on one device: MultiGoal as tensors, MuJoCo's tasks by Warp.

Written without a GPU at hand: on CUDA it has never run.
"""

from __future__ import annotations

import importlib.util
import math
import subprocess
import time
from typing import Any, NamedTuple

import numpy as np
from gpu.part import Report, Skipped, synchronize
from gpu.suite import passing
from gpu.training import is_finite, speeds
from stable_baselines3.common.callbacks import BaseCallback


class Size(NamedTuple):
    """How much is trained."""

    n_envs: int
    n_steps: int
    batch_size: int
    timesteps: int


MULTI_GOAL = "driftrl/MultiGoal-v0"
SMALL = Size(16, 8, 64, 1024)
TENSORS = Size(4096, 32, 32_768, 12_000_000)
WORLDS = Size(4096, 16, 8192, 200_000_000)
GOALS = {"InvertedPendulum-v5": 950.0, "Hopper-v5": math.inf, "HalfCheetah-v5": 5000.0}
"""Tasks of Warp and the mean return at which their training ends; the last one has all the time that is left."""


class Watch(BaseCallback):
    """When each iteration began, and the mean return of the latest episodes; looks at nothing in between.

    Args:
        device: where the training is.
        seconds: after which it ends.
        goal: mean return of the latest hundred episodes at which it ends.
    """

    def __init__(self, device: str, seconds: float, goal: float = math.inf) -> None:
        super().__init__()
        self.device, self.goal, self.start = device, goal, time.perf_counter()
        self.deadline = self.start + seconds
        self.began: list[float] = []
        self.returns: list[float] = []
        self.reached: float | None = None
        """Seconds from the beginning to the goal, compilation among them."""

    def _on_rollout_start(self) -> None:
        synchronize(self.device)
        self.began.append(time.perf_counter())

    def _on_step(self) -> bool:
        return self.reached is None and time.perf_counter() < self.deadline

    def _on_rollout_end(self) -> None:
        episodes: Any = self.model.ep_info_buffer
        self.returns.append(float(np.mean([each["r"] for each in episodes])) if episodes else math.nan)
        if len(episodes) == episodes.maxlen and self.returns[-1] >= self.goal:
            self.reached = time.perf_counter() - self.start


def one(report: Report, backend: str, env_id: str, size: Size, share: float, **fields: Any) -> dict[str, Any]:
    """Train on the device for a share of the time that is left when the environments are made; the figures."""
    from driftrl import PolicyFlow
    from driftrl.envs import make_vec

    small, device = report.options.small, report.options.device
    size = SMALL if small else size
    where: dict[str, Any] = {} if backend == "batched" else {"device": device}
    env = make_vec(env_id, size.n_envs, 0, backend=backend, **where)  # type: ignore[arg-type]
    fields |= {"n_steps": size.n_steps, "batch_size": size.batch_size, "n_epochs": 5}
    agent = PolicyFlow("MlpPolicy", env, **{**fields, "compile": "off" if small else "on"}, seed=0, device=device)
    seconds = share * report.left() - 4
    watch = Watch(device, seconds, GOALS.get(env_id, math.inf))
    agent.learn(size.timesteps, watch)
    if len(watch.began) < 2:
        raise ValueError(f"{env_id}, {backend} on {device}: no iteration was finished in {seconds:.0f} s")
    if not is_finite(agent):
        raise ValueError(f"{env_id}, {backend} on {device}: a weight is not finite")
    return {
        **size._asdict(), "device": device, "backend": backend, "done": agent.num_timesteps,
        "steps_per_second": speeds(watch.began, size.n_envs * size.n_steps), "returns": watch.returns,
        "simulations_diverged": agent._diverged, "goal": watch.goal, "seconds_to_goal": watch.reached,
    }  # fmt: skip


def shown(name: str, row: dict[str, Any]) -> str:
    """A training in the table."""
    speed = row["steps_per_second"][len(row["steps_per_second"]) // 2]
    found = f"{name}: {speed:,.0f} steps/s, return {row['returns'][-1]:.2f}"
    seconds = row["seconds_to_goal"]
    return found if seconds is None else f"{found} after {seconds:.0f} s"


def resident(report: Report) -> None:
    """Environments as tensors on the device, then as arrays on the CPU, with the networks where they are."""
    found = dict[str, dict[str, Any]]()
    settings = {"learning_rate": 1e-3, "gamma": 0.95, "base": "standard", "base_std": 0.5, "ratio": "endpoint"}
    for backend in ("tensor", "batched"):
        found[backend] = one(report, backend, MULTI_GOAL, TENSORS, 0.45, **settings)
        _keep(report, "MultiGoal: ", found)


def warp(report: Report) -> None:
    """The tests of simulation by Warp, then trainings with thousands of worlds."""
    if absent := [name for name in ("warp", "mujoco_warp") if importlib.util.find_spec(name) is None]:
        raise Skipped(f"{', '.join(absent)}: absent; wheels.sh --warp fetches them")
    from learning_arms import preset

    fault: BaseException | None = None
    if report.cuda:
        try:
            passing(report, ["tests/envs/test_warp.py"], 0.4 * report.left())
        except (SystemExit, subprocess.TimeoutExpired) as error:  # the figures count nevertheless
            fault = error
    found = dict[str, dict[str, Any]]()
    for id in GOALS:
        _, config = preset(id)
        found[id] = one(report, "warp", id, WORLDS, 1 if id == list(GOALS)[-1] else 0.2, **vars(config))
        _keep(report, "", found)
    if fault is not None:
        raise fault


def _keep(report: Report, what: str, found: dict[str, dict[str, Any]]) -> None:
    text = "; ".join(shown(name, row) for name, row in found.items())
    report.keep(what + text + ("" if report.cuda else "; no CUDA device"), **found)
