import math
from typing import Any

import pytest
import torch
from torch import Tensor

from driftrl.dynamics.control import ControlPath
from driftrl.dynamics.fields import MLPField, Time, VelocityField
from driftrl.dynamics.ode import (
    DOPRI5,
    SOLVERS,
    Tableau,
)
from driftrl.dynamics.reversible import odeint_reversible
from driftrl.dynamics.special_fields import PotentialField

from .draws import rand, saved_numbers
from .known_fields import LinearField, SumField

F64 = torch.float64


def mlp(**options: object) -> MLPField:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return MLPField(3, 2, **{"hidden": (8, 8), "last_layer_scale": 1.0, **options}).double()  # type: ignore[arg-type]


@pytest.mark.parametrize("solver", [*SOLVERS.values(), DOPRI5], ids=lambda tableau: tableau.name)
def test_reversible_form_keeps_the_order(solver: Tableau) -> None:
    matrix, x0 = 0.5 * rand(3, 3), rand(4, 3, seed=1)
    exact = x0 @ torch.linalg.matrix_exp(matrix).T
    field = LinearField(matrix)
    errors = [(odeint_reversible(field, x0, steps=n, solver=solver) - exact).abs().max().item() for n in (8, 16)]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(solver.order, abs=0.2)


def test_reversible_euler_is_the_papers_recursion() -> None:
    # x' = x: psi_h(x) = h x, so both states are multiples of x0 by the recursion on numbers.
    y, z, h, c = 1.0, 1.0, 0.25, 0.9
    for _ in range(4):
        y = c * y + (1 - c) * z + h * z
        z = z - (-h * y)
    end = odeint_reversible(LinearField(torch.eye(1, dtype=F64)), rand(3, 1), steps=4, solver="euler", coupling=c)
    torch.testing.assert_close(end, y * rand(3, 1), rtol=0, atol=1e-14)


@pytest.mark.parametrize("solver", ["euler", "midpoint", DOPRI5], ids=str)
@pytest.mark.parametrize("coupling", [0.9, 1.0])
def test_reversible_gradient_equals_the_direct_one(solver: Tableau | str, coupling: float) -> None:
    matrix = rand(3, 3).requires_grad_()  # a buffer that is differentiated
    field = SumField(LinearField(matrix), mlp())
    x, cond = rand(4, 3).requires_grad_(), rand(1, 2, seed=1).requires_grad_()
    inputs = (x, cond, matrix, *field.parameters())
    gradients = []
    for gradient in ("reversible", "direct"):
        end = odeint_reversible(
            field, x, steps=30, solver=solver, cond=cond, t0=0.9, t1=0.1, coupling=coupling, gradient=gradient
        )
        gradients.append((end.detach(), *torch.autograd.grad(end.square().sum(), inputs)))
    for ours, direct in zip(*gradients, strict=True):
        # Rounding of 30 steps, grown by at most 0.9^-30 = 24 on the way back.
        torch.testing.assert_close(ours, direct, rtol=1e-11, atol=1e-11)


def test_reversible_gradient_against_finite_differences() -> None:
    field = mlp(hidden=(4,))

    def run(x: Tensor, cond: Tensor, *parameters: Tensor) -> Tensor:
        return odeint_reversible(field, x, steps=3, cond=cond)

    inputs = (rand(2, 3).requires_grad_(), rand(2, 2, seed=1).requires_grad_(), *field.parameters())
    assert torch.autograd.gradcheck(run, inputs)


def test_memory_of_the_reversible_gradient_does_not_grow_with_the_steps() -> None:
    field, x, cond = mlp(), rand(4, 3).requires_grad_(), rand(4, 2)

    def saved(steps: int, gradient: Any) -> int:
        return saved_numbers(lambda: odeint_reversible(field, x, steps=steps, cond=cond, gradient=gradient))

    assert saved(3, "reversible") == saved(48, "reversible") < saved(3, "direct")
    assert saved(48, "direct") > 8 * saved(3, "direct")


def test_reversible_gradient_goes_only_where_it_is_wanted() -> None:
    field, x, cond = mlp(), rand(4, 3), rand(4, 2).requires_grad_()
    field.requires_grad_(False)
    odeint_reversible(field, x, steps=3, cond=cond).sum().backward()
    assert cond.grad is not None and cond.grad.abs().min() > 0
    assert all(p.grad is None for p in field.parameters())
    with torch.no_grad():
        assert not odeint_reversible(field, x, steps=3, cond=cond).requires_grad
    assert not odeint_reversible(field, x, steps=3, cond=cond.detach()).requires_grad


def test_bad_arguments_of_the_reversible_form_are_refused() -> None:
    field, x = LinearField(torch.eye(2)), torch.zeros(4, 2)
    with pytest.raises(ValueError, match=r"field must be a VelocityField.*got function"):
        odeint_reversible(lambda t, y, cond: y, x, steps=1)  # type: ignore[arg-type]
    for coupling in (0.0, 1.1):
        with pytest.raises(ValueError, match=rf"coupling must lie in \(0, 1\], got {coupling}"):
            odeint_reversible(field, x, steps=1, coupling=coupling)
    with pytest.raises(ValueError, match="gradient must be 'reversible' or 'direct', got 'adjoint'"):
        odeint_reversible(field, x, steps=1, gradient="adjoint")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        odeint_reversible(field, x, steps=0)


def test_a_way_back_that_misses_the_start_is_an_error() -> None:
    stiff, x = LinearField(-60 * torch.eye(2)), torch.ones(4, 2, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"the way back misses the start, by .*use gradient='direct'"):
        odeint_reversible(stiff, x, steps=64).sum().backward()


def test_a_tensor_that_is_no_parameter_is_refused_also_where_it_acts_late() -> None:
    x, k = rand(4, 1), torch.tensor(2.0, dtype=F64, requires_grad=True)
    path = ControlPath([0.0, 0.6, 1.0], torch.cat([torch.zeros(4, 2, 1, dtype=F64), k.expand(4, 1, 1)], 1))
    field = PotentialField(lambda y, cond: 0.5 * k * y.square().sum(-1), 1)
    for each in (field, path.drive(MLPField(1, 1, hidden=(4,), last_layer_scale=1.0).double())):
        with pytest.raises(
            ValueError, match=r"the field needs a gradient for a tensor of shape .*use gradient='direct'"
        ):
            odeint_reversible(each, x, steps=8)
    # x' = -k x: dx(1)/dk = -x0 e^-k.
    odeint_reversible(field, x, steps=200, gradient="direct").sum().backward()
    torch.testing.assert_close(k.grad, -x.sum() * math.exp(-2), rtol=1e-3, atol=0)
    with torch.no_grad():
        assert odeint_reversible(field, x, steps=8).isfinite().all()


def test_a_weight_that_is_computed_from_others_gets_its_gradient() -> None:
    root = rand(1, 1).requires_grad_()
    odeint_reversible(LinearField(root * 2), rand(4, 1), steps=8).sum().backward()
    with torch.no_grad():
        root_gradient, root.grad = root.grad, None
    odeint_reversible(LinearField(root * 2), rand(4, 1), steps=8, gradient="direct").sum().backward()
    torch.testing.assert_close(root_gradient, root.grad)


class Wind(VelocityField):
    """A velocity that depends on nothing."""

    def forward(self, t: Time, x: Tensor, cond: Tensor | None = None) -> Tensor:
        return torch.full_like(x, 3.0)


def test_gradient_of_a_field_that_depends_on_nothing() -> None:
    x = rand(4, 2).requires_grad_()
    odeint_reversible(Wind(2), x, steps=5).sum().backward()
    torch.testing.assert_close(x.grad, torch.ones_like(x))
