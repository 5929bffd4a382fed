"""Step sizes by the estimated error, every row with its own: the search that ``adaptive`` and ``adaptive_sde`` share.

Other libraries share one step size in a batch: the hardest row sets the cost of all, and a norm over the batch hides
its error. Here a row's result does not depend on the rest of its batch.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor, nn

_SAFETY = 0.9
_FACTORS = (0.2, 10.0)
"""Least and greatest change of the step size at once."""

_LEAST_ERROR = 1e-4
"""Floor of the previous error in the controller, as in Hairer's DOPRI5."""


def may_learn(*functions: Any) -> bool:
    """Whether the gradient of one may be wanted: a module says so by its weights, of another function nobody knows."""
    return any(
        any(each.requires_grad for each in (*function.parameters(), *function.buffers()))
        if isinstance(function, nn.Module)
        else function is not None
        for function in functions
    )


class Status(enum.IntEnum):
    """Why a row stopped; ``str()`` says it in a sentence."""

    DONE = 0
    MAX_STEPS = 1
    STEP_TOO_SMALL = 2
    NOT_FINITE = 3
    EVENT = 4

    def __str__(self) -> str:
        return _SENTENCES[self]


_SENTENCES = {
    Status.DONE: "The end time was reached within the tolerance.",
    Status.MAX_STEPS: "The steps ran out before the end time: raise max_steps, or loosen rtol and atol.",
    Status.STEP_TOO_SMALL: "The tolerance needs steps below the resolution of the time: loosen rtol and atol, use "
    "float64, or look for a jump or a pole of the field.",
    Status.NOT_FINITE: "The state or the field was not finite however small the step: look for a pole of the solution, "
    "or for nan in x, cond or the parameters.",
    Status.EVENT: "The event came before the end time.",
}


@dataclass(frozen=True)
class AdaptiveResult:
    """What the adaptive solvers return; one entry per row in each tensor.

    Attributes:
        x: state at time ``t``, [B, D]; differentiable.
        t: time reached, [B]; exactly t1 where ``status`` is DONE, differentiable where it is EVENT.
        status: a ``Status``, [B], int64.
        accepted: accepted steps, [B], int64.
        rejected: rejected steps, [B], int64.
        calls: field evaluations of the search for steps, [B], int64.
        error: sum over the accepted steps of step size times norm of the estimated error, [B], in units of x times
            time; differentiable.
        states: [T, B, D] at the times asked for, nan where the row ended before; None where none were asked for.
    """

    x: Tensor
    t: Tensor
    status: Tensor
    accepted: Tensor
    rejected: Tensor
    calls: Tensor
    error: Tensor
    states: Tensor | None = None

    def checked(self) -> Tensor:
        """The state x, [B, D], of a batch whose rows all reached the end time or their event.

        Raises:
            RuntimeError: if a row did not, with the reasons.
        """
        good = (Status.DONE, Status.EVENT)
        reasons = [Status(code) for code in self.status.unique().tolist() if code not in good]
        if reasons:
            counts = [f"{int((self.status == reason).sum())} of {len(self.x)} rows: {reason}" for reason in reasons]
            raise RuntimeError(" ".join(counts))
        return self.x


class Span(NamedTuple):
    """A step of every row that is in the batch: start t, end and size h, [R] each."""

    t: Tensor
    end: Tensor
    h: Tensor


Carry: TypeAlias = tuple[Tensor, ...]
"""What a step hands to the next beside the state, rows first."""


class Trial(NamedTuple):
    """What a step gives: the state at its end, its estimated error, [R, D] each, the carry of the next step.

    ``bend`` [R, D] is what an interpolant adds to the cubic, where one is wanted and the solver has it.
    """

    x: Tensor
    error: Tensor
    carry: Carry
    bend: Tensor | None = None


Step: TypeAlias = Callable[[Span, Tensor, Carry], Trial]
"""``(span, x [R, D], carry) -> trial``."""


class Watch(Protocol):
    """Looks at every step that is tried."""

    def __call__(
        self, rows: Tensor, span: Span, x: Tensor, carry: Carry, trial: Trial, accepted: Tensor
    ) -> Stop | None:
        """Which rows stop within this step, and where."""


class Stop(NamedTuple):
    """Rows [R] that stop within a step, with the time [R] and the state [R, D] there."""

    rows: Tensor
    t: Tensor
    x: Tensor


@dataclass(frozen=True)
class Problem:
    """What is integrated.

    Attributes:
        step: the step of some rows of the batch, int64 [R].
        x: state at the start, [B, D].
        carry: of the first step.
        h: signed size of the first step, [B].
        span: start and end time.
        tolerances: rtol and atol.
        order: q, where the error of a step falls as ``h^q``.
        max_steps: most steps of a row, accepted and rejected together.
        gains: of the error of this step and of the one before, in the size of the next.
        snap: ``(t, h) -> h``, sizes that the steps may have.
        least_step: a row that needs a smaller one fails.
    """

    step: Callable[[Tensor], Step]
    x: Tensor
    carry: Carry
    h: Tensor
    span: tuple[float, float]
    tolerances: tuple[float, float]
    order: float
    max_steps: int
    gains: tuple[float, float] = (0.85, 0.2)
    snap: Callable[[Tensor, Tensor], Tensor] = lambda t, h: h
    least_step: float = 0.0


Course: TypeAlias = list[tuple[Tensor, Tensor, Span]]
"""Accepted steps, by attempt: rows, how many steps they had made before, where."""


def check_problem(x: Tensor, cond: Tensor | None, rtol: float, atol: float, max_steps: int) -> None:
    """Refuse what no adaptive solver takes.

    Raises:
        ValueError: if x has no dimension, or is neither float32 nor float64, cond has not its rows, a tolerance or
            ``max_steps`` out of range.
    """
    if cond is not None and len(cond) not in (1, len(x)):
        raise ValueError(f"cond must have {len(x)} rows like x, or 1 row, got {len(cond)}")
    if not (rtol >= 0 and atol > 0):
        raise ValueError(f"rtol must be at least 0 and atol positive, got {rtol} and {atol}")
    if not x.shape[1]:
        raise ValueError(f"x must have a dimension at least, got {list(x.shape)}")
    if max_steps < 1:
        raise ValueError(f"max_steps must be at least 1, got {max_steps}")
    if x.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"x must be float32 or float64, got {x.dtype}, which does not resolve errors of single steps")
    if not x.new_tensor(atol) > 0:
        raise ValueError(f"atol must be positive in the type of x, got {atol} in {x.dtype}")


def search(problem: Problem, watch: Watch | None = None) -> tuple[AdaptiveResult, Course]:
    """Find the steps: every one's error within the tolerance. Without gradient; ``calls`` is left at 0.

    A step is accepted if the root mean square over D of ``error / (atol + rtol max(|x|, |x'|))`` is at most 1. A PI
    controller sets the sizes (Hairer, Norsett and Wanner 1993, sections II.4 and IV.2); the last step ends at the end
    time exactly. Rows that are done leave the batch whenever they are half of it. Waits for the device once per step.
    """
    (rtol, atol), (t0, t1), x, h = problem.tolerances, problem.span, problem.x, problem.h
    least_step = max(8 * torch.finfo(h.dtype).eps * max(abs(t0), abs(t1)), problem.least_step)
    count = torch.zeros(len(x), dtype=torch.int64, device=x.device)
    t = torch.full_like(h, t0)
    status = torch.full_like(count, Status.DONE if t0 == t1 else Status.MAX_STEPS)
    status[~_finite(x, *problem.carry)] = Status.NOT_FINITE
    # What is held of every row that is still in the batch, and of all rows at the end.
    held = {"row": torch.arange(len(x), device=x.device), "x": x, "t": t, "h": h, "status": status}
    held |= {
        "accepted": count,
        "rejected": count,
        "previous": torch.ones_like(t),
        "cap": torch.full_like(t, _FACTORS[1]),
        "sum": x.new_zeros(len(x)),
    }
    carries = [f"carry {k}" for k in range(len(problem.carry))]
    held |= dict(zip(carries, problem.carry, strict=True))
    final = {name: value.clone() for name, value in held.items()}
    course: Course = []
    step = problem.step(held["row"])

    for _ in range(problem.max_steps):
        live = held["status"] == Status.MAX_STEPS
        rows = int(live.sum())
        if 2 * rows <= len(live):
            for name, value in final.items():
                value[held["row"]] = held[name]
            if rows == 0:
                break
            held, live = {name: value[live] for name, value in held.items()}, live[live]
            step = problem.step(held["row"])
        x, t, h = (held[name] for name in ("x", "t", "h"))
        carry = tuple(held[name] for name in carries)
        # A rest of a hundredth of a step is not worth one more.
        last = (t1 - t).abs() <= 1.01 * h.abs()
        h = torch.where(last, t1 - t, problem.snap(t, h))
        span = Span(t, torch.where(last, t1, t + h), h)

        trial = step(span, x, carry)
        scale = atol + rtol * torch.maximum(x.abs(), trial.x.abs())
        error = (trial.error / scale).square().mean(-1).sqrt()
        finite = error.isfinite() & _finite(trial.x, *trial.carry)
        error = torch.where(finite, error, torch.inf).to(t)

        stuck = ~last & ~((t + h - t).abs() > 0)  # a step of nothing, or nan
        accept = live & (error <= 1) & ~stuck
        power = 1 / problem.order
        grow = error ** (-problem.gains[0] * power) * held["previous"] ** (problem.gains[1] * power)
        factor = _SAFETY * torch.where(accept, grow, error**-power)
        factor = torch.minimum(factor.clamp(*_FACTORS), held["cap"])
        if accept.any():
            course.append((held["row"][accept], held["accepted"][accept], Span(*(part[accept] for part in span))))
        failed = live & ~accept & (stuck | ((factor * h).abs() < least_step))
        status = torch.where(accept & last, Status.DONE, held["status"])
        status = torch.where(failed, torch.where(finite, Status.STEP_TOO_SMALL, Status.NOT_FINITE), status)
        t_end, end = span.end, trial.x
        if watch is not None and (stop := watch(held["row"], span, x, carry, trial, accept)) is not None:
            status = torch.where(stop.rows, Status.EVENT, status)
            t_end, end = torch.where(stop.rows, stop.t, t_end), torch.where(stop.rows.unsqueeze(-1), stop.x, end)
        held |= {
            "x": _choose(accept, end, x),
            "t": torch.where(accept, t_end, t),
            "h": coarse(factor * h),
            "status": status,
            "accepted": held["accepted"] + accept,
            "rejected": held["rejected"] + (live & ~accept),
            "previous": torch.where(accept, error.clamp(min=_LEAST_ERROR), held["previous"]),
            "cap": torch.where(accept, _FACTORS[1], 1.0).to(t),  # no growth right after a rejection
            "sum": torch.where(accept, held["sum"] + _weighted(span, trial), held["sum"]),
        }
        held |= {name: _choose(accept, new, held[name]) for name, new in zip(carries, trial.carry, strict=True)}
    for name, value in final.items():
        value[held["row"]] = held[name]
    counts = final["accepted"], final["rejected"], torch.zeros_like(count)
    return AdaptiveResult(final["x"], final["t"], final["status"], *counts, final["sum"]), course


def retrace(
    problem: Problem, course: Course, accepted: Tensor, watch: Watch | None = None
) -> tuple[Tensor, Carry, Tensor]:
    """State [B, D] and carry after the accepted steps and the sum of their errors [B], differentiable.

    Rows that have made their steps are not evaluated again.
    """
    # Sorted by their number of steps, so that the rows of each turn are the first ones.
    order = accepted.argsort(descending=True)
    x, carry, total = problem.x[order], tuple(part[order] for part in problem.carry), problem.x.new_zeros(len(order))
    turns = int(accepted.max()) if len(x) else 0
    starts, ends, sizes = (problem.h.new_zeros(turns, len(x)) for _ in range(3))
    for row, turn, span in course:
        starts[turn, row], ends[turn, row], sizes[turn, row] = span
    counts = (sizes != 0).sum(1).tolist()
    finished, step = [(x[:0], total[:0], *(part[:0] for part in carry))], problem.step(order)
    for t, end, h, rows in zip(starts[:, order], ends[:, order], sizes[:, order], counts, strict=True):
        if rows < len(x):
            finished.append((x[rows:], total[rows:], *(part[rows:] for part in carry)))
            x, carry, total = x[:rows], tuple(part[:rows] for part in carry), total[:rows]
            step = problem.step(order[:rows])
        span = Span(t[:rows], end[:rows], h[:rows])
        trial = step(span, x, carry)
        if watch is not None:
            watch(order[:rows], span, x, carry, trial, torch.ones_like(span.t, dtype=torch.bool))
        x, carry, total = trial.x, trial.carry, total + _weighted(span, trial)
    finished.append((x, total, *carry))
    back = order.argsort()
    x, total, *rest = (torch.cat(parts)[back] for parts in zip(*reversed(finished), strict=True))
    return x, tuple(rest), total


def coarse(h: Tensor) -> Tensor:
    """Size h to ten binary digits (Veltkamp's splitting): last bits, which depend on the batch, get no say."""
    split = h * (1 / (512 * torch.finfo(h.dtype).eps) + 1)
    return split - (split - h)


def select(cond: Tensor | None, rows: Tensor | slice) -> Tensor | None:
    """The conditioning of some rows; one of a single row serves all."""
    return cond if cond is None or len(cond) == 1 else cond[rows]


def _weighted(span: Span, trial: Trial) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(trial.error, dim=-1)
    return norm * span.h.abs().to(norm)


def _finite(*parts: Tensor) -> Tensor:
    return torch.stack([part.isfinite().flatten(1).all(1) for part in parts]).all(0)


def _choose(rows: Tensor, new: Tensor, old: Tensor) -> Tensor:
    return torch.where(rows.view(-1, *([1] * (old.ndim - 1))), new, old)
