"""Where an iteration of PolicyFlow spends its time, how far that is from the physical limit, and how it grows.

    OMP_NUM_THREADS=1 python benchmarks/profile_iteration.py --output benchmarks/results/profile_iteration.json

The variants take turns in one process, an iteration (rollout and update) at a time; all are compiled. The limit of a
variant is the time of `mj_step` alone on all cores from the states of its environments, plus its arithmetic (counted by
PyTorch) at the rate of the preset's largest matrix product on one core.
"""

from __future__ import annotations

import time
import warnings
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import tyro
from env_speed import bare_turn
from learning_arms import preset
from paired import machine, ratio, spread, take_turns, write
from torch.utils.flop_counter import FlopCounterMode

from driftrl import PolicyFlow
from driftrl.agents.common.compiling import Compiled
from driftrl.agents.common.program import onednn_is_faster
from driftrl.agents.common.update import Gradient
from driftrl.agents.policyflow.algorithm import losses
from driftrl.agents.policyflow.policy import FlowNoise
from driftrl.agents.policyflow.ratios import draw_epoch, record_references
from driftrl.envs.mujoco_batch import MujocoVecEnv

VARIANTS: dict[str, dict[str, Any]] = {
    "preset": {},
    "4 environments": {"n_envs": 4},
    "64 environments": {"n_envs": 64},
    "1 Euler step": {"solver_steps": 1},
    "8 Euler steps": {"solver_steps": 8},
    "2 midpoint steps": {"solver": "midpoint", "solver_steps": 2},
    "endpoint ratio": {"ratio": "endpoint"},
    "widths 64": {"actor_hidden": (64, 64), "critic_hidden": (64, 64)},
    "widths 256": {"actor_hidden": (256, 256), "critic_hidden": (256, 256)},
    "Hopper-v5 (3 actions)": {"env_id": "Hopper-v5"},
    "Ant-v5 (8 actions)": {"env_id": "Ant-v5"},
    "Humanoid-v5 (17 actions)": {"env_id": "Humanoid-v5"},
}
PARTS = ("simulator", "rest of step", "policy", "rest of rollout", "update", "rest of train")


class Timed(Compiled):
    """A compiled function whose calls are timed."""

    def __init__(self, compiled: Compiled, profiled: Profiled, name: str) -> None:
        self.compiled, self.profiled, self.name = compiled, profiled, name
        self.function = compiled.function

    def __call__(self, *arguments: Any) -> Any:
        return self.profiled.timed(self.name, self.compiled, *arguments)

    def check_again(self) -> None:
        self.compiled.check_again()


class Profiled:
    """An agent whose parts are timed."""

    def __init__(self, env_id: str = "HalfCheetah-v5", n_envs: int | None = None, **overrides: Any) -> None:
        preset_envs, config = preset("HalfCheetah-v5", **overrides)
        n = n_envs or preset_envs
        self.iteration = config.n_steps * preset_envs
        self.env = MujocoVecEnv(env_id, n)
        self.agent = PolicyFlow(
            "MlpPolicy", self.env, config=config, n_steps=self.iteration // n, compile="on", seed=0, device="cpu"
        )
        self.agent.learn(2 * self.iteration)
        self.seconds: dict[str, float] = defaultdict(float)
        self.history: list[dict[str, float]] = []
        agent: Any = self.agent
        agent._act, agent._step = Timed(agent._act, self, "_act"), Timed(agent._step, self, "_step")
        for owner, name in (
            (self.env.simulators, "step"), (self.env, "step_wait"), (agent, "collect_rollouts"), (agent, "train")
        ):  # fmt: skip
            setattr(owner, name, partial(self.timed, name, getattr(owner, name)))

    def timed(self, name: str, function: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
        start = time.perf_counter()
        result = function(*arguments, **keywords)
        self.seconds[name] += time.perf_counter() - start
        return result

    def turn(self) -> None:
        """One iteration."""
        self.seconds.clear()
        self.agent.learn(self.iteration, reset_num_timesteps=False)
        s = self.seconds
        parts = (
            s["step"], s["step_wait"] - s["step"], s["_act"],
            s["collect_rollouts"] - s["step_wait"] - s["_act"], s["_step"], s["train"] - s["_step"],
        )  # fmt: skip
        self.history.append(dict(zip(PARTS, parts, strict=True)))

    def limit(self, flops_per_second: float) -> tuple[float, float]:
        """Seconds of an iteration for the bare simulator on all cores, and for the arithmetic on one core."""
        steps = 10
        turn, close = bare_turn(self.env, steps)
        turn()
        best = min(_seconds(turn) for _ in range(5))
        close()
        agent, config, policy = self.agent, self.agent.config, self.agent.policy
        references = record_references(policy.actor, agent._ratio, agent.samples, agent._generator, chord=True)
        epoch = draw_epoch(policy.actor, agent._ratio, references, agent._generator)
        minibatch, spread_coef = epoch.rows(slice(config.batch_size)), torch.tensor(config.spread_coef)
        gradient = Gradient(policy, partial(losses, ratio=agent._ratio, config=config), 1.0)
        updates = self.iteration // config.batch_size * config.n_epochs
        features = torch.zeros(self.env.num_envs, policy.obs_dim)
        noise = FlowNoise.of(torch.zeros(policy.draws, self.env.num_envs, policy.action_dim))
        flops = updates * _flops(gradient.clipped, minibatch, spread_coef, torch.tensor(config.bc_coef))
        flops += agent.n_steps * _flops(policy.act, features, noise)
        return best / (steps * self.env.num_envs) * self.iteration, flops / flops_per_second


def _seconds(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def _flops(function: Callable[..., Any], *arguments: Any) -> int:
    with FlopCounterMode(display=False) as counter:
        function(*arguments)
    return int(counter.get_total_flops())


def matrix_rate(rows: int = 256, width: int = 128) -> float:
    """Floating-point operations per second of a product [rows, width] x [width, width], by the faster library."""
    a, b = torch.randn(rows, width), torch.randn(width, width)
    product: Callable[[], Any] = partial(torch.mm, a, b)
    if onednn_is_faster():
        product = partial(torch.ops.mkldnn._linear_pointwise, a, b, None, "none", [], "")
    block = partial(_repeat, product, 100)
    return 100 * 2 * rows * width * width / min(_seconds(block) for _ in range(20))


def _repeat(function: Callable[[], Any], times: int) -> None:
    for _ in range(times):
        function()


def main(rounds: int = 11, output: Path | None = None) -> None:
    """Print the tables.

    Args:
        rounds: turns of each variant.
        output: also write the figures there, as JSON.
    """
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", "this agent cannot be saved")  # nobody wants to
    variants = {name: Profiled(**settings) for name, settings in VARIANTS.items()}
    seconds = take_turns({name: variant.turn for name, variant in variants.items()}, rounds)
    rate = matrix_rate()
    packages = ("torch", "mujoco", "gymnasium", "stable-baselines3", "numpy")
    report: dict[str, Any] = {"machine": machine(*packages), "gflops": rate / 1e9, "rows": {}}
    print(report["machine"], f"{rate / 1e9:.0f} GFLOP/s")
    print(f"| variant | time / preset's | ms | {' | '.join(PARTS)} | limit: simulator + arithmetic |")
    print("|" + "---|" * (len(PARTS) + 4))
    for name, variant in variants.items():
        history = variant.history[-rounds:]
        parts = {part: 1e3 * spread([each[part] for each in history]).median for part in PARTS}
        simulator, arithmetic = (1e3 * part for part in variant.limit(rate))
        total = 1e3 * spread(seconds[name]).median
        row = {"ratio": ratio(seconds[name], seconds["preset"]), "ms": total, "parts_ms": parts}
        report["rows"][name] = row | {"limit_simulator_ms": simulator, "limit_arithmetic_ms": arithmetic}
        cells = " | ".join(f"{value:.0f}" for value in parts.values())
        print(f"| {name} | {row['ratio']} | {total:.0f} | {cells} | {simulator:.0f} + {arithmetic:.0f} |", flush=True)
    write(output, report)


if __name__ == "__main__":
    tyro.cli(main)
