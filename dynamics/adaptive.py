"""Integration of ``dx/dt = v(t, x, cond)`` to a tolerance, every row with step sizes of its own."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from .dense import Event, Events, Readout, at_event
from .fields import Time
from .ode import DOPRI5, FieldLike, Tableau, bind, check_batch, check_one, combine, error_estimate
from .step_control import (
    AdaptiveResult,
    Carry,
    Problem,
    Span,
    Status,
    Step,
    Trial,
    check_problem,
    coarse,
    may_learn,
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
    t0: Time = 0.0,
    t1: Time = 1.0,
    at: Sequence[float] | Tensor = (),
    event: Event | None = None,
    max_steps: int = 1000,
) -> AdaptiveResult:
    """Integrate each row from t0 to t1, the estimated error of every step within the tolerance.

    A step is accepted if the root mean square over D of ``error / (atol + rtol max(|x|, |x'|))`` is at most 1. A PI
    controller sets the sizes (Hairer, Norsett and Wanner 1993, sections II.4 and IV.2, also the first one); the last
    step ends at t1 exactly. Rows that are done leave the batch whenever they are half of it.

    The gradient is that of the map of the accepted steps, their sizes constant. The steps are found without it. If one
    is wanted, the accepted ones are then taken once more: rejected steps cost no memory and cannot spoil it. Gradients
    in times are those of the exact flow, by the field's velocity at the state found; first ones only.

    States within a step are those of the solver's interpolant, for which no further step is made: it adds ``O(h^5)`` to
    the error with DOPRI5 and ``O(h^4)`` with HEUN. The event is located on it to the last bit of the time. The gradient
    of its time is that of the implicit function theorem, the first one only (``create_graph=True`` is an error); it
    is infinite where the event does not change with time.

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
        at: times between t0 and t1, in any order, at which the states are wanted, [T].
        event: a function ``(t [B], x [B, D], cond) -> [B]`` of each row alone. A row ends where its sign changes, at
            the latest at t1. Not seen are a sign that changes twice within a step, and a row that starts at 0 and is
            back there within its first step.
        max_steps: most steps of a row, accepted and rejected together.

    Returns:
        State, time, status and counts of each row. A row that fails raises nothing; ``AdaptiveResult.checked`` does.

    Raises:
        ValueError: if x is not [B, D], a tolerance or ``max_steps`` out of range, the solver without error estimate, a
            time not finite or not between t0 and t1, x of another type than float32 and float64, the field's result not
            of the shape of x, or the event's not [B], no floating-point numbers, or without a gradient that is wanted.
    """
    check_batch(x)
    check_problem(x, cond, rtol, atol, max_steps)
    if not solver.error:
        raise ValueError(f"solver must have an error estimate, as DOPRI5 and HEUN have, got {solver.name!r}")
    span, times = _times(x, t0, t1, at)
    velocity, starts = bind(field, cond), x.new_full(x.shape[:1], span[0])
    slope = velocity(starts, x)
    forwards, within = span[1] >= span[0], len(times) > 0 or event is not None
    readout = Readout(times.detach(), forwards) if len(times) else None
    with torch.no_grad():
        first = _first_step(velocity, x, slope, (rtol, atol), solver.order, span)
        problem = Problem(
            lambda rows: _step(field, solver, select(cond, rows), dense=within),
            x.detach(), (slope.detach(),), first, span, (rtol, atol), solver.order, max_steps,
        )  # fmt: skip
        watch = readout if event is None else Events(event, cond, starts, x, readout)
        result, course = search(problem, watch)
        if readout is not None:
            result = replace(result, states=_until(result.t, times, readout.states(x, slope, span[0]), forwards))
    result = replace(result, calls=len(solver.c) * (result.accepted + result.rejected) + 2)
    given = (x, slope, t0, t1, times)
    learns = may_learn(field, event) or any(isinstance(each, Tensor) and each.requires_grad for each in given)
    if not (torch.is_grad_enabled() and learns):
        return result

    if isinstance(t0, Tensor) and t0.requires_grad:  # a later start is one from further back
        x = x - slope.detach() * (t0 - t0.detach())
        slope = velocity(starts, x)
    happened = result.status == Status.EVENT
    readout = Readout(torch.cat([times.detach(), torch.where(happened, result.t, torch.nan).unsqueeze(0)]), forwards)
    end, (last,), error = retrace(replace(problem, x=x, carry=(slope,)), course, result.accepted, readout)
    states, t = readout.states(x, slope, span[0]), result.t
    if times.requires_grad:
        states = torch.cat([_move(field, cond, times, states[:-1]), states[-1:]])
    if isinstance(t1, Tensor) and t1.requires_grad:
        end = end + torch.where((result.status == Status.DONE).unsqueeze(-1), last.detach(), 0.0) * (t1 - t1.detach())
    (rows,) = happened.nonzero(as_tuple=True)
    if event is not None and len(rows):
        found, there = t[rows], select(cond, rows)
        last = bind(field, there)(found, states[-1, rows])
        found, state = at_event(event, found, states[-1, rows], last, there)
        t, end = t.index_put((rows,), found), end.index_put((rows,), state)
    past = _until(result.t, times, states[:-1], forwards) if len(times) else None
    return replace(result, x=end, t=t, error=error, states=past)


def _times(x: Tensor, t0: Time, t1: Time, at: Sequence[float] | Tensor) -> tuple[tuple[float, float], Tensor]:
    """Start and end time, and the times between them, of each row, [T, B] in the type of x."""
    check_one("t0", t0)
    check_one("t1", t1)
    start, end = (float(time.detach()) if isinstance(time, Tensor) else float(time) for time in (t0, t1))
    span = start, end
    for name, time in zip(("t0", "t1"), span, strict=True):
        if not math.isfinite(time):
            raise ValueError(f"{name} must be finite, got {time}")
    if t0 != t1 and x.new_tensor(span[0]) == x.new_tensor(span[1]):
        raise ValueError(f"t0 and t1 must differ in the type of x, got {span[0]} and {span[1]} in {x.dtype}")
    times = torch.as_tensor(at, dtype=x.dtype, device=x.device)
    if times.ndim != 1:
        raise ValueError(f"at must have shape [T], got {list(times.shape)}")
    low, high = x.new_tensor(sorted(span))
    if not ((low <= times) & (times <= high)).all():
        raise ValueError(f"at must lie between t0 = {span[0]} and t1 = {span[1]}, got {times.tolist()}")
    return span, times.unsqueeze(-1).expand(-1, len(x))


def _move(field: FieldLike, cond: Tensor | None, times: Tensor, states: Tensor) -> Tensor:
    """The states [T, B, D] with their gradient in the times [T, B]: the velocity; the interpolant's is less exact."""
    which, rows = states.detach().isfinite().all(-1).nonzero(as_tuple=True)
    if not len(rows):
        return states
    when, where = times[which, rows], states[which, rows]
    with torch.no_grad():
        slope = bind(field, select(cond, rows))(when, where)
    return states.index_put((which, rows), where + slope * (when - when.detach()).unsqueeze(-1))


def _until(t: Tensor, times: Tensor, states: Tensor, forwards: bool) -> Tensor:
    """The states [T, B, D], nan after the end [B] of each row."""
    beyond = times > t if forwards else times < t
    return states.masked_fill(beyond.unsqueeze(-1), torch.nan)


def _step(field: FieldLike, solver: Tableau, cond: Tensor | None, *, dense: bool) -> Step:
    """The step of a tableau; it carries the slope at the start, which is that at the end of the step before."""
    velocity = bind(field, cond)

    def step(span: Span, x: Tensor, carry: Carry) -> Trial:
        slopes = [*carry]
        for weights, c in zip(solver.a[1:], solver.c[1:], strict=True):
            slopes.append(velocity(span.t + c * span.h, combine(x, span.h, weights, slopes)))
        end = combine(x, span.h, solver.b, slopes)
        slopes.append(velocity(span.end, end))
        bend = combine(torch.zeros_like(x), span.h, solver.dense, slopes) if dense and solver.dense else None
        return Trial(end, error_estimate(solver, span.h, slopes), (slopes[-1],), bend)

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
