"""Langevin samplers of ``p(x) ~ exp(-U(x) / temperature)``.

Forces are velocity fields or callables ``(t, x, cond) -> -grad U``, called at t = 0; ``PotentialField`` makes one of a
potential. Noise is standard normal and explicit; its first axis counts the steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from .noise import OrnsteinUhlenbeck
from .ode import FieldLike, bind, check_batch, fixed_time

Energy: TypeAlias = Callable[[Tensor, Tensor | None], Tensor]
"""A potential ``(x [B, D], cond) -> U [B]``, as ``PotentialField`` takes it."""


def overdamped(
    force: FieldLike,
    x: Tensor,
    noise: Tensor,
    *,
    step: float,
    temperature: float = 1.0,
    preconditioner: Tensor | None = None,
    cond: Tensor | None = None,
) -> Tensor:
    """Unadjusted Langevin steps ``x' = x + step M F(x) + sqrt(2 step temperature M) noise``.

    Order 1 in law: on ``U = k x^2 / 2`` the stationary variance is ``temperature / (k (1 - step k / 2))``, so with M
    the inverse curvature the bias is equal in all directions. One force call per step.

    Args:
        force: ``-grad U``.
        x: positions, [B, D].
        noise: standard normal, [steps, B, D].
        step: step size, in units of x^2 / U.
        temperature: in units of U, positive.
        preconditioner: diagonal of M, positive, [D] or [B, D], constant over the steps; None for the identity.
        cond: conditioning, [B, C], or None.

    Returns:
        Positions after the steps, [B, D], differentiable.

    Raises:
        ValueError: if step or temperature is not positive or a shape differs.
    """
    check_steps(x, noise, step, temperature, preconditioner)
    step, velocity = fixed_time("step", step), bind(force, cond, (0.0,))
    spread = (2 * step * temperature) ** 0.5
    root = None if preconditioner is None else preconditioner.sqrt()
    for z in noise.unbind():
        drift = velocity(0.0, x)
        if preconditioner is not None and root is not None:
            drift, z = preconditioner * drift, root * z
        x = torch.add(x, drift, alpha=step)
        x = x + spread * z if isinstance(spread, Tensor) else torch.add(x, z, alpha=spread)
    return x


def mala(
    energy: Energy,
    x: Tensor,
    noise: Tensor,
    uniform: Tensor,
    *,
    step: float,
    temperature: float = 1.0,
    preconditioner: Tensor | None = None,
    cond: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``overdamped`` steps with Metropolis' adjustment, row by row: p is stationary exactly, for any step.

    MALA (Roberts and Tweedie 1996); most efficient where about 0.57 of the steps are accepted. Energy and force are
    carried along: one evaluation per step and one more.

    Args:
        energy: U, ``(x [B, D], cond) -> [B]``.
        x: positions, [B, D].
        noise: standard normal, [steps, B, D].
        uniform: uniform in [0, 1), [steps, B]: a proposal is taken where it lies below the acceptance probability.
        step: step size.
        temperature: positive.
        preconditioner: diagonal of M, [D] or [B, D]; None for the identity.
        cond: conditioning, [B, C], or None.

    Returns:
        Positions [B, D], and the acceptance probability of every step, [steps, B].

    Raises:
        ValueError: as ``overdamped``, or if uniform is not [steps, B] or the energy not [B].
    """
    check_steps(x, noise, step, temperature, preconditioner)
    check_uniform(uniform, noise)
    m = torch.ones_like(x[:1]) if preconditioner is None else preconditioner
    value, probabilities = gradient_and_energy(energy, cond), []
    state = Chains(x, *value(x))
    for z, level in zip(noise.unbind(), uniform.unbind(), strict=True):
        state, probability = adjusted_step(value, state, z, level, step, temperature, lambda v, p: m**p * v)
        probabilities.append(probability)
    return state.x, torch.stack(probabilities)


class Chains(NamedTuple):
    """Positions x [B, D] with gradient [B, D] and value [B] of the potential there."""

    x: Tensor
    gradient: Tensor
    energy: Tensor


def gradient_and_energy(energy: Energy, cond: Tensor | None) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """``x [B, D] -> (gradient [B, D], U [B])``; raises ValueError if the energy is not [B]."""

    def total(y: Tensor) -> tuple[Tensor, Tensor]:
        u = energy(y, cond)
        if u.shape != y.shape[:1]:
            raise ValueError(f"energy must return shape [{y.shape[0]}], got {list(u.shape)}; squeeze it")
        return u.sum(), u

    value: Callable[[Tensor], tuple[Tensor, Tensor]] = torch.func.grad(total, has_aux=True)
    return value


def adjusted_step(
    value: Callable[[Tensor], tuple[Tensor, Tensor]],
    here: Chains,
    z: Tensor,
    level: Tensor,
    step: float,
    temperature: float,
    metric: Callable[[Tensor, float], Tensor],
) -> tuple[Chains, Tensor]:
    """One Langevin step in the metric M, which is given, with Metropolis' adjustment row by row.

    Args:
        value: `gradient_and_energy`.
        here: the chains.
        z: standard normal, [B, D].
        level: uniform in [0, 1), [B].
        step: step size.
        temperature: positive.
        metric: ``(v [B, D], p) -> M^p v``.

    Returns:
        The chains, and the probabilities [B] with which proposals are accepted.
    """
    spread = (2 * step * temperature) ** 0.5
    proposal = here.x - step * metric(here.gradient, 1.0) + spread * metric(z, 0.5)
    there = Chains(proposal, *value(proposal))
    back = metric(here.x - proposal + step * metric(there.gradient, 1.0), -0.5) / spread  # the noise that leads back
    log_ratio = (here.energy - there.energy) / temperature + 0.5 * (z.square() - back.square()).sum(-1)
    # A proposal of infinite energy may give nan: inf - inf. It is refused.
    probability = torch.exp(log_ratio.nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf).clamp(max=0))
    accepted = level < probability
    column = accepted.unsqueeze(-1)
    return Chains(
        torch.where(column, there.x, here.x),
        torch.where(column, there.gradient, here.gradient),
        torch.where(accepted, there.energy, here.energy),
    ), probability


def check_uniform(uniform: Tensor, noise: Tensor) -> None:
    """Raise ValueError unless uniform is [steps, B]."""
    if uniform.shape != noise.shape[:2]:
        raise ValueError(f"uniform must have shape {list(noise.shape[:2])}, got {list(uniform.shape)}")


def kinetic(
    force: FieldLike,
    position: Tensor,
    velocity: Tensor,
    noise: Tensor,
    *,
    step: float,
    friction: float | Tensor,
    temperature: float = 1.0,
    cond: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Underdamped Langevin dynamics ``dx = p dt, dp = F dt - friction p dt + sqrt(2 friction temperature) dW``.

    The splitting BAOAB into kick B, drift A and exact friction O (Leimkuhler and Matthews 2013), of order 2 in law, for
    unit mass. One force call per step and one at the start. On ``U = k x^2 / 2`` it is stable for ``step < 2 /
    sqrt(k)``. With T the temperature the stationary variances are then ``T / k`` of the position, which is exact, and
    ``T (1 - step^2 k / 4)`` of the velocity, whatever the friction.

    Args:
        force: ``-grad U``.
        position: x, [B, D].
        velocity: p, [B, D].
        noise: standard normal, [steps, B, D].
        step: step size, in units of time.
        friction: in 1/time, positive: a number, or a tensor that broadcasts with x (goes unchecked).
        temperature: in units of U, positive.
        cond: conditioning, [B, C], or None.

    Returns:
        Position and velocity after the steps, [B, D] each, differentiable.

    Raises:
        ValueError: if step, friction or temperature is not positive, or a shape differs.
    """
    check_steps(position, noise, step, temperature, None)
    if velocity.shape != position.shape:
        raise ValueError(
            f"velocity must have the shape of position, {list(position.shape)}, got {list(velocity.shape)}"
        )
    if not isinstance(friction, Tensor) and not friction > 0:
        raise ValueError(f"friction must be positive, got {friction}")
    step, acceleration = fixed_time("step", step), bind(force, cond, (0.0,))
    decay, spread = OrnsteinUhlenbeck(friction, (2 * friction * temperature) ** 0.5).transition(step)
    x, p, f = position, velocity, acceleration(0.0, position)
    for z in noise.unbind():
        p = torch.add(p, f, alpha=0.5 * step)
        x = torch.add(x, p, alpha=0.5 * step)
        p = decay * p + spread * z
        x = torch.add(x, p, alpha=0.5 * step)
        f = acceleration(0.0, x)
        p = torch.add(p, f, alpha=0.5 * step)
    return x, p


def check_steps(x: Tensor, noise: Tensor, step: float, temperature: float, preconditioner: Tensor | None) -> None:
    """Raise ValueError if what all samplers take is out of range or of another shape."""
    check_batch(x)
    for name, value in (("step", step), ("temperature", temperature)):
        if not value > 0:
            raise ValueError(f"{name} must be positive, got {value}")
    if noise.ndim != 3 or noise.shape[0] < 1 or noise.shape[1:] != x.shape:
        raise ValueError(f"noise must have shape [steps, {x.shape[0]}, {x.shape[1]}], got {list(noise.shape)}")
    if (noise.dtype, noise.device) != (x.dtype, x.device):
        raise ValueError(f"noise must be {x.dtype} on {x.device}, got {noise.dtype} on {noise.device}")
    if preconditioner is not None and preconditioner.shape not in (x.shape, x.shape[1:]):
        raise ValueError(
            f"preconditioner must have shape {[x.shape[1]]} or {list(x.shape)}, got {list(preconditioner.shape)}"
        )
