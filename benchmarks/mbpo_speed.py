r"""Gradient updates: our SAC and LipschitzMBPO against Stable-Baselines3's SAC, batch 256, two layers of 256.

    OMP_NUM_THREADS=1 python benchmarks/mbpo_speed.py --output benchmarks/results/mbpo_speed.json
    OMP_NUM_THREADS=1 python benchmarks/mbpo_speed.py --parts value_gradients \
        --output benchmarks/results/value_gradient_speed.json

Then whole agents as `benchmarks/lipschitz.py` trains them, halfway through their runs: steps of the environment, the
model's fit and rollouts, all updates. Contenders take turns; medians [quartiles] of the ratios. The models by
themselves: benchmarks/transition_speed.py. The second command times updates by value gradients and the fits of their
models, in float32 and bfloat16, with one model and with eight.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from paired import machine, ratio, spread, take_turns, write
from stable_baselines3 import SAC

from driftrl import LipschitzMBPO
from driftrl.agents import registry
from driftrl.envs import make_vec

CONTENDERS: dict[str, dict[str, Any]] = {
    "SAC": {"regularizer": "none"},
    "robust, (pi, a)": {"regularizer": "robust"},
    "robust, (a, a)": {"regularizer": "robust", "robust_actions": "same_action"},
    "spectral": {"regularizer": "spectral"},
}
BASELINE = "Stable-Baselines3 SAC"
AGENTS: dict[str, dict[str, Any]] = {
    "SAC alone": {"model": "none", "regularizer": "none"},
    "single model": {"regularizer": "none"},
    "single model, robust": {"regularizer": "robust"},
    "ensemble of 7, 5 elites": {"regularizer": "none", "members": 7, "elites": 5},
}
SINGLE = "single model"
VALUE_GRADIENTS: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16": {"precision": "bfloat16"},
    "eight models, float32": {"members": 8, "elites": 8},
    "eight models, bfloat16": {"members": 8, "elites": 8, "precision": "bfloat16"},
}
"""Beside the preset standard."""


def main(
    env_id: str = "Hopper-v5",
    updates: int = 20,
    rounds: int = 11,
    gradient_steps: int = 10,
    agent_rounds: int = 6,
    parts: tuple[Literal["updates", "agents", "value_gradients"], ...] = ("updates", "agents"),
    output: Path | None = None,
) -> None:
    """Print the tables.

    Args:
        env_id: whose sizes the networks have, and in which the whole agents act.
        updates: in a turn; of LipschitzMBPO those of one environment step.
        rounds: turns of each contender.
        gradient_steps: updates per environment step of the whole agents, all else as in their preset "fast".
        agent_rounds: turns of each whole agent, of as many environment steps as lie between two fits of the model.
        parts: what is timed.
        output: also write the figures there, as JSON.
    """
    torch.set_num_threads(1)
    report: dict[str, Any] = {"machine": machine("torch", "stable-baselines3", "gymnasium", "mujoco", "numpy")}
    print(report["machine"])
    report["env_id"] = env_id
    if "updates" in parts:
        report["rows"] = update_rows(env_id, updates, rounds)
    if "agents" in parts:
        report["agents"] = agent_rows(env_id, gradient_steps, agent_rounds)
    if "value_gradients" in parts:
        report["value_gradients"] = value_gradient_rows(env_id, rounds)
    write(output, report)


def update_rows(env_id: str, updates: int, rounds: int) -> dict[str, Any]:
    """Gradient updates of SAC and of its regularised critics."""
    env = make_vec(env_id, 1, seed=0)
    baseline = SAC("MlpPolicy", env, learning_starts=300, device="cpu", seed=0)
    baseline.learn(310)
    contenders: dict[str, Callable[[], object]] = {BASELINE: partial(baseline.train, updates, 256)}
    for name, fields in CONTENDERS.items():
        for compile in ("off", "on"):
            agent = LipschitzMBPO(
                "MlpPolicy", env, model="none", learning_starts=300, gradient_steps=1, compile=compile,
                diagnostics_interval=0, device="cpu", seed=0, **fields,
            ).learn(310)  # fmt: skip
            contenders[f"{name}, {'compiled' if compile == 'on' else 'eager'}"] = partial(agent.train, updates, 256)
    seconds = take_turns(contenders, rounds)
    rows: dict[str, Any] = {}
    print(f"| contender | ms per update | updates/s over {BASELINE}'s |")
    print("|---|---|---|")
    for name, times in seconds.items():
        row = {"ms": 1e3 * spread(times).median / updates, "speed": ratio(seconds[BASELINE], times)}
        rows[name] = row
        print(f"| {name} | {row['ms']:.2f} | {row['speed']} |", flush=True)
    return rows


def value_gradient_rows(env_id: str, rounds: int) -> dict[str, Any]:
    """Value gradients, 20 updates a turn; then an epoch of the model's fit."""
    updates: dict[str, Callable[[], object]] = {}
    fits: dict[str, Callable[[], object]] = {}
    for name, fields in VALUE_GRADIENTS.items():
        run, config = registry.AGENTS["mbpo"].settings(env_id, "standard", **fields)
        changes = {"learning_starts": 2560, "compile": "on", "diagnostics_interval": 0, "model_epochs": 1}
        config = dataclasses.replace(config, **changes)
        env = make_vec(env_id, run["n_envs"], seed=0)
        agent = LipschitzMBPO("MlpPolicy", env, config=config, device="cpu", seed=0).learn(2565)
        updates[name] = partial(agent.train, 20, agent.batch_size)
        assert agent.transition is not None
        fits[name] = partial(agent._fit_model, agent.transition)
    rows: dict[str, Any] = {}
    seconds, fit_seconds = take_turns(updates, rounds), take_turns(fits, rounds)
    print("| value gradients | ms per update | time over float32's | of an epoch of the fit |")
    print("|---|---|---|---|")
    for name, times in seconds.items():
        row = {"ms": 50 * spread(times).median, "time": ratio(times, seconds["float32"])}
        row["fit"] = ratio(fit_seconds[name], fit_seconds["float32"])
        rows[name] = row
        print(f"| {name} | {row['ms']:.2f} | {row['time']} | {row['fit']} |", flush=True)
    return rows


def agent_rows(env_id: str, gradient_steps: int, rounds: int) -> dict[str, Any]:
    """Whole agents at equal environment steps; what the first half of a run would have seen is seen at random."""
    common = {"gradient_steps": gradient_steps, "compile": "on", "diagnostics_interval": 0}
    turns: dict[str, Callable[[], object]] = {}
    for name, fields in AGENTS.items():
        run, config = registry.AGENTS["mbpo"].settings(env_id, "fast", **common | fields)
        config = dataclasses.replace(config, learning_starts=run["total_timesteps"] // 2)
        env = make_vec(env_id, run["n_envs"], seed=0)
        agent = LipschitzMBPO("MlpPolicy", env, config=config, device="cpu", seed=0)
        agent.learn(agent.config.learning_starts)
        turns[name] = partial(agent.learn, agent.config.model_interval, reset_num_timesteps=False)
    seconds = take_turns(turns, rounds)
    rows = {}
    print(f"| agent, {gradient_steps} updates per step | ms per environment step | time over {SINGLE}'s |")
    print("|---|---|---|")
    for name, times in seconds.items():
        row = {"ms": 1e3 * spread(times).median / agent.config.model_interval, "time": ratio(times, seconds[SINGLE])}
        rows[name] = row
        print(f"| {name} | {row['ms']:.1f} | {row['time']} |", flush=True)
    return rows


if __name__ == "__main__":
    tyro.cli(main)
