"""Integration of ``dx/dt = v(t, x, cond)`` to a tolerance, every row with step sizes of its own.

Other libraries share one step size in a batch: the hardest row sets the cost of all, and a norm over the batch hides
its error. Here a row's result does not depend on the rest of its batch.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .fields import Time
from .ode import DOPRI5, FieldLike, Tableau, advance, bind, check_batch, combine, error_estimate, fixed_time

_SAFETY = 0.9
_FACTORS = (0.2, 10.0)
"""Least and greatest change of the step size at once."""

_LEAST_ERROR = 1e-4
"""Floor of the previous error in the controller, as in Hairer's DOPRI5."""


class Status(enum.IntEnum):
    """Why a row stopped; ``str()`` says it in a sentence."""

    DONE = 0
    MAX_STEPS = 1
    STEP_TOO_SMALL = 2
    NOT_FINITE = 3

    def __str__(self) -> str:
        return _SENTENCES[self]


_SENTENCES = {
    Status.DONE: "The end time was reached within the tolerance.",
    Status.MAX_STEPS: "The steps ran out before the end time: raise max_steps, or loosen rtol and atol.",
    Status.STEP_TOO_SMALL: "The tolerance needs steps below the resolution of the time: loosen rtol and atol, use "
    "float64, or look for a jump or a pole of the field.",
    Status.NOT_FINITE: "The state or the field was not finite however small the step: look for a pole of the solution, "
    "or for nan in x, cond or the parameters.",
}


@dataclass(frozen=True)
class AdaptiveResult:
    """What ``odeint_adaptive`` returns; one entry per row in each tensor.

    Attributes:
        x: state at time ``t``, [B, D]; differentiable.
        t: time reached, [B]; exactly t1 where ``status`` is DONE.
        status: a ``Status``, [B], int64.
        accepted: accepted steps, [B], int64.
        rejected: rejected steps, [B], int64.
        calls: field evaluations of the search for steps, [B], int64.
    """

    x: Tensor
    t: Tensor
    status: Tensor
    accepted: Tensor
    rejected: Tensor
    calls: Tensor

    def checked(self) -> Tensor:
        """The state x, [B, D], of a batch that reached the end time.

        Raises:
            RuntimeError: if a row did not, with the reasons.
        """
        reasons = [Status(code) for code in self.status.unique().tolist() if code != Status.DONE]
        if reasons:
            counts = [f"{int((self.status == reason).sum())} of {len(self.x)} rows: {reason}" for reason in reasons]
            raise RuntimeError(" ".join(counts))
        return self.x


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
    if not (rtol >= 0 and atol > 0):
        raise ValueError(f"rtol must be at least 0 and atol positive, got {rtol} and {atol}")
    if not x.shape[1]:
        raise ValueError(f"x must have a dimension at least, got {list(x.shape)}")
    if max_steps < 1:
        raise ValueError(f"max_steps must be at least 1, got {max_steps}")
    if not solver.error:
        raise ValueError(f"solver must have an error estimate, as DOPRI5 and HEUN have, got {solver.name!r}")
    t0, t1 = fixed_time("t0", t0), fixed_time("t1", t1)
    if x.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"x must be float32 or float64, got {x.dtype}, which does not resolve errors of single steps")
    if not x.new_tensor(atol) > 0:
        raise ValueError(f"atol must be positive in the type of x, got {atol} in {x.dtype}")
    if t0 != t1 and x.new_tensor(t0) == x.new_tensor(t1):
        raise ValueError(f"t0 and t1 must differ in the type of x, got {t0} and {t1} in {x.dtype}")
    slope = bind(field, cond)(x.new_full(x.shape[:1], t0), x)
    if slope.shape != x.shape:
        raise ValueError(
            f"field must return shape {list(x.shape)}, got {list(slope.shape)}; it is called with t of shape [B]"
        )
    with torch.no_grad():
        result, course = _search(field, x.detach(), slope.detach(), cond, (rtol, atol), solver, (t0, t1), max_steps)
    if not (torch.is_grad_enabled() and (x.requires_grad or slope.requires_grad)):
        return result
    end = _retrace(field, x, cond, solver, course, result)
    return AdaptiveResult(end, result.t, result.status, result.accepted, result.rejected, result.calls)


_Course = list[tuple[Tensor, Tensor, Tensor, Tensor]]
"""Accepted steps, by attempt: rows, how many steps they had made before, start times, sizes."""


def _search(
    field: FieldLike,
    x: Tensor,
    slope: Tensor,
    cond: Tensor | None,
    tolerances: tuple[float, float],
    solver: Tableau,
    span: tuple[float, float],
    max_steps: int,
) -> tuple[AdaptiveResult, _Course]:
    (rtol, atol), (t0, t1) = tolerances, span
    least_step = 8 * torch.finfo(x.dtype).eps * max(abs(t0), abs(t1))
    velocity = bind(field, cond)
    count = torch.zeros(len(x), dtype=torch.int64, device=x.device)
    t = x.new_full(x.shape[:1], t0)
    h = _first_step(velocity, x, slope, tolerances, solver.order, span)
    status = torch.full_like(count, Status.DONE if t0 == t1 else Status.MAX_STEPS)
    status[~(x.isfinite() & slope.isfinite()).all(-1)] = Status.NOT_FINITE
    # What is held of every row that is still in the batch, and of all rows at the end.
    held = {"row": torch.arange(len(x), device=x.device), "x": x, "t": t, "h": h, "slope": slope, "status": status}
    held |= {
        "accepted": count,
        "rejected": count,
        "previous": torch.ones_like(t),
        "cap": torch.full_like(t, _FACTORS[1]),
    }
    final = {name: value.clone() for name, value in held.items()}
    course: _Course = []

    for _ in range(max_steps):
        live = held["status"] == Status.MAX_STEPS
        rows = int(live.sum())
        if 2 * rows <= len(live):
            for name, value in final.items():
                value[held["row"]] = held[name]
            if rows == 0:
                break
            held, live = {name: value[live] for name, value in held.items()}, live[live]
            velocity = bind(field, _select(cond, held["row"]))
        x, t, h, slope = (held[name] for name in ("x", "t", "h", "slope"))
        # A rest of a hundredth of a step is not worth one more.
        last = (t1 - t).abs() <= 1.01 * h.abs()
        h = torch.where(last, t1 - t, h)

        slopes = [slope]
        for weights, c in zip(solver.a[1:], solver.c[1:], strict=True):
            slopes.append(velocity(t + c * h, combine(x, h, weights, slopes)))
        end = combine(x, h, solver.b, slopes)
        t_end = torch.where(last, t1, t + h)
        slopes.append(velocity(t_end, end))
        scale = atol + rtol * torch.maximum(x.abs(), end.abs())
        error = (error_estimate(solver, h, slopes) / scale).square().mean(-1).sqrt()
        finite = error.isfinite() & (end.isfinite() & slopes[-1].isfinite()).all(-1)
        error = torch.where(finite, error, torch.inf)

        stuck = ~last & ~((t + h - t).abs() > 0)  # a step of nothing, or nan
        accept = live & (error <= 1) & ~stuck
        power = 1 / solver.order
        grow = error ** (-0.85 * power) * held["previous"] ** (0.2 * power)
        factor = _SAFETY * torch.where(accept, grow, error**-power)
        factor = torch.minimum(factor.clamp(*_FACTORS), held["cap"])
        if accept.any():
            course.append((held["row"][accept], held["accepted"][accept], t[accept], h[accept]))
        failed = live & ~accept & (stuck | ((factor * h).abs() < least_step))
        status = torch.where(accept & last, Status.DONE, held["status"])
        status = torch.where(failed, torch.where(finite, Status.STEP_TOO_SMALL, Status.NOT_FINITE), status)
        column = accept.unsqueeze(-1)
        held |= {
            "x": torch.where(column, end, x),
            "slope": torch.where(column, slopes[-1], slope),
            "t": torch.where(accept, t_end, t),
            "h": _coarse(factor * h),
            "status": status,
            "accepted": held["accepted"] + accept,
            "rejected": held["rejected"] + (live & ~accept),
            "previous": torch.where(accept, error.clamp(min=_LEAST_ERROR), held["previous"]),
            "cap": torch.where(accept, _FACTORS[1], 1.0).to(t),  # no growth right after a rejection
        }
    for name, value in final.items():
        value[held["row"]] = held[name]
    accepted, rejected = final["accepted"], final["rejected"]
    calls = len(solver.c) * (accepted + rejected) + 2
    return AdaptiveResult(final["x"], final["t"], final["status"], accepted, rejected, calls), course


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
    return sign * _coarse(torch.where(usable, torch.minimum(100 * guess, fitting), guess)).clamp(max=length)


def _coarse(h: Tensor) -> Tensor:
    """Size h to ten binary digits (Veltkamp's splitting): last bits, which depend on the batch, get no say."""
    split = h * (1 / (512 * torch.finfo(h.dtype).eps) + 1)
    return split - (split - h)


def _retrace(
    field: FieldLike, x: Tensor, cond: Tensor | None, solver: Tableau, course: _Course, result: AdaptiveResult
) -> Tensor:
    """The state [B, D] after the accepted steps, differentiable. Rows that have made theirs are not evaluated again."""
    # Sorted by their number of steps, so that the rows of each turn are the first ones.
    order = result.accepted.argsort(descending=True)
    turns = int(result.accepted.max()) if len(x) else 0
    starts, sizes = x.new_zeros(turns, len(x)), x.new_zeros(turns, len(x))
    for row, turn, t, h in course:
        starts[turn, row], sizes[turn, row] = t, h
    y, finished, velocity = x[order], [x[:0]], bind(field, _select(cond, order))
    counts = (sizes != 0).sum(1).tolist()
    for t, h, rows in zip(starts[:, order], sizes[:, order], counts, strict=True):
        if rows < len(y):
            finished.append(y[rows:])
            y, velocity = y[:rows], bind(field, _select(cond, order[:rows]))
        y = advance(velocity, solver, t[:rows], h[:rows], y)
    return torch.cat([y, *reversed(finished)])[order.argsort()]


def _select(cond: Tensor | None, rows: Tensor) -> Tensor | None:
    return cond if cond is None or len(cond) == 1 else cond[rows]
