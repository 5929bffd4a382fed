"""Brownian motion from a single seed, at any time and in any order of queries. Symbols as in ``brownian``."""

from __future__ import annotations

import copy
import math
import operator
from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import TypeAlias

import torch
from torch import Tensor

from .brownian import BrownianGrid
from .fields import Time
from .ode import fixed_time, intervals

State: TypeAlias = tuple[Tensor, Tensor]


class BrownianTree:
    """Brownian motion from a single seed, at any time, in any order of queries, without stored values.

    A Virtual Brownian Tree with space-time Levy area (Jelincic, Foster, Kidger, arXiv 2405.06464): a query descends by
    halving the interval, and each node's normals are a hash of (seed, node, element). Differences from the paper: the
    descent ends at the query itself, not at a tolerance, so any set of queries has the joint law of Brownian motion;
    times are rounded to ``2^-53`` of the interval. A query costs as many levels as its time has binary digits: 3 at
    1/8, up to 53 at 0.1; it holds about 200 float64 numbers per element while it runs, and nothing afterwards.

    Computed in float64: the same values to rounding on every device and in every batch size (a row's path depends on
    its index and D only). A time is a number, or a tensor [B] of one time per row. Increments are of 2^-30 of the
    interval or more: below it the areas, differences of integrals from t0, lose their digits.

    Args:
        seed: any integer; taken modulo 2^64.
        shape: (B, D).
        t0: start time, where W = 0.
        t1: end time.
        dtype: of the results; None for torch's default.
        device: of the results.

    Raises:
        ValueError: if t1 is not above t0, shape is not (B, D), each at least 1, or dtype has no fractions.
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
        if len(tuple(shape)) != 2 or min(shape) < 1:
            raise ValueError(f"shape must be (B, D), each at least 1, got {tuple(shape)}")
        self.t0, self.t1 = t0, t1
        self._dtype = dtype or torch.get_default_dtype()
        if not self._dtype.is_floating_point:
            raise ValueError(f"dtype must be a floating-point type, got {dtype}")
        count = torch.arange(2 * math.prod(shape), device=device).view(*shape, 2).movedim(-1, 0)
        # Outputs of SplitMix64 are numbered from 1: its output function maps 0, the state before, to 0.
        self._counter = (count + 1) * _GOLDEN
        self._seed = _hash(torch.tensor(_signed(operator.index(seed)), device=device) + _GOLDEN)

    @property
    def shape(self) -> tuple[int, int]:
        """(B, D)."""
        return self._counter.shape[1], self._counter.shape[2]

    @property
    def dtype(self) -> torch.dtype:
        """Of the results."""
        return self._dtype

    @property
    def device(self) -> torch.device:
        """Of the results."""
        return self._counter.device

    def rows(self, rows: Tensor) -> BrownianTree:
        """The paths of these rows, int64 [R], as a tree of R rows."""
        tree = copy.copy(self)
        tree._counter = self._counter[:, rows]
        return tree

    def __call__(self, t: Time) -> Tensor:
        """``W_t``, [B, D].

        Raises:
            ValueError: if t lies outside [t0, t1], or is a tensor and not [B].
        """
        return self.state(self._fraction(t))[0].to(self._dtype)

    def increment(self, start: Time, end: Time) -> tuple[Tensor, Tensor]:
        """Increment and space-time Levy area (w, h) from start to end, each [B, D].

        Raises:
            ValueError: unless ``t0 <= start < end <= t1`` in each row, or if a tensor is not [B].
        """
        if not (self._fraction(start) < self._fraction(end)).all():
            raise ValueError(f"times must increase, got {start} before {end}")
        return next(self.walk([start, end]))

    def walk(self, times: Iterable[Time]) -> Iterator[tuple[Tensor, Tensor]]:
        """(w, h) between consecutive times, each [B, D], one pair at a time, for one query per time.

        The times may fall: w is then what leads back. Raises as a query at each of them, and ValueError where two that
        follow each other are less than 2^-30 of the interval apart, in any row.
        """
        places = map(self._fraction, times)
        for (start, before), (end, after) in pairwise((place, self.state(place)) for place in places):
            if ((end - start).abs() < LEAST_INCREMENT).any():
                raise ValueError("times must be 2^-30 of the interval at least from those before them")
            w, h = self.step(start, end, before, after)
            yield w.to(self._dtype), h.to(self._dtype)

    def grid(self, steps: int, t0: float | None = None, t1: float | None = None) -> BrownianGrid:
        """The increments over equal steps from t0 to t1 (default: the whole interval), for ``sdeint``.

        Raises:
            ValueError: if ``steps`` is below 1, or the times lie outside the tree's or are not in order.
        """
        t0, t1 = self.t0 if t0 is None else t0, self.t1 if t1 is None else t1
        if not t0 < t1:
            raise ValueError(f"t1 must be above t0, got t0={t0} and t1={t1}")
        w, h = zip(*self.walk([*(t for t, _ in intervals(steps, t0, t1)), t1]), strict=True)
        return BrownianGrid((t1 - t0) / steps, torch.stack(w), torch.stack(h))

    def _fraction(self, t: Time) -> Tensor:
        """The time as a fraction of the interval, [B] or [1], float64."""
        if isinstance(t, Tensor) and t.ndim:
            if t.shape != self.shape[:1]:
                raise ValueError(f"t must be a number or have shape [{self.shape[0]}], got {list(t.shape)}")
            given = t.detach().to(self.device)
        else:
            given = torch.tensor([fixed_time("t", t)], dtype=torch.float64, device=self.device)
        low, high = torch.tensor([self.t0, self.t1], device=self.device, dtype=given.dtype)  # as they are in its type
        if not ((low <= given) & (given <= high)).all():
            raise ValueError(f"t must lie in [{self.t0}, {self.t1}], got {t}")
        return ((given.double() - self.t0) / (self.t1 - self.t0)).clamp(0, 1)

    def step(self, start: Tensor, end: Tensor, before: State, after: State) -> State:
        """(w, h) between two fractions of the interval [..., B], whose states are given, [..., B, D] each, float64."""
        size = ((end - start) * (self.t1 - self.t0)).unsqueeze(-1)
        w = after[0] - before[0]
        return w, (after[1] - before[1]) / size - before[0] - 0.5 * w

    def state(self, fraction: Tensor) -> State:
        """``W`` and its integral from t0, [..., B, D] each, float64, at fractions of the interval, float64 [..., B].

        The last axis may be 1 for all rows. Fractions with few binary digits cost few levels.
        """
        index = (fraction * 2**_DEPTH).round().long()
        lowest = index & -index
        levels = max(_DEPTH + 1 - int(lowest[lowest > 0].min()).bit_length(), 0) if index.any() else 0
        # Node 0 draws the whole interval; 2^l + i halves the i-th interval of level l. A row whose time has no further
        # digits goes on in the left half, which changes nothing.
        nodes = [torch.zeros_like(index), *((1 << level) + (index >> (_DEPTH - level)) for level in range(levels))]
        z = self._normals(torch.stack(nodes))
        length = self.t1 - self.t0
        w, h = math.sqrt(length) * z[0, 0], math.sqrt(length / 12) * z[0, 1]
        last = (index == 2**_DEPTH).unsqueeze(-1)
        end, end_integral = w, length * (0.5 * w + h)
        value, integral = torch.zeros_like(w), torch.zeros_like(w)
        for level in range(levels):
            w_left, h_left, w_right, h_right = _halve(length, w, h, z[level + 1, 0], z[level + 1, 1])
            length *= 0.5
            right = (index >> (_DEPTH - 1 - level) & 1).bool().unsqueeze(-1)
            integral = torch.where(right, integral + length * (value + 0.5 * w_left + h_left), integral)
            value = torch.where(right, value + w_left, value)
            w, h = torch.where(right, w_right, w_left), torch.where(right, h_right, h_left)
        return torch.where(last, end, value), torch.where(last, end_integral, integral)

    def _normals(self, nodes: Tensor) -> Tensor:
        """Two standard normals per node [N, ..., B] and element, [N, 2, ..., B, D], by Box and Muller's transform."""
        keys = _hash(self._seed + (nodes + 1) * _GOLDEN).unsqueeze(-1).unsqueeze(1)
        count = self._counter.view(2, *([1] * (nodes.ndim - 2)), *self.shape)
        bits = _hash(keys + count)
        uniform = ((bits >> 11 & (2**53 - 1)).double() + 0.5) * 2.0**-53
        radius, angle = torch.sqrt(-2 * torch.log(uniform[:, 0])), (2 * math.pi) * uniform[:, 1]
        return torch.stack([radius * torch.cos(angle), radius * torch.sin(angle)], 1)


def _halve(dt: float, w: Tensor, h: Tensor, z1: Tensor, z2: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(w, h) of both halves of a step given (w, h) of the whole (arXiv 2405.06464, at the midpoint)."""
    arch, split = (0.25 * math.sqrt(dt)) * z1, (0.5 * math.sqrt(dt / 12)) * z2
    left = torch.add(0.5 * w + arch, h, alpha=1.5)
    common = torch.sub(0.25 * h, arch, alpha=0.5)
    return left, common + split, w - left, common - split


def check_tree(noise: BrownianTree, x: Tensor) -> None:
    """Raise ValueError unless the noise is a tree whose results are like x."""
    if not isinstance(noise, BrownianTree):
        raise ValueError(f"noise must be a BrownianTree, got {type(noise).__name__}")
    expected, got = (f"{list(like.shape)} {like.dtype} on {like.device}" for like in (x, noise))
    if got != expected:
        raise ValueError(f"noise must be like x, {expected}, got {got}")


LEAST_INCREMENT = 2.0**-30
"""Of the interval: the variance of the area is then right to 1 %."""
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
