"""Explicit Runge-Kutta integration of ``dx/dt = v(t, x, cond)`` in equal steps.

Python ints drive the loop, so ``torch.compile(fullgraph=True)`` unrolls it. A row's result does not depend on the rest
of its batch. Gradients are those of the discrete map (discretise, then differentiate).

Step sizes chosen by the error are in ``adaptive``; gradients whose memory does not grow with the steps in
``reversible``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeAlias

import torch
from torch import Tensor

from .fields import Time, VelocityField

FieldLike: TypeAlias = VelocityField | Callable[[Time, Tensor, Tensor | None], Tensor]
"""A VelocityField or any callable ``(t, x, cond) -> v``."""


@dataclass(frozen=True)
class Tableau:
    """Butcher tableau of an explicit Runge-Kutta method with s stages.

        k_i = v(t + c_i h, x + h sum_j a_ij k_j),   x' = x + h sum_i b_i k_i

    Attributes:
        name: key in ``SOLVERS``.
        order: global error O(h^order) for smooth fields.
        a: s rows; row i holds the i coefficients of the stages before it.
        b: s weights, sum 1.
        c: s stage times as fractions of a step, in [0, 1], the first 0.
        error: weights of the slopes in the embedded error estimate ``h sum_i error_i k_i``, the step minus one of lower
            order; s weights, or s + 1 where the last belongs to the slope at the end of the step. Empty for none.
        dense: s + 1 weights of the slopes in what the interpolant adds to the cubic of both ends, ``h sum_i dense_i
            k_i``. Empty where the cubic is of the solver's order.
    """

    name: str
    order: int
    a: tuple[tuple[float, ...], ...]
    b: tuple[float, ...]
    c: tuple[float, ...]
    error: tuple[float, ...] = ()
    dense: tuple[float, ...] = ()


EULER = Tableau("euler", 1, a=((),), b=(1.0,), c=(0.0,))
"""Order 1, one field call per step (Euler 1768)."""

MIDPOINT = Tableau("midpoint", 2, a=((), (0.5,)), b=(0.0, 1.0), c=(0.0, 0.5))
"""Order 2, two field calls per step (Runge 1895). The solver of PolicyFlow (arXiv 2602.01156)."""

HEUN = Tableau("heun", 2, a=((), (1.0,)), b=(0.5, 0.5), c=(0.0, 1.0), error=(-0.5, 0.5))
"""Order 2, two field calls per step, both at step boundaries: explicit trapezoidal rule (Heun 1900).

Embedded: Euler."""

RK4 = Tableau(
    "rk4",
    4,
    a=((), (0.5,), (0.0, 0.5), (0.0, 0.0, 1.0)),
    b=(1 / 6, 1 / 3, 1 / 3, 1 / 6),
    c=(0.0, 0.5, 0.5, 1.0),
)
"""Order 4, four field calls per step (Kutta 1901)."""

DOPRI5 = Tableau(
    "dopri5",
    5,
    a=(
        (),
        (1 / 5,),
        (3 / 40, 9 / 40),
        (44 / 45, -56 / 15, 32 / 9),
        (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
        (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    ),
    b=(35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
    c=(0.0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0),
    error=(71 / 57600, 0.0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40),
    dense=(
        -12715105075 / 11282082432,
        0.0,
        87487479700 / 32700410799,
        -10690763975 / 1880347072,
        701980252875 / 199316789632,
        -1453857185 / 822651844,
        69997945 / 29380423,
    ),
)
"""Order 5, embedded order 4, six field calls per step (Dormand and Prince 1980). The seventh slope of the error
estimate is the first of the next step. Interpolant of order 4 (Hairer, Norsett and Wanner 1993, II.6). Not among
``SOLVERS``: a negative weight makes b no distribution of times."""

SOLVERS: dict[str, Tableau] = {tableau.name: tableau for tableau in (EULER, MIDPOINT, HEUN, RK4)}
"""The named solvers, for configurations and command lines."""


def get_tableau(solver: Tableau | str) -> Tableau:
    """The tableau of a solver given by name or as a tableau.

    Raises:
        ValueError: if the name is not in ``SOLVERS``.
    """
    if isinstance(solver, Tableau):
        return solver
    if solver not in SOLVERS:
        raise ValueError(f"solver must be one of {sorted(SOLVERS)} or a Tableau, got {solver!r}")
    return SOLVERS[solver]


def intervals(steps: int, t0: float, t1: float) -> list[tuple[float, float]]:
    """Start and size (t, h) of each of the equal steps from t0 to t1; ``t + h`` of the last is t1 exactly on [0, 1].

    Raises:
        ValueError: if ``steps`` is below 1, or a time is a number and not finite, or a tensor of several.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    times_given: tuple[tuple[str, float | Tensor], ...] = ("t0", t0), ("t1", t1)
    for name, time in times_given:
        check_one(name, time)
        if not isinstance(time, Tensor) and not math.isfinite(time):
            raise ValueError(f"{name} must be finite, got {time}")
    times = [t0 + (t1 - t0) * k / steps for k in range(steps)] + [t1]
    return [(t, t_next - t) for t, t_next in pairwise(times)]


def fixed_time(name: str, time: float | Tensor) -> float:
    """A time as a number, for a solver that gives no gradient with respect to it.

    Raises:
        ValueError: if the time requires one, is not finite, or a tensor of several.
    """
    check_one(name, time)
    if isinstance(time, Tensor) and time.requires_grad:
        raise ValueError(f"{name} must not require a gradient, which this solver does not give; use odeint")
    if not math.isfinite(time):
        raise ValueError(f"{name} must be finite, got {time}")
    return float(time)


def check_one(name: str, time: float | Tensor) -> None:
    """Raise ValueError unless the time is one number, the same for all rows."""
    if isinstance(time, Tensor) and time.ndim:
        raise ValueError(f"{name} must be one number, got a tensor of shape {list(time.shape)}")


def time_grid(steps: int, solver: Tableau | str = "midpoint", t0: float = 0.0, t1: float = 1.0) -> tuple[float, ...]:
    """The distinct stage times of a fixed-step solver, from t0 to t1 inclusive.

    The end t1 belongs to the grid also where the solver has no stage there (Euler, midpoint): K steps give ``2 K + 1``
    times for midpoint and RK4, ``K + 1`` for Euler and Heun. PolicyFlow (arXiv 2602.01156) draws the times of its
    importance ratio uniformly from this grid.

    Raises:
        ValueError: if ``steps`` is below 1 or the solver unknown.
    """
    # c = 1 is the next step's start: left out rather than compared, as rounding could make it a second, close time.
    fractions = sorted({0.0, *get_tableau(solver).c} - {1.0})
    return (*(t + c * h for t, h in intervals(steps, t0, t1) for c in fractions), t1)


def stage_times(tableau: Tableau, steps: list[tuple[float, float]]) -> tuple[float, ...]:
    """The times at which `advance` calls the field in steps (t, h), each once, in order.

    Without those that are tensors: no field can look them up, and they may require a gradient.
    """
    times: list[Time] = [t + c * h for t, h in steps for c in tableau.c]
    return tuple(dict.fromkeys(t for t in times if not isinstance(t, Tensor)))


def bind(field: FieldLike, cond: Tensor | None, times: Sequence[float] = ()) -> Callable[[Time, Tensor], Tensor]:
    """``(t, x) -> v`` with cond fixed; a VelocityField embeds cond and the times to come once, here.

    Raises:
        ValueError: by a call of it, if v has not the shape of x: it would be added to x all the same, and enlarge it.
    """
    if not isinstance(field, VelocityField):
        return same_shape("field", lambda t, x: field(t, x, cond))
    embedded = field.embed(cond, times)
    return same_shape("field", lambda t, x: field.forward_embedded(t, x, embedded))


def same_shape(name: str, function: Callable[[Time, Tensor], Tensor]) -> Callable[[Time, Tensor], Tensor]:
    """The function ``(t, x) -> v`` of this name, whose calls raise ValueError if v has not the shape of x."""

    def checked(t: Time, x: Tensor) -> Tensor:
        v = function(t, x)
        if v.shape != x.shape:
            hint = f"; t has shape {list(t.shape)}" if isinstance(t, Tensor) and t.ndim else ""
            raise ValueError(f"{name} must return the shape of x, {list(x.shape)}, got {list(v.shape)}{hint}")
        return v

    return checked


def advance(velocity: Callable[[Time, Tensor], Tensor], tableau: Tableau, t: Time, h: Time, x: Tensor) -> Tensor:
    """The state after one step of size h from time t, [B, D], by a field that ``bind`` has bound.

    One field call per stage. A zero coefficient costs nothing, so Euler is one call and one addition.
    """
    return combine(x, h, tableau.b, stage_slopes(velocity, tableau, t, h, x))


def stage_slopes(
    velocity: Callable[[Time, Tensor], Tensor], tableau: Tableau, t: Time, h: Time, x: Tensor
) -> list[Tensor]:
    """The slopes ``k_i`` of a step, s times [B, D]; t and h numbers, or one per row."""
    slopes: list[Tensor] = []
    for row, c in zip(tableau.a, tableau.c, strict=True):
        slopes.append(velocity(t + c * h, combine(x, h, row, slopes)))
    return slopes


def combine(x: Tensor, h: Time, weights: tuple[float, ...], slopes: list[Tensor]) -> Tensor:
    """``x + h sum_i weights_i slopes_i``, skipping zero weights; h a number, or one per row, [B]."""
    h = column(h)  # a 0-d tensor as it is: it leaves x its type
    for weight, slope in zip(weights, slopes, strict=True):
        if weight != 0.0:
            if isinstance(h, Tensor):
                x = torch.addcmul(x, h, slope, value=weight)
            else:
                x = torch.add(x, slope, alpha=h * weight)
    return x


def stability(solver: Tableau | str, w: Tensor) -> Tensor:
    """Stability function R(w): what one step of size h makes of x = 1 under ``x' = (w / h) x``, elementwise.

    A polynomial close to ``exp(w)`` (Hairer and Wanner 1996, chapter IV.2). K steps over [0, 1] of ``x' = c x`` grow x
    by ``R(c / K)^K``.
    """
    return advance(lambda t, x: w * x, get_tableau(solver), 0.0, 1.0, torch.ones_like(w))


def least_growth(solver: Tableau | str) -> float:
    """The least ``|R(w)|`` of `stability` for real w: 0 for Euler, 1/2 for midpoint and Heun, 0.27 for RK4.

    By no rate does a step shrink x further.
    """
    return stability(solver, torch.linspace(-4, 0, 4001, dtype=torch.float64)).abs().min().item()


def column(t: Time) -> Time:
    """A time or step size that broadcasts with [B, D]: a number as it is, one per row as [B, 1]."""
    return t.unsqueeze(-1) if isinstance(t, Tensor) and t.ndim else t


def error_estimate(tableau: Tableau, h: Time, slopes: list[Tensor]) -> Tensor:
    """``h sum_i error_i k_i``, [B, D], from the slopes of the stages and, for an error of s + 1 weights, of the end."""
    return combine(torch.zeros_like(slopes[0]), h, tableau.error, slopes[: len(tableau.error)])


def odeint(
    field: FieldLike,
    x: Tensor,
    *,
    steps: int,
    solver: Tableau | str = "midpoint",
    cond: Tensor | None = None,
    t0: float = 0.0,
    t1: float = 1.0,
) -> Tensor:
    """Integrate ``dx/dt = field(t, x, cond)`` from t0 to t1 in equal steps.

    Costs ``steps`` times the solver's number of stages in field calls.

    Args:
        field: velocity field or callable ``(t, x, cond) -> v``.
        x: state at t0, [B, D].
        steps: number of steps, at least 1.
        solver: a tableau or a key of ``SOLVERS``.
        cond: conditioning, [B, C], or None.
        t0: start time.
        t1: end time; below t0 to integrate backwards.

    Returns:
        State at t1, [B, D], differentiable in x, cond and the field's parameters.

    Raises:
        ValueError: if ``steps`` is below 1, the solver unknown or x not [B, D].
    """
    tableau = get_tableau(solver)
    check_batch(x)
    course = intervals(steps, t0, t1)
    velocity = bind(field, cond, stage_times(tableau, course))
    for t, h in course:
        x = advance(velocity, tableau, t, h, x)
    return x


def odeint_path(
    field: FieldLike,
    x: Tensor,
    *,
    steps: int,
    solver: Tableau | str = "midpoint",
    cond: Tensor | None = None,
    t0: float = 0.0,
    t1: float = 1.0,
) -> Tensor:
    """``odeint`` with the states it passes through; arguments and errors are the same.

    Returns:
        States at the step boundaries ``time_grid(steps, EULER, t0, t1)``, [steps + 1, B, D], the first of them x.
    """
    tableau = get_tableau(solver)
    check_batch(x)
    course = intervals(steps, t0, t1)
    velocity = bind(field, cond, stage_times(tableau, course))
    states = [x]
    for t, h in course:
        states.append(advance(velocity, tableau, t, h, states[-1]))
    return torch.stack(states)


def check_batch(x: object) -> None:
    """Raise ValueError unless x is a tensor [B, D] whose numbers can change by small steps."""
    if not isinstance(x, Tensor):
        raise ValueError(f"x must be a floating-point tensor, got {type(x).__name__}")
    if not x.is_floating_point():
        raise ValueError(f"x must be a floating-point tensor, got {x.dtype}")
    if x.ndim != 2:
        raise ValueError(f"x must have shape [B, D], got {list(x.shape)}; flatten or add the batch dimension")
