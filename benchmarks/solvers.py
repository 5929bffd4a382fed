"""Our ODE solvers and divergences against torchdiffeq, torchode and diffrax, on one thread.

    OMP_NUM_THREADS=1 python benchmarks/solvers.py --output benchmarks/results/solvers.json

torchdiffeq is among the dev dependencies. torchode and diffrax are measured where they are installed (`pip install
torchode diffrax`); a line says so where they are not. The contenders take turns. A ratio is their time over ours, round
by round, median and quartiles: above 1 we are faster.

fixed     ten equal steps of one network on [x, cond, t]: the same for all, and ours also with MLPField, which computes
          the part of the conditioning and of the times once. diffrax runs compiled by XLA, so it also meets ours
          compiled by torch.compile
trace     exact divergence of MLPField in closed form against automatic differentiation
adaptive  error of the worst row at equal evaluations: step sizes per row against one for the batch
"""

from __future__ import annotations

import os

# One thread for diffrax, too.
os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1")

import importlib
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import tyro
from paired import machine, ratio, take_turns, write
from torch import Tensor, nn

from driftrl.dynamics import MLPField, VelocityField, odeint, odeint_adaptive
from driftrl.dynamics.fields import Time

DIM, COND, STEPS = 6, 17, 10  # HalfCheetah-v5's action and observation


@cache
def optional(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        print(f"{name} is not installed: left out")
        return None


class Network(nn.Module):
    """What a user of any library would write."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        sizes = (DIM + COND + 1, width, width, DIM)
        self.layers = nn.ModuleList(nn.Linear(i, o) for i, o in pairwise(sizes))

    def forward(self, t: Time, x: Tensor, cond: Tensor | None) -> Tensor:
        assert cond is not None
        time = t.reshape(-1, 1).expand(len(x), 1) if isinstance(t, Tensor) else x.new_full((len(x), 1), t)
        h = torch.cat([x, cond, time], 1)
        for layer in self.layers[:-1]:
            h = nn.functional.silu(layer(h))
        result: Tensor = self.layers[-1](h)
        return result


Solve = Callable[[Tensor, Tensor], Tensor]


def torch_contenders(net: Network, solver: str, compile: bool) -> Iterator[tuple[str, nn.Module, Solve]]:
    """Name, module whose gradient is taken, and ``(x, cond) -> x1``."""
    yield "ours", net, lambda x, cond: odeint(net, x, steps=STEPS, solver=solver, cond=cond)
    field = MLPField(DIM, COND, (net.width, net.width), last_layer_scale=1.0)
    yield "ours, MLPField", field, lambda x, cond: odeint(field, x, steps=STEPS, solver=solver, cond=cond)
    if compile:
        ours = torch.compile(lambda x, cond: odeint(net, x, steps=STEPS, solver=solver, cond=cond), fullgraph=True)
        yield "ours, compiled", net, ours
    if torchdiffeq := optional("torchdiffeq"):
        times = torch.linspace(0, 1, STEPS + 1)
        grid = {"method": solver, "options": {"step_size": 1 / STEPS}}

        def by_torchdiffeq(x: Tensor, cond: Tensor) -> Tensor:
            end: Tensor = torchdiffeq.odeint(lambda t, y: net(t, y, cond), x, times[[0, -1]], **grid)[-1]
            return end

        yield "torchdiffeq", net, by_torchdiffeq
    if solver == "euler" and (torchode := optional("torchode")):  # its other methods are adaptive pairs

        def by_torchode(x: Tensor, cond: Tensor) -> Tensor:
            term = torchode.ODETerm(lambda t, y, cond: net(t, y, cond), with_args=True)
            method = torchode.AutoDiffAdjoint(torchode.Euler(term), torchode.FixedStepController())
            ends = torch.tensor([[0.0, 1.0]]).expand(len(x), 2)
            problem = torchode.InitialValueProblem(y0=x, t_eval=ends)
            end: Tensor = method.solve(problem, args=cond, dt0=torch.full((len(x),), 1 / STEPS)).ys[:, -1]
            return end

        yield "torchode", net, by_torchode


def diffrax_calls(net: Network, solver: str, x: Tensor, cond: Tensor) -> dict[str, Callable[[], object]]:
    """Forward, and forward with the gradient of the weights, jitted; rk4 is none of diffrax's methods."""
    diffrax = None if solver == "rk4" else optional("diffrax")
    if diffrax is None:
        return {}
    jax = importlib.import_module("jax")
    jnp = jax.numpy
    weights = [(layer.weight.detach().numpy().T, layer.bias.detach().numpy()) for layer in net.layers]  # type: ignore[operator]
    method = {"euler": diffrax.Euler, "midpoint": diffrax.Midpoint}[solver]()

    def velocity(t: Any, y: Any, args: Any) -> Any:
        weights, cond = args
        h = jnp.concatenate([y, cond, jnp.full((len(y), 1), t)], 1)
        for weight, bias in weights[:-1]:
            h = jax.nn.silu(h @ weight + bias)
        return h @ weights[-1][0] + weights[-1][1]

    def solve(weights: Any, x: Any, cond: Any) -> Any:
        term = diffrax.ODETerm(velocity)
        return diffrax.diffeqsolve(term, method, 0.0, 1.0, 1 / STEPS, x, (weights, cond), max_steps=STEPS + 1).ys[-1]

    given = jax.device_put((weights, x.numpy(), cond.numpy()))
    forward = jax.jit(solve)
    both = jax.jit(jax.grad(lambda *args: solve(*args).sum()))
    return {
        "forward": lambda: jax.block_until_ready(forward(*given)),
        "backward": lambda: jax.block_until_ready(both(*given)),
    }


def call(module: nn.Module, solve: Solve, x: Tensor, cond: Tensor, backward: bool, repeat: int) -> None:
    for _ in range(repeat):
        with nullcontext() if backward else torch.no_grad():
            end = solve(x, cond)
            if backward:
                torch.autograd.grad(end.sum(), list(module.parameters()))


def again(function: Callable[[], object], repeat: int) -> None:
    for _ in range(repeat):
        function()


def fixed(rounds: int, compile: bool) -> list[dict[str, Any]]:
    rows = []
    print("| solver | width | batch | pass | contender | their time / ours | / ours, MLPField | / ours, compiled |")
    print("|---|---|---|---|---|---|---|---|")
    for solver in ("euler", "midpoint", "rk4"):
        for width in (64, 128):
            for batch in (64, 4096):
                torch.compiler.reset()  # else it counts as one function compiled too often
                torch.manual_seed(0)
                net, x, cond = Network(width), torch.randn(batch, DIM), torch.randn(batch, COND)
                solves = list(torch_contenders(net, solver, compile and solver != "rk4"))
                peers = diffrax_calls(net, solver, x, cond)
                repeat = 5 if batch == 64 else 1
                for direction in ("forward", "backward"):
                    turns: dict[str, Callable[[], object]] = {
                        name: partial(call, module, solve, x, cond, direction == "backward", repeat)
                        for name, module, solve in solves
                    }
                    if direction in peers:
                        turns["diffrax, compiled"] = partial(again, peers[direction], repeat)
                    seconds = take_turns(turns, rounds, warmup=2)
                    ours = [name for name in seconds if name.startswith("ours")]
                    for name in seconds.keys() - set(ours):
                        row: dict[str, Any] = {
                            "solver": solver,
                            "width": width,
                            "batch": batch,
                            "pass": direction,
                            "contender": name,
                        }
                        row |= {f"over {own}": ratio(seconds[name], seconds[own]) for own in ours}
                        rows.append(row)
                        cells = [str(row.get(f"over ours{own}", "")) for own in ("", ", MLPField", ", compiled")]
                        print("|", " | ".join([*map(str, list(row.values())[:5]), *cells]), "|", flush=True)
    return rows


def trace(rounds: int) -> list[dict[str, Any]]:
    rows = []
    print("\n| D | width | batch | pass | autograd, row by row / ours | autograd, vmapped / ours |")
    print("|---|---|---|---|---|---|")
    for dim, width in ((6, 64), (6, 128), (17, 128)):
        for batch in (64, 4096):
            torch.manual_seed(0)
            field = MLPField(dim, COND, (width, width), last_layer_scale=1.0)
            x, cond = torch.randn(batch, dim), torch.randn(batch, COND)
            ways: dict[str, Callable[[], Tensor]] = {
                "ours": lambda field=field, x=x, cond=cond: field.divergence(0.3, x, cond)[1],  # type: ignore[misc]
                "row by row": partial(row_by_row, field, x, cond),
                "vmapped": partial(vmapped, field, x, cond),
            }
            for way in ways.values():
                torch.testing.assert_close(way(), ways["ours"](), rtol=1e-4, atol=1e-4)
            for direction in ("forward", "backward"):
                gradient = direction == "backward"
                repeat = 5 if batch == 64 else 1
                turns = {name: partial(differentiate, field, way, gradient, repeat) for name, way in ways.items()}
                seconds = take_turns(turns, rounds, warmup=2)
                row: dict[str, Any] = {"dim": dim, "width": width, "batch": batch, "pass": direction}
                row |= {name: ratio(seconds[name], seconds["ours"]) for name in ("row by row", "vmapped")}
                rows.append(row)
                print("|", " | ".join(map(str, row.values())), "|", flush=True)
    return rows


def row_by_row(field: MLPField, x: Tensor, cond: Tensor) -> Tensor:
    """One backward pass per row of the Jacobian, as in FFJORD's code."""
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        y = x.clone().requires_grad_()
        v = field(0.3, y, cond)
        total = torch.zeros(len(x))
        for i in range(x.shape[1]):
            total = total + torch.autograd.grad(v[:, i].sum(), y, retain_graph=True, create_graph=create_graph)[0][:, i]
    return total


def vmapped(field: MLPField, x: Tensor, cond: Tensor) -> Tensor:
    return VelocityField.jacobian_embedded(field, 0.3, x, field.embed(cond))[1].diagonal(dim1=1, dim2=2).sum(1)


def differentiate(field: MLPField, way: Callable[[], Tensor], backward: bool, repeat: int) -> None:
    for _ in range(repeat):
        with nullcontext() if backward else torch.no_grad():
            value = way()
            if backward:
                torch.autograd.grad(value.sum(), list(field.parameters()), allow_unused=True)


def adaptive() -> list[dict[str, Any]]:
    """Worst row's error, relative to 1 + |x|; for the joint step size the best of many tolerances at so many calls."""
    torchdiffeq = optional("torchdiffeq")
    if torchdiffeq is None:
        return []
    torch.manual_seed(0)
    field = MLPField(DIM, hidden=(64, 64), last_layer_scale=1.0).double()
    problems: dict[str, tuple[Any, Tensor]] = {
        "x' = -2 t x^2": (
            lambda t, x, cond: -2 * torch.as_tensor(t).reshape(-1, 1) * x.square(),
            torch.logspace(-1, 2, 256, dtype=torch.float64).unsqueeze(1),
        ),
        "MLPField": (field, torch.logspace(-1, 1, 256).double().unsqueeze(1) * torch.randn(256, DIM).double()),
    }
    rows = []
    print(
        "\n| problem | rtol = atol | calls per row | worst error | joint at as many: error | ratio | calls for ours |"
    )
    print("|---|---|---|---|---|---|---|")
    with torch.no_grad():
        for name, (velocity, x) in problems.items():
            exact = odeint_adaptive(velocity, x, rtol=1e-12, atol=1e-12, max_steps=20_000).checked()

            def worst(end: Tensor, exact: Tensor = exact) -> float:
                return ((end - exact).abs().amax(1) / (1 + exact.abs().amax(1))).max().item()

            solves = [joint_solve(torchdiffeq, velocity, x, 10 ** (-k / 10)) for k in range(10, 120)]
            joint = [(calls, worst(end)) for calls, end in solves if calls]
            for tolerance in (1e-3, 1e-5, 1e-7):
                ours = odeint_adaptive(velocity, x, rtol=tolerance, atol=tolerance)
                calls, error = ours.calls.double().mean().item(), worst(ours.checked())
                equal = min((e for c, e in joint if c <= calls + 6), default=None)  # a step more is allowed
                needed = min(c for c, e in joint if e <= error)
                row = {"problem": name, "tolerance": tolerance, "calls": calls, "error": error, "joint_error": equal}
                rows.append(row | {"joint_calls_for_error": needed})
                theirs = "fails | " if equal is None else f"{equal:.1e} | {equal / error:.1f}"
                cells = f"{calls:.0f} | {error:.1e} | {theirs} | {needed}"
                print(f"| {name} | {tolerance:g} | {cells} |", flush=True)
    return rows


def joint_solve(torchdiffeq: Any, velocity: Any, x: Tensor, tolerance: float) -> tuple[int, Tensor]:
    """Calls and end state; no calls where it fails."""
    calls = 0

    def counted(t: Tensor, y: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        slope: Tensor = velocity(t, y, None)
        return slope

    times = torch.tensor([0.0, 1.0], dtype=x.dtype)
    try:
        end = torchdiffeq.odeint(counted, x, times, rtol=tolerance, atol=tolerance, method="dopri5")[-1]
    except AssertionError:  # "underflow in dt": at loose tolerances a step leads to where the solution explodes
        return 0, x
    return calls, end


def main(rounds: int = 21, compile: bool = True, output: Path | None = None) -> None:
    """Print the tables.

    Args:
        rounds: turns of each contender.
        compile: also measure ours compiled, which takes minutes to compile.
        output: also write the figures there, as JSON.
    """
    torch.set_num_threads(1)
    packages = [name for name in ("torch", "torchdiffeq", "torchode", "diffrax", "jax") if optional(name) is not None]
    report: dict[str, Any] = {"machine": machine(*packages), "dim": DIM, "cond_dim": COND, "steps": STEPS}
    print(report["machine"])
    report["adaptive"] = adaptive()
    report["trace"] = trace(rounds)
    report["fixed"] = fixed(rounds, compile)
    write(output, report)


if __name__ == "__main__":
    tyro.cli(main)
