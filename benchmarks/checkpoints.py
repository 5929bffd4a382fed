"""Saving and loading against Stable-Baselines3's format, and what periodic checkpoints cost.

    OMP_NUM_THREADS=1 python benchmarks/checkpoints.py --output benchmarks/results/checkpoints.json

The same agent, that of the preset, takes turns with itself: saved to a file and loaded by DriftRL's methods, then by
those of Stable-Baselines3 that they replace. The cost is the time of a checkpoint of a run, on the disk, with as many
transitions as there are steps between two, over the time of so many steps.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import tyro
from paired import machine, ratio, spread, take_turns, write
from stable_baselines3.common.base_class import BaseAlgorithm

from driftrl.agents.registry import AGENTS
from driftrl.envs import make_vec
from driftrl.runs.folder import save_checkpoint

STEPS = {"policyflow": 16_384, "mbpo": 400}
"""Environment steps that are timed, after as many to warm up."""


def main(
    runs: tuple[str, ...] = ("policyflow:HalfCheetah-v5", "mbpo:Hopper-v5"),
    interval: int = 100_000,
    rounds: int = 31,
    output: Path | None = None,
) -> None:
    """Print the table.

    Args:
        runs: agent:environment.
        interval: steps between checkpoints.
        rounds: of saving and loading.
        output: also write the figures there, as JSON.
    """
    torch.set_num_threads(1)
    report: dict[str, Any] = {"machine": machine("torch", "stable-baselines3", "numpy"), "rows": []}
    print(report["machine"])
    print("| run | size / SB3's | save / SB3's | load / SB3's | checkpoint, MB | checkpoint, s | share of the time |")
    print("|---|---|---|---|---|---|---|")
    for run in runs:
        name, env_id = run.split(":")
        with tempfile.TemporaryDirectory() as folder:
            row = measure(name, env_id, interval, rounds, Path(folder))
        report["rows"].append({"run": run, **row})
        cost = f"{row['megabytes']:.1f} | {row['seconds'].median:.3f} | {100 * row['share']:.3f} %"
        print(f"| {name}, {env_id} | {row['size']:.2f} | {row['save']} | {row['load']} | {cost} |", flush=True)
    write(output, report)


def measure(name: str, env_id: str, interval: int, rounds: int, folder: Path) -> dict[str, Any]:
    """The figures of a run."""
    entry = AGENTS[name]
    run, config = entry.settings(env_id, "standard", **({"learning_starts": 100} if name == "mbpo" else {}))
    agent: Any = entry.agent("MlpPolicy", make_vec(env_id, run["n_envs"], 0), config=config, seed=0, device="cpu")
    agent.learn(STEPS[name])
    begun, before = time.perf_counter(), agent.num_timesteps
    agent.learn(STEPS[name], reset_num_timesteps=False)
    seconds_per_step = (time.perf_counter() - begun) / (agent.num_timesteps - before)

    ours, theirs = folder / "ours.zip", folder / "theirs.zip"
    saved = take_turns({"ours": lambda: agent.save(ours), "theirs": lambda: BaseAlgorithm.save(agent, theirs)}, rounds)
    loaded = take_turns(
        {
            "ours": lambda: type(agent).load(ours, device="cpu"),
            "theirs": lambda: type(agent).load(theirs, device="cpu", allow_pickle=True),
        },
        rounds,
    )
    if name == "mbpo":
        seen = agent.replay_buffer.transitions.all()
        rows = torch.randint(len(seen["reward"]), (interval,))
        agent.replay_buffer.transitions.append(
            *(seen[key][rows] for key in ("obs", "action", "next_obs", "reward", "terminated"))
        )
    seconds = []
    for _ in range(rounds):
        begun = time.perf_counter()
        path = save_checkpoint(agent, folder, 1, {})
        seconds.append(time.perf_counter() - begun)
    return {
        "size": ours.stat().st_size / theirs.stat().st_size,
        "save": ratio(saved["ours"], saved["theirs"]),
        "load": ratio(loaded["ours"], loaded["theirs"]),
        "megabytes": path.stat().st_size / 1e6,
        "seconds": spread(seconds),
        "seconds_per_step": seconds_per_step,
        "share": spread(seconds).median / (interval * seconds_per_step),
    }


if __name__ == "__main__":
    tyro.cli(main)
