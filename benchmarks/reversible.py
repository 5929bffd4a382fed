"""Memory, time and exactness of gradients through many steps: reversible solvers against backpropagation.

    OMP_NUM_THREADS=1 python benchmarks/reversible.py --rounds 7 --output benchmarks/results/reversible.json

Writes the table of docs/solvers.md. A 64-64 `MLPField`, D = 8, C = 17, batch 64, float32, one thread: the ODE by
midpoint steps (`odeint_reversible`), the SDE ``dx = v dt + 0.3 x dW`` by reversible Heun on a `BrownianTree` or on a
`BrownianGrid` (`sdeint_reversible`). Each against plain automatic differentiation of the same map.

memory    what the graph keeps between forward and backward pass, parameters left out, each storage once
time      of forward and backward pass over that of backpropagation, median and quartiles of alternating runs
gradient  greatest difference of the parameters' gradients, over their greatest entry, in float32 and float64
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from learning import write_between
from paired import Spread, machine, ratio, take_turns, write
from torch import Tensor

from driftrl.dynamics import (
    BrownianGrid,
    BrownianTree,
    MLPField,
    odeint_reversible,
    sdeint_reversible,
)
from driftrl.dynamics.neural_sde import LinearNoiseSDE

PAGE = Path(__file__).parents[1] / "docs" / "solvers.md"
BATCH, DIM, COND_DIM = 64, 8, 17
Way = Literal["reversible", "direct"]
CASES = ("ODE", "SDE, tree", "SDE, grid")


def case(name: str, steps: int, dtype: torch.dtype) -> tuple[MLPField, Callable[[Way], Tensor]]:
    """The field, and what integrates it to a sum of squares."""
    torch.manual_seed(0)
    field = MLPField(DIM, COND_DIM, last_layer_scale=1.0).to(dtype)
    x, cond = torch.randn(BATCH, DIM).to(dtype), torch.randn(BATCH, COND_DIM).to(dtype)
    paths = BrownianTree(0, (BATCH, DIM), dtype=dtype)
    noise: BrownianTree | BrownianGrid = paths.grid(steps) if name == "SDE, grid" else paths

    def run(gradient: Way) -> Tensor:
        if name == "ODE":
            return odeint_reversible(field, x, steps=steps, cond=cond, gradient=gradient).square().sum()
        sde = LinearNoiseSDE(field, 0.3)
        return sdeint_reversible(sde, x, steps=steps, noise=noise, cond=cond, gradient=gradient).square().sum()

    return field, run


class Kept:
    """What a graph holds of a tensor."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def kept_bytes(field: MLPField, run: Callable[[Way], Tensor], gradient: Way) -> int:
    parameters = {p.untyped_storage().data_ptr() for p in field.parameters()}
    held: weakref.WeakSet[Kept] = weakref.WeakSet()

    def pack(tensor: Tensor) -> Kept:
        kept = Kept(tensor)
        held.add(kept)
        return kept

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.tensor):
        end = run(gradient)
    storages = [kept.tensor.untyped_storage() for kept in held]  # those that `end` still holds
    sizes = {storage.data_ptr(): storage.nbytes() for storage in storages}
    del end
    return sum(size for pointer, size in sizes.items() if pointer not in parameters)


def gradients(field: MLPField, run: Callable[[Way], Tensor], gradient: Way) -> Tensor:
    return torch.cat([g.flatten() for g in torch.autograd.grad(run(gradient), list(field.parameters()))])


def difference(name: str, steps: int, dtype: torch.dtype) -> float:
    field, run = case(name, steps, dtype)
    ours, direct = (gradients(field, run, way) for way in ("reversible", "direct"))
    return ((ours - direct).abs().max() / direct.abs().max()).item()


def measure(name: str, steps: int, rounds: int) -> dict[str, Any]:
    field, run = case(name, steps, torch.float32)
    row: dict[str, Any] = {"equation": name, "steps": steps}
    row |= {way: kept_bytes(field, run, way) / 1e6 for way in ("reversible", "direct")}
    turns = {way: partial(gradients, field, run, way) for way in ("reversible", "direct")}
    seconds = take_turns(turns, rounds)
    row["time"] = ratio(seconds["reversible"], seconds["direct"])
    row |= {
        str(dtype).removeprefix("torch."): difference(name, steps, dtype) for dtype in (torch.float32, torch.float64)
    }
    return row


def table(rows: list[dict[str, Any]]) -> str:
    """In Markdown."""
    lines = [
        "| equation | steps | MB kept | backpropagation: MB | time / backpropagation | error, float32 | float64 |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        memory = f"{row['reversible']:.2f} | {row['direct']:.2f}"
        errors = f"{row['float32']:.0e} | {row['float64']:.0e}"
        lines.append(f"| {row['equation']} | {row['steps']} | {memory} | {Spread(*row['time'])} | {errors} |")
    return "\n".join(lines)


def main(rounds: int = 11, output: Path | None = None) -> None:
    """Print and write the table.

    Args:
        rounds: turns of each contender.
        output: also write the figures there, as JSON.
    """
    torch.set_num_threads(1)
    report: dict[str, Any] = {"machine": machine("torch"), "rows": []}
    for name in CASES:
        for steps in (16, 100, 512):
            report["rows"].append(measure(name, steps, rounds))
            print(report["rows"][-1], flush=True)
    write(output, report)
    write_between(PAGE, "reversible", table(report["rows"]))


if __name__ == "__main__":
    tyro.cli(main)
