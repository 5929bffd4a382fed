"""What a run's progress.csv tells while the run trains, on whatever machine: its steps, its evaluations."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path

from ..analysis.logs import rows_of

_STEPS, _RETURN = "time/total_timesteps", "eval/mean_return"


def last_steps(folder: Path) -> int | None:
    """The steps of the last row, None where there is none yet."""
    steps = None
    for row in _rows(folder):
        with contextlib.suppress(KeyError, ValueError):
            steps = int(float(row[_STEPS]))
    return steps


def evaluations(folder: Path) -> dict[int, float]:
    """The mean return of each evaluation while training, by steps; NaN where it is not finite."""
    found: dict[int, float] = {}
    for row in _rows(folder):
        if row.get(_RETURN):
            with contextlib.suppress(KeyError, ValueError):
                value = float(row[_RETURN])
                found[int(float(row[_STEPS]))] = value if math.isfinite(value) else math.nan
    return found


def _rows(folder: Path) -> Iterator[dict[str, str]]:
    path = folder / "progress.csv"
    if path.exists():
        yield from rows_of(path, path.read_bytes())
