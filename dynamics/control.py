"""Control paths: irregular observations with gaps as a function of time, which drives a neural SDE."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from .fields import Time, VelocityField


class ControlPath:
    """Straight lines between the values that were observed, each channel of each row by itself.

    Before its first value a channel is that value, after its last that one; a channel that is never observed is 0. The
    path of Stable Neural SDEs (arXiv 2402.14989), which takes splines, and of neural CDEs (arXiv 2005.08926).

    Args:
        times: at which something was observed, rising, at least two: the union of all rows' own.
        values: [B, N, C]; nan where a channel was not observed.

    Raises:
        ValueError: if times do not rise or are not finite, or values are not [B, N, C], no floating point numbers, or
            infinite.
    """

    def __init__(self, times: Sequence[float], values: Tensor) -> None:
        self.times = [float(t) for t in times]
        if len(self.times) < 2 or not all(-math.inf < a < b < math.inf for a, b in pairwise(self.times)):
            raise ValueError(f"times must rise, be finite and at least two, got {self.times}")
        if values.ndim != 3 or values.shape[1] != len(self.times):
            raise ValueError(f"values must have shape [B, {len(self.times)}, C], got {list(values.shape)}")
        if not values.is_floating_point():
            raise ValueError(f"values must be floating point numbers, got {values.dtype}")
        if not torch.compiler.is_compiling() and values.isinf().any():  # a compiled graph cannot ask
            raise ValueError("values must be finite, or nan where nothing was observed, got infinite ones")
        # In float64, for times may be large, and their differences small.
        self.values = _without_gaps(torch.tensor(self.times, dtype=torch.float64, device=values.device), values)

    def at(self, t: float) -> Tensor:
        """Values at a time, [B, C]; those of the nearest end outside of the times."""
        k = min(max(sum(t >= each for each in self.times) - 1, 0), len(self.times) - 2)
        share = (t - self.times[k]) / (self.times[k + 1] - self.times[k])
        return torch.lerp(self.values[:, k], self.values[:, k + 1], min(max(share, 0.0), 1.0))

    def drive(self, field: VelocityField) -> VelocityField:
        """The drift ``(t, z) -> field(t, z, X(t))`` of a controlled equation, for t a number, with the field's weights.

        With `LangevinSDE`, `LinearNoiseSDE` or `GeometricSDE` this is a stable neural SDE with its control path.
        """
        return _Driven(self, field)


class _Driven(VelocityField):
    """See `ControlPath.drive`."""

    def __init__(self, path: ControlPath, field: VelocityField) -> None:
        super().__init__(field.dim)
        self.path, self.field = path, field

    def forward(self, t: Time, x: Tensor, cond: Tensor | None = None) -> Tensor:
        """Velocity [B, D] at a time that all rows share."""
        self.check_state(t, x)
        self.check_cond(cond)
        if isinstance(t, Tensor) and t.numel() > 1:
            raise ValueError(f"t must be a number with a control path, got {list(t.shape)}: take equal steps")
        return self.field(t, x, self.path.at(float(t)))


def _without_gaps(times: Tensor, values: Tensor) -> Tensor:
    """Values [B, N, C] with nan replaced by interpolation along N."""
    seen = ~values.isnan()
    place = torch.arange(len(times), device=values.device).view(1, -1, 1).expand_as(values)
    before = torch.where(seen, place, -1).cummax(1).values
    after = torch.where(seen, place, len(times)).flip(1).cummin(1).values.flip(1)
    # A gap at an end has an edge on one side only; a channel never observed has none.
    left = torch.where(before < 0, after, before).clamp(max=len(times) - 1)
    right = torch.where(after == len(times), before, after).clamp(min=0)
    known = values.nan_to_num()
    gap = (times[right] - times[left]).clamp(min=torch.finfo(times.dtype).tiny)
    share = ((times[place] - times[left]) / gap).clamp(0, 1).to(values.dtype)
    return torch.lerp(known.gather(1, left), known.gather(1, right), share)
