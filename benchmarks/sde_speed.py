"""Time of `sdeint` against torchsde's, with the same schemes on the same equation.

    pip install 'driftrl[torchsde]'         # or: pip install torchsde
    python benchmarks/sde_speed.py --output benchmarks/results/sde_speed.json

``dx = v(t, x, cond) dt + 0.3 x dW`` with a 64-64 `MLPField`, D = 8, C = 17, 20 steps, one thread, float32; each draws
its own noise. First both are given torchsde's noise: their ends must agree. "embedded" is torchsde with the
conditioning embedded once, by hand, as our solver does by itself. The table has the peer's time over ours: median and
quartiles of alternating runs.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import tyro
from paired import machine, ratio, spread, take_turns, write
from torch import Tensor, nn

from driftrl.dynamics import MLPField
from driftrl.dynamics.brownian import BrownianGrid
from driftrl.dynamics.neural_sde import LinearNoiseSDE
from driftrl.dynamics.sde import sdeint

DIM, COND_DIM, SCALE, STEPS = 8, 17, 0.3, 20
# Ours: torchsde's name for it and the sense of the equation that it is given.
SCHEMES = {
    "euler_maruyama": ("euler", "ito"),
    "milstein": ("milstein", "ito"),
    "stochastic_heun": ("heun", "stratonovich"),
    "reversible_heun": ("reversible_heun", "stratonovich"),
}


class Peer(nn.Module):
    """The equation as torchsde takes it; for its Stratonovich schemes with the drift that keeps the process."""

    noise_type = "diagonal"

    def __init__(self, velocity: Callable[[Tensor, Tensor], Tensor], sde_type: str) -> None:
        super().__init__()
        self.velocity, self.sde_type = velocity, sde_type

    def f(self, t: Tensor, y: Tensor) -> Tensor:
        v = self.velocity(t, y)
        return v if self.sde_type == "ito" else v - 0.5 * SCALE**2 * y

    def g(self, t: Tensor, y: Tensor) -> Tensor:
        return SCALE * y


def main(rounds: int = 31, output: Path | None = None) -> None:
    """Print the table.

    Args:
        rounds: turns of each contender.
        output: also write the figures there, as JSON.
    """
    if importlib.util.find_spec("torchsde") is None:
        raise SystemExit("torchsde is not installed; it is the extra 'torchsde': pip install 'driftrl[torchsde]'")
    torchsde: Any = importlib.import_module("torchsde")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    report: dict[str, Any] = {"machine": machine("torch", "torchsde"), "steps": STEPS, "rows": []}
    print(report["machine"])
    print("| scheme | batch | pass | our ms | torchsde, x ours | torchsde embedded, x ours |")
    print("|---|---|---|---|---|---|")
    for scheme in SCHEMES:
        for batch in (64, 4096):
            for backward in (False, True):
                seconds = take_turns(prepare(torchsde, scheme, batch, backward), rounds, warmup=3)
                ours = seconds.pop("driftrl")
                ratios = {name: ratio(values, ours) for name, values in seconds.items()}
                row = {
                    "scheme": scheme,
                    "batch": batch,
                    "backward": backward,
                    "ms": spread(ours).median * 1e3,
                    **ratios,
                }
                report["rows"].append(row)
                name = "forward + backward" if backward else "forward"
                cells = " | ".join(map(str, ratios.values()))
                print(f"| {scheme} | {batch} | {name} | {row['ms']:.2f} | {cells} |", flush=True)
    write(output, report)


def prepare(torchsde: Any, scheme: str, batch: int, backward: bool) -> dict[str, Callable[[], object]]:
    """The contenders' turns, after a check that they compute the same."""
    method, sde_type = SCHEMES[scheme]
    field = MLPField(DIM, COND_DIM, last_layer_scale=1.0)
    x, cond = torch.randn(batch, DIM), torch.randn(batch, COND_DIM)
    equation, generator = LinearNoiseSDE(field, SCALE), torch.Generator().manual_seed(0)
    times = torch.tensor([0.0, 1.0])

    def ours(**noise: Any) -> Tensor:
        return sdeint(equation, x, steps=STEPS, solver=scheme, cond=cond, **(noise or {"generator": generator}))

    def theirs(embedded: bool, **noise: Any) -> Tensor:
        if embedded:
            known = field.embed(cond)
            peer = Peer(lambda t, y: field.forward_embedded(t, y, known), sde_type)
        else:
            peer = Peer(lambda t, y: field(t, y, cond), sde_type)
        end: Tensor = torchsde.sdeint(peer, x, times, dt=1 / STEPS, method=method, **noise)[-1]
        return end

    path = torchsde.BrownianInterval(0.0, 1.0, size=(batch, DIM), entropy=0)
    grid = [k / STEPS for k in range(STEPS)] + [1.0]
    w = torch.stack([path(grid[k], grid[k + 1]) for k in range(STEPS)])
    for embedded in (False, True):
        # Their times are sums of float32 steps, so that the increments differ in the fourth digit.
        torch.testing.assert_close(
            theirs(embedded, bm=path), ours(noise=BrownianGrid(1 / STEPS, w)), rtol=1e-3, atol=1e-3
        )

    def turn(run: Callable[[], Tensor]) -> None:
        if backward:
            field.zero_grad()
            run().sum().backward()
        else:
            with torch.no_grad():
                run()

    runs: dict[str, Callable[[], Tensor]] = {
        "driftrl": ours,
        "torchsde": partial(theirs, False),
        "torchsde embedded": partial(theirs, True),
    }
    return {name: partial(turn, run) for name, run in runs.items()}


if __name__ == "__main__":
    tyro.cli(main)
