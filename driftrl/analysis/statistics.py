"""Statistics of returns: interquartile mean, probability of improvement, bootstrap intervals."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike, NDArray


def interquartile_mean(x: ArrayLike) -> NDArray[np.float64]:
    """Mean of the middle half of the values along the last axis, [..., n] -> [...].

    Twice the integral of the empirical quantile function from 1/4 to 3/4: the i-th smallest of n values covers the
    quantiles i/n to (i + 1)/n and counts by its share of the middle half. Agrees with the 25 % trimmed mean where n
    is a multiple of 4, and interpolates otherwise.

    Raises:
        ValueError: if there are no values.
    """
    ordered = np.sort(np.asarray(x, dtype=np.float64), axis=-1)
    if ordered.size == 0:
        raise ValueError("interquartile_mean: got no values, expected at least 1")
    edges = np.clip(np.linspace(0, 1, ordered.shape[-1] + 1), 0.25, 0.75)
    return np.asarray(ordered @ (2 * np.diff(edges)))


def bootstrap_interval(
    x: ArrayLike,
    statistic: Callable[[NDArray[np.float64]], NDArray[np.float64]],
    level: float = 0.95,
    resamples: int = 10_000,
    *,
    rng: np.random.Generator,
) -> tuple[float, float]:
    """Percentile bootstrap interval of a statistic of independent values (Efron 1979).

    Args:
        x: values, [n].
        statistic: reduces the last axis, [resamples, n] -> [resamples].
        level: share of the resamples inside the interval, in (0, 1).
        resamples: number of resamples, n values each, drawn with replacement.
        rng: source of the resamples.

    Raises:
        ValueError: if there are no values, or level is outside (0, 1).
    """
    values = np.asarray(x, dtype=np.float64)
    if values.ndim != 1 or values.size == 0:
        raise ValueError(f"bootstrap_interval: got values of shape {values.shape}, expected [n] with n of at least 1")
    if not 0 < level < 1:
        raise ValueError(f"level: got {level}, expected a number in (0, 1)")
    resampled = statistic(values[rng.integers(values.size, size=(resamples, values.size))])
    low, high = np.quantile(resampled, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def probability_of_improvement(x: ArrayLike, y: ArrayLike) -> float:
    """Probability that a value of x is larger than one of y; a tie counts half (Mann and Whitney 1947).

    Raises:
        ValueError: if x or y has no values.
    """
    left, right = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if left.size == 0 or right.size == 0:
        raise ValueError("probability_of_improvement: got no values, expected at least 1 on either side")
    return float(_share_above(left[None], right[None])[0])


def improvement_interval(
    x: ArrayLike, y: ArrayLike, level: float = 0.95, resamples: int = 2_000, *, rng: np.random.Generator
) -> tuple[float, float]:
    """Percentile bootstrap interval of `probability_of_improvement`, both sides resampled independently.

    Raises:
        ValueError: if x or y has no values.
    """
    left, right = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if left.size == 0 or right.size == 0:
        raise ValueError("improvement_interval: got no values, expected at least 1 on either side")
    resampled = [each[rng.integers(each.size, size=(resamples, each.size))] for each in (left, right)]
    low, high = np.quantile(_share_above(*resampled), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _share_above(x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float64]:
    """Share of the pairs where x is above y, ties half, [k, n] and [k, m] -> [k]."""
    return np.asarray((np.sign(x[:, :, None] - y[:, None, :]).mean(axis=(1, 2)) + 1) / 2)
