"""Flows that are noisy while sampling: the field as an SDE, or as a chain of Gaussian steps."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...dynamics.brownian import BrownianGrid
from ...dynamics.fields import Time, VelocityField
from ...dynamics.fokker_planck import fokker_planck_residual
from ...dynamics.neural_sde import LangevinSDE, interpolant_sde
from ...dynamics.ode import FieldLike, bind, time_grid
from ...dynamics.sde import sdeint, sdeint_path


def langevin_flow(
    field: FieldLike, z: Tensor, obs: Tensor, path: Tensor, mean: Tensor, log_std: Tensor, eps: float
) -> Tensor:
    """Carry z [B, D] to x1 [B, D] along noise by Euler and Maruyama: `interpolant_sde` in units of the base.

    ``dx = (v + eps s^2 score) dt + sqrt(2 eps) s dW`` with ``s^2 score = (t v - (x - m)) / (1 - t)`` for a base
    N(m, s^2).

    Args:
        field: v, conditioned on obs.
        z: start.
        obs: normalised observations, [B, O].
        path: standard normal noise of each step, [K, B, D].
        mean: m, [B, D].
        log_std: log s, [B, D].
        eps: noise, in (0, 1], in units of the base's variance / flow time.
    """
    std, step = log_std.exp(), 1 / len(path)
    velocity = bind(field, obs, time_grid(len(path), "euler")[:-1])
    sde = interpolant_sde(lambda t, x, cond: velocity(t, mean + std * x) / std, eps)
    noise = BrownianGrid(step, path * math.sqrt(step))
    return mean + std * sdeint(sde, (z - mean) / std, steps=len(path), noise=noise)


class _InUnitsOfBase(VelocityField):
    """The field as one of ``y = (x - m) / s``, whose base is N(0, I)."""

    def __init__(self, field: VelocityField, mean: Tensor, log_std: Tensor) -> None:
        super().__init__(field.dim, field.cond_dim)
        self.field, self.mean, self.std = field, mean, log_std.exp()

    def forward(self, t: Time, x: Tensor, cond: Tensor | None = None) -> Tensor:
        return self.field(t, self.mean + self.std * x, cond) / self.std

    def divergence_embedded(self, t: Time, x: Tensor, embedded: Tensor | None) -> tuple[Tensor, Tensor]:
        v, divergence = self.field.divergence(t, self.mean + self.std * x, embedded)
        return v / self.std, divergence


def sde_gap(field: VelocityField, t: Tensor, x: Tensor, obs: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """Root mean square of ``(1 - t)^2 s r``, a scalar: r is `fokker_planck_residual`, s the base's deviation.

    0 where the actions of the ODE and those of `langevin_flow` have the same distribution, 1 for a field that is 0.

    Args:
        field: v, conditioned on obs.
        t: flow times, [B].
        x: states, [B, D].
        obs: normalised observations, [B, O].
        mean: m of the base, [B, D].
        log_std: log s, [B, D].
    """
    scaled = _InUnitsOfBase(field, mean, log_std)
    residual = fokker_planck_residual(scaled, t, (x - mean) / scaled.std, obs)
    return ((1 - t.unsqueeze(-1)).square() * residual).square().mean().sqrt()


def gaussian_chain(field: FieldLike, z: Tensor, obs: Tensor, path: Tensor, log_std: Tensor) -> Tensor:
    """K Euler steps with noise after all but the last: the states from z to x1, [K + 1, B, D] (arXiv 2505.22094).

    Each state given the one before is Gaussian; the last step's noise is left to the action.

    Args:
        field: velocity field, conditioned on obs.
        z: start, [B, D].
        obs: normalised observations, [B, O].
        path: standard normal noise, [K - 1, B, D].
        log_std: log standard deviations of the steps, [K - 1, D].
    """
    noise = torch.cat([log_std.exp().unsqueeze(1) * path, torch.zeros_like(z).unsqueeze(0)])
    grid = BrownianGrid(1 / len(noise), noise)
    return sdeint_path(LangevinSDE(field, 1.0), z, steps=len(noise), noise=grid, cond=obs)
