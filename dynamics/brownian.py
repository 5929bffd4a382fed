"""Brownian motion over equal steps: the noise of the SDE solvers.

No global random numbers: a ``torch.Generator`` is an argument wherever something is drawn.

    ======== ============= ===============================================================================
    symbol   shape         meaning
    ======== ============= ===============================================================================
    w        [..., B, D]   increment of Brownian motion over a step, ``N(0, dt)``
    h        [..., B, D]   space-time Levy area of the step, ``N(0, dt / 12)``, independent of w:
                           the mean of ``W_s - W_start - (s - start) / dt w`` over the step
    ======== ============= ===============================================================================
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class BrownianGrid:
    """Increments of B x D independent Brownian motions over equal steps.

    Attributes:
        dt: size of a step, in units of time.
        w: increments, [steps, B, D].
        h: space-time Levy areas, [steps, B, D], or None where no scheme asks for them.

    Raises:
        ValueError: if dt is not positive, w not [steps, B, D] with steps >= 1, or h unlike w.
    """

    dt: float
    w: Tensor
    h: Tensor | None = None

    def __post_init__(self) -> None:
        if not self.dt > 0:
            raise ValueError(f"dt must be positive, got {self.dt}")
        if self.w.ndim != 3 or self.w.shape[0] < 1:
            raise ValueError(f"w must have shape [steps, B, D] with steps at least 1, got {list(self.w.shape)}")
        if self.h is not None and _kind(self.h) != _kind(self.w):
            raise ValueError(f"h must be like w, {_kind(self.w)}, got {_kind(self.h)}")

    @classmethod
    def sample(
        cls,
        steps: int,
        shape: tuple[int, int],
        *,
        dt: float,
        generator: torch.Generator,
        levy: bool = True,
        dtype: torch.dtype | None = None,
    ) -> BrownianGrid:
        """Draw a grid of ``shape`` (B, D) on the generator's device, in ``dtype`` (None: torch's default).

        Raises:
            ValueError: if ``steps`` is below 1 or ``dt`` not positive.
        """
        if steps < 1 or not dt > 0:
            raise ValueError(f"steps must be at least 1 and dt positive, got {steps} and {dt}")
        z = torch.randn((1 + levy, steps, *shape), generator=generator, dtype=dtype, device=generator.device)
        return cls(dt, z[0] * math.sqrt(dt), z[1] * math.sqrt(dt / 12) if levy else None)

    def path(self) -> Tensor:
        """Brownian motion at the step boundaries, [steps + 1, B, D], from 0."""
        return torch.cat([torch.zeros_like(self.w[:1]), self.w.cumsum(0)])

    def coarsen(self, factor: int) -> BrownianGrid:
        """The same path over steps ``factor`` times as large.

        Raises:
            ValueError: if ``factor`` does not divide the number of steps.
        """
        steps = self.w.shape[0]
        if factor < 1 or steps % factor:
            raise ValueError(f"factor must divide the {steps} steps, got {factor}")
        fine = self.w.unflatten(0, (-1, factor))
        w = fine.sum(1)
        if self.h is None:
            return BrownianGrid(self.dt * factor, w)
        # The mean of W over a fine step is W at its start + w / 2 + h; h of the coarse step is their mean less w / 2.
        h = (fine.cumsum(1) - 0.5 * fine + self.h.unflatten(0, (-1, factor))).mean(1) - 0.5 * w
        return BrownianGrid(self.dt * factor, w, h)


def _kind(x: Tensor) -> tuple[list[int], torch.dtype, torch.device]:
    return list(x.shape), x.dtype, x.device
