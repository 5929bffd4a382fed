"""A learned Langevin transition of a latent state, after LangevinFlow (arXiv 2507.11531)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .fields import Time, VelocityField
from .langevin import kinetic


class OscillatorField(VelocityField):
    """Force of coupled oscillators on a ring, after the potential of LangevinFlow (arXiv 2507.11531).

        U = 1/2 sum_i [k_i x_i^2 + c_i (x_i - x_(i+1))^2] - x . (W cond),    F = -dU/dx

    Stiffnesses k and couplings c are learned and positive, so U is convex and the dynamics stay bounded. The paper's
    potential is more general; a ``PotentialField`` of any network can take this field's place.

    Args:
        dim: D, number of oscillators.
        cond_dim: C, size of the external drive, 0 for none; W is zero at first.
    """

    def __init__(self, dim: int, cond_dim: int = 0) -> None:
        super().__init__(dim, cond_dim)
        self.log_stiffness = nn.Parameter(torch.zeros(dim))
        self.log_coupling = nn.Parameter(torch.zeros(dim))
        self.drive = nn.Parameter(torch.zeros(dim, cond_dim)) if cond_dim else None

    def forward(self, t: Time, x: Tensor, cond: Tensor | None = None) -> Tensor:
        """Force [B, D] at x [B, D]; the same at all times t."""
        self.check_state(t, x)
        self.check_cond(cond)
        spring = self.log_coupling.exp() * (x.roll(-1, -1) - x)
        force = spring - spring.roll(1, -1) - self.log_stiffness.exp() * x
        return force if self.drive is None or cond is None else force + cond @ self.drive.mT


class KineticTransition(nn.Module):
    """Transition of a latent (position, velocity) by BAOAB steps in a learned potential (LangevinFlow).

    Args:
        force: field of the force, such as an ``OscillatorField`` or a ``PotentialField``.
        step: step size.
        friction: initial value; learned, one per dimension.
        temperature: strength of the noise, positive.

    Raises:
        ValueError: if friction is not positive; step and temperature are checked at the call.
    """

    def __init__(self, force: VelocityField, *, step: float, friction: float = 1.0, temperature: float = 1.0) -> None:
        super().__init__()
        if not friction > 0:
            raise ValueError(f"friction must be positive, got {friction}")
        self.force, self.step, self.temperature = force, step, temperature
        self.log_friction = nn.Parameter(torch.full((force.dim,), math.log(friction)))

    def forward(
        self, position: Tensor, velocity: Tensor, noise: Tensor, cond: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Position and velocity, [B, D] each, after the steps for which ``noise`` [steps, B, D] is standard normal."""
        friction, temperature = self.log_friction.exp(), self.temperature
        return kinetic(
            self.force, position, velocity, noise, step=self.step, friction=friction, temperature=temperature, cond=cond
        )
