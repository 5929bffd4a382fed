"""Integration of an SDE to a tolerance on one Brownian path, every row with step sizes of its own."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from .brownian_tree import LEAST_INCREMENT, BrownianTree, check_tree
from .ode import check_batch, fixed_time
from .sde import SDE, Bound, SDESolver, bind_sde, check_direction, get_solver
from .step_control import (
    AdaptiveResult,
    Carry,
    Problem,
    Span,
    Step,
    Trial,
    check_problem,
    may_learn,
    retrace,
    search,
    select,
)

_BEGIN = 0.01
"""The first step, as a fraction of the time to integrate: the controller finds the right size within a few steps."""

_DIGITS = 3
"""Binary digits of a step size after the first: few, for the tree's sake, and the size is off by at most an eighth."""


_GAINS = (0.2, 0.05)
"""Lower than for an ODE: the estimate of a step is random, and says little on the next."""


def sdeint_adaptive(
    sde: SDE,
    x: Tensor,
    *,
    noise: BrownianTree,
    rtol: float = 1e-3,
    atol: float = 1e-4,
    solver: SDESolver | str | None = None,
    cond: Tensor | None = None,
    t0: float | None = None,
    t1: float | None = None,
    max_steps: int = 10_000,
) -> AdaptiveResult:
    """Integrate an Ito equation, the estimated error of every step within the tolerance.

    The tree fixes the path: whatever the tolerance, solver and steps, a row solves for the same Brownian motion, also
    after a step that was rejected (Jelincic, Foster and Kidger, arXiv 2405.06464). A step is taken whole and in two
    halves; the halves are the result, their difference to the whole the estimate. Acceptance and sizes as in
    `odeint_adaptive`, for an error that falls as ``h^(order + 1/2)``. Sizes and times have few binary digits of the
    tree's interval, so that a query of the tree costs few levels.

    At tolerance r the root mean square error is about in proportion to ``r^(order / (order + 1/2))``. Sizes that look
    ahead on the path are safe only for solvers that converge on every single path. Euler-Maruyama does not unless the
    noise is additive: its errors cancel in the mean over paths only, and chosen sizes bias that mean (Gaines and Lyons
    1997).

    The gradient is that of the map of the accepted steps, their sizes constant, as in `odeint_adaptive`. Waits for the
    device once per step, and is not for ``torch.compile``. A step tried costs ``3 s - 1`` drift calls for a solver of
    s, and one query of the tree.

    Args:
        sde: the equation, called with t of shape [B] (`interpolant_sde` takes numbers only).
        x: state at t0, [B, D], float32 or float64.
        noise: the Brownian paths, of x's shape, dtype and device.
        rtol: tolerance relative to the state, at least 0.
        atol: absolute tolerance in units of x, positive.
        solver: a scheme or a key of ``SDE_SOLVERS``: of order 1 or more, or the noise is additive; "reversible_heun",
            whose state is a pair, is not among them. None for "sra1" where the noise is additive, else "milstein".
        cond: conditioning, [B, C] or [1, C], or None.
        t0: start time; None for the tree's.
        t1: end time; None for the tree's.
        max_steps: most steps of a row, accepted and rejected together.

    Returns:
        State, time, status and counts of each row. A row that fails raises nothing; ``AdaptiveResult.checked`` does.

    Raises:
        ValueError: if x, a tolerance, ``max_steps`` or a time is not as above, the noise does not fit, or the solver
            does not take the equation.
    """
    check_batch(x)
    check_problem(x, cond, rtol, atol, max_steps)
    solver = get_solver(("sra1" if sde.additive else "milstein") if solver is None else solver, sde)
    if solver.pairs:
        raise ValueError(f"solver must have one state, got {solver.name!r}; use 'stochastic_heun'")
    if solver.order < 1 and not sde.additive:
        raise ValueError(
            f"solver must be of order 1 or more for {type(sde).__name__}, got {solver.name!r} of order "
            f"{solver.order:g}: with step sizes that depend on the path it goes wrong; use 'milstein'"
        )
    check_tree(noise, x)
    t0, t1 = (noise.t0 if t0 is None else fixed_time("t0", t0)), (noise.t1 if t1 is None else fixed_time("t1", t1))
    check_direction(t0, t1)
    length = noise.t1 - noise.t0
    start, end = (t0 - noise.t0) / length, (t1 - noise.t0) / length
    if not (start >= 0 and end <= 1):
        raise ValueError(f"t0 and t1 must lie in the tree's [{noise.t0}, {noise.t1}], got {t0} and {t1}")

    # The search runs in the tree's own time, from 0 to 1 in float64, where binary fractions are exact.
    at, scheme = torch.full_like(x[:, 0], start, dtype=torch.float64), solver
    equation, t = bind_sde(sde, scheme, cond), x.new_full(x.shape[:1], t0)
    level = equation.diffusion(t, x)
    drift = equation.drift(t, x)
    with torch.no_grad():
        problem = Problem(
            lambda rows: _step(bind_sde(sde, scheme, select(cond, rows)), scheme, noise.rows(rows)),
            x.detach(), noise.state(at), torch.full_like(at, _BEGIN * (end - start)), (start, end), (rtol, atol),
            max(solver.order, 1.0) + 0.5, max_steps, _GAINS, _snap,
            2 * LEAST_INCREMENT,
        )  # fmt: skip
        result, course = search(problem)
    calls = (3 * len(solver.c) - 1) * (result.accepted + result.rejected) + 1
    t = torch.where(result.t == end, t1, noise.t0 + length * result.t).to(x.dtype)
    result = replace(result, t=t, calls=calls, error=length * result.error)
    learns = may_learn(sde) or any(isinstance(part, Tensor) and part.requires_grad for part in (x, drift, level))
    if not (torch.is_grad_enabled() and learns):
        return result
    last, _, error = retrace(replace(problem, x=x), course, result.accepted)
    return replace(result, x=last, error=length * error)


def _step(equation: Bound, solver: SDESolver, noise: BrownianTree) -> Step:
    """Two half steps and their difference to the whole one; it carries W and its integral at the start."""
    length = noise.t1 - noise.t0

    def step(span: Span, x: Tensor, carry: Carry) -> Trial:
        middle = span.t + 0.5 * span.h
        with torch.no_grad():
            w, integral = noise.state(torch.stack([middle, span.end]))
        places = ((span.t, (carry[0], carry[1])), (middle, (w[0], integral[0])), (span.end, (w[1], integral[1])))
        begin = (noise.t0 + length * span.t).to(x.dtype)
        slope = equation.drift(begin, x)
        known = equation._replace(drift=lambda t, y: slope if y is x else equation.drift(t, y))

        def advance(start: int, end: int, y: Tensor) -> Tensor:
            (t, before), (t_end, after) = places[start], places[end]
            increment, area = (part.to(x.dtype) for part in noise.step(t, t_end, before, after))
            time, size = (noise.t0 + length * t).to(x.dtype), (length * (t_end - t)).to(x.dtype)
            return solver.step(known, time, size, (y,), increment, area)[0]

        end = advance(1, 2, advance(0, 1, x))
        return Trial(end, end - advance(0, 2, x), places[2][1])

    return step


def _snap(t: Tensor, h: Tensor) -> Tensor:
    """The size, at most h, that leads from t to a multiple of h rounded to a power of two, over 2^digits."""
    unit = torch.exp2(torch.floor(torch.log2(h)) - _DIGITS)
    return torch.floor((t + h) / unit) * unit - t
