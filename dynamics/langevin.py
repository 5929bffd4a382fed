"""Langevin samplers of ``p(x) ~ exp(-U(x) / temperature)``.

Forces are velocity fields or callables ``(t, x, cond) -> -grad U``, called at t = 0; ``PotentialField`` makes one of a
potential. Noise is standard normal and explicit; its first axis counts the steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, TypeAlias

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
    _check(x, noise, step, temperature, preconditioner)
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
    _check(x, noise, step, temperature, preconditioner)
    if uniform.shape != noise.shape[:2]:
        raise ValueError(f"uniform must have shape {list(noise.shape[:2])}, got {list(uniform.shape)}")

    def total(y: Tensor) -> tuple[Tensor, Tensor]:
        u = energy(y, cond)
        if u.shape != y.shape[:1]:
            raise ValueError(f"energy must return shape [{y.shape[0]}], got {list(u.shape)}; squeeze it")
        return u.sum(), u

    gradient_and_energy: Callable[[Tensor], tuple[Tensor, Tensor]] = torch.func.grad(total, has_aux=True)
    m = torch.ones_like(x[:1]) if preconditioner is None else preconditioner
    spread = (2 * step * temperature * m).sqrt()
    probabilities = []
    gradient, u = gradient_and_energy(x)
    for z, level in zip(noise.unbind(), uniform.unbind(), strict=True):
        proposal = x - step * m * gradient + spread * z
        gradient_there, u_there = gradient_and_energy(proposal)
        z_back = (x - proposal + step * m * gradient_there) / spread  # the noise that would lead back
        log_ratio = (u - u_there) / temperature + 0.5 * (z.square() - z_back.square()).sum(-1)
        # A proposal of infinite energy may give nan: inf - inf. It is refused.
        probability = torch.exp(log_ratio.nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf).clamp(max=0))
        accepted = level < probability
        x = torch.where(accepted.unsqueeze(-1), proposal, x)
        gradient = torch.where(accepted.unsqueeze(-1), gradient_there, gradient)
        u = torch.where(accepted, u_there, u)
        probabilities.append(probability)
    return x, torch.stack(probabilities)


def kinetic(
    force: FieldLike,
    position: Tensor,
    velocity: Tensor,
    noise: Tensor,
    *,
    step: float,
    friction: float | Tensor,
    temperature: float = 1.0,
    scheme: Literal["baoab", "obabo"] = "baoab",
    cond: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Underdamped Langevin dynamics ``dx = p dt, dp = F dt - friction p dt + sqrt(2 friction temperature) dW``.

    Splittings into kick B, drift A and exact friction O (Leimkuhler and Matthews 2013), of order 2 in law, for unit
    mass. One force call per step and one at the start. On ``U = k x^2 / 2`` they are stable for ``step < 2 / sqrt(k)``.
    With T the temperature and ``s = 1 - step^2 k / 4``, the stationary variances are then, whatever the friction:

        ======== ================= =============
        scheme   position          velocity
        ======== ================= =============
        baoab    ``T / k`` (exact) ``T s``
        obabo    ``T / (k s)``     ``T`` (exact)
        ======== ================= =============

    Args:
        force: ``-grad U``.
        position: x, [B, D].
        velocity: p, [B, D].
        noise: standard normal, [steps, B, D]; for OBABO two per step, [2 steps, B, D].
        step: step size, in units of time.
        friction: in 1/time, positive: a number, or a tensor that broadcasts with x (goes unchecked).
        temperature: in units of U, positive.
        scheme: "baoab" or "obabo".
        cond: conditioning, [B, C], or None.

    Returns:
        Position and velocity after the steps, [B, D] each, differentiable.

    Raises:
        ValueError: if step, friction or temperature is not positive, the scheme unknown or a shape differs.
    """
    if scheme not in ("baoab", "obabo"):
        raise ValueError(f"scheme must be 'baoab' or 'obabo', got {scheme!r}")
    _check(position, noise, step, temperature, None)
    if velocity.shape != position.shape or (scheme == "obabo" and noise.shape[0] % 2):
        raise ValueError(
            f"velocity must have the shape of position, {list(position.shape)}, and noise an even first axis for "
            f"'obabo', got {list(velocity.shape)} and {list(noise.shape)}"
        )
    if not isinstance(friction, Tensor) and not friction > 0:
        raise ValueError(f"friction must be positive, got {friction}")
    step, acceleration = fixed_time("step", step), bind(force, cond, (0.0,))
    thermostat = OrnsteinUhlenbeck(friction, (2 * friction * temperature) ** 0.5)
    decay, spread = thermostat.transition(step if scheme == "baoab" else 0.5 * step)
    x, p, f = position, velocity, acceleration(0.0, position)
    draws = noise.unbind()
    for k in range(len(draws) if scheme == "baoab" else len(draws) // 2):
        if scheme == "baoab":
            p = torch.add(p, f, alpha=0.5 * step)
            x = torch.add(x, p, alpha=0.5 * step)
            p = decay * p + spread * draws[k]
            x = torch.add(x, p, alpha=0.5 * step)
            f = acceleration(0.0, x)
            p = torch.add(p, f, alpha=0.5 * step)
        else:
            p = torch.add(decay * p + spread * draws[2 * k], f, alpha=0.5 * step)
            x = torch.add(x, p, alpha=step)
            f = acceleration(0.0, x)
            p = decay * torch.add(p, f, alpha=0.5 * step) + spread * draws[2 * k + 1]
    return x, p


def _check(x: Tensor, noise: Tensor, step: float, temperature: float, preconditioner: Tensor | None) -> None:
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
