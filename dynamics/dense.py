"""States within the steps of an adaptive solver: an interpolant, read at given times or where an event happens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .fields import Time
from .step_control import Carry, Span, Stop, Trial, select

Event = Callable[[Time, Tensor, Tensor | None], Tensor]
"""``(t [R], x [R, D], cond) -> [R]``, called as a field is: it happens where its sign changes."""


def interpolate(span: Span, x: Tensor, carry: Carry, trial: Trial, fraction: Tensor) -> Tensor:
    """The state after a fraction [R] of a step, [R, D].

    The cubic that has states and slopes of both ends (Hermite's; its error is ``O(h^4)``), and ``f^2 (1 - f)^2 bend``,
    with which DOPRI5's is ``O(h^5)`` (Hairer, Norsett and Wanner 1993, II.6).
    """
    f, h = fraction.unsqueeze(-1), span.h.unsqueeze(-1)
    change = trial.x - x
    start = h * carry[0] - change
    end = change - h * trial.carry[0] - start
    if trial.bend is not None:
        end = end + (1 - f) * trial.bend
    return x + f * (change + (1 - f) * (start + f * end))


class Readout:
    """The states at given times; a `Watch` of `search` and `retrace`.

    Args:
        times: of each row, [T, B]; nan for none. Differentiable.
        forwards: whether time grows.
    """

    def __init__(self, times: Tensor, forwards: bool) -> None:
        self._times, self._sign = times, 1.0 if forwards else -1.0
        self._found: list[tuple[Tensor, Tensor, Tensor]] = []

    def __call__(self, rows: Tensor, span: Span, x: Tensor, carry: Carry, trial: Trial, accepted: Tensor) -> None:
        """Read what lies within a step, its end included."""
        times = self._times[:, rows]
        after, until = self._sign * (times.detach() - span.t) > 0, self._sign * (times.detach() - span.end) <= 0
        which, row = (accepted & after & until).nonzero(as_tuple=True)
        if len(row):
            fraction = ((times[which, row] - span.t[row]) / span.h[row]).clamp(max=1)
            self._found.append((which, rows[row], interpolate(*_part(row, span, x, carry, trial), fraction)))

    def states(self, x: Tensor, slope: Tensor, start: float) -> Tensor:
        """[T, B, D], nan where no step came by; x and its slope are those at the start time."""
        first = x + slope.detach() * (self._times - start).unsqueeze(-1)
        states = first.masked_fill((self._times.detach() != start).unsqueeze(-1), torch.nan)
        if not self._found:
            return states
        which, rows, values = (torch.cat(parts) for parts in zip(*self._found, strict=True))
        return states.index_put((which, rows), values)


def _sign(value: Tensor) -> Tensor:
    """-1, 0 or 1, and nan of nan, of which `torch.sign` makes 0: where an event is nan it does not happen."""
    return torch.where(value.isnan(), value, value.sign())


class Events:
    """Stops each row where the event happens first; a `Watch` of `search`.

    Args:
        event: see `Event`.
        cond: of the whole batch.
        t: start time, [B].
        x: state there, [B, D].
        readout: also gets the steps, or None.

    Raises:
        ValueError: if the event does not return [B], or no floating-point numbers.
    """

    def __init__(self, event: Event, cond: Tensor | None, t: Tensor, x: Tensor, readout: Readout | None) -> None:
        self._event, self._cond, self._readout = event, cond, readout
        value = event(t, x, cond)
        if value.shape != t.shape:
            raise ValueError(f"event must return shape {list(t.shape)}, got {list(value.shape)}; one number per row")
        if not value.is_floating_point():
            raise ValueError(f"event must return floating-point numbers, whose sign changes, got {value.dtype}")
        self._sign = _sign(value.detach())

    def __call__(self, rows: Tensor, span: Span, x: Tensor, carry: Carry, trial: Trial, accepted: Tensor) -> Stop:
        """Which rows stop within this step, and where."""
        if self._readout is not None:
            self._readout(rows, span, x, carry, trial, accepted)
        sign, before = _sign(self._event(span.end, trial.x, select(self._cond, rows))), self._sign[rows]
        # On a row that starts where the event is 0 it happens when it comes back to 0.
        stops = accepted & (before != 0) & (sign * before <= 0)
        self._sign[rows] = torch.where(accepted & (sign != 0) & ~sign.isnan(), sign, before)
        t, end = span.end.clone(), trial.x.clone()
        (which,) = stops.nonzero(as_tuple=True)
        if len(which):
            step = _part(which, span, x, carry, trial)
            t[which], end[which] = self._locate(step, before[which], select(self._cond, rows[which]))
        return Stop(stops, t, end)

    def _locate(
        self, step: tuple[Span, Tensor, Carry, Trial], before: Tensor, cond: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Time and state where the sign changes, by bisection of the interpolant down to the resolution of time."""
        span = step[0]
        low, high = torch.zeros_like(span.t), torch.ones_like(span.t)
        for _ in range(torch.finfo(low.dtype).eps.as_integer_ratio()[1].bit_length()):
            middle = 0.5 * (low + high)
            passed = _sign(self._event(span.t + middle * span.h, interpolate(*step, middle), cond)) * before <= 0
            low, high = torch.where(passed, low, middle), torch.where(passed, middle, high)
        return torch.where(high < 1, span.t + high * span.h, span.end), interpolate(*step, high)


def at_event(event: Event, t: Tensor, x: Tensor, slope: Tensor, cond: Tensor | None) -> tuple[Tensor, Tensor]:
    """Time [R] and state [R, D] of an event, with their gradients by the implicit function theorem.

    Args:
        event: see `Event`; it is 0 here.
        t: time, [R], a constant.
        x: state at this time, [R, D], differentiable in all but the time.
        slope: dx/dt there, [R, D].
        cond: conditioning of these rows.

    Raises:
        ValueError: if the gradient is wanted of an event that has none, in time or state.
    """
    value, slope = event(t, x, cond), slope.detach()
    if not (x.requires_grad or value.requires_grad):
        return t, x
    with torch.enable_grad():
        time, state = t.detach().requires_grad_(), x.detach().requires_grad_()
        total = event(time, state, cond).sum()
        if not total.requires_grad:
            raise ValueError("event must be differentiable in t or x, as a gradient of its time is wanted")
        by_t, by_x = torch.autograd.grad(total, (time, state), materialize_grads=True)
    shift: Tensor = _Shift.apply(value, by_t + (by_x * slope).sum(-1))  # type: ignore[no-untyped-call]
    return t + shift, x + slope * shift.unsqueeze(-1)


class _Shift(torch.autograd.Function):
    """0, whose derivative in an event's value [R] is -1 / rate: infinite where the event does not change with time."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, rate: Tensor) -> Tensor:
        ctx.save_for_backward(rate)
        return torch.zeros_like(value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        if torch.is_grad_enabled():  # by create_graph; the rate is a constant here, so a second derivative were wrong
            raise RuntimeError("the time of an event has first derivatives only, got create_graph=True")
        (rate,) = ctx.saved_tensors
        return torch.where(gradient == 0, 0.0, -gradient / rate), None


def _part(rows: Tensor, span: Span, x: Tensor, carry: Carry, trial: Trial) -> tuple[Span, Tensor, Carry, Trial]:
    bend = None if trial.bend is None else trial.bend[rows]
    part = Trial(trial.x[rows], trial.error[rows], tuple(each[rows] for each in trial.carry), bend)
    return Span(*(each[rows] for each in span)), x[rows], tuple(each[rows] for each in carry), part
