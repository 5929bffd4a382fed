"""LipschitzMBPO's SAC update, robust or not, eager, compiled and as CUDA graphs, against Stable-Baselines3's SAC.

Two layers of 256, batch 256, the sizes of HalfCheetah-v5; transitions are noise, so no simulator runs. A turn is one
call of `train` with several updates. Written without a GPU at hand: the CUDA contenders have never run.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

from gpu.contenders import Contender, NoiseVecEnv, failures, measure, speedup
from gpu.part import Report

STARTS = 300


def ours_turn(small: bool, updates: int, regularizer: str, device: str, compile: str) -> Callable[[], object]:
    """Ready for updates."""
    from driftrl import LipschitzMBPO

    fields: dict[str, Any] = {"actor_hidden": (8, 8), "critic_hidden": (8, 8), "batch_size": 32} if small else {}
    agent = LipschitzMBPO(
        "MlpPolicy", NoiseVecEnv(1), model="none", learning_starts=STARTS, gradient_steps=1, compile=compile,
        diagnostics_interval=0, regularizer=regularizer, device=device, seed=0, **fields,
    )  # fmt: skip
    agent.learn(STARTS + 10)
    return partial(agent.train, updates, agent.config.batch_size)


def sb3_turn(small: bool, updates: int, device: str) -> Callable[[], object]:
    """Stable-Baselines3's SAC, ready for updates."""
    from stable_baselines3 import SAC

    batch, hidden = (32, [8, 8]) if small else (256, [256, 256])
    agent = SAC(
        "MlpPolicy", NoiseVecEnv(1), learning_starts=STARTS, batch_size=batch, policy_kwargs={"net_arch": hidden},
        device=device, seed=0,
    )  # fmt: skip
    agent.learn(STARTS + 10)
    return partial(agent.train, updates, batch)


def contenders(small: bool, updates: int) -> dict[str, Contender]:
    """Who takes part, the most important first: time may end before the last."""
    ours = partial(ours_turn, small, updates)
    found = {
        "cuda SB3 SAC": Contender("cuda", partial(sb3_turn, small, updates, "cuda")),
        "cuda SAC eager": Contender("cuda", partial(ours, "none", "cuda", "off")),
        "cuda SAC graphs": Contender("cuda", partial(ours, "none", "cuda", "on"), compiled=True),
        "cpu SB3 SAC": Contender("cpu", partial(sb3_turn, small, updates, "cpu")),
        "cpu SAC eager": Contender("cpu", partial(ours, "none", "cpu", "off")),
        "cuda robust eager": Contender("cuda", partial(ours, "robust", "cuda", "off")),
        "cuda robust graphs": Contender("cuda", partial(ours, "robust", "cuda", "on"), compiled=True),
        "cpu robust eager": Contender("cpu", partial(ours, "robust", "cpu", "off")),
        "cpu SAC compiled": Contender("cpu", partial(ours, "none", "cpu", "on"), compiled=True),
    }
    if not small:
        found["cpu robust compiled"] = Contender("cpu", partial(ours, "robust", "cpu", "on"), compiled=True)
    return found


def sac_update(report: Report) -> None:
    """Measure them all; fails at the end if a contender did."""
    small = report.options.small
    updates = 2 if small else 20
    device, how = ("cuda", "graphs") if report.cuda else ("cpu", "compiled")
    rows = measure(
        report, contenders(small, updates), updates=updates, seconds=min(20.0, report.left() / 4),
        rounds=3 if small else 15, reference=f"{device} SB3 SAC",
    )  # fmt: skip
    pairs = [
        (f"{device} SAC {how}", f"{device} SB3 SAC"), (f"{device} SAC {how}", f"{device} SAC eager"),
        (f"{device} robust {how}", f"{device} robust eager"),
    ]  # fmt: skip
    report.keep("; ".join(speedup(rows, *pair) for pair in pairs[: 2 if small else 3]), rows=rows, updates=updates)
    if faults := failures(rows):
        sys.exit("; ".join(faults))
