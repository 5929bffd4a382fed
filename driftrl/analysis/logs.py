"""Logs of training runs: progress.csv, Monitor's files, evaluations.npz, rl_zoo3's settings.

They are those of Stable-Baselines3; our own runs write the first. What cannot be read is a ValueError that names the
file; single rows that cannot be used are left out, and a note says how many.
"""

from __future__ import annotations

import csv
import json
import math
import re
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

WINDOW = 100
"""Episodes that a training return is the mean of, as in Stable-Baselines3."""
_STEPS, _SECONDS = "time/total_timesteps", "time/time_elapsed"
_COLUMNS = {"training": ("rollout/ep_rew_mean",), "evaluation": ("eval/mean_reward", "eval/mean_return")}
"""Ours is the last; where a log has several, the first counts."""


@dataclass(frozen=True)
class Curve:
    """A return over training.

    Args:
        steps: environment steps, ascending, [n].
        returns: finite, [n].
        seconds: wall seconds of training, NaN where they are not known, [n].
    """

    steps: NDArray[np.float64]
    returns: NDArray[np.float64]
    seconds: NDArray[np.float64]


@dataclass(frozen=True)
class Log:
    """What was read of one log.

    Args:
        curves: by what they show, "training" (mean of the last WINDOW episodes) or "evaluation".
        notes: what was left out.
        steps: the last step that was logged.
        env_id: Gymnasium id, where the log tells it.
        replaced: points that were left out because the steps went back behind them.
    """

    curves: Mapping[str, Curve]
    notes: tuple[str, ...]
    steps: float = 0.0
    env_id: str | None = None
    replaced: int = 0


class _Points:
    """Points of a curve as they are read."""

    def __init__(self) -> None:
        self._points: list[tuple[float, float, float]] = []
        self.not_finite = self.replaced = 0

    def add(self, step: float, value: float, seconds: float) -> None:
        """Add a point. A run that went on from an earlier step replaces what it had logged after that."""
        if not math.isfinite(value):
            self.not_finite += 1
            return
        if self._points and self._points[-1][0] > step:
            self.replaced += sum(each[0] >= step for each in self._points)
        while self._points and self._points[-1][0] >= step:
            self._points.pop()
        self._points.append((step, value, seconds))

    def curve(self) -> Curve | None:
        """The curve; None where there is no point."""
        return Curve(*np.array(self._points, dtype=np.float64).T) if self._points else None


def read_progress(path: Path, resumed: Sequence[float] = ()) -> Log:
    """Read progress.csv as Stable-Baselines3's logger writes it.

    Args:
        path: of the file.
        resumed: steps from which the run went on: the seconds of a row begin anew after each. Without them that is seen
            only where they are fewer than those of the row before.

    Raises:
        ValueError: if it is damaged or has no column of steps.
    """
    points = {kind: _Points() for kind in _COLUMNS}
    unreadable, last, before, elapsed = 0, 0.0, 0.0, 0.0
    rows = list(rows_of(path, path.read_bytes()))
    if rows and _STEPS not in rows[0]:
        raise ValueError(f"{path} is damaged: it has no column {_STEPS}")
    for row in rows:
        try:
            step, seconds = _number(row.get(_STEPS)), _number(row.get(_SECONDS))
            values = [_number(next(filter(None, map(row.get, names)), None)) for names in _COLUMNS.values()]
        except ValueError:
            unreadable += 1
            continue
        if step is None or not math.isfinite(step):
            unreadable += 1
            continue
        if seconds is not None:
            anew = seconds < elapsed or any(last <= each < step for each in resumed)
            before, elapsed = before + (elapsed if anew else 0.0), seconds
        last = step
        for kind, value in zip(_COLUMNS, values, strict=True):
            if value is not None:
                points[kind].add(step, value, math.nan if seconds is None else before + seconds)
    curves = {kind: curve for kind, each in points.items() if (curve := each.curve())}
    not_finite = sum(each.not_finite for each in points.values())
    replaced = sum(each.replaced for each in points.values())
    return Log(curves, tuple(_notes(path, unreadable, not_finite)), last, replaced=replaced)


def read_monitors(paths: Sequence[Path]) -> Log:
    """Read the files of Monitor, one per parallel environment, into one curve.

    Steps count all environments; episodes are ordered by the time at which they ended.

    Raises:
        ValueError: if one of them is damaged.
    """
    episodes: list[tuple[float, float, float]] = []
    starts: list[float] = []
    notes: list[str] = []
    env_id = None
    for path in paths:
        first, _, rest = path.read_bytes().partition(b"\n")
        try:
            header = json.loads(first.decode("utf-8-sig").removeprefix("#"))
            start, name = float(header["t_start"]), header.get("env_id")
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise ValueError(f"{path} is damaged: its first line is not that of a Monitor file") from error
        starts.append(start)
        env_id = name if isinstance(name, str) and name != "None" else env_id
        unreadable = 0
        for row in rows_of(path, rest):
            try:
                value, length, end = (_number(row.get(key)) for key in "rlt")
            except ValueError:
                value = length = end = None
            if value is None or length is None or end is None or not (1 <= length < math.inf and math.isfinite(end)):
                unreadable += 1
            else:
                episodes.append((start + end, length, value))
        notes += _notes(path, unreadable, 0)
    points, window, steps = _Points(), deque[float](maxlen=WINDOW), 0.0
    for end, length, value in sorted(episodes):
        steps += length
        window.append(value)
        points.add(steps, sum(window) / len(window), end - min(starts))
    curve = points.curve()
    notes += _notes(paths[0].parent, 0, points.not_finite)
    return Log({"training": curve} if curve else {}, tuple(notes), steps, env_id)


def read_evaluations(path: Path) -> Log:
    """Read evaluations.npz of EvalCallback; nothing in it is unpickled.

    Raises:
        ValueError: if it is damaged.
    """
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as data:
            steps, results = data["timesteps"], data["results"]
        if steps.ndim != 1 or not (steps.dtype.kind in "iuf" and results.dtype.kind in "iuf") or 0 in results.shape[1:]:
            raise ValueError("no numbers")
        steps = steps.astype(np.float64)
        returns = results.astype(np.float64).reshape(len(steps), -1).mean(axis=1)
    except Exception as error:  # zipfile, zlib and NumPy fail in many ways where a file is damaged
        raise ValueError(f"{path} is damaged; restore it, or leave the folder out") from error
    if not np.isfinite(steps).all():
        raise ValueError(f"{path} is damaged: its steps are not finite")
    points = _Points()
    for step, value in zip(steps, returns, strict=True):
        points.add(float(step), float(value), math.nan)
    curve = points.curve()
    notes = tuple(_notes(path, 0, points.not_finite))
    last = float(steps.max(initial=0.0))
    return Log({"evaluation": curve} if curve else {}, notes, last, replaced=points.replaced)


def read_zoo_file(path: Path) -> dict[str, str]:
    """The pairs of args.yml or config.yml of rl_zoo3, an OrderedDict with tags of Python, without a YAML reader.

    Pairs whose value is no scalar are left out.
    """
    pairs = re.findall(r"^[ -]*- (\w+)\n +- (\S.*)$", path.read_text(errors="replace"), flags=re.MULTILINE)
    return {key: value.strip("'\"") for key, value in pairs if not value.startswith(("!", "&", "- "))}


def thinned(curve: Curve, points: int = 400) -> Curve:
    """At most so many of a curve's points, evenly spread, the first and the last among them."""
    if len(curve.steps) <= points:
        return curve
    chosen = np.linspace(0, len(curve.steps) - 1, points).round().astype(int)
    return Curve(curve.steps[chosen], curve.returns[chosen], curve.seconds[chosen])


def rows_of(path: Path, content: bytes) -> Iterator[dict[str, Any]]:
    """The rows of a CSV file; the last one only if it is whole: the program may be writing it, or was killed then."""
    try:
        text = content.decode("utf-8-sig")  # spreadsheets put a byte order mark before what they save
        yield from csv.DictReader(text[: text.rfind("\n") + 1].splitlines())
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def _number(text: str | None) -> float | None:
    return float(text) if text else None


def _notes(path: Path, unreadable: int, not_finite: int) -> Iterable[str]:
    if unreadable:
        yield f"{path}: {unreadable} unreadable row{'s' * (unreadable > 1)} left out"
    if not_finite:
        yield f"{path}: {not_finite} return{'s' * (not_finite > 1)} not finite, left out"
