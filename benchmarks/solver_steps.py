"""What solver steps cost and what fewer of them lose, on a trained policy.

    python benchmarks/solver_steps.py RUN_OR_FILE

For each solver and number of steps, against 4 Euler steps: the error of the flow's endpoint relative to
how far the flow carries z (reference: 64 RK4 steps), and the time of one rollout step of 16 environments and of one
minibatch of 256 with gradient, with the endpoint ratio. The interpolation ratio evaluates the field once, whatever the
solver. Times are ratios of alternating measurements: median and quartiles. One thread.

With --tolerances 1e-3 1e-5 ... it prints, instead, the steps that `odeint_adaptive` takes at each: mean over rows.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import cast

import numpy as np
import torch
import tyro
from torch import Tensor

from driftrl import PolicyFlow
from driftrl.agents.policyflow.policy import FlowActor
from driftrl.dynamics import odeint, odeint_adaptive
from driftrl.envs import make_vec
from driftrl.runs.folder import load_agent, read_settings, run_folder_of

CASES = [("euler", 1), ("euler", 2), ("euler", 4), ("euler", 8), ("midpoint", 2), ("midpoint", 10), ("rk4", 2)]
REPETITIONS = 200


def paired_ratio(ours: Callable[[], object], reference: Callable[[], object]) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile of time(ours) / time(reference), measured in turn."""

    def seconds(function: Callable[[], object]) -> float:
        start = time.perf_counter()
        function()
        return time.perf_counter() - start

    for function in (ours, reference):
        seconds(function)
    low, middle, high = statistics.quantiles([seconds(ours) / seconds(reference) for _ in range(REPETITIONS)], n=4)
    return low, middle, high


def visited_observations(agent: PolicyFlow, env_id: str, steps: int = 500) -> Tensor:
    """Normalised observations [B, O] along sampled episodes."""
    env = make_vec(env_id, 4, seed=0)
    obs, visited = env.reset(), []
    assert isinstance(obs, np.ndarray)
    with torch.no_grad():
        for _ in range(steps):
            visited.append(agent.policy.obs_norm(torch.as_tensor(obs, dtype=torch.float32)))
            obs = cast(np.ndarray, env.step(agent.predict(obs)[0])[0])
    env.close()
    return torch.cat(visited)


def main(run: tyro.conf.Positional[Path], output: Path | None = None, tolerances: tuple[float, ...] = ()) -> None:
    """Print the table.

    Args:
        run: run folder or saved file within one.
        output: also write the rows there, as JSON.
        tolerances: count the steps of the adaptive solver at these instead, rtol = atol.
    """
    torch.set_num_threads(1)
    folder = run_folder_of(run)
    assert folder is not None, "the run's config.json tells the environment"
    agent = cast(PolicyFlow, load_agent(run, "cpu"))
    actor: FlowActor = agent.policy.actor
    obs = visited_observations(agent, read_settings(folder).env_id)
    torch.manual_seed(0)
    with torch.no_grad():
        mean, log_std = actor.base(obs)
        z = mean + log_std.exp() * torch.randn_like(mean)
        exact = odeint(actor.field, z, steps=64, solver="rk4", cond=obs)
        carried = (exact - z).square().sum(1).mean().sqrt()

    for tolerance in tolerances:
        result = odeint_adaptive(actor.field, z, rtol=tolerance, atol=tolerance, cond=obs)
        result.checked()
        counts = {name: getattr(result, name).double().mean().item() for name in ("accepted", "rejected", "calls")}
        print(f"rtol = atol = {tolerance:g}: " + ", ".join(f"{name} {mean:.2f}" for name, mean in counts.items()))
    if tolerances:
        print(f"distance that the flow carries z: {carried.item():.3f}")
        return

    def integrate(size: int, solver: str, steps: int) -> Tensor:
        return odeint(actor.field, z[:size], steps=steps, solver=solver, cond=obs[:size])

    def rollout_step(solver: str, steps: int) -> None:
        with torch.no_grad():
            integrate(16, solver, steps)

    def minibatch(solver: str, steps: int) -> None:
        integrate(256, solver, steps).sum().backward()

    rows = []
    print("| solver | steps | endpoint error | 16 rows, x Euler 4 | 256 rows and the gradient, x Euler 4 |")
    print("|---|---|---|---|---|")
    for solver, steps in CASES:
        with torch.no_grad():
            error = (integrate(len(z), solver, steps) - exact).square().sum(1).mean().sqrt() / carried
        times = {
            name: paired_ratio(partial(function, solver, steps), partial(function, "euler", 4))
            for name, function in (("rollout_step", rollout_step), ("minibatch", minibatch))
        }
        rows.append({"solver": solver, "steps": steps, "endpoint_error": error.item(), **times})
        cells = [f"{middle:.2f} [{low:.2f}, {high:.2f}]" for low, middle, high in times.values()]
        print(f"| {solver} | {steps} | {error.item():.2%} | {' | '.join(cells)} |", flush=True)
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps({"run": read_settings(folder).env_id, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    tyro.cli(main)
