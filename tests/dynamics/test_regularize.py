import pytest
import torch
from torch import Tensor

from driftrl.dynamics.fields import MLPField, Time
from driftrl.dynamics.ode import EULER, HEUN
from driftrl.dynamics.regularize import jacobian_penalty, local_error_penalty

from .known_fields import LinearField

F64 = torch.float64


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def mlp(hidden: tuple[int, ...] = (8, 8)) -> MLPField:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return MLPField(3, 2, hidden, last_layer_scale=1.0).double()


def test_linear_penalty_and_gradient_in_closed_form() -> None:
    matrix = rand(3, 3).requires_grad_()
    penalty = jacobian_penalty(LinearField(matrix), 0.0, rand(4, 3, seed=1))
    torch.testing.assert_close(penalty, torch.linalg.matrix_norm(matrix).square().expand(4))
    torch.testing.assert_close(torch.autograd.grad(penalty.sum(), matrix)[0], 8 * matrix)


def test_penalty_equals_autodiff() -> None:
    field, x, cond, t = mlp(), rand(4, 3), rand(4, 2), torch.rand(4, dtype=F64)
    penalty = jacobian_penalty(field, t, x, cond)
    for b in range(4):
        jacobian = torch.func.jacrev(lambda y, b=b: field(t[b : b + 1], y[None], cond[b : b + 1])[0])(x[b])
        torch.testing.assert_close(penalty[b], torch.linalg.matrix_norm(jacobian).square())


def test_weight_scales_each_row() -> None:
    field, x, cond, weight = mlp(), rand(4, 3), rand(4, 2), torch.tensor([0.0, 1.0, 2.0, 0.5], dtype=F64)
    for probe in (None, rand(4, 3)):
        plain = jacobian_penalty(field, 0.3, x, cond, probe=probe)
        torch.testing.assert_close(jacobian_penalty(field, 0.3, x, cond, weight=weight, probe=probe), weight * plain)


def test_probe_estimate_is_unbiased() -> None:
    field, x, cond = mlp(), rand(1, 3), rand(1, 2)
    signs = torch.tensor([[(1.0 if k >> i & 1 else -1.0) for i in range(3)] for k in range(8)], dtype=F64)
    estimates = jacobian_penalty(field, 0.3, x.expand(8, 3), cond.expand(8, 2), probe=signs)
    torch.testing.assert_close(estimates.mean(), jacobian_penalty(field, 0.3, x, cond)[0], rtol=0, atol=1e-13)
    assert estimates.std() > 1e-3


@pytest.mark.parametrize("probe", [None, rand(2, 3, seed=5)], ids=["exact", "probe"])
def test_gradient_in_state_conditioning_and_parameters(probe: Tensor | None) -> None:
    field = mlp((4,))

    def run(x: Tensor, cond: Tensor, *parameters: Tensor) -> Tensor:
        return jacobian_penalty(field, 0.3, x, cond, probe=probe)

    inputs = (rand(2, 3).requires_grad_(), rand(2, 2).requires_grad_(), *field.parameters())
    assert torch.autograd.gradcheck(run, inputs)


def test_descending_the_penalty_flattens_the_field() -> None:
    field, x, cond = mlp(), rand(16, 3), rand(16, 2)
    optimizer = torch.optim.Adam(field.parameters(), 1e-2)
    before = jacobian_penalty(field, 0.5, x, cond).mean().item()
    for _ in range(100):
        optimizer.zero_grad()
        jacobian_penalty(field, 0.5, x, cond).mean().backward()
        optimizer.step()
    assert jacobian_penalty(field, 0.5, x, cond).mean().item() < 0.05 * before


def test_bad_arguments_are_refused() -> None:
    field, x = LinearField(torch.eye(2)), torch.zeros(4, 2)
    with pytest.raises(ValueError, match=r"weight must have shape \[4\], got \[4, 1\]"):
        jacobian_penalty(field, 0.0, x, weight=torch.zeros(4, 1))
    with pytest.raises(ValueError, match=r"probe must have the shape of x, \[4, 2\], got \[2\]"):
        jacobian_penalty(field, 0.0, x, probe=torch.zeros(2))
    with pytest.raises(ValueError, match=r"t must be a float or have shape \[4\], got \[1\]"):
        jacobian_penalty(field, torch.zeros(1), x)
    with pytest.raises(ValueError, match="cond must be None"):
        jacobian_penalty(field, 0.0, x, x)


def test_local_error_on_a_linear_field_in_closed_form() -> None:
    matrix, x, h = 2 * rand(3, 3), rand(4, 3, seed=1), 0.3
    field, powers = LinearField(matrix), [torch.linalg.matrix_power(h * matrix, k) for k in range(8)]
    # Heun minus Euler is (hA)^2 x / 2. For DOPRI5 the difference of the two stability polynomials (see test_ode).
    heun = h * (x @ powers[2].T / 2).norm(dim=1)
    torch.testing.assert_close(local_error_penalty(field, 0.0, x, h=h, solver=HEUN), heun)
    dopri5 = -97 / 120000 * powers[5] + 13 / 40000 * powers[6] - powers[7] / 24000
    torch.testing.assert_close(local_error_penalty(field, 0.0, x, h=h), h * (x @ dopri5.T).norm(dim=1))


def test_local_error_vanishes_where_the_solver_is_exact() -> None:
    def field(t: Time, x: Tensor, cond: Tensor | None) -> Tensor:
        assert isinstance(t, Tensor)
        return (1 - t[:, None]) ** 3 + 0 * x

    x, t = rand(4, 1), torch.linspace(0, 0.7, 4, dtype=F64)
    torch.testing.assert_close(local_error_penalty(field, t, x, h=0.3), torch.zeros(4, dtype=F64), rtol=0, atol=1e-16)
    # Heun minus Euler on a function of time is h/2 times its increment.
    expected = 0.3 * 0.15 * ((1 - t) ** 3 - (0.7 - t) ** 3)
    torch.testing.assert_close(local_error_penalty(field, t, x, h=0.3, solver=HEUN), expected)


def test_the_solver_penalty_has_right_gradients_and_rests_at_rest() -> None:
    field = mlp((4,))
    t = torch.tensor([0.2, 0.7], dtype=F64)

    def run(x: Tensor, cond: Tensor, *parameters: Tensor) -> Tensor:
        return 1e4 * local_error_penalty(field, t, x, cond, h=0.3)

    inputs = (rand(2, 3).requires_grad_(), rand(2, 2).requires_grad_(), *field.parameters())
    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)
    gradients = torch.autograd.grad(run(*inputs).sum(), inputs)
    assert all(g.isfinite().all() and g.any() for g in gradients)
    untrained = MLPField(3, 2)
    value = local_error_penalty(untrained, 0.3, torch.randn(4, 3), torch.randn(4, 2))
    value.sum().backward()
    assert not value.any()
    assert all(p.grad is None or p.grad.isfinite().all() for p in untrained.parameters())


def test_descending_the_local_error_saves_work() -> None:
    field, x, cond = mlp(), rand(16, 3), rand(16, 2)
    optimizer = torch.optim.Adam(field.parameters(), 1e-2)
    generator = torch.Generator().manual_seed(0)
    before = local_error_penalty(field, 0.45, x, cond).mean().item()
    for _ in range(100):
        optimizer.zero_grad()
        t = 0.9 * torch.rand(16, generator=generator, dtype=F64)
        local_error_penalty(field, t, x, cond).mean().backward()
        optimizer.step()
    assert local_error_penalty(field, 0.45, x, cond).mean().item() < 0.3 * before


def test_solver_without_error_estimate_is_refused() -> None:
    with pytest.raises(ValueError, match="solver must have an error estimate, as DOPRI5 and HEUN have, got 'euler'"):
        local_error_penalty(LinearField(torch.eye(2)), 0.0, torch.zeros(4, 2), solver=EULER)


@pytest.mark.gpu
def test_gpu_equals_cpu() -> None:
    field, x, cond = mlp(), rand(9, 3), rand(9, 2)

    ours = local_error_penalty(field, 0.3, x, cond)
    theirs = local_error_penalty(field.cuda(), 0.3, x.cuda(), cond.cuda())
    torch.testing.assert_close(theirs.cpu(), ours, rtol=1e-8, atol=1e-10)
