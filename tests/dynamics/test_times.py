"""Times and seeds that are tensors or NumPy's numbers: differentiated, used, or refused."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from driftrl.dynamics.adaptive import odeint_adaptive
from driftrl.dynamics.brownian_tree import BrownianTree
from driftrl.dynamics.fields import MLPField, Time, VelocityField
from driftrl.dynamics.girsanov import girsanov_kl
from driftrl.dynamics.langevin import overdamped
from driftrl.dynamics.neural_sde import LangevinSDE
from driftrl.dynamics.ode import odeint
from driftrl.dynamics.reversible import odeint_reversible
from driftrl.dynamics.sde import sdeint


class Decay(VelocityField):
    """x' = -x."""

    def forward(self, t: Time, x: Tensor, cond: Tensor | None = None) -> Tensor:
        return -x


def end_time() -> Any:
    return torch.tensor(1.0, dtype=torch.float64, requires_grad=True)


X = torch.ones(1, 1, dtype=torch.float64)


@pytest.mark.parametrize("solve", [odeint, lambda *args, **kw: odeint_reversible(*args, gradient="direct", **kw)])
def test_fixed_steps_are_differentiated_with_respect_to_the_end(solve: Any) -> None:
    t1 = end_time()
    solve(Decay(1), X, steps=200, t1=t1).sum().backward()
    assert t1.grad.item() == pytest.approx(-math.exp(-1), rel=1e-3)


@pytest.mark.parametrize("name", ["t0", "t1"])
def test_reversible_form_refuses_what_it_would_detach(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must not require a gradient, which this solver does not give"):
        odeint_reversible(Decay(1), X, steps=4, **{name: end_time()})
    solvers: list[Any] = [odeint_adaptive, lambda *args, **kw: odeint_reversible(*args, steps=4, **kw)]
    for solve in solvers:
        with pytest.raises(ValueError, match=f"{name} must be finite, got nan"):
            solve(Decay(1), X, **{name: math.nan})


def numbers_in_need_of_a_gradient() -> dict[str, Any]:
    one, noise = end_time(), torch.zeros(2, 1, 1, dtype=torch.float64)
    sde = LangevinSDE(Decay(1), lambda t: 1.0)
    return {
        "coupling": lambda: odeint_reversible(Decay(1), X, steps=3, coupling=one),
        "t1": lambda: sdeint(sde, X, steps=2, generator=torch.Generator(), t1=one),
        "t0": lambda: girsanov_kl(sde, Decay(1), torch.zeros(3, 1, 1), t0=one - 1),
        "t": lambda: BrownianTree(0, (1, 1))(one / 2),
        "step": lambda: overdamped(Decay(1), X, noise, step=one),
    }


@pytest.mark.parametrize("name", numbers_in_need_of_a_gradient())
def test_no_number_is_silently_detached(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must not require a gradient"):
        numbers_in_need_of_a_gradient()[name]()


def test_langevin_steps_are_differentiated_with_respect_to_the_temperature() -> None:
    temperature, noise = end_time(), torch.full((1, 1, 1), 2.0, dtype=torch.float64)
    overdamped(Decay(1), X, noise, step=0.1, temperature=temperature).sum().backward()
    assert temperature.grad.item() == pytest.approx(0.5 * math.sqrt(0.2) * 2)  # d sqrt(2 h T) z / dT at T = 1


def test_times_and_tolerances_that_say_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="t1 must be finite, got nan"):
        odeint(Decay(1), X, steps=2, t1=math.nan)
    with pytest.raises(ValueError, match=r"atol must be positive in the type of x, got 1e-46 in torch\.float32"):
        odeint_adaptive(Decay(1), X.float(), atol=1e-46)
    with pytest.raises(ValueError, match="x must have a dimension at least"):
        odeint_adaptive(Decay(1), X[:, :0])
    with pytest.raises(ValueError, match="t1 must be finite, got inf"):
        BrownianTree(0, (1, 1), t1=math.inf)


def test_adaptive_takes_a_time_that_is_a_tensor() -> None:
    end = odeint_adaptive(Decay(1), X, t1=torch.tensor(0.5)).checked()
    assert end.item() == pytest.approx(math.exp(-0.5), rel=1e-3)


@pytest.mark.parametrize("kind", [np.int64, np.uint32, torch.tensor])
def test_seeds_are_integers_of_any_kind(kind: Any) -> None:
    assert torch.equal(BrownianTree(kind(2**31 - 5), (2, 3))(0.3), BrownianTree(2**31 - 5, (2, 3))(0.3))
    with pytest.raises(TypeError):
        BrownianTree(0.5, (1, 1))  # type: ignore[arg-type]


def test_a_slope_whose_square_overflows() -> None:
    result = odeint_adaptive(lambda t, x, cond: torch.full_like(x, 3e13), torch.zeros(1, 2))
    torch.testing.assert_close(result.checked(), torch.full((1, 2), 3e13))
    assert result.accepted.item() < 30


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_types_that_do_not_resolve_an_error_are_refused(kind: torch.dtype) -> None:
    with pytest.raises(ValueError, match=r"x must be float32 or float64, got torch"):
        odeint_adaptive(lambda t, x, cond: -x, torch.ones(1, 1, dtype=kind))


def test_an_interval_that_vanishes_in_the_type_of_x_is_refused() -> None:
    with pytest.raises(ValueError, match=r"t0 and t1 must differ in the type of x, got 1000000000.0 and 1000000001.0"):
        odeint_adaptive(lambda t, x, cond: -x, torch.ones(1, 1), t0=1e9, t1=1e9 + 1)


@pytest.mark.parametrize("solve", [odeint, lambda *args, **kw: odeint_reversible(*args, gradient="direct", **kw)])
def test_a_time_that_is_a_tensor_leaves_the_state_its_type_and_warns_of_nothing(solve: Any) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        field = MLPField(1, hidden=(4,), last_layer_scale=1.0)
    t1, x = end_time(), X.float()
    end = solve(field, x, steps=3, t0=0.25, t1=t1)
    assert end.dtype == torch.float32
    torch.testing.assert_close(end, solve(field, x, steps=3, t0=0.25, t1=1.0))
    end.sum().backward()
    assert t1.grad.dtype == torch.float64 and t1.grad != 0
