from typing import Any

import pytest
import torch
from torch import Tensor

from driftrl.dynamics.brownian import BrownianGrid
from driftrl.dynamics.brownian_tree import BrownianTree
from driftrl.dynamics.neural_sde import GeometricSDE, LangevinSDE, LinearNoiseSDE
from driftrl.dynamics.reversible_sde import sdeint_reversible
from driftrl.dynamics.sde import SDE, sdeint

from .draws import mlp, rand, saved_numbers

F64 = torch.float64
KINDS: dict[str, type[LangevinSDE]] = {"additive": LangevinSDE, "linear": LinearNoiseSDE, "geometric": GeometricSDE}


def tree(t1: float = 1.0) -> BrownianTree:
    return BrownianTree(0, (4, 3), t1=t1, dtype=F64)


def scale(*size: int) -> torch.nn.Parameter:
    return torch.nn.Parameter(0.2 + 0.5 * torch.rand(size, generator=torch.Generator().manual_seed(2), dtype=F64))


def test_state_is_that_of_the_solver_of_the_same_name() -> None:
    sde, x, cond, paths = LinearNoiseSDE(mlp(), 0.5), rand(4, 3), rand(4, 2, seed=1), tree(2.0)
    expected = sdeint(sde, x, steps=7, solver="reversible_heun", noise=paths.grid(7), cond=cond, t1=2.0)
    for noise in (paths, paths.grid(7)):
        end = sdeint_reversible(sde, x, steps=7, noise=noise, cond=cond, t1=2.0)
        torch.testing.assert_close(end, expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(), (3,), (4, 1), (4, 3)])
def test_gradient_is_that_of_backpropagation(kind: str, shape: tuple[int, ...]) -> None:
    field = mlp()
    sde = KINDS[kind](field, scale(*shape))
    x, cond = rand(4, 3).requires_grad_(), rand(4, 2, seed=1).requires_grad_()
    inputs = (x, cond, *sde.parameters())
    assert len(inputs) == 3 + len(list(field.parameters()))
    gradients = []
    for gradient, noise in (("reversible", tree()), ("reversible", tree().grid(30)), ("direct", tree())):
        end = sdeint_reversible(sde, x, steps=30, noise=noise, cond=cond, gradient=gradient)  # type: ignore[arg-type]
        gradients.append((end.detach(), *torch.autograd.grad(end.square().sum(), inputs)))
    for ours, by_grid, direct in zip(*gradients, strict=True):
        # Rounding of 30 steps there and back.
        torch.testing.assert_close(ours, direct, rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(by_grid, direct, rtol=1e-11, atol=1e-11)


def test_gradient_against_finite_differences() -> None:
    sde = LinearNoiseSDE(mlp(), scale(3))

    def run(x: Tensor, cond: Tensor, *parameters: Tensor) -> Tensor:
        return sdeint_reversible(sde, x, steps=3, noise=tree(), cond=cond)

    inputs = (rand(4, 3).requires_grad_(), rand(4, 2, seed=1).requires_grad_(), *sde.parameters())
    assert torch.autograd.gradcheck(run, inputs)


def test_gradient_of_geometric_brownian_motion_in_closed_form() -> None:
    """x = x0 exp((mu - s^2 / 2) t + s W), on the path of the tree: d x / d x0 = x / x0 and d x / d s = (W - s) x."""
    level, paths = torch.nn.Parameter(torch.full((4, 3), 0.5, dtype=F64)), tree()
    x = (1 + rand(4, 3).abs()).requires_grad_()
    end = sdeint_reversible(LinearNoiseSDE(lambda t, x, cond: 0.3 * x, level), x, steps=256, noise=paths)
    by_x, by_level = torch.autograd.grad(end.sum(), (x, level))
    exact = x.detach() * torch.exp(0.3 - 0.125 + 0.5 * paths(1.0))
    # Order 1: the error of 256 steps.
    torch.testing.assert_close(by_x, exact / x.detach(), rtol=2e-2, atol=0)
    torch.testing.assert_close(by_level, (paths(1.0) - 0.5) * exact, rtol=2e-2, atol=2e-2)


def saved(gradient: Any, sde: SDE, steps: int) -> int:
    x, cond = rand(4, 3).requires_grad_(), rand(4, 2)
    return saved_numbers(lambda: sdeint_reversible(sde, x, steps=steps, noise=tree(), cond=cond, gradient=gradient))


@pytest.mark.parametrize("kind", KINDS)
def test_memory_of_the_gradient_does_not_grow_with_the_steps(kind: str) -> None:
    sde = KINDS[kind](mlp(), scale(3))
    few, many = (saved("reversible", sde, steps) for steps in (3, 48))
    assert few == many < saved("direct", sde, 3)
    assert saved("direct", sde, 48) > 8 * saved("direct", sde, 3)


def test_gradient_goes_only_where_it_is_wanted() -> None:
    sde, x, cond = LinearNoiseSDE(mlp(), 0.5), rand(4, 3), rand(4, 2).requires_grad_()
    sde.requires_grad_(False)
    sdeint_reversible(sde, x, steps=3, noise=tree(), cond=cond).sum().backward()
    assert cond.grad is not None and cond.grad.abs().min() > 0
    assert all(p.grad is None for p in sde.parameters())
    with torch.no_grad():
        assert not sdeint_reversible(sde, x, steps=3, noise=tree(), cond=cond).requires_grad
    assert not sdeint_reversible(sde, x, steps=3, noise=tree(), cond=cond.detach()).requires_grad


def test_float32_follows_float64() -> None:
    gradients = []
    for dtype in (F64, torch.float32):
        sde, x = LinearNoiseSDE(mlp().to(dtype), 0.5), rand(4, 3).to(dtype).requires_grad_()
        noise = BrownianTree(0, (4, 3), dtype=dtype)
        end = sdeint_reversible(sde, x, steps=20, noise=noise, cond=rand(4, 2).to(dtype))
        gradients.append(torch.autograd.grad(end.sum(), x)[0])
    assert gradients[1].dtype == torch.float32
    torch.testing.assert_close(gradients[1].double(), gradients[0], rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
def test_gpu_equals_cpu() -> None:
    gradients = []
    for device in ("cpu", "cuda"):
        sde, x = LinearNoiseSDE(mlp(), 0.5).to(device), rand(4, 3).to(device).requires_grad_()
        noise = BrownianTree(0, (4, 3), dtype=F64, device=device)
        end = sdeint_reversible(sde, x, steps=20, noise=noise, cond=rand(4, 2).to(device))
        gradients.append(torch.autograd.grad(end.sum(), x)[0].cpu())
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-10)


def test_bad_arguments_are_refused() -> None:
    sde, x = LangevinSDE(lambda t, x, cond: -x, 1.0), rand(4, 3)
    with pytest.raises(ValueError, match="gradient must be 'reversible' or 'direct', got 'adjoint'"):
        sdeint_reversible(sde, x, steps=1, noise=tree(), gradient="adjoint")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        sdeint_reversible(sde, x, steps=0, noise=tree())
    with pytest.raises(ValueError, match=r"t1 must be above t0, got t0=1\.0 and t1=1\.0"):
        sdeint_reversible(sde, x, steps=1, noise=tree(), t0=1.0)
    with pytest.raises(ValueError, match=r"noise must be like x, \[4, 3\] torch.float32.*got .*float64"):
        sdeint_reversible(sde, x.float(), steps=1, noise=tree())
    with pytest.raises(ValueError, match=r"noise must be .*got \(\[2, 4, 3\]"):
        sdeint_reversible(sde, x, steps=3, noise=tree().grid(2))
    grid = tree().grid(2)
    with pytest.raises(ValueError, match="noise must not require a gradient, got one; use gradient='direct'"):
        sdeint_reversible(sde, x, steps=2, noise=BrownianGrid(grid.dt, grid.w.requires_grad_()))
    hidden = torch.ones(3, dtype=F64, requires_grad=True)
    with pytest.raises(ValueError, match=r"needs a gradient for a tensor of shape \[3\] that is no parameter"):
        sdeint_reversible(LangevinSDE(lambda t, x, cond: -x * hidden.exp(), 1.0), x, steps=1, noise=tree())


def test_a_tensor_that_acts_late_and_is_no_parameter_is_refused() -> None:
    c = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    sde = LangevinSDE(lambda t, x, _: -x if float(t) < 0.5 else -c * x, 0.3)
    noise = BrownianTree(0, (2, 1), dtype=torch.float64)
    with pytest.raises(ValueError, match="parameter"):
        sdeint_reversible(sde, torch.ones(2, 1, dtype=torch.float64), steps=8, noise=noise)


def test_a_way_back_that_misses_the_start_is_an_error() -> None:
    """Stiff decay, where the two states part, and dropout, which the way back draws anew."""
    x = torch.ones(4, 2, dtype=F64, requires_grad=True)
    paths = BrownianTree(0, (4, 2), dtype=F64)
    for drift in (lambda t, x, cond: -40 * x, lambda t, x, cond: torch.nn.functional.dropout(x)):
        sde = LangevinSDE(drift, 0.3)
        with pytest.raises(RuntimeError, match=r"the way back misses the start, by .*use gradient='direct'"):
            sdeint_reversible(sde, x, steps=128, noise=paths).sum().backward()
        sdeint_reversible(sde, x, steps=128, noise=paths, gradient="direct").sum().backward()
