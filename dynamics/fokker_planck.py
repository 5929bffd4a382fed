"""By how much a density fails the Fokker-Planck equation of an SDE: a diagnostic, or a penalty."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .fields import Time, VelocityField


def fokker_planck_residual(
    log_density: Callable[[Time, Tensor, Tensor | None], Tensor],
    drift: VelocityField,
    diffusion: float | Tensor,
    t: Time,
    x: Tensor,
    cond: Tensor | None = None,
    *,
    probe: Tensor | None = None,
    width: float = 0.1,
) -> Tensor:
    """By how much a density fails the Fokker-Planck equation of ``dX = f dt + g dW``.

        r = g^2 / 2 (div s + |s|^2) - f.s - div f - d/dt log p,    s = grad log p

    The residual is 0 everywhere for the density of the SDE's solution, and with g = 0 for that of the flow. Use it as a
    penalty, or to check that sampling by ODE and by SDE agree (arXiv 2311.15996, 2506.17139).

    The strong form takes two divergences, each D passes by default. The weak form replaces div w at x by
    ``(w(x + d) - w(x - d)).d / (2 width^2)`` with d = width probe, and the other terms by their mean at both points. By
    Stein's identity it is an unbiased estimate of the residual averaged over N(x, width^2 I). Its square is biased:
    multiply the residuals of two independent probes instead.

    Args:
        log_density: ``(t, x, cond) -> log p``, [B], normalised at all times alike, each row of its own row only.
        drift: f.
        diffusion: g at time t, a number or [B].
        t: times, a float or [B].
        x: states, [B, D].
        cond: conditioning of density and drift, [B, C], or None.
        probe: None for the strong form; standard normal, [B, D], for the weak one.
        width: standard deviation of the average in the weak form, in units of x.

    Returns:
        Residual r, [B], in 1/time.

    Raises:
        ValueError: if shapes do not fit, or the width is not positive.
    """
    drift.check_state(t, x)
    if probe is not None and probe.shape != x.shape:
        raise ValueError(f"probe must have the shape of x, {list(x.shape)}, got {list(probe.shape)}")
    if not width > 0:
        raise ValueError(f"width must be positive, got {width}")
    half = 0.5 * diffusion**2
    score = _Score(log_density, drift)
    times = torch.as_tensor(t, dtype=x.dtype, device=x.device).expand(x.shape[0])

    def rest(y: Tensor, s: Tensor, f: Tensor) -> Tensor:
        """The residual without the divergences."""
        rate: Tensor = torch.func.grad(lambda time: log_density(time, y, cond).sum())(times)
        return half * s.square().sum(-1) - (f * s).sum(-1) - rate

    if probe is None:
        s, spread = score.divergence(times, x, cond)
        f, expansion = drift.divergence(t, x, cond)
        return rest(x, s, f) + half * spread - expansion
    points = (x + width * probe, x - width * probe)
    (s_up, s_down), (f_up, f_down) = ([field(times, y, cond) for y in points] for field in (score, drift))
    column = half.unsqueeze(-1) if isinstance(half, Tensor) and half.ndim else half
    divergence = ((column * (s_up - s_down) - (f_up - f_down)) * probe).sum(-1) / (2 * width)
    return divergence + 0.5 * (rest(points[0], s_up, f_up) + rest(points[1], s_down, f_down))


class _Score(VelocityField):
    """``grad_x log p(t, x, cond)``."""

    def __init__(self, log_density: Callable[[Time, Tensor, Tensor | None], Tensor], drift: VelocityField) -> None:
        super().__init__(drift.dim, drift.cond_dim)
        self.log_density = log_density

    def forward(self, t: Time, x: Tensor, cond: Tensor | None = None) -> Tensor:
        score: Tensor = torch.func.grad(lambda y: self.log_density(t, y, cond).sum())(x)
        return score
