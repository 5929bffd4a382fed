"""What the tests of killed sweeps share: a slow task, a specification, and how two sweeps are compared."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
EXACT = "InvertedPendulum-v5"
"""An environment that tells its state, so that a resumed run equals an uninterrupted one; this many steps take some
seconds, most of them for checkpoints."""
EXACT_SETTINGS = {"total_timesteps": 6400, "checkpoint_interval": 64}
TASK = """
import time
from pathlib import Path
import gymnasium as gym, numpy as np

class Task(gym.Env):  # takes its time where there is a file `slow`
    observation_space, action_space = gym.spaces.Box(-1, 1, (2,)), gym.spaces.Box(-1, 1, (1,))
    steps, slow = 0, (Path(__file__).parent / "slow").exists()

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(2, np.float32), {}

    def step(self, action):
        self.steps += 1
        time.sleep(0.03 if self.slow else 0)
        obs = self.np_random.uniform(-1, 1, 2).astype(np.float32)
        return obs, float(action[0] * obs[0]), False, self.steps % 5 == 0, {}

gym.register("Task-v0", Task, max_episode_steps=10)
"""


def write_spec(path: Path, env: str = "slow_task:Task-v0", **fields: Any) -> None:
    """Write a sweep of short runs, by default on the slow task, which lies beside it."""
    path.with_name("slow_task.py").write_text(TASK)
    spec: dict[str, Any] = {
        "folder": path.stem, "agent": "policyflow", "envs": [env],
        "settings": {
            "n_envs": 1, "n_steps": 16, "batch_size": 16, "n_epochs": 1, "lr_schedule": "constant",
            "actor_hidden": [8], "critic_hidden": [8], "compile": "off",
            "device": "cpu", "total_timesteps": 128, "checkpoint_interval": 16,
        },
    }  # fmt: skip
    varied = {*fields.get("grid", {}), *fields.get("search", {}).get("space", {})}
    settings = {**spec["settings"], **fields.get("settings", {})}
    settings = {name: value for name, value in settings.items() if name not in varied}
    path.write_text(yaml.safe_dump({**spec, **fields, "settings": settings}, sort_keys=False))


def begin(spec: Path, environment: Mapping[str, str] | None = None) -> subprocess.Popen[bytes]:
    """Start the command in a process of its own, its output in a file beside the specification."""
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    with spec.with_suffix(".log").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "driftrl.commands.sweep", spec.name], cwd=spec.parent, stdout=log, stderr=log,
            env={**os.environ, "PYTHONPATH": paths, **(environment or {})},
        )  # fmt: skip


def kill(process: subprocess.Popen[bytes]) -> None:
    """Kill the command, which was there until now."""
    assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()


def finish(process: subprocess.Popen[bytes], spec: Path) -> str:
    """Wait for the command to succeed; returns all that it has printed."""
    try:
        code = process.wait(400)
    finally:
        process.kill()  # of one that hangs
        process.wait()
    text = spec.with_suffix(".log").read_text()
    assert code == 0, text
    return text


def until(condition: Callable[[], object], seconds: float = 60) -> None:
    """Wait for a condition."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def run_folders(folder: Path) -> list[Path]:
    """The runs of a sweep, by their folders."""
    return sorted(path.parent for path in folder.glob("*/*/*/*/config.json"))


def processes_of(text: str) -> list[int]:
    """Processes with a text in their command line."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if text in path.read_bytes().decode(errors="replace"):
                found.append(int(path.parent.name))
        except OSError:  # it has ended
            continue
    return found
