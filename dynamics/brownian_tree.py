"""Brownian motion from a single seed, at any time and in any order of queries. Symbols as in ``brownian``."""

from __future__ import annotations

import math
import operator
from itertools import pairwise

import torch
from torch import Tensor

from .brownian import BrownianGrid, halve
from .ode import fixed_time, intervals


class BrownianTree:
    """Brownian motion from a single seed, at any time, in any order of queries, without stored values.

    A Virtual Brownian Tree with space-time Levy area (Jelincic, Foster, Kidger, arXiv 2405.06464): a query descends by
    halving the interval, and each node's normals are a hash of (seed, node, element). Differences from the paper: the
    descent ends at the query itself, not at a tolerance, so any set of queries has the joint law of Brownian motion;
    times are rounded to ``2^-53`` of the interval. A query costs as many levels as its time has binary digits: 3 at
    1/8, up to 53 at 0.1; it holds about 200 float64 numbers per element while it runs, and nothing afterwards.

    Computed in float64: the same values to rounding on every device and in every batch size (a row's path depends on
    its index and D only).

    Args:
        seed: any integer; taken modulo 2^64.
        shape: (B, D).
        t0: start time, where W = 0.
        t1: end time.
        dtype: of the results; None for torch's default.
        device: of the results.

    Raises:
        ValueError: if t1 is not above t0, or a size of shape is below 1.
    """

    def __init__(
        self,
        seed: int,
        shape: tuple[int, int],
        *,
        t0: float = 0.0,
        t1: float = 1.0,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        t0, t1 = fixed_time("t0", t0), fixed_time("t1", t1)
        if not t1 > t0:
            raise ValueError(f"t1 must be above t0, got t0={t0} and t1={t1}")
        if min(shape) < 1:
            raise ValueError(f"shape must be (B, D), each at least 1, got {tuple(shape)}")
        self.t0, self.t1 = t0, t1
        self._shape = tuple(shape)
        self._dtype = dtype or torch.get_default_dtype()
        count = torch.arange(2 * math.prod(shape), device=device).view(*shape, 2).movedim(-1, 0)
        self._counter = count * _GOLDEN
        self._seed = _hash(torch.tensor(_signed(operator.index(seed)), device=device))

    def __call__(self, t: float) -> Tensor:
        """``W_t``, [B, D].

        Raises:
            ValueError: if t lies outside [t0, t1].
        """
        return self._state(t)[0].to(self._dtype)

    def increment(self, start: float, end: float) -> tuple[Tensor, Tensor]:
        """Increment and space-time Levy area (w, h) from start to end, each [B, D].

        Raises:
            ValueError: unless ``t0 <= start < end <= t1``.
        """
        w, h = self._between([start, end])
        return w[0], h[0]

    def grid(self, steps: int, t0: float | None = None, t1: float | None = None) -> BrownianGrid:
        """The increments over equal steps from t0 to t1 (default: the whole interval), for ``sdeint``.

        Raises:
            ValueError: if ``steps`` is below 1, or the times lie outside the tree's or are not in order.
        """
        t0, t1 = self.t0 if t0 is None else t0, self.t1 if t1 is None else t1
        w, h = self._between([*(t for t, _ in intervals(steps, t0, t1)), t1])
        return BrownianGrid((t1 - t0) / steps, w, h)

    def _between(self, times: list[float]) -> tuple[Tensor, Tensor]:
        """(w, h) of the steps between consecutive times, each [steps, B, D]."""
        if any(not a < b for a, b in pairwise(times)):
            raise ValueError(f"times must increase, got {times[0]} before {times[-1]}")
        value, integral = (torch.stack(part) for part in zip(*map(self._state, times), strict=True))
        sizes = torch.tensor([b - a for a, b in pairwise(times)], dtype=value.dtype, device=value.device)
        w = value.diff(dim=0)
        h = integral.diff(dim=0) / sizes.view(-1, 1, 1) - value[:-1] - 0.5 * w
        return w.to(self._dtype), h.to(self._dtype)

    def _state(self, t: float) -> tuple[Tensor, Tensor]:
        """``W_t`` and ``integral of W from t0 to t``, [B, D] each, float64."""
        t = fixed_time("t", t)
        if not self.t0 <= t <= self.t1:
            raise ValueError(f"t must lie in [{self.t0}, {self.t1}], got {t}")
        length = self.t1 - self.t0
        index = round((t - self.t0) / length * 2**_DEPTH)
        levels = _DEPTH - ((index & -index).bit_length() - 1) if index else 0
        # Node 0 draws the whole interval; 2^l + i halves the i-th interval of level l.
        z = self._normals([0] + [(1 << level) + (index >> (_DEPTH - level)) for level in range(levels)])
        w, h = math.sqrt(length) * z[0, 0], math.sqrt(length / 12) * z[0, 1]
        if index == 2**_DEPTH:
            return w, length * (0.5 * w + h)
        value, integral = torch.zeros_like(w), torch.zeros_like(w)
        for level in range(levels):
            w_left, h_left, w_right, h_right = halve(length, w, h, z[level + 1, 0], z[level + 1, 1])
            length *= 0.5
            if index >> (_DEPTH - 1 - level) & 1:
                integral = integral + length * (value + 0.5 * w_left + h_left)
                value = value + w_left
                w, h = w_right, h_right
            else:
                w, h = w_left, h_left
        return value, integral

    def _normals(self, nodes: list[int]) -> Tensor:
        """Two standard normals per node and element, [nodes, 2, B, D], by Box and Muller's transform."""
        keys = _hash(self._seed + torch.tensor(nodes, device=self._counter.device) * _GOLDEN)
        bits = _hash(keys.view(-1, 1, 1, 1) + self._counter)
        uniform = ((bits >> 11 & (2**53 - 1)).double() + 0.5) * 2.0**-53
        radius, angle = torch.sqrt(-2 * torch.log(uniform[:, 0])), (2 * math.pi) * uniform[:, 1]
        return torch.stack([radius * torch.cos(angle), radius * torch.sin(angle)], 1)


_DEPTH = 53


def _signed(number: int) -> int:
    """The int64 with the same lowest 64 bits."""
    return (number + 2**63) % 2**64 - 2**63


_GOLDEN = _signed(0x9E3779B97F4A7C15)


def _hash(x: Tensor) -> Tensor:
    """SplitMix64's output function (Steele et al. 2014) on int64, whose products wrap; elementwise."""
    x = (x ^ (x >> 30 & (2**34 - 1))) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> 27 & (2**37 - 1))) * _signed(0x94D049BB133111EB)
    return x ^ (x >> 31 & (2**33 - 1))
