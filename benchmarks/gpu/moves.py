"""Agents and runs that move between CPU and GPU: files, actions, resumed runs.

Written without a GPU at hand: with CUDA it has never run. Without one both ends are the CPU.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from gpu.contenders import OBS_DIM, NoiseVecEnv
from gpu.part import NO_CUDA, ROOT, Report

TOLERANCE = 1e-5
STEPS = 256
"""Environment steps between two moves of a run; its task has episodes of 50 steps, so its evaluation is short."""


def checkpoints(report: Report) -> None:
    """Files of both agents there and back, then a run that is resumed twice; fails if anything differs."""
    there = report.options.device
    differences = {
        f"{name} {start} -> {end} -> {start}": round_trip(name, start, end, report.options.scratch)
        for name in ("policyflow", "mbpo")
        for start, end in (("cpu", there), (there, "cpu"))
    }
    worst = max(max(each.values()) for each in differences.values())
    report.keep(f"actions differ by {worst:.1e}", differences=differences)
    if not worst <= TOLERANCE:
        raise ValueError(f"actions differ by more than {TOLERANCE}: {differences}")
    stages = resume(report, ("cpu", there, "cpu"))
    report.keep(f"actions differ by {worst:.1e}; {' -> '.join(stages)}" + ("" if report.cuda else f"; {NO_CUDA}"))


def make(name: str, device: str) -> Any:
    """A small agent that has learned a little."""
    from driftrl import LipschitzMBPO, PolicyFlow

    if name == "policyflow":
        agent: Any = PolicyFlow(
            "MlpPolicy", NoiseVecEnv(4), n_steps=16, batch_size=32, n_epochs=2, ema_decay=0.9, device=device, seed=0
        )
        return agent.learn(128)
    agent = LipschitzMBPO("MlpPolicy", NoiseVecEnv(1), model="none", learning_starts=50, device=device, seed=0)
    return agent.learn(60)


def round_trip(name: str, start: str, end: str, folder: Path) -> dict[str, float]:
    """Largest differences of actions: after a move, after the way back, and after learning has gone on there."""
    obs = np.random.default_rng(0).normal(size=(32, OBS_DIM))
    first = make(name, start)
    kind, expected = type(first), first.predict(obs, deterministic=True)[0]
    env = NoiseVecEnv(first.n_envs)
    first.save(folder / "first")
    moved = kind.load(folder / "first", env=env, device=end)
    moved.save(folder / "second")
    back = kind.load(folder / "second", device=start)
    found = {
        "moved": float(np.abs(moved.predict(obs, deterministic=True)[0] - expected).max()),
        "back": float(np.abs(back.predict(obs, deterministic=True)[0] - expected).max()),
    }
    if moved.device.type != end or back.device.type != start:
        raise ValueError(f"{name}: got {moved.device} and {back.device}, expected {end} and {start}")
    moved.learn(64, reset_num_timesteps=False).save(folder / "third")  # the optimizer's state has moved as well
    learned = kind.load(folder / "third", device=start)
    after = moved.predict(obs, deterministic=True)[0]
    found["after learning"] = float(np.abs(learned.predict(obs, deterministic=True)[0] - after).max())
    return found


def resume(report: Report, devices: tuple[str, ...]) -> list[str]:
    """A run by train.py that goes on twice, each time on another device; says what was done where."""
    folder = report.options.scratch / "runs"
    stages, run = [], Path()
    for i, device in enumerate(devices):
        total = str(STEPS * (i + 1))
        if i == 0:
            arguments = ["policyflow", "--env", "Reacher-v5", "--run-dir", str(folder), "--seed", "0"]
            arguments += ["--n-envs", "4", "--n-steps", "32", "--batch-size", "64", "--checkpoint-interval", str(STEPS)]
        else:
            arguments = ["--resume", str(run)]
        command = [sys.executable, str(ROOT / "train.py"), *arguments, "--device", device, "--total-timesteps", total]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        print(done.stdout, done.stderr, flush=True)
        if done.returncode:
            raise RuntimeError(f"train.py on {device}: exit code {done.returncode}: {done.stderr.strip()[-300:]}")
        if i > 0 and "all restored" not in done.stdout:
            raise RuntimeError(f"train.py --resume on {device} did not restore everything")
        run = next(folder.rglob("config.json")).parent
        stages.append(f"{total} steps on {device}")
    if not (run / "final.zip").is_file():
        raise RuntimeError("the resumed run left no final.zip")
    return stages
