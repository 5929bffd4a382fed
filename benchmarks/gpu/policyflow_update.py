"""PolicyFlow's update: eager, compiled and as CUDA graphs, on CPU and GPU, against Stable-Baselines3's PPO.

The networks and hyperparameters of the HalfCheetah-v5 preset; observations are noise, so no simulator runs. A turn is
one call of `train`: references, epochs of minibatches, logging. Written without a GPU at hand: the CUDA contenders have
never run.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

from gpu.contenders import ENV_ID, Contender, NoiseVecEnv, failures, measure, speedup
from gpu.part import Report


class Size(NamedTuple):
    """The work of a turn."""

    batch: int
    batches: int  # in a rollout
    epochs: int

    @property
    def updates(self) -> int:
        return self.batches * self.epochs


SIZES = (Size(256, 8, 10), Size(32_768, 4, 2), Size(4096, 8, 2))
"""The preset's; one that fills a GPU; one in between."""
SMALL = (Size(32, 2, 1),)
N_STEPS = 128


def settings(size: Size, small: bool) -> tuple[int, Any]:
    """Number of environments and Config of the preset at a size."""
    from learning_arms import preset

    fields: dict[str, Any] = {"batch_size": size.batch, "n_epochs": size.epochs, "n_steps": N_STEPS}
    if small:
        fields |= {"n_steps": 16, "actor_hidden": (8, 8), "critic_hidden": (8, 8), "solver_steps": 1}
    _, config = preset(ENV_ID, **fields)
    return size.batch * size.batches // config.n_steps, replace(config, diagnostics_interval=0)


def flow_turn(size: Size, small: bool, device: str, compile: str) -> Callable[[], object]:
    """Ready to train again and again on one rollout."""
    from driftrl import PolicyFlow

    n_envs, config = settings(size, small)
    env = NoiseVecEnv(n_envs)
    agent = PolicyFlow("MlpPolicy", env, config=config, compile=compile, seed=0, device=device)
    agent.learn(2 * n_envs * config.n_steps)  # compiles in the first iteration, and again if anything changed
    return agent.train


def ppo_turn(size: Size, small: bool, device: str) -> Callable[[], object]:
    """Stable-Baselines3's PPO at the same work."""
    from stable_baselines3 import PPO
    from torch import nn

    n_envs, config = settings(size, small)
    activation = {"silu": nn.SiLU, "mish": nn.Mish, "tanh": nn.Tanh, "elu": nn.ELU, "relu": nn.ReLU}[config.activation]
    network = {
        "activation_fn": activation,
        "net_arch": {"pi": list(config.actor_hidden), "vf": list(config.critic_hidden)},
    }
    agent = PPO(
        "MlpPolicy", NoiseVecEnv(n_envs), n_steps=config.n_steps, batch_size=size.batch, n_epochs=size.epochs,
        gamma=config.gamma, gae_lambda=config.gae_lambda, policy_kwargs=network, seed=0, device=device,
    )  # fmt: skip
    agent.learn(n_envs * config.n_steps)
    return agent.train


def contenders(size: Size, small: bool) -> dict[str, Contender]:
    """Who takes part at a size: the CPU alone where it needs seconds, not minutes, for a turn."""
    flow = partial(flow_turn, size, small)
    found = {
        "cuda eager": Contender("cuda", partial(flow, "cuda", "off")),
        "cuda graphs": Contender("cuda", partial(flow, "cuda", "on"), compiled=True),
        "cuda SB3 PPO": Contender("cuda", partial(ppo_turn, size, small, "cuda")),
    }
    if size.batch <= 4096:  # one thread is fastest at the preset's size, all of them at the larger one
        threads = 1 if size.batch <= 256 else os.cpu_count() or 1
        found["cpu eager"] = Contender("cpu", partial(flow, "cpu", "off"), threads=threads)
        found["cpu SB3 PPO"] = Contender("cpu", partial(ppo_turn, size, small, "cpu"), threads=threads)
    if size.batch <= 256:
        found["cpu compiled"] = Contender("cpu", partial(flow, "cpu", "on"), compiled=True)
    return found


def policyflow_update(report: Report) -> None:
    """Measure all sizes; fails at the end if a contender did."""
    small = report.options.small
    sizes = SMALL if small else SIZES
    device, how = ("cuda", "graphs") if report.cuda else ("cpu", "compiled")
    headlines, faults = [], []
    for i, size in enumerate(sizes):
        seconds = min(25.0, report.left() / (2 * (len(sizes) - i)))
        rows = measure(
            report, contenders(size, small), updates=size.updates, seconds=seconds, rounds=3 if small else 9,
            reference=f"{device} eager",
        )  # fmt: skip
        headlines.append(f"batch {size.batch}: {speedup(rows, f'{device} {how}', f'{device} eager')}")
        if i == 0:
            headlines.append(speedup(rows, f"{device} {how}", f"{device} SB3 PPO"))
        faults += failures(rows)
        report.keep("; ".join(headlines), **{f"batch_{size.batch}": {"work": size._asdict(), "rows": rows}})
    if faults:
        sys.exit("; ".join(faults))
