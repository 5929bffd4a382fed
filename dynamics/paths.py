"""Probability paths between a source and data, and the losses and scores that follow from them.

A path joins a source sample x0 to a data sample x1 (stochastic interpolants, Albergo et al., arXiv 2303.08797):

    x_t = a(t) x0 + b(t) x1 + g(t) z,    z ~ N(0, I),    a(0) = b(1) = 1,    a(1) = b(0) = g(0) = g(1) = 0

Two regressions on x_t determine the flow and its score. The variance of their targets is bounded, whatever the path:

    v(t, x) = E[a' x0 + b' x1 | x_t = x]        the velocity without the noise term: `flow_matching_loss`
    e(t, x) = E[z | x_t = x]                    the denoiser, on a path with noise: `denoising_loss`
    dx/dt = v + g' e,    score = -e / g

Where x0 ~ N(0, I) is independent of x1, a path without noise needs no denoiser: `score_from_velocity`. The pairs
(x0, x1) may be drawn independently or from any coupling, such as that of `coupling`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor

from .fields import Time
from .ode import FieldLike, bind

Schedule: TypeAlias = Callable[[Tensor], tuple[Tensor, Tensor]]
"""A coefficient of the path: t -> (value, time derivative), elementwise."""


@dataclass(frozen=True)
class Path:
    """``x_t = a(t) x0 + b(t) x1 + g(t) z`` and the velocity of its first two terms.

    Attributes:
        name: for configurations and messages.
        a: weight of the source.
        b: weight of the data.
        g: weight of the latent noise; None for a path without.
    """

    name: str
    a: Schedule
    b: Schedule
    g: Schedule | None = None

    def sample(self, t: Time, x0: Tensor, x1: Tensor, z: Tensor | None = None) -> Tensor:
        """The point x_t, [B, D].

        Args:
            t: time in [0, 1], a float or [B].
            x0: source samples, [B, D].
            x1: data samples, [B, D].
            z: standard normal noise, [B, D], exactly for the paths that have g.

        Raises:
            ValueError: if shapes differ, or z is missing or superfluous.
        """
        if (z is None) != (self.g is None):
            raise ValueError(
                f"path {self.name!r} has no noise term, got z; leave it out"
                if self.g is None
                else f"path {self.name!r} has a noise term, got z=None; pass torch.randn(x0.shape, generator=...)"
            )
        point = self._mix(0, t, x0, x1)
        if self.g is None or z is None:
            return point
        _same_shape(x0=x0, z=z)
        return point + self.g(time_column(t, x0))[0] * z

    def velocity(self, t: Time, x0: Tensor, x1: Tensor) -> Tensor:
        """The velocity ``a' x0 + b' x1``, [B, D], without that of the noise, ``g' z``; arguments as in ``sample``.

        Raises:
            ValueError: if shapes differ.
        """
        return self._mix(1, t, x0, x1)

    def _mix(self, derivative: int, t: Time, x0: Tensor, x1: Tensor) -> Tensor:
        """The combination of x0 and x1 with the coefficients (derivative = 0) or their derivatives (1)."""
        _same_shape(x0=x0, x1=x1)
        column = time_column(t, x0)
        return self.a(column)[derivative] * x0 + self.b(column)[derivative] * x1


def _same_shape(**tensors: Tensor) -> None:
    shapes = [list(x.shape) for x in tensors.values()]
    if len(shapes[0]) != 2 or any(shape != shapes[0] for shape in shapes):
        names, got = " and ".join(tensors), " and ".join(map(str, shapes))
        raise ValueError(f"{names} must have the same shape [B, D], got {got}")


def time_column(t: Time, x: Tensor) -> Tensor:
    """Time as [B, 1] (or [1, 1] for a number) in the dtype and on the device of x.

    Raises:
        ValueError: if t is a tensor of another length than x.
    """
    if isinstance(t, Tensor) and t.ndim > 0 and t.shape != x.shape[:1]:
        raise ValueError(f"t must be a float or have shape [{x.shape[0]}], got {list(t.shape)}; one time per row of x")
    return torch.as_tensor(t, dtype=x.dtype, device=x.device).reshape(-1, 1)


def _fall(t: Tensor) -> tuple[Tensor, Tensor]:
    return 1 - t, -torch.ones_like(t)


def _rise(t: Tensor) -> tuple[Tensor, Tensor]:
    return t, torch.ones_like(t)


def _cosine(t: Tensor) -> tuple[Tensor, Tensor]:
    angle = 0.5 * math.pi * t
    return torch.cos(angle), -0.5 * math.pi * torch.sin(angle)


def _sine(t: Tensor) -> tuple[Tensor, Tensor]:
    angle = 0.5 * math.pi * t
    return torch.sin(angle), 0.5 * math.pi * torch.cos(angle)


def _bridge(t: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    deviation = torch.sqrt(t * (1 - t))
    return scale * deviation, scale * (0.5 - t) / deviation


def brownian_bridge(scale: float = 1.0) -> Path:
    """Straight line plus a Brownian bridge: ``g(t) = scale sqrt(t (1 - t))``.

    Raises:
        ValueError: if ``scale`` is not positive.
    """
    if not scale > 0:
        raise ValueError(f"scale must be positive, got {scale}; the path without noise is LINEAR")
    return Path("brownian_bridge", _fall, _rise, partial(_bridge, scale=scale))


LINEAR = Path("linear", _fall, _rise)
"""``(1 - t) x0 + t x1``: rectified flow, the path of PolicyFlow."""

TRIG = Path("trig", _cosine, _sine)
"""``cos(pi t / 2) x0 + sin(pi t / 2) x1``: keeps unit variance between independent unit-variance ends."""


def score_from_velocity(path: Path, t: Time, x: Tensor, velocity: Tensor) -> Tensor:
    """Score ``grad log p_t(x)`` of the path's marginal for a source x0 ~ N(0, I) independent of x1.

    The marginal velocity is ``v = a' E[x0|x] + b' E[x1|x]``, the state ``x = a E[x0|x] + b E[x1|x]``, and Tweedie's
    formula gives ``score = -E[x0|x] / a``. Eliminating both expectations:

        score = (b v - b' x) / (a (a b' - a' b))

    For LINEAR this is ``(t v - x) / (1 - t)``.

    Args:
        path: a path without noise term.
        t: time in [0, 1), a float or [B]; the formula is singular at t = 1, where a = 0.
        x: states, [B, D].
        velocity: marginal velocity ``E[dx_t/dt | x_t = x]``, such as a trained field's, [B, D].

    Returns:
        Score, [B, D], in units of 1/x.

    Raises:
        ValueError: if the path has a noise term or shapes differ.
    """
    if path.g is not None:
        raise ValueError(
            f"path {path.name!r} has a noise term, its velocity does not determine the score; train a denoiser"
        )
    _same_shape(x=x, velocity=velocity)
    column = time_column(t, x)
    (a, da), (b, db) = path.a(column), path.b(column)
    return (b * velocity - db * x) / (a * (a * db - da * b))


def flow_matching_loss(
    field: FieldLike,
    path: Path,
    x0: Tensor,
    x1: Tensor,
    t: Time,
    cond: Tensor | None = None,
    z: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Conditional flow matching: ``|v(t, x_t, cond) - (a' x0 + b' x1)|^2``, summed over the D dimensions.

    Its expectation is minimal at ``E[a' x0 + b' x1 | x_t]``: the marginal velocity (Lipman et al., arXiv 2210.02747)
    but for the noise's part, ``g' E[z | x_t]``, which `denoising_loss` finds.

    Args:
        field: velocity field or callable ``(t, x, cond) -> v``.
        path: the path from x0 to x1.
        x0: source samples, [B, D].
        x1: data samples, [B, D].
        t: times, a float or [B].
        cond: conditioning, [B, C], or None.
        z: standard normal noise, [B, D], exactly for the paths that have a noise term.
        mask: where x1 is known, bool [B, D]; the velocity elsewhere does not count. None: everywhere.

    Returns:
        Loss per row, [B].

    Raises:
        ValueError: if shapes do not fit, or z is missing or superfluous.
    """
    error = bind(field, cond)(t, path.sample(t, x0, x1, z)) - path.velocity(t, x0, x1)
    return (error if mask is None else error * mask).square().sum(-1)


def denoising_loss(
    denoiser: FieldLike, path: Path, x0: Tensor, x1: Tensor, t: Time, z: Tensor, cond: Tensor | None = None
) -> Tensor:
    """``|e(t, x_t, cond) - z|^2``, summed over the D dimensions: minimal at ``E[z | x_t]``, which is ``-g score``.

    The score's objective of stochastic interpolants (arXiv 2303.08797). Its target has unit variance at
    all times, while the score itself grows as 1 / g at both ends.

    Args:
        denoiser: field or callable ``(t, x, cond) -> e``.
        path: a path with a noise term.
        x0: source samples, [B, D].
        x1: data samples, [B, D].
        t: times, a float or [B].
        z: standard normal noise, [B, D], that of ``flow_matching_loss`` or another.
        cond: conditioning, [B, C], or None.

    Returns:
        Loss per row, [B].

    Raises:
        ValueError: if the path has no noise term or shapes do not fit.
    """
    error = bind(denoiser, cond)(t, path.sample(t, x0, x1, z)) - z
    return error.square().sum(-1)
