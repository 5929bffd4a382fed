"""A short training as a user waits for it, from the start of its process: PolicyFlow against Stable-Baselines3's PPO.

    OMP_NUM_THREADS=1 python benchmarks/short_run.py --output benchmarks/results/short_run.json

The preset that tasks without one of their own have; PPO with the same rollout, epochs, minibatches, widths and
activation, and VecNormalize. Every run has a process of its own; the contenders take turns. The first turn is not
counted: it compiles what the later ones find in the cache, so they are second runs of their kind. Seconds to the first
iteration go from the start of the process to the end of the first update.
"""

from __future__ import annotations

import multiprocessing
import time
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import tyro
from paired import machine, ratio, spread, take_turns, write

CONTENDERS = ("driftrl", "driftrl eager", "sb3")


def make_agent(contender: str, env_id: str, n_envs: int) -> Any:
    """The agent of a contender."""
    import torch

    from driftrl import PolicyFlow, PolicyFlowConfig
    from driftrl.agents.presets import DEFAULT

    torch.set_num_threads(1)
    config = PolicyFlowConfig(**{name: value for name, value in DEFAULT.items() if name != "n_envs"})
    if contender != "sb3":
        from driftrl.envs import make_vec

        choice = "off" if contender.endswith("eager") else "auto"
        return PolicyFlow("MlpPolicy", make_vec(env_id, n_envs, 0), config=config, compile=choice, seed=0, device="cpu")
    from stable_baselines3 import PPO
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.vec_env import VecNormalize
    from torch import nn

    network = {"activation_fn": nn.SiLU, "net_arch": {"pi": config.actor_hidden, "vf": config.critic_hidden}}
    assert config.activation == "silu"
    return PPO(
        "MlpPolicy", VecNormalize(make_vec_env(env_id, n_envs, 0), gamma=config.gamma), n_steps=config.n_steps,
        batch_size=config.batch_size, n_epochs=config.n_epochs, gamma=config.gamma, gae_lambda=config.gae_lambda,
        policy_kwargs=network, seed=0, device="cpu",
    )  # fmt: skip


def serve(connection: Connection, contender: str, env_id: str, n_envs: int, steps: int) -> None:
    """Train; send a word after the first iteration and at the end."""
    from stable_baselines3.common.callbacks import BaseCallback

    class Tell(BaseCallback):
        """Tells of the first update."""

        rollouts = 0

        def _on_rollout_start(self) -> None:
            self.rollouts += 1
            if self.rollouts == 2:
                connection.send("first")

        def _on_step(self) -> bool:
            return True

    make_agent(contender, env_id, n_envs).learn(steps, Tell())
    connection.send("all")


def main(
    env_id: str = "HalfCheetah-v5",
    n_envs: int = 16,
    steps: int = 100_000,
    rounds: int = 7,
    output: Path | None = None,
) -> None:
    """Print the table.

    Args:
        env_id: Gymnasium id.
        n_envs: environments.
        steps: environment steps of a run.
        rounds: turns of each contender.
        output: also write the figures there, as JSON.
    """
    context = multiprocessing.get_context("spawn")
    first: dict[str, list[float]] = {name: [] for name in CONTENDERS}

    def run(name: str) -> None:
        ours, theirs = context.Pipe()
        start = time.perf_counter()
        process = context.Process(target=serve, args=(theirs, name, env_id, n_envs, steps))
        process.start()
        ours.recv()
        first[name].append(time.perf_counter() - start)
        ours.recv()
        process.join()

    seconds = take_turns({name: partial(run, name) for name in CONTENDERS}, rounds)
    report: dict[str, Any] = {
        "machine": machine("torch", "mujoco", "gymnasium", "stable-baselines3", "numpy"),
        "env_id": env_id, "n_envs": n_envs, "steps": steps, "contenders": {},
    }  # fmt: skip
    print(report["machine"])
    print("| contender | whole run, s | first iteration, s | whole / driftrl | first / driftrl eager |")
    print("|---|---|---|---|---|")
    for name in CONTENDERS:
        row = {
            "seconds": spread(seconds[name]),
            "first_seconds": spread(first[name][1:]),
            "ratio": ratio(seconds[name], seconds["driftrl"]),
            "first_ratio": ratio(first[name][1:], first["driftrl eager"][1:]),
        }
        report["contenders"][name] = row
        print(f"| {name} | {' | '.join(str(each) for each in row.values())} |")
    write(output, report)


if __name__ == "__main__":
    tyro.cli(main)
