"""Equations ``dx = f dt + g dW`` made of a velocity field or a network: stable neural SDEs and stochastic interpolants.

``sde`` solves them. All are meant in Ito's sense.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from .fields import Time
from .ode import FieldLike, bind, column
from .paths import LINEAR, Path, score_from_velocity, time_column
from .sde import SDE, Drift

Scale: TypeAlias = float | Tensor | Callable[[Time], float | Tensor]
"""A noise level s(t): a constant or a function of time, in units of x / sqrt(time); a number or [D].

`sdeint_adaptive` calls the function with times [B, 1], one per row."""


class LangevinSDE(SDE):
    """``dx = drift dt + s(t) dW``: the Langevin-type class of Stable Neural SDEs (arXiv 2402.14989).

    Args:
        drift: field or callable ``(t, x, cond) -> [B, D]``; the paper's does not depend on t, this one may.
        scale: s.
    """

    additive = True

    def __init__(self, drift: FieldLike, scale: Scale) -> None:
        super().__init__()
        self.drift, self.scale = drift, scale

    def bind(self, cond: Tensor | None, times: Sequence[float] = ()) -> Drift:
        """The drift with cond embedded."""
        return bind(self.drift, cond, times)

    def diffusion(self, t: Time, x: Tensor) -> float | Tensor:
        """``s(t)``."""
        return self.scale(column(t)) if callable(self.scale) else self.scale


class LinearNoiseSDE(LangevinSDE):
    """``dx = drift dt + s(t) x dW``: noise that vanishes at the origin (arXiv 2402.14989).

    Arguments as in `LangevinSDE`.
    """

    additive = False

    def diffusion(self, t: Time, x: Tensor) -> Tensor:
        """``s(t) x``, [B, D]."""
        return super().diffusion(t, x) * x

    def correction(self, t: Time, x: Tensor) -> Tensor:
        """``s(t)^2 x``, [B, D]."""
        return super().diffusion(t, x) ** 2 * x


class GeometricSDE(LinearNoiseSDE):
    """``dx / x = drift dt + s(t) dW``: a positive x stays positive in continuous time (arXiv 2402.14989).

    Arguments as in `LangevinSDE`.
    """

    def bind(self, cond: Tensor | None, times: Sequence[float] = ()) -> Drift:
        """``x drift``, with cond embedded."""
        relative = super().bind(cond, times)
        return lambda t, x: x * relative(t, x)


class _InterpolantSDE(SDE):
    additive = True

    def __init__(
        self, field: FieldLike, eps: float | Callable[[float], float], path: Path, denoiser: FieldLike | None
    ) -> None:
        super().__init__()
        self.field, self.eps, self.path, self.denoiser = field, eps, path, denoiser

    def _level(self, t: Time) -> float:
        if isinstance(t, Tensor) and t.ndim:
            raise ValueError("t must be one number for all rows with interpolant_sde: take sdeint, not sdeint_adaptive")
        level = self.eps(float(t)) if callable(self.eps) else self.eps
        if not level >= 0:
            raise ValueError(f"eps must be at least 0, got {level} at t = {float(t):g}")
        return level

    def bind(self, cond: Tensor | None, times: Sequence[float] = ()) -> Drift:
        velocity = bind(self.field, cond, times)
        if self.denoiser is not None:
            return self._with_denoiser(velocity, self.denoiser, cond, times)
        if any(t >= 1 and self._level(t) for t in times):
            raise ValueError("the score is singular at t = 1; use a solver without a stage there or t1 below 1")

        def drift(t: Time, x: Tensor) -> Tensor:
            v, eps = velocity(t, x), self._level(t)
            return torch.add(v, score_from_velocity(self.path, t, x, v), alpha=eps) if eps else v

        return drift

    def _with_denoiser(
        self, velocity: Drift, denoiser: FieldLike, cond: Tensor | None, times: Sequence[float]
    ) -> Drift:
        schedule, noise = self.path.g, bind(denoiser, cond, times)
        assert schedule is not None
        if any(not 0 < t < 1 for t in times):
            raise ValueError(
                f"the score of a path with noise is singular at t = 0 and t = 1, got stages at {sorted(times)}; "
                "use t0=1e-3 and a solver without a stage at the end"
            )

        def drift(t: Time, x: Tensor) -> Tensor:
            g, dg = schedule(time_column(t, x))
            return torch.addcmul(velocity(t, x), dg - self._level(t) / g, noise(t, x))

        return drift

    def diffusion(self, t: Time, x: Tensor) -> float:
        return math.sqrt(2 * self._level(t))


def interpolant_sde(
    field: FieldLike,
    eps: float | Callable[[float], float],
    path: Path = LINEAR,
    denoiser: FieldLike | None = None,
) -> SDE:
    """``dx = (b + eps s) dt + sqrt(2 eps) dW``: the flow's marginals at every t, whatever eps (arXiv 2303.08797).

    b is the velocity of the flow, s the score of its marginals:

        path without noise  ``b = v`` and s follows from v, for a source N(0, I). It is singular at t = 1: solve with
                            "euler_maruyama" or "sra1", or end earlier
        path with noise     ``b = v + g' e`` and ``s = -e / g`` by the denoiser e, for any two ends. It is singular at
                            t = 0, too: begin at t0 = 1e-3, say

    Args:
        field: v, fitted by `flow_matching_loss`.
        eps: noise level in units of x^2 / time, at least 0 (0: the flow itself), or a function of time.
        path: the path of the fit.
        denoiser: e, fitted by `denoising_loss`, exactly for the paths with a noise term.

    Raises:
        ValueError: if eps is negative or a tensor, or the denoiser missing or superfluous.
    """
    if isinstance(eps, Tensor):
        raise ValueError("eps must be a number or a function of time, got a tensor; the noise level does not learn")
    if not callable(eps) and not eps >= 0:
        raise ValueError(f"eps must be at least 0, got {eps}")
    if (denoiser is None) != (path.g is None):
        raise ValueError(
            f"path {path.name!r} has no noise term, got a denoiser; leave it out"
            if path.g is None
            else f"path {path.name!r} has a noise term, got denoiser=None; fit one by denoising_loss"
        )
    return _InterpolantSDE(field, eps, path, denoiser)
