import math

import pytest
import torch
from torch import Tensor

from driftrl.dynamics.adaptive import odeint_adaptive
from driftrl.dynamics.dense import Event, interpolate
from driftrl.dynamics.fields import Time
from driftrl.dynamics.ode import DOPRI5, HEUN, Tableau, combine, stage_slopes
from driftrl.dynamics.regularize import local_error_penalty
from driftrl.dynamics.step_control import Span, Status, Trial

from .draws import column, mlp, rand

F64 = torch.float64
GRAVITY = 9.81


def turning(t: Time, x: Tensor, cond: Tensor | None) -> Tensor:
    """The harmonic oscillator: a turn at unit speed."""
    return torch.stack([x[:, 1], -x[:, 0]], 1)


def turned(x: Tensor, t: Tensor) -> Tensor:
    """[T, B, 2] for times [T]."""
    cos, sin = t.cos()[:, None], t.sin()[:, None]
    return torch.stack([cos * x[:, 0] + sin * x[:, 1], cos * x[:, 1] - sin * x[:, 0]], 2)


def riccati(t: Time, x: Tensor, cond: Tensor | None) -> Tensor:
    """x' = -2 t x^2 has the solution 1 / (t^2 - t0^2 + 1 / x(t0))."""
    return -2 * column(t) * x.square()


def falling(t: Time, x: Tensor, cond: Tensor | None) -> Tensor:
    """(height, velocity) of a ball."""
    return torch.stack([x[:, 1], torch.full_like(x[:, 0], -GRAVITY)], 1)


def height(t: Time, x: Tensor, cond: Tensor | None) -> Tensor:
    return x[:, 0]


@pytest.mark.parametrize(("solver", "order"), [(DOPRI5, 5), (HEUN, 3)])
def test_interpolant_of_one_step_has_the_order_stated(solver: Tableau, order: int) -> None:
    """HEUN's state at the end of the step is itself off by O(h^3)."""
    x, fractions = rand(1, 2), torch.linspace(0.1, 0.9, 9, dtype=F64)
    errors = []
    for size in (0.2, 0.1):
        h = torch.tensor([size], dtype=F64)
        slopes = stage_slopes(lambda t, y: turning(t, y, None), solver, 0.0, h, x)
        end = combine(x, h, solver.b, slopes)
        slopes.append(turning(h, end, None))
        bend = combine(torch.zeros_like(x), h, solver.dense, slopes) if solver.dense else None
        span, trial = Span(0 * h, h, h), Trial(end, end, (slopes[-1],), bend)
        found = torch.cat([interpolate(span, x, (slopes[0],), trial, f.reshape(1)) for f in fractions])
        errors.append((found - turned(x, fractions * size)[:, 0]).abs().max().item())
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.15)


def test_cubic_of_exact_ends_has_order_four() -> None:
    x, errors = rand(1, 2), []
    for size in (0.2, 0.1):
        h, half = torch.tensor([size], dtype=F64), torch.tensor([0.5], dtype=F64)
        end = turned(x, h)[0]
        trial = Trial(end, end, (turning(h, end, None),))
        found = interpolate(Span(0 * h, h, h), x, (turning(h, x, None),), trial, half)
        errors.append((found - turned(x, half * h)[0]).abs().max().item())
    assert math.log2(errors[0] / errors[1]) == pytest.approx(4, abs=0.1)


@pytest.mark.parametrize(("solver", "tolerance"), [(DOPRI5, 1e-4), (DOPRI5, 1e-8), (HEUN, 1e-4)])
def test_states_at_any_times_follow_the_tolerance(solver: Tableau, tolerance: float) -> None:
    x = torch.linspace(0.1, 3, 8, dtype=F64).unsqueeze(1) * rand(8, 2)
    times = torch.tensor([0.0, 7.0, 0.3, 1e-6, 6.999, 3.3, math.pi], dtype=F64)
    result = odeint_adaptive(turning, x, rtol=tolerance, atol=tolerance, solver=solver, t1=7.0, at=times)
    assert result.states is not None
    # The errors of the steps add up over the time.
    assert (result.states - turned(x, times)).abs().max() < 20 * tolerance
    torch.testing.assert_close(result.states[1], result.x, rtol=0, atol=1e-14)
    assert torch.equal(result.states[0], x)
    plain = odeint_adaptive(turning, x, rtol=tolerance, atol=tolerance, solver=solver, t1=7.0)
    assert torch.equal(result.calls, plain.calls)  # no step is made for them
    assert torch.equal(result.x, plain.x)


def test_states_backwards_and_those_of_torchdiffeq() -> None:
    torchdiffeq = pytest.importorskip("torchdiffeq")
    field, x, cond, times = mlp(), rand(5, 3), rand(5, 2, seed=1), torch.tensor([1.0, 0.83, 0.2, 0.1], dtype=F64)
    ours = odeint_adaptive(field, x, rtol=1e-8, atol=1e-8, cond=cond, t0=1.0, t1=0.1, at=times).states
    theirs = torchdiffeq.odeint(lambda t, y: field(t, y, cond), x, times, rtol=1e-9, atol=1e-9, method="dopri5")
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-7)


def test_row_alone_has_the_states_of_the_row_in_a_batch() -> None:
    x, times = torch.logspace(-1, 2, 16, dtype=F64).unsqueeze(-1), torch.linspace(0, 1, 9, dtype=F64)
    batch = odeint_adaptive(riccati, x, at=times)
    assert batch.states is not None and len(batch.accepted.unique()) > 3
    torch.testing.assert_close(batch.states[..., 0], 1 / (times[:, None] ** 2 + 1 / x.T), rtol=1e-4, atol=1e-4)
    for b in (0, 7, 15):
        alone = odeint_adaptive(riccati, x[b : b + 1], at=times)
        assert alone.states is not None and torch.equal(alone.states, batch.states[:, b : b + 1])


def test_states_after_the_end_of_a_row_are_nan() -> None:
    x = torch.tensor([[0.5], [2.0]], dtype=F64, requires_grad=True)  # the second has a pole at 0.5
    result = odeint_adaptive(lambda t, x, cond: x.square(), x, at=(0.25, 0.75))
    assert result.states is not None
    assert result.states.isnan().flatten().tolist() == [False, False, False, True]
    (gradient,) = torch.autograd.grad(result.states[0].sum(), x)
    torch.testing.assert_close(gradient, (1 - 0.25 * x.detach()) ** -2, rtol=1e-4, atol=0)


def fall(x: Tensor) -> Tensor:
    """Time from (height, velocity) to the ground."""
    return (x[:, 1] + torch.sqrt(x[:, 1].square() + 2 * GRAVITY * x[:, 0])) / GRAVITY


def test_ball_meets_the_ground_and_so_do_the_gradients() -> None:
    x = torch.tensor([[1.0, 0.0], [10.0, 3.0], [0.2, -4.0], [100.0, 0.0]], dtype=F64, requires_grad=True)
    result = odeint_adaptive(falling, x, t1=3.0, event=height)
    assert result.status.tolist() == [Status.EVENT, Status.EVENT, Status.EVENT, Status.DONE]
    expected = fall(x)[:3]
    torch.testing.assert_close(result.t[:3], expected, rtol=0, atol=1e-12)  # the field is a polynomial of t
    torch.testing.assert_close(result.checked()[:3, 1], x[:3, 1] - GRAVITY * expected, rtol=0, atol=1e-11)
    assert result.x[:3, 0].abs().max() < 1e-12 and result.t[3] == 3.0
    for ours, exact in ((result.t, expected), (result.x[:3, 1], x[:3, 1] - GRAVITY * expected)):
        (gradient,) = torch.autograd.grad(ours.sum(), x, retain_graph=True)
        torch.testing.assert_close(gradient, torch.autograd.grad(exact.sum(), x, retain_graph=True)[0])
    # On the ground, wherever it started.
    assert torch.autograd.grad(result.x[:3, 0].sum(), x)[0].abs().max() < 1e-12
    with torch.no_grad():
        torch.testing.assert_close(odeint_adaptive(falling, x, t1=3.0, event=height).t, result.t, rtol=0, atol=1e-14)


def test_ball_that_starts_on_the_ground_comes_back() -> None:
    x = torch.tensor([[0.0, 4.0], [0.0, 9.0]], dtype=F64)
    for _ in range(3):
        result = odeint_adaptive(falling, x, t1=5.0, event=height)
        torch.testing.assert_close(result.t, 2 * x[:, 1] / GRAVITY, rtol=0, atol=1e-11)
        x = torch.stack([torch.zeros_like(result.t), -0.8 * result.checked()[:, 1]], 1)  # exactly on the ground
    torch.testing.assert_close(x[:, 1], 0.8**3 * torch.tensor([4.0, 9.0], dtype=F64), rtol=0, atol=1e-10)


def test_event_of_an_oscillator_with_a_learned_level() -> None:
    """From (0, 1) the position is sin t: it passes the level c at arcsin c, where dt / dc = 1 / cos t."""
    level = torch.tensor([[0.3], [0.9], [-0.5]], dtype=F64, requires_grad=True)
    x = torch.tensor([[0.0, 1.0]], dtype=F64).expand(3, 2)

    def field(t: Time, x: Tensor, cond: Tensor | None) -> Tensor:
        return turning(t, x, None)

    def passes(t: Time, x: Tensor, cond: Tensor | None) -> Tensor:
        assert cond is not None
        return x[:, 0] - cond[:, 0]

    result = odeint_adaptive(field, x.clone().requires_grad_(), rtol=1e-9, atol=1e-9, cond=level, t1=6.0, event=passes)
    expected = torch.asin(level[:, 0])
    expected = torch.where(expected > 0, expected, math.pi - expected)
    torch.testing.assert_close(result.t, expected, rtol=0, atol=1e-8)
    ours, exact = (torch.autograd.grad(t.sum(), level)[0] for t in (result.t, expected))
    torch.testing.assert_close(ours, exact, rtol=1e-7, atol=0)


@pytest.mark.parametrize("dtype", [F64, torch.float32])
def test_event_ends_a_row_before_later_times_and_leaves_the_rest_of_the_batch(dtype: torch.dtype) -> None:
    x = torch.tensor([[1.0, 0.0], [30.0, 0.0]], dtype=dtype, requires_grad=True)
    result = odeint_adaptive(falling, x, t1=2.0, at=(0.4, 0.5, 2.0), event=height)
    assert result.states is not None and result.states.dtype == result.t.dtype == dtype
    assert result.states[..., 0].isnan().tolist() == [[False, False], [True, False], [True, False]]  # it lands at 0.45
    heights = x[:, 0] - 0.5 * GRAVITY * torch.tensor([0.4, 0.5, 2.0], dtype=dtype)[:, None] ** 2
    torch.testing.assert_close(result.states[:, 1, 0], heights[:, 1], rtol=1e-6, atol=1e-5)
    (gradient,) = torch.autograd.grad(result.states[0].sum(), x)
    torch.testing.assert_close(gradient, torch.tensor([[1.0, 1.4]] * 2, dtype=dtype))
    with torch.no_grad():
        again = odeint_adaptive(falling, x, t1=2.0, at=(0.4, 0.5, 2.0), event=height).states
    torch.testing.assert_close(again, result.states.detach(), equal_nan=True)


def test_gradients_in_times_in_closed_form() -> None:
    x = torch.logspace(-1, 1, 5, dtype=F64).unsqueeze(-1)
    t0, t1, at = (torch.tensor(t, dtype=F64, requires_grad=True) for t in (0.2, 1.3, [0.2, 0.5, 0.9]))
    result = odeint_adaptive(riccati, x, rtol=1e-10, atol=1e-10, t0=t0, t1=t1, at=at)
    assert result.states is not None

    def exact(t: Tensor) -> Tensor:
        return 1 / (t.reshape(-1, 1, 1) ** 2 - t0**2 + 1 / x)

    torch.testing.assert_close(result.checked(), exact(t1)[0], rtol=0, atol=1e-8)
    for ours, expected in ((result.x, exact(t1)), (result.states, exact(at))):
        inputs = (t0, t1) if ours is result.x else (t0, at)
        found, wanted = (torch.autograd.grad(y.sum(), inputs, retain_graph=True) for y in (ours, expected))
        torch.testing.assert_close(found, wanted, rtol=1e-7, atol=1e-7)


def test_gradient_in_the_times_is_the_velocity_however_long_the_steps() -> None:
    x = rand(3, 2)
    at = torch.tensor([0.0, 0.3, 1.0, 1.7, 2.0], dtype=F64, requires_grad=True)
    result = odeint_adaptive(turning, x, rtol=1e-3, atol=1e-3, t1=2.0, at=at)
    assert result.states is not None and result.accepted.max() < 5
    (found,) = torch.autograd.grad(result.states[..., 0].sum(), at)
    torch.testing.assert_close(found, result.states[..., 1].sum(1).detach(), rtol=1e-12, atol=1e-12)


def test_where_an_event_is_nan_it_does_not_happen() -> None:
    def oscillator(t: Time, x: Tensor, cond: Tensor | None) -> Tensor:
        return torch.stack([x[:, 1], -x[:, 0]], 1)

    start = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    never = odeint_adaptive(oscillator, start, t1=4.0, event=lambda t, x, c: torch.sqrt(x[:, 0] + 0.5) - 5)
    assert never.status.item() == Status.DONE and never.t.item() == 4
    # It is nan from cos t < -1/2 to cos t > -1/2, and 0 only where cos t = 1/2.
    once = odeint_adaptive(
        oscillator, start, t1=6.0, rtol=1e-9, atol=1e-9, event=lambda t, x, c: torch.sqrt(x[:, 0] + 0.5) - 1
    )
    assert once.status.item() == Status.EVENT and once.t.item() == pytest.approx(math.pi / 3, abs=1e-6)


def test_the_time_of_an_event_has_the_gradient_of_its_level_alone() -> None:
    level = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    ones = torch.ones(1, 1, dtype=torch.float64)
    found = odeint_adaptive(
        lambda t, x, c: -x, ones, t1=3.0, rtol=1e-9, atol=1e-9, event=lambda t, x, c: x[:, 0] - level
    )
    (gradient,) = torch.autograd.grad(found.t.sum(), level)
    assert gradient.item() == pytest.approx(-1 / 0.3, rel=1e-6)  # t = -log(level)


def test_a_later_start_delays_the_event() -> None:
    x, t0 = torch.tensor([[1.0, 0.0]], dtype=F64), torch.tensor(0.3, dtype=F64, requires_grad=True)
    result = odeint_adaptive(falling, x, t0=t0, t1=3.0, event=height)
    assert result.t.item() == pytest.approx(0.3 + math.sqrt(2 / GRAVITY), abs=1e-12)
    assert torch.autograd.grad(result.t.sum(), t0)[0].item() == pytest.approx(1.0, abs=1e-12)


def sinking(t: Time, x: Tensor, cond: Tensor | None) -> Tensor:
    return 0 * x - 1


@pytest.mark.parametrize("event", [lambda t, x, cond: (x[:, 0] - 0.1).relu(), lambda t, x, cond: (x[:, 0] - 0.1) ** 3])
def test_an_event_without_slope_has_a_time_and_an_infinite_gradient(event: Event) -> None:
    x = torch.tensor([[0.5], [0.7]], dtype=F64)
    with torch.no_grad():
        plain = odeint_adaptive(sinking, x, event=event)
    torch.testing.assert_close(plain.t, torch.tensor([0.4, 0.6], dtype=F64), rtol=0, atol=1e-5)
    result = odeint_adaptive(sinking, x.clone().requires_grad_(), event=event)
    torch.testing.assert_close(result.t.detach(), plain.t, rtol=0, atol=0)


def test_an_event_that_is_not_differentiable_serves_where_no_gradient_is_wanted() -> None:
    x = torch.tensor([[0.5], [0.7]], dtype=F64)
    result = odeint_adaptive(sinking, x, event=lambda t, x, cond: (x[:, 0] - 0.1).sign())
    torch.testing.assert_close(result.t, torch.tensor([0.4, 0.6], dtype=F64))
    with pytest.raises(ValueError, match="event must be differentiable in t or x, as a gradient of its time is wanted"):
        odeint_adaptive(sinking, x.requires_grad_(), event=lambda t, x, cond: x.detach()[:, 0] - 0.1)
    with pytest.raises(ValueError, match=r"event must return floating-point numbers, .*got torch\.bool"):
        odeint_adaptive(sinking, x, event=lambda t, x, cond: x[:, 0] > 0.1)


def test_second_derivatives_of_the_time_of_an_event_are_refused() -> None:
    x = torch.tensor([[2.0]], dtype=F64, requires_grad=True)
    result = odeint_adaptive(lambda t, x, cond: -(x**2), x, t1=9.0, event=lambda t, x, cond: x[:, 0] - 0.3)
    (gradient,) = torch.autograd.grad(result.t.sum(), x, retain_graph=True)
    assert gradient.item() == pytest.approx(0.25, rel=1e-4)  # of 1 / 0.3 - 1 / x
    with pytest.raises(RuntimeError, match="the time of an event has first derivatives only"):
        torch.autograd.grad(result.t.sum(), x, create_graph=True)


def test_a_row_that_fails_has_no_gradient_in_the_end_time() -> None:
    t1, x = torch.tensor(1.0, dtype=F64, requires_grad=True), torch.ones(1, 2, dtype=F64)
    result = odeint_adaptive(turning, x, t1=t1, rtol=1e-12, atol=1e-12, max_steps=1)
    assert (result.status == Status.MAX_STEPS).all()
    assert result.x.requires_grad
    (gradient,) = torch.autograd.grad(result.x.sum(), t1)
    assert gradient.item() == 0


def test_sum_of_errors_is_that_of_the_penalty_over_the_steps_made() -> None:
    x, total, t = rand(6, 3), torch.zeros(6, dtype=F64), torch.zeros(6, dtype=F64)
    field, cond, state = mlp(), rand(6, 2, seed=1), x
    options = {"rtol": 1e-8, "atol": 1e-8}
    final = odeint_adaptive(field, x, cond=cond, **options)  # type: ignore[arg-type]
    assert int(final.accepted.min()) > 3
    for steps in range(1, int((final.accepted + final.rejected).max()) + 1):
        result = odeint_adaptive(field, x, cond=cond, max_steps=steps, **options)  # type: ignore[arg-type]
        for b in range(6):
            if h := (result.t - t)[b].item():
                at = state[b : b + 1], cond[b : b + 1]
                total[b] += local_error_penalty(field, t[b : b + 1], *at, h=h)[0].detach()
        t, state = result.t, result.x.detach()
    torch.testing.assert_close(final.error.detach(), total, rtol=1e-5, atol=0)


def test_gradients_of_states_event_and_errors_against_finite_differences() -> None:
    field = mlp()

    def event(t: Time, x: Tensor, cond: Tensor | None) -> Tensor:
        assert cond is not None
        return (x * direction).sum(1) - cond[:, 1] - 0.1 * column(t)[:, 0]

    def run(x: Tensor, cond: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        result = odeint_adaptive(field, x, rtol=1e-8, atol=1e-8, cond=cond, event=event)
        assert result.status.tolist() == [Status.EVENT] * 2
        states = odeint_adaptive(field, x, rtol=1e-8, atol=1e-8, cond=cond, at=(0.35,)).states
        assert states is not None
        return result.t, result.x, states

    x, cond, direction = rand(2, 3), rand(2, 2, seed=1), rand(1, 3, seed=2)
    for _ in range(10):  # a level, as part of cond, that both rows pass at t = 0.4 at the latest
        with torch.no_grad():
            there = odeint_adaptive(field, x, cond=cond, t1=0.4).x
            cond[:, 1] = (there * direction).sum(1) - 0.04
    inputs = (x.requires_grad_(), cond.requires_grad_(), *field.parameters())
    assert torch.autograd.gradcheck(run, inputs, fast_mode=True, atol=1e-4)
    result = odeint_adaptive(field, inputs[0], rtol=1e-4, atol=1e-4, cond=inputs[1])
    gradients = torch.autograd.grad(result.error.sum(), inputs)
    assert all(g.isfinite().all() and g.any() for g in gradients)


@pytest.mark.gpu
def test_gpu_equals_cpu() -> None:
    x = torch.tensor([[1.0, 0.0], [30.0, 0.0]], dtype=F64)
    here, there = (odeint_adaptive(falling, y, t1=2.0, at=(0.4, 2.0), event=height) for y in (x, x.cuda()))
    torch.testing.assert_close(there.t.cpu(), here.t, rtol=0, atol=1e-12)
    assert here.states is not None and there.states is not None
    torch.testing.assert_close(there.states.cpu(), here.states, rtol=0, atol=1e-11, equal_nan=True)


def test_bad_arguments_are_refused() -> None:
    x = rand(4, 2)
    with pytest.raises(ValueError, match=r"at must lie between t0 = 0\.0 and t1 = 1\.0, got \[0\.5, 1\.5\]"):
        odeint_adaptive(turning, x, at=(0.5, 1.5))
    with pytest.raises(ValueError, match="at must lie between"):
        odeint_adaptive(turning, x, at=(math.nan,))
    with pytest.raises(ValueError, match=r"at must have shape \[T\], got \[1, 1\]"):
        odeint_adaptive(turning, x, at=torch.zeros(1, 1))
    with pytest.raises(ValueError, match=r"event must return shape \[4\], got \[4, 2\]; one number per row"):
        odeint_adaptive(turning, x, event=lambda t, x, cond: x)
