"""What the solvers refuse, each in a line that names the argument."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from driftrl.dynamics.adaptive import odeint_adaptive
from driftrl.dynamics.adaptive_sde import sdeint_adaptive
from driftrl.dynamics.brownian_tree import BrownianTree
from driftrl.dynamics.fields import MLPField, Time
from driftrl.dynamics.koopman import koopman_matrix
from driftrl.dynamics.langevin import mala, overdamped
from driftrl.dynamics.levenberg_marquardt import levenberg_marquardt
from driftrl.dynamics.neural_sde import LangevinSDE
from driftrl.dynamics.ode import odeint, odeint_path
from driftrl.dynamics.reversible import odeint_reversible
from driftrl.dynamics.reversible_sde import sdeint_reversible
from driftrl.dynamics.sde import sdeint

X = torch.zeros(4, 2)
TREE = BrownianTree(0, (4, 2))
FIELD = MLPField(dim=2, hidden=(8,))
SDE = LangevinSDE(FIELD, lambda t: 1.0)


def decay(t: Time, x: Tensor, cond: Tensor | None = None) -> Tensor:
    return -x


def energy(x: Tensor, cond: Tensor | None) -> Tensor:
    return x.square().sum(1)


Call = Callable[..., Any]
SOLVERS: dict[str, Call] = {
    "odeint": lambda x, **kw: odeint(decay, x, steps=4, **kw),
    "odeint_path": lambda x, **kw: odeint_path(decay, x, steps=4, **kw),
    "odeint_adaptive": lambda x, **kw: odeint_adaptive(decay, x, **kw),
    "odeint_reversible": lambda x, **kw: odeint_reversible(FIELD, x, steps=4, **kw),
    "sdeint": lambda x, **kw: sdeint(SDE, x, steps=4, generator=torch.Generator(), **kw),
    "sdeint_adaptive": lambda x, **kw: sdeint_adaptive(SDE, x, noise=TREE, **kw),
    "sdeint_reversible": lambda x, **kw: sdeint_reversible(SDE, x, steps=4, noise=TREE, **kw),
}
NOISE, LEVEL = torch.zeros(3, 4, 2), torch.zeros(3, 4)
SAMPLERS: dict[str, Call] = {
    "overdamped": lambda x: overdamped(decay, x, NOISE, step=0.1),
    "mala": lambda x: mala(energy, x, NOISE, LEVEL, step=0.1),
    "levenberg_marquardt": lambda x: levenberg_marquardt(energy, x, NOISE, LEVEL, step=0.1, damping=1.0),
}
SOME = torch.randn(9, 2, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("call", [*SOLVERS.values(), *SAMPLERS.values()], ids=[*SOLVERS, *SAMPLERS])
@pytest.mark.parametrize(("x", "kind"), [(torch.zeros(4, 2, dtype=torch.int64), "torch.int64"), ([[0.0, 0.0]], "list")])
def test_state_has_to_be_a_floating_point_tensor(call: Call, x: Any, kind: str) -> None:
    with pytest.raises(ValueError, match=f"x must be a floating-point tensor, got {kind}"):
        call(x)


@pytest.mark.parametrize("call", SOLVERS.values(), ids=SOLVERS)
@pytest.mark.parametrize("name", ["t0", "t1"])
def test_time_has_to_be_one_number(call: Call, name: str) -> None:
    with pytest.raises(ValueError, match=rf"{name} must be one number, got a tensor of shape \[4\]"):
        call(X, **{name: torch.full((4,), 0.5)})


@pytest.mark.parametrize("name", ["odeint_adaptive", "sdeint_adaptive"])
def test_conditioning_has_a_row_for_each_state(name: str) -> None:
    with pytest.raises(ValueError, match="cond must have 4 rows like x, or 1 row, got 3"):
        SOLVERS[name](X, cond=torch.zeros(3, 1))


@pytest.mark.parametrize(
    ("call", "kind", "noise"),
    [
        (lambda noise: sdeint(SDE, X, steps=4, noise=noise), "BrownianGrid", TREE),
        (lambda noise: sdeint(SDE, X, steps=4, noise=noise), "BrownianGrid", NOISE),
        (lambda noise: sdeint_adaptive(SDE, X, noise=noise), "BrownianTree", TREE.grid(4)),
        (lambda noise: sdeint_adaptive(SDE, X, noise=noise), "BrownianTree", None),
        (lambda noise: sdeint_reversible(SDE, X, steps=4, noise=noise), "BrownianTree", None),
    ],
)
def test_noise_has_to_be_what_the_solver_asks_for(call: Call, kind: str, noise: Any) -> None:
    message = f"noise must be a {kind}.*, got {type(noise).__name__}"
    with pytest.raises(ValueError, match=message):
        call(noise)


def refused_numbers() -> dict[str, tuple[Call, str]]:
    nan = torch.full((9, 2), torch.nan)
    return {
        "shape of a tree": (lambda: BrownianTree(0, (4,)), r"shape must be \(B, D\), each at least 1, got \(4,\)"),  # type: ignore[arg-type]
        "type of a tree": (lambda: BrownianTree(0, (4, 2), dtype=torch.int64), "dtype must be a floating-point type"),
        "same time twice": (lambda: list(TREE.walk([0.1, 0.1])), "times must be 2.-30 of the interval at least"),
        "nan chain": (lambda: SAMPLERS["levenberg_marquardt"](nan[:4]), "positions and gradients must be finite"),
        "rows of control": (lambda: koopman_matrix(SOME, SOME, SOME[:8]), r"control must have shape \[9, C\], got \[8"),
        "1-D control": (lambda: koopman_matrix(SOME, SOME, SOME[:, 0]), r"control must have shape \[9, C\], got \[9\]"),
        "nan state": (lambda: koopman_matrix(nan, SOME), "must hold finite floating-point numbers"),
        "nan next state": (lambda: koopman_matrix(SOME, nan), "must hold finite floating-point numbers"),
    }


@pytest.mark.parametrize("case", refused_numbers())
def test_refused(case: str) -> None:
    call, message = refused_numbers()[case]
    with pytest.raises(ValueError, match=message):
        call()
