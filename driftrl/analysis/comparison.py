"""Comparison of training runs: groups by what differs, and per environment what each group reaches, and when.

A value per run, the interquartile mean over runs with a bootstrap interval: Agarwal et al. 2021, "Deep Reinforcement
Learning at the Edge of the Statistical Precipice".
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from .logs import WINDOW, Curve
from .records import Record
from .statistics import bootstrap_interval, improvement_interval, interquartile_mean, probability_of_improvement

Measure = Literal["evaluation", "training"]
WORDS: dict[str, str] = {
    "evaluation": "return of the last evaluation, deterministic policy",
    "training": f"return while training, mean of the last {WINDOW} episodes",
}
ABSENT = "-"
_LONGEST_NAME = 48
_GRID = 120
_RESAMPLES = 500


@dataclass(frozen=True)
class Run:
    """A run within a group.

    Args:
        record: what is known of it.
        score: its final return; None where it has none, NaN where it is not finite.
        counts: whether it is part of the group's statistics: complete, with a finite score.
        reached: step and wall seconds at which the curve first reaches the threshold; None if it never does.
    """

    record: Record
    score: float | None
    counts: bool
    reached: tuple[float, float] | None


@dataclass(frozen=True)
class Group:
    """Runs that differ in their seed alone, or that the user put together.

    Args:
        name: the agent with the settings that differ, or what the user called it.
        runs: by seed.
        settings: of its first run.
        iqm: over the runs that count; NaN where none does.
        interval: 95 % bootstrap interval of it; None where fewer than two runs count.
        steps: median of the step at which the threshold is reached; infinite where half of the runs never do.
        seconds: the same in wall seconds; NaN where they are not known.
        mean: IQM of the curves of complete runs, [k, 4]: step, IQM and its 95 % interval; None for fewer than two.
    """

    name: str
    runs: Sequence[Run]
    settings: Mapping[str, Any]
    iqm: float
    interval: tuple[float, float] | None
    steps: float
    seconds: float
    mean: NDArray[np.float64] | None

    @property
    def scores(self) -> list[float]:
        """Final returns of the runs that count."""
        return [run.score for run in self.runs if run.counts and run.score is not None]


@dataclass(frozen=True)
class Section:
    """The groups of one environment.

    Args:
        env: Gymnasium id, with the environment's arguments if there are any.
        measure: what a score is.
        curve: what the curves show.
        threshold: the return whose first time is taken, of the curves; NaN where there are none.
        threshold_note: where the threshold comes from.
        groups: at least one.
        differing: settings that differ between groups.
        improvement: for each pair of group names the probability that the first is better, and its interval; one minus
            it is the probability that the second is.
        notes: what a reader should know.
    """

    env: str
    measure: Measure
    curve: Measure
    threshold: float
    threshold_note: str
    groups: Sequence[Group]
    differing: Sequence[str]
    improvement: Mapping[tuple[str, str], tuple[float, tuple[float, float] | None]]
    notes: Sequence[str]


def compare(
    records: Sequence[Record], threshold: float | None = None, measure: Measure | None = None, env: str | None = None
) -> tuple[list[Section], list[str]]:
    """Group runs and compare the groups of each environment.

    Args:
        records: the runs.
        threshold: return whose first time is taken; None: the lowest of the groups' (lower) median last returns on
            their curves, so that over half of the runs of each group reach it.
        measure: what a score is; None: the last evaluation where all complete runs have one, else the training return,
            so that like is compared with like.
        env: environment of runs that do not tell it; None: that of the others, if there is one only.

    Returns:
        One section per environment, and in one line each the runs that could not be assigned to one.
    """
    known = sorted({record.env_id for record in records if record.env_id})
    assumed = env or (known[0] if len(known) == 1 else None)
    sections: dict[str, list[Record]] = {}
    problems = []
    for record in records:
        if record.env_id is None and assumed is None:
            problems.append(f"{record.folder} does not tell its environment; add --env ID")
            continue
        if record.env_id is None:
            note = f"logs that do not tell their environment are taken as {assumed}"
            record = dataclasses.replace(record, env_id=assumed, notes=(*record.notes, note))
        arguments = " ".join(f"{key}={_text(value)}" for key, value in sorted(record.env_kwargs.items()))
        sections.setdefault(f"{record.env_id} {arguments}".strip(), []).append(record)
    return [_section(name, sections[name], threshold, measure) for name in sorted(sections)], problems


def _section(env: str, records: Sequence[Record], threshold: float | None, chosen: Measure | None) -> Section:
    notes = list(dict.fromkeys(note for record in records for note in record.notes))
    complete = [record for record in records if record.complete]
    all_evaluated = all(record.evaluation is not None for record in complete)
    all_logged = all("training" in record.curves for record in complete)
    measure: Measure = chosen or ("evaluation" if all_evaluated or not all_logged else "training")
    if measure == "training" and not chosen and any(record.evaluation is not None for record in complete):
        notes.append("not every run was evaluated: all are compared by their return while training")
    drawn = [record for record in records if record.curves]
    curve: Measure = "training" if all("training" in record.curves for record in drawn) else "evaluation"
    named = _named(records)
    note = "given"
    if threshold is None:
        ends = [
            float(statistics.median_low(last))
            for members in named.values()
            if (last := [each.curves[curve].returns[-1] for each in members if each.complete and curve in each.curves])
        ]
        threshold = min(ends, default=math.nan)
        note = f"the lowest of the groups' median last returns ({curve})"
    groups = [_group(name, members, measure, curve, threshold) for name, members in named.items()]
    for group in groups:
        notes += _group_notes(group, measure)
    if math.isnan(threshold):
        notes.append(f"no threshold: no complete run has a {curve} return (of training, an episode has to end first)")
    elif measure == "evaluation" and curve == "training":
        notes.append(
            "curves and threshold are of the return while training, whose actions are sampled; the deterministic "
            "policy that is evaluated may return more or less"
        )
    totals = {each.steps for each in complete}
    if totals and max(totals) > 1.1 * min(totals):
        notes.append(f"the runs differ in length: {min(totals):,} to {max(totals):,} steps")
    pairs = {
        (a.name, b.name): _improvement(a.scores, b.scores)
        for a, b in itertools.combinations(groups, 2)
        if a.scores and b.scores
    }
    return Section(env, measure, curve, threshold, note, groups, _differing(records), pairs, notes)


def _named(records: Sequence[Record]) -> dict[str, list[Record]]:
    """The runs by the name of their group, ordered by seed."""
    groups: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        key = json.dumps(record.settings, sort_keys=True, default=str) if record.name is None else ""
        groups.setdefault((record.name or record.agent, key), []).append(record)
    found: dict[str, list[Record]] = {}
    for (title, _), members in groups.items():
        peers = [others[0] for (other, _), others in groups.items() if other == title]
        at = peers.index(members[0])
        own = [f"{key}={_texts([each.settings.get(key, ABSENT) for each in peers])[at]}" for key in _differing(peers)]
        name = " ".join([title, *own])
        if (own and len(name) > _LONGEST_NAME) or name in found:
            folders = {each.group for each in members}
            name = f"{title} #{1 + at}"
            if len(folders) == 1 and None not in folders and f"{title} {members[0].group}" not in found:
                name = f"{title} {members[0].group}"  # trial-0003 of a search, as sweep.py calls it
        found[name] = sorted(members, key=lambda each: (each.seed is None, each.seed or 0, str(each.folder)))
    return found


def _differing(records: Iterable[Record]) -> list[str]:
    """Settings that differ: those that two runs have with different values, or that one run of an agent lacks."""
    values: dict[str, set[str]] = {}
    exact: dict[tuple[str, str], set[str]] = {}  # of one agent "1" and 1 are two; logs of others have text alone
    owners: dict[str, set[str]] = {}
    keys_of: dict[str, list[set[str]]] = {}
    for record in records:
        keys_of.setdefault(record.agent, []).append(set(record.settings))
        for key, value in record.settings.items():
            values.setdefault(key, set()).add(_text(value))
            exact.setdefault((key, record.agent), set()).add(json.dumps(value, default=str))
            owners.setdefault(key, set()).add(record.agent)
    return [
        key
        for key in values
        if len(values[key]) > 1
        or any(len(exact[key, agent]) > 1 or key not in keys for agent in owners[key] for keys in keys_of[agent])
    ]


def _group(name: str, records: Sequence[Record], measure: Measure, curve: Measure, threshold: float) -> Group:
    runs = [_run(record, measure, curve, threshold) for record in records]
    scores = [run.score for run in runs if run.counts and run.score is not None]
    reached = [
        run.reached or (math.inf, math.inf) for run in runs if run.record.complete and curve in run.record.curves
    ]
    steps, seconds = np.median(reached, axis=0) if reached else (math.nan, math.nan)
    return Group(
        name, runs, records[0].settings,
        float(interquartile_mean(scores)) if scores else math.nan,
        bootstrap_interval(scores, interquartile_mean, rng=np.random.default_rng(0)) if len(scores) > 1 else None,
        float(steps), float(seconds),
        _mean_curve([record.curves[curve] for record in records if record.complete and curve in record.curves]),
    )  # fmt: skip


def _run(record: Record, measure: Measure, curve: Measure, threshold: float) -> Run:
    score = record.evaluation
    if measure == "training":
        score = float(record.curves["training"].returns[-1]) if "training" in record.curves else None
    reached = None
    if curve in record.curves:
        line = record.curves[curve]
        above = np.flatnonzero(line.returns >= threshold)
        reached = (float(line.steps[above[0]]), float(line.seconds[above[0]])) if above.size else None
    return Run(record, score, record.complete and score is not None and math.isfinite(score), reached)


def _mean_curve(curves: Sequence[Curve]) -> NDArray[np.float64] | None:
    """IQM of curves with its 95 % bootstrap interval at steps that all of them have, [k, 4]."""
    if len(curves) < 2:
        return None
    begin, end = max(each.steps[0] for each in curves), min(each.steps[-1] for each in curves)
    if begin > end:
        return None
    grid = np.linspace(begin, end, _GRID)
    values = np.array([np.interp(grid, each.steps, each.returns) for each in curves])
    chosen = np.random.default_rng(0).integers(len(curves), size=(_RESAMPLES, len(curves)))
    resampled = interquartile_mean(np.moveaxis(values[chosen], 1, -1))
    return np.stack([grid, interquartile_mean(values.T), *np.quantile(resampled, [0.025, 0.975], axis=0)], axis=1)


def _improvement(x: Sequence[float], y: Sequence[float]) -> tuple[float, tuple[float, float] | None]:
    several = len(x) > 1 and len(y) > 1
    interval = improvement_interval(x, y, rng=np.random.default_rng(0)) if several else None
    return probability_of_improvement(x, y), interval


def _group_notes(group: Group, measure: Measure) -> Iterator[str]:
    for run in group.runs:
        if not run.record.complete:
            yield f"{group.name}, {run.record.label}: unfinished, at {run.record.steps:,} steps; does not count"
        elif run.score is None:
            yield f"{group.name}, {run.record.label}: no {measure} return; does not count"
        elif not run.counts:
            yield f"{group.name}, {run.record.label}: its return is {run.score}; does not count"
    if len(group.scores) == 1:
        yield f"{group.name}: one run only, so no interval"
    seeds = [run.record.seed for run in group.runs if run.record.seed is not None]
    if len(set(seeds)) < len(seeds):
        yield f"{group.name}: a seed occurs twice; the runs may not be independent"
    if mixed := _differing(run.record for run in group.runs):
        yield f"{group.name}: its runs differ in {', '.join(mixed)}"
    versions = [run.record.versions for run in group.runs if run.record.versions]
    if others := sorted({key for each in versions for key in each if each[key] != versions[0].get(key)}):
        yield f"{group.name}: its runs differ in their versions of {', '.join(others)}"


def _text(value: Any) -> str:
    """A setting as it is written on a command line."""
    return value if isinstance(value, str) else json.dumps(value, default=str).replace('"', "")


def _texts(values: Sequence[Any]) -> list[str]:
    """The values of one setting for readers: numbers with four digits, where these tell the values apart."""
    exact, quoted = ([write(value) for value in values] for write in (_text, partial(json.dumps, default=str)))
    if len(set(exact)) < len(set(quoted)):
        return quoted
    short = [
        f"{value:.4g}" if isinstance(value, float) and math.isfinite(value) else text
        for value, text in zip(values, exact, strict=True)
    ]
    return short if len(set(short)) == len(set(exact)) else exact


def settings_table(section: Section) -> list[tuple[str, list[str]]]:
    """The settings that differ, each with its value in every group: all values where the group's runs differ."""
    found = []
    for key in section.differing:
        values = [[run.record.settings.get(key, ABSENT) for run in group.runs] for group in section.groups]
        texts = iter(_texts([value for group in values for value in group]))
        found.append((key, [", ".join(dict.fromkeys(next(texts) for _ in group)) for group in values]))
    return found
