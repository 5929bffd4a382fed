"""Stochastic flows ``dx = f(t, x, cond) dt + g(t, x) dW`` with diagonal noise: equations and solvers.

Every equation here is meant in Ito's sense, whatever the solver. Two of the solvers converge to the Stratonovich
solution; they are given the drift ``f - (g dg/dx) / 2`` of the same process. For a Stratonovich equation, add
``(g dg/dx) / 2`` to its drift. With additive noise the two senses coincide.

As in ``ode``, loops run over Python ints and compile with ``torch.compile(fullgraph=True)`` (pass ``noise``: torch does
not trace a generator), rows do not depend on their batch, and gradients are those of the discrete map.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from .brownian import BrownianGrid
from .fields import Time
from .ode import check_batch, column, combine, fixed_time, intervals, same_shape

Drift: TypeAlias = Callable[[Time, Tensor], Tensor]


class SDE(nn.Module, abc.ABC):
    """An Ito equation with diagonal noise: component i of x is driven by component i of W alone.

    Attributes:
        additive: g does not depend on x. It may then be a number or [D].
    """

    additive: bool = False

    @abc.abstractmethod
    def bind(self, cond: Tensor | None, times: Sequence[float] = ()) -> Drift:
        """The drift ``(t, x [B, D]) -> f [B, D]`` for a conditioning, which is embedded here, once."""

    @abc.abstractmethod
    def diffusion(self, t: Time, x: Tensor) -> float | Tensor:
        """The noise level g, broadcastable to [B, D]; ``g_i`` depends on ``x_i`` only; t a float or [B]."""

    def correction(self, t: Time, x: Tensor) -> Tensor:
        """``g_i dg_i/dx_i``, [B, D]: by a backward pass here, in closed form in the subclasses that have one."""
        g, pull_back, *_ = torch.func.vjp(lambda y: self.diffusion(t, y), x)
        product: Tensor = pull_back(g)[0]
        return product


class Bound(NamedTuple):
    """An equation for one conditioning, in the sense (Ito or Stratonovich) that the solver integrates."""

    drift: Drift
    diffusion: Callable[[Time, Tensor], float | Tensor]
    correction: Callable[[Time, Tensor], Tensor] | None  # None: additive noise


_Carry: TypeAlias = tuple[Tensor, ...]  # the state x, then what a solver hands to its next step


_Step: TypeAlias = Callable[[Bound, Time, Time, _Carry, Tensor, Tensor | None], _Carry]


def _add_noise(x: Tensor, g: float | Tensor, w: Tensor) -> Tensor:
    return torch.addcmul(x, g, w) if isinstance(g, Tensor) else torch.add(x, w, alpha=g)


def _start(eq: Bound, t: float, x: Tensor) -> _Carry:
    return (x,)


def _euler_step(eq: Bound, t: Time, h: Time, carry: _Carry, w: Tensor, levy: Tensor | None) -> _Carry:
    (x,) = carry
    return (_add_noise(combine(x, h, (1.0,), [eq.drift(t, x)]), eq.diffusion(t, x), w),)


def _milstein_step(eq: Bound, t: Time, h: Time, carry: _Carry, w: Tensor, levy: Tensor | None) -> _Carry:
    (x,) = _euler_step(eq, t, h, carry, w, levy)
    return (x if eq.correction is None else torch.addcmul(x, eq.correction(t, carry[0]), w * w - column(h), value=0.5),)


def _heun_step(eq: Bound, t: Time, h: Time, carry: _Carry, w: Tensor, levy: Tensor | None) -> _Carry:
    (x,) = carry
    f, g = eq.drift(t, x), eq.diffusion(t, x)
    guess = _add_noise(combine(x, h, (1.0,), [f]), g, w)
    f, g = f + eq.drift(t + h, guess), g + eq.diffusion(t + h, guess)
    return (_add_noise(combine(x, h, (0.5,), [f]), 0.5 * g, w),)


def _reversible_start(eq: Bound, t: float, x: Tensor) -> _Carry:
    return x, x, eq.drift(t, x), torch.as_tensor(eq.diffusion(t, x), dtype=x.dtype, device=x.device)


def _reversible_step(eq: Bound, t: Time, h: Time, carry: _Carry, w: Tensor, levy: Tensor | None) -> _Carry:
    x, twin, f, g = carry
    twin = _add_noise(combine(2 * x - twin, h, (1.0,), [f]), g, w)
    f_next = eq.drift(t + h, twin)
    g_next = torch.as_tensor(eq.diffusion(t + h, twin), dtype=x.dtype, device=x.device)
    x = torch.addcmul(combine(x, h, (0.5,), [f + f_next]), g + g_next, w, value=0.5)
    return x, twin, f_next, g_next


def _sra1_step(eq: Bound, t: Time, h: Time, carry: _Carry, w: Tensor, levy: Tensor | None) -> _Carry:
    assert levy is not None
    (x,) = carry
    mean = torch.add(levy, w, alpha=0.5)  # of W - W_t over the step
    g, g_end = eq.diffusion(t, x), eq.diffusion(t + h, x)
    f = eq.drift(t, x)
    f_late = eq.drift(t + 0.75 * h, _add_noise(combine(x, h, (0.75,), [f]), 1.5 * g_end, mean))
    x = combine(x, h, (1 / 3, 2 / 3), [f, f_late])
    return (_add_noise(_add_noise(x, g_end, w), g - g_end, mean),)


@dataclass(frozen=True)
class SDESolver:
    """A fixed-step scheme.

    Attributes:
        name: key in ``SDE_SOLVERS``.
        order: strong order for diagonal noise, or for additive noise where the scheme takes that only.
        c: the times at which it calls the drift, as fractions of a step.
        step: ``(equation, t, h, carry, w, levy area) -> carry``; ``carry[0]`` is the state.
        start: ``(equation, t, x) -> carry``.
        stratonovich: it converges to the Stratonovich solution (``sdeint`` converts the drift).
        additive_only: it takes equations with additive noise only.
        levy: it needs the space-time Levy area.
    """

    name: str
    order: float
    c: tuple[float, ...]
    step: _Step
    start: Callable[[Bound, float, Tensor], _Carry] = _start
    stratonovich: bool = False
    additive_only: bool = False
    levy: bool = False

    @property
    def pairs(self) -> bool:
        """It carries more than the state from step to step."""
        return self.start is not _start


EULER_MARUYAMA = SDESolver("euler_maruyama", 0.5, (0.0,), _euler_step)
"""One drift call per step; order 1 for additive noise (Maruyama 1955)."""


MILSTEIN = SDESolver("milstein", 1.0, (0.0,), _milstein_step)
"""One drift call per step and the derivative of g (Milstein 1974)."""


STOCHASTIC_HEUN = SDESolver("stochastic_heun", 1.0, (0.0, 1.0), _heun_step, stratonovich=True)
"""Two drift calls per step and, for Ito's drift, the derivative of g; order 2 without noise (Ruemelin 1982)."""


REVERSIBLE_HEUN = SDESolver("reversible_heun", 0.5, (0.0, 1.0), _reversible_step, _reversible_start, stratonovich=True)
"""One drift call per step and one at the start; algebraically reversible (Kidger et al., arXiv 2105.13493).

Like Heun's method it takes the derivative of g where the drift is Ito's."""


SRA1 = SDESolver("sra1", 1.5, (0.0, 0.75), _sra1_step, additive_only=True, levy=True)
"""Two drift calls per step, additive noise, with the space-time Levy area (Roessler 2010)."""


SDE_SOLVERS: dict[str, SDESolver] = {
    solver.name: solver for solver in (EULER_MARUYAMA, MILSTEIN, STOCHASTIC_HEUN, REVERSIBLE_HEUN, SRA1)
}
"""The named solvers, for configurations and command lines."""


def sdeint(
    sde: SDE,
    x: Tensor,
    *,
    steps: int,
    solver: SDESolver | str = "euler_maruyama",
    noise: BrownianGrid | None = None,
    generator: torch.Generator | None = None,
    cond: Tensor | None = None,
    t0: float = 0.0,
    t1: float = 1.0,
) -> Tensor:
    """Integrate an Ito equation from t0 to t1 in equal steps.

    Args:
        sde: the equation.
        x: state at t0, [B, D].
        steps: number of steps, at least 1.
        solver: a scheme or a key of ``SDE_SOLVERS``.
        noise: Brownian increments [steps, B, D], of x's dtype and device; or
        generator: a source of them. Exactly one of the two.
        cond: conditioning, [B, C], or None.
        t0: start time.
        t1: end time, above t0.

    Returns:
        State at t1, [B, D], differentiable in x, the noise, cond and the parameters.

    Raises:
        ValueError: if steps, times, solver or x are not as above, the noise does not fit or lacks the Levy area that
            the solver needs, or the solver does not take the equation.
    """
    return _integrate(sde, x, steps, solver, noise, generator, cond, t0, t1, keep=False)[-1]


def sdeint_path(
    sde: SDE,
    x: Tensor,
    *,
    steps: int,
    solver: SDESolver | str = "euler_maruyama",
    noise: BrownianGrid | None = None,
    generator: torch.Generator | None = None,
    cond: Tensor | None = None,
    t0: float = 0.0,
    t1: float = 1.0,
) -> Tensor:
    """``sdeint`` with the states it passes through, [steps + 1, B, D], the first of them x."""
    return torch.stack(_integrate(sde, x, steps, solver, noise, generator, cond, t0, t1, keep=True))


def _integrate(
    sde: SDE,
    x: Tensor,
    steps: int,
    solver: SDESolver | str,
    noise: BrownianGrid | None,
    generator: torch.Generator | None,
    cond: Tensor | None,
    t0: float,
    t1: float,
    *,
    keep: bool,
) -> list[Tensor]:
    check_batch(x)
    solver, t0, t1 = get_solver(solver, sde), fixed_time("t0", t0), fixed_time("t1", t1)
    course = intervals(steps, t0, t1)
    check_direction(t0, t1)
    noise = _noise(x, steps, (t1 - t0) / steps, solver, noise, generator)

    equation = bind_sde(sde, solver, cond, tuple(dict.fromkeys(t + c * h for t, h in course for c in solver.c)))
    areas = noise.h.unbind() if solver.levy and noise.h is not None else [None] * steps
    carry = solver.start(equation, t0, x)
    states = [x]
    for (t, h), w, area in zip(course, noise.w.unbind(), areas, strict=True):
        carry = solver.step(equation, t, h, carry, w, area)
        if keep:
            states.append(carry[0])
        else:
            states = [carry[0]]
    return states


def get_solver(solver: SDESolver | str, sde: SDE) -> SDESolver:
    """The scheme given by name or as itself.

    Raises:
        ValueError: if the name is not in ``SDE_SOLVERS``, or the scheme does not take the equation.
    """
    if isinstance(solver, str):
        if solver not in SDE_SOLVERS:
            raise ValueError(f"solver must be one of {sorted(SDE_SOLVERS)} or an SDESolver, got {solver!r}")
        solver = SDE_SOLVERS[solver]
    if solver.additive_only and not sde.additive:
        raise ValueError(f"solver {solver.name!r} needs additive noise, got {type(sde).__name__}; use 'milstein'")
    return solver


def check_direction(t0: float, t1: float) -> None:
    """Raise ValueError unless t1 is above t0."""
    if not t1 > t0:
        raise ValueError(f"t1 must be above t0, got t0={t0} and t1={t1}; noise has no backward direction")


def bind_sde(sde: SDE, solver: SDESolver, cond: Tensor | None, times: Sequence[float] = ()) -> Bound:
    """The equation in the solver's sense, with cond and the times to come embedded once, here.

    Raises:
        ValueError: by a call of the drift or the diffusion, if what it returns does not fit x.
    """
    drift = same_shape("drift", sde.bind(cond, times))

    def level(t: Time, x: Tensor) -> float | Tensor:
        g = sde.diffusion(t, x)
        if isinstance(g, Tensor) and torch.broadcast_shapes(g.shape, x.shape) != x.shape:
            raise ValueError(f"diffusion must broadcast with x, {list(x.shape)}, got {list(g.shape)}")
        if isinstance(g, Tensor) and g.ndim and g.dtype != x.dtype:
            raise ValueError(f"diffusion must be {x.dtype} like x, got {g.dtype}")
        return g

    if sde.additive:
        return Bound(drift, level, None)
    if not solver.stratonovich:
        return Bound(drift, level, sde.correction)
    return Bound(lambda t, y: torch.sub(drift(t, y), sde.correction(t, y), alpha=0.5), level, sde.correction)


def _noise(
    x: Tensor, steps: int, dt: float, solver: SDESolver, noise: BrownianGrid | None, generator: torch.Generator | None
) -> BrownianGrid:
    """The noise given or drawn, checked."""
    if (noise is None) == (generator is None):
        raise ValueError("pass exactly one of noise and generator, got " + ("neither" if noise is None else "both"))
    if generator is not None:
        batch, dim = x.shape
        noise = BrownianGrid.sample(steps, (batch, dim), dt=dt, generator=generator, levy=solver.levy, dtype=x.dtype)
    assert noise is not None
    check_noise(noise, x, steps, dt)
    if solver.levy and noise.h is None:
        raise ValueError(f"solver {solver.name!r} needs the Levy area, got noise without h; sample it with levy=True")
    return noise


def check_noise(noise: BrownianGrid, x: Tensor, steps: int, dt: float) -> None:
    """Raise ValueError unless the noise is for so many steps of x."""
    if not isinstance(noise, BrownianGrid):
        raise ValueError(f"noise must be a BrownianGrid, such as BrownianTree.grid gives, got {type(noise).__name__}")
    expected, got = ([steps, *x.shape], x.dtype, x.device), (list(noise.w.shape), noise.w.dtype, noise.w.device)
    if got != expected:
        raise ValueError(f"noise must be {expected}, got {got}")
    if not math.isclose(noise.dt, dt, rel_tol=1e-9):
        raise ValueError(f"noise must have dt = (t1 - t0) / steps = {dt}, got {noise.dt}")
