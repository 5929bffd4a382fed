import math

import numpy as np
import pytest
import torch
from torch import Tensor

from driftrl.dynamics.adaptive import odeint_adaptive
from driftrl.dynamics.fields import Time, VelocityField
from driftrl.dynamics.ode import HEUN, RK4, odeint
from driftrl.dynamics.step_control import AdaptiveResult, Status

from .draws import column, mlp, rand
from .known_fields import LinearField

F64 = torch.float64


def riccati(t: Time, x: Tensor, cond: Tensor | None) -> Tensor:
    """x' = -2 t x^2 has the solution 1 / (t^2 + 1 / x(0)): the larger x(0), the harder."""
    return -2 * column(t) * x.square()


STARTS = torch.logspace(-1, 2, 32, dtype=F64).unsqueeze(-1)
ENDS = 1 / (1 + 1 / STARTS)


@pytest.mark.parametrize("tolerance", [1e-4, 1e-6, 1e-8, 1e-10])
def test_error_of_every_row_follows_the_tolerance(tolerance: float) -> None:
    result = odeint_adaptive(riccati, STARTS, rtol=tolerance, atol=tolerance)
    # The tolerance bounds each step's error, the problem damps it: a few times the tolerance at the end.
    assert (result.checked() - ENDS).abs().max() < 5 * tolerance
    assert (result.t == 1).all()


def test_work_grows_as_the_fifth_root_of_the_tolerance() -> None:
    steps = [odeint_adaptive(riccati, STARTS, rtol=r, atol=r).accepted.sum().item() for r in (1e-7, 1e-12)]
    assert 8 < steps[1] / steps[0] < 12  # 10^(5 / 5)


def test_agrees_with_scipy() -> None:
    integrate = pytest.importorskip("scipy.integrate")
    field, x, cond = mlp(), 2 * rand(4, 3), rand(4, 2, seed=1)
    result = odeint_adaptive(field, x, rtol=1e-9, atol=1e-9, cond=cond)
    for b in range(4):

        def slope(t: float, y: np.ndarray, b: int = b) -> np.ndarray:
            with torch.no_grad():
                return field(t, torch.from_numpy(y)[None], cond[b : b + 1])[0].numpy()

        solution = integrate.solve_ivp(slope, (0, 1), x[b].numpy(), "RK45", rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(result.x[b].detach().numpy(), solution.y[:, -1], rtol=0, atol=2e-8)
        # The same pair and tolerance, another controller and first step: about as many calls.
        assert result.calls[b].item() == pytest.approx(solution.nfev, rel=0.35)


def test_row_alone_equals_row_in_a_batch_bit_for_bit() -> None:
    """Elementwise fields round the same way in any batch; rows finish at different times."""
    batch = odeint_adaptive(riccati, STARTS)
    assert len(batch.accepted.unique()) > 5
    for b in range(0, 32, 5):
        alone = odeint_adaptive(riccati, STARTS[b : b + 1])
        for name in AdaptiveResult.__dataclass_fields__.keys() - {"states"}:
            assert torch.equal(getattr(alone, name), getattr(batch, name)[b : b + 1]), name


def test_row_of_a_network_is_independent_of_its_batch_with_value_and_gradient() -> None:
    field, x, cond = mlp(), rand(17, 3).requires_grad_(), rand(17, 2).requires_grad_()
    with torch.no_grad():
        x *= torch.linspace(0.1, 30, 17)[:, None]
    batch = odeint_adaptive(field, x, cond=cond)
    gradients = torch.autograd.grad(batch.x.sum(), (x, cond))
    for b in (0, 8, 16):
        alone = odeint_adaptive(field, x[b : b + 1], cond=cond[b : b + 1])
        torch.testing.assert_close(alone.x, batch.x[b : b + 1], rtol=0, atol=1e-12)
        for ours, theirs in zip(torch.autograd.grad(alone.x.sum(), (x, cond)), gradients, strict=True):
            torch.testing.assert_close(ours[b], theirs[b], rtol=0, atol=1e-11)
    shared = odeint_adaptive(field, x, cond=cond[:1])
    torch.testing.assert_close(shared.x, odeint_adaptive(field, x, cond=cond[:1].expand(17, -1)).x, rtol=0, atol=1e-12)


def test_worst_row_is_better_than_with_a_joint_step_size_at_equal_evaluations() -> None:
    torchdiffeq = pytest.importorskip("torchdiffeq")
    result = odeint_adaptive(riccati, STARTS, rtol=1e-6, atol=1e-6)
    ours, per_row = (result.x - ENDS).abs().max(), result.calls.double().mean()
    times = torch.tensor([0.0, 1.0], dtype=F64)
    for tolerance in (1e-5, 1e-6, 1e-7, 1e-8):  # from fewer to more evaluations than ours
        calls = 0

        def slope(t: Tensor, y: Tensor) -> Tensor:
            nonlocal calls
            calls += 1
            return -2 * t * y.square()

        joint = torchdiffeq.odeint(slope, STARTS, times, rtol=tolerance, atol=tolerance, method="dopri5")[-1]
        if calls > per_row:
            break
    assert calls > per_row
    assert ours < 0.5 * (joint - ENDS).abs().max()


@pytest.mark.parametrize("span", [(1.0, 0.0), (-0.7, 0.3), (0.2, 0.2), (2.0, 5.0)])
def test_any_span_against_the_matrix_exponential(span: tuple[float, float]) -> None:
    matrix, x = rand(3, 3), rand(5, 3, seed=1)
    result = odeint_adaptive(LinearField(matrix), x, rtol=1e-9, atol=1e-9, t0=span[0], t1=span[1])
    exact = x @ torch.linalg.matrix_exp((span[1] - span[0]) * matrix).T
    torch.testing.assert_close(result.checked(), exact, rtol=1e-7, atol=1e-7)
    assert (result.t == span[1]).all()


def test_end_time_is_exact_whatever_the_rounding() -> None:
    ends = [k / 7 for k in range(1, 30) if -1 / 3 + (k / 7 + 1 / 3) != k / 7]
    assert ends
    for t1 in ends:
        result = odeint_adaptive(riccati, STARTS[:3], rtol=1.0, atol=100.0, t0=-1 / 3, t1=t1)
        assert (result.t == t1).all()


def test_other_pairs_work() -> None:
    result = odeint_adaptive(riccati, STARTS, rtol=1e-4, atol=1e-4, solver=HEUN)
    assert (result.checked() - ENDS).abs().max() < 1e-4  # Euler's error is controlled, Heun's is smaller
    assert torch.equal(result.calls, 2 * (result.accepted + result.rejected) + 2)


def test_a_weight_that_acts_late_gets_its_gradient() -> None:
    class Late(VelocityField):
        def __init__(self) -> None:
            super().__init__(1)
            self.k = torch.nn.Parameter(torch.tensor(0.5, dtype=F64))

        def forward(self, t: Time, x: Tensor, cond: Tensor | None = None) -> Tensor:
            assert isinstance(t, Tensor)
            return torch.where(t.unsqueeze(-1) < 0.5, torch.zeros_like(x), -self.k * x) if (t > 0.4).any() else 0 * x

    field = Late()
    end = odeint_adaptive(field, torch.ones(1, 1, dtype=F64), rtol=1e-9, atol=1e-9).x
    (gradient,) = torch.autograd.grad(end.sum(), field.k)
    assert gradient.item() == pytest.approx(-0.5 * math.exp(-0.25), rel=1e-5)


def test_counts_are_those_of_the_calls() -> None:
    rows = 0

    def counted(t: Time, x: Tensor, cond: Tensor | None) -> Tensor:
        nonlocal rows
        rows += len(x)
        return riccati(t, x, cond)

    with torch.no_grad():  # with gradients the steps found are made once more
        result = odeint_adaptive(counted, STARTS[20:21])
    assert result.calls.item() == rows == 2 + 6 * (result.accepted + result.rejected).item()
    rows = 0
    with torch.no_grad():
        result = odeint_adaptive(counted, STARTS)
    assert result.calls.sum() <= rows < 32 * result.calls.max()  # finished rows are held for a while, not to the end


def test_statuses_of_rows_that_fail_leave_the_others_alone() -> None:
    def field(t: Time, x: Tensor, cond: Tensor | None) -> Tensor:
        return x.square()  # x0 / (1 - x0 t) has a pole at 1 / x0

    x = torch.tensor([[0.5], [2.0], [float("nan")], [-1.0]], dtype=F64, requires_grad=True)
    result = odeint_adaptive(field, x)
    good = [0, 3]
    assert result.status.tolist() == [Status.DONE, Status.STEP_TOO_SMALL, Status.NOT_FINITE, Status.DONE]
    torch.testing.assert_close(result.x[good], (x / (1 - x))[good], rtol=1e-5, atol=1e-5)
    assert result.t[1].item() == pytest.approx(0.5, abs=1e-5)  # the tolerance
    assert result.accepted[2] == result.rejected[2] == 0
    (gradient,) = torch.autograd.grad(result.x[good].sum(), x)
    torch.testing.assert_close(gradient[good], (1 - x[good]) ** -2, rtol=1e-4, atol=0)
    with pytest.raises(RuntimeError, match=r"1 of 4 rows: The tolerance needs steps below.*1 of 4 rows: .*not finite"):
        result.checked()


def test_too_few_steps_are_reported_and_the_state_belongs_to_the_time_reached() -> None:
    result = odeint_adaptive(riccati, STARTS, max_steps=8)
    done = result.status == Status.DONE
    assert 0 < done.sum() < 32
    assert (result.status[~done] == Status.MAX_STEPS).all() and (result.t[~done] < 1).all()
    exact = 1 / (result.t[:, None] ** 2 + 1 / STARTS)
    torch.testing.assert_close(result.x, exact, rtol=1e-4, atol=1e-4)
    assert (result.accepted + result.rejected)[~done].eq(8).all()
    with pytest.raises(RuntimeError, match="raise max_steps"):
        result.checked()


def test_field_that_ends_inside_is_not_finite() -> None:
    result = odeint_adaptive(lambda t, x, cond: -torch.sqrt(x), torch.tensor([[0.1], [2.0]], dtype=F64))
    assert result.status.tolist() == [Status.NOT_FINITE, Status.DONE]  # (sqrt(x0) - t / 2)^2 ends at 2 sqrt(x0)
    assert result.t[0].item() == pytest.approx(2 * 0.1**0.5, abs=1e-3)


def test_rejected_steps_do_not_spoil_the_gradient() -> None:
    """The square root of what a too long step makes negative is nan: such a step is rejected, and leaves no trace."""
    x = torch.full((1, 1), 1.0, dtype=F64, requires_grad=True)
    result = odeint_adaptive(lambda t, x, cond: -20 * torch.sqrt(x - 0.5) * (x - 0.5), x, rtol=1e-2, atol=1e-2)
    assert result.rejected > 0
    (gradient,) = torch.autograd.grad(result.checked().sum(), x)
    assert gradient.isfinite().all()


def test_gradient_in_closed_form() -> None:
    x = STARTS.clone().requires_grad_()
    result = odeint_adaptive(riccati, x, rtol=1e-9, atol=1e-9)
    (gradient,) = torch.autograd.grad(result.checked().sum(), x)
    torch.testing.assert_close(gradient, 1 / (STARTS + 1).square(), rtol=0, atol=1e-7)
    assert torch.equal(result.x.detach(), odeint_adaptive(riccati, STARTS, rtol=1e-9, atol=1e-9).x)


def test_gradients_against_finite_differences() -> None:
    field = mlp()

    def run(x: Tensor, cond: Tensor, *parameters: Tensor) -> Tensor:
        return odeint_adaptive(field, x, rtol=1e-10, atol=1e-10, cond=cond).x

    inputs = (rand(2, 3).requires_grad_(), rand(2, 2, seed=1).requires_grad_(), *field.parameters())
    # Sizes react to the inputs and are held fixed in the gradient: equal up to the tolerance.
    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)


def test_gradient_of_parameters_without_gradient_of_the_state() -> None:
    field, x, cond = mlp(), rand(4, 3), rand(4, 2)
    odeint_adaptive(field, x, rtol=1e-8, atol=1e-8, cond=cond).x.sum().backward()
    adaptive = field.output.weight.grad
    assert adaptive is not None
    field.zero_grad()
    odeint(field, x, steps=50, solver="rk4", cond=cond).sum().backward()
    torch.testing.assert_close(adaptive, field.output.weight.grad, rtol=0, atol=1e-6)
    with torch.no_grad():
        assert not odeint_adaptive(field, x.requires_grad_(), cond=cond).x.requires_grad


def test_float32_stays_float32_and_keeps_its_tolerance() -> None:
    result = odeint_adaptive(riccati, STARTS.float())
    assert result.x.dtype == result.t.dtype == torch.float32
    assert (result.checked() - ENDS).abs().max() < 5e-5


def test_empty_batch_and_field_at_rest() -> None:
    assert odeint_adaptive(riccati, STARTS[:0]).checked().shape == (0, 1)
    x = rand(3, 2)
    result = odeint_adaptive(lambda t, x, cond: torch.zeros_like(x), x)
    assert torch.equal(result.checked(), x)
    assert result.accepted.max() < 20


@pytest.mark.gpu
def test_gpu_equals_cpu() -> None:
    field, x, cond = mlp(), rand(9, 3), rand(9, 2)
    ours = odeint_adaptive(field, x, cond=cond)
    theirs = odeint_adaptive(field.cuda(), x.cuda(), cond=cond.cuda())
    torch.testing.assert_close(theirs.checked().cpu(), ours.checked(), rtol=0, atol=1e-11)
    assert torch.equal(theirs.calls.cpu(), ours.calls)


def test_bad_arguments_are_refused() -> None:
    x = torch.zeros(4, 2)
    for rtol, atol in ((-1.0, 1e-6), (1e-6, 0.0)):
        with pytest.raises(ValueError, match=f"rtol must be at least 0 and atol positive, got {rtol} and {atol}"):
            odeint_adaptive(riccati, x, rtol=rtol, atol=atol)
    with pytest.raises(ValueError, match="max_steps must be at least 1, got 0"):
        odeint_adaptive(riccati, x, max_steps=0)
    with pytest.raises(ValueError, match=r"solver must have an error estimate.*got 'rk4'"):
        odeint_adaptive(riccati, x, solver=RK4)
    with pytest.raises(ValueError, match=r"x must have shape \[B, D\], got \[2\]"):
        odeint_adaptive(riccati, torch.zeros(2))
    with pytest.raises(ValueError, match=r"field must return the shape of x, \[4, 1\], got \[4, 4\]"):
        odeint_adaptive(lambda t, x, cond: t * x, torch.zeros(4, 1))
