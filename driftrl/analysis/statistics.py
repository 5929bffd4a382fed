"""Statistics of returns: interquartile mean and bootstrap intervals."""

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
