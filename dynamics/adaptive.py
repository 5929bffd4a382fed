"""Integration of ``dx/dt = v(t, x, cond)`` to a tolerance, every row with step sizes of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from .fields import Time
from .ode import DOPRI5, FieldLike, Tableau, bind, check_batch, combine, error_estimate, fixed_time
from .step_control import (
    AdaptiveResult,
    Carry,
    Problem,
    Span,
    Step,
    Trial,
    check_problem,
    coarse,
    retrace,
    search,
    select,
)


def odeint_adaptive(
    field: FieldLike,
    x: Tensor,
    *,
    rtol: float = 1e-5,
    atol: float = 1e-6,
    solver: Tableau = DOPRI5,
    cond: Tensor | None = None,
    t0: float = 0.0,
    t1: float = 1.0,
    max_steps: int = 1000,
) -> AdaptiveResult:
    """Integrate each row from t0 to t1, the estimated error of every step within the tolerance.

    A step is accepted if the root mean square over D of ``error / (atol + rtol max(|x|, |x'|))`` is at most 1. A PI
    controller sets the sizes (Hairer, Norsett and Wanner 1993, sections II.4 and IV.2, also the first one); the last
    step ends at t1 exactly. Rows that are done leave the batch whenever they are half of it.

    The gradient is that of the map of the accepted steps, their sizes constant. The steps are found without it. If one
    is wanted, the accepted ones are then taken once more: rejected steps cost no memory and cannot spoil it.

    Waits for the device once per step, and is not for ``torch.compile``. ``solver`` calls in a step: its number of
    stages; two more for the first.

    Args:
        field: velocity field or callable ``(t, x, cond) -> v``, called with t of shape [B].
        x: state at t0, [B, D].
        rtol: tolerance relative to the state, at least 0.
        atol: absolute tolerance in units of x, positive.
        solver: a tableau with an error estimate: DOPRI5 or HEUN.
        cond: conditioning, [B, C] or [1, C], or None.
        t0: start time.
        t1: end time; below t0 to integrate backwards.
        max_steps: most steps of a row, accepted and rejected together.

    Returns:
        State, time, status and counts of each row. A row that fails raises nothing; ``AdaptiveResult.checked`` does.

    Raises:
        ValueError: if x is not [B, D], a tolerance or ``max_steps`` out of range, the solver without error estimate, a
            time not finite or in need of a gradient, x of another type than float32 and float64, or the field's result
            not of the shape of x.
    """
    check_batch(x)
    check_problem(x, rtol, atol, max_steps)
    if not solver.error:
        raise ValueError(f"solver must have an error estimate, as DOPRI5 and HEUN have, got {solver.name!r}")
    t0, t1 = fixed_time("t0", t0), fixed_time("t1", t1)
    if t0 != t1 and x.new_tensor(t0) == x.new_tensor(t1):
        raise ValueError(f"t0 and t1 must differ in the type of x, got {t0} and {t1} in {x.dtype}")
    velocity = bind(field, cond)
    slope = velocity(x.new_full(x.shape[:1], t0), x)
    if slope.shape != x.shape:
        raise ValueError(
            f"field must return shape {list(x.shape)}, got {list(slope.shape)}; it is called with t of shape [B]"
        )
    with torch.no_grad():
        first = _first_step(velocity, x, slope, (rtol, atol), solver.order, (t0, t1))
        problem = Problem(
            lambda rows: _step(field, solver, select(cond, rows)),
            x.detach(), (slope.detach(),), first, (t0, t1), (rtol, atol), solver.order, max_steps,
        )  # fmt: skip
        result, course = search(problem)
    result = replace(result, calls=len(solver.c) * (result.accepted + result.rejected) + 2)
    if not (torch.is_grad_enabled() and (x.requires_grad or slope.requires_grad)):
        return result
    end, _, error = retrace(replace(problem, x=x, carry=(slope,)), course, result.accepted)
    return replace(result, x=end, error=error)


def _step(field: FieldLike, solver: Tableau, cond: Tensor | None) -> Step:
    """The step of a tableau; it carries the slope at the start, which is that at the end of the step before."""
    velocity = bind(field, cond)

    def step(span: Span, x: Tensor, carry: Carry) -> Trial:
        slopes = [*carry]
        for weights, c in zip(solver.a[1:], solver.c[1:], strict=True):
            slopes.append(velocity(span.t + c * span.h, combine(x, span.h, weights, slopes)))
        end = combine(x, span.h, solver.b, slopes)
        slopes.append(velocity(span.end, end))
        return Trial(end, error_estimate(solver, span.h, slopes), (slopes[-1],))

    return step


def _first_step(
    velocity: Callable[[Time, Tensor], Tensor],
    x: Tensor,
    slope: Tensor,
    tolerances: tuple[float, float],
    order: int,
    span: tuple[float, float],
) -> Tensor:
    """Signed size of the first step, [B] (Hairer, Norsett and Wanner 1993, II.4): one more field call."""
    scale = tolerances[1] + tolerances[0] * x.abs()
    size, speed = ((value / scale).square().mean(-1).sqrt() for value in (x, slope))
    length, sign = abs(span[1] - span[0]), 1.0 if span[1] >= span[0] else -1.0
    guess = torch.where(torch.minimum(size, speed) < 1e-5, 1e-6, 0.01 * size / speed).clamp(max=length)
    change = velocity(span[0] + sign * guess, combine(x, sign * guess, (1.0,), [slope])) - slope
    bend = (change / scale).square().mean(-1).sqrt() / guess
    most = torch.maximum(speed, bend)
    fitting = torch.where(most <= 1e-15, (1e-3 * guess).clamp(min=1e-6), (0.01 / most) ** (1 / order))
    usable = fitting.isfinite() & (fitting > 0)  # 0 where the slope's square overflows
    return sign * coarse(torch.where(usable, torch.minimum(100 * guess, fitting), guess)).clamp(max=length)
