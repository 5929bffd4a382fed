"""What a sweep prints: what it would train, and the table of what came of it."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import Any

from ..analysis.several import MODES, format_interval, over_runs
from ..commands.describe import command
from ..runs.group import is_trained
from ..runs.results import read_results
from .plan import Planned, grid
from .space import TRIAL
from .spec import Spec
from .study import open_study, trials_over

_BEST = 10
"""Trials that the table of a search shows."""


def format_plan(spec: Spec) -> str:
    """What would be trained, and what is complete.

    Raises:
        ValueError: as `open_study`, of a search.
    """
    if spec.search is not None:
        names, study = ", ".join(spec.search.space), open_study(spec, makes=False)
        over = f"{trials_over(study) if study else 0} of {spec.search.trials} trials over"
        return f"{spec.folder}  {over}; space: {names}; {len(spec.seeds)} runs each"
    rows = []
    for group in grid(spec):
        done = sum(is_trained(group.run_folder(run), run.total_timesteps) for run in group.runs)
        rows.append(f"{group.folder}  {done} of {len(group.runs)} runs complete")
    return "\n".join(rows)


def format_grid(groups: Sequence[Planned]) -> str:
    """A table per environment, with the IQM over the complete runs of each setting."""
    tables = []
    for env in dict.fromkeys(group.runs[0].env_id for group in groups):
        those = [group for group in groups if group.runs[0].env_id == env]
        width = max(len(text) for text in (env, *(group.name for group in those)))
        tables.append("\n".join([f"{env:{width}}  complete  {_HEAD}", *(_row(group, width) for group in those)]))
    folder = groups[0].folder.parents[2]
    compare = f"compare:   {command('compare')} {shlex.quote(str(folder))} --html report.html"
    return "\n\n".join([*tables, compare])


_HEAD = "IQM [95 %] deterministic, sampled"


def _row(group: Planned, width: int) -> str:
    reports = [
        results
        for run in group.runs
        if is_trained(group.run_folder(run), run.total_timesteps) and (results := read_results(group.run_folder(run)))
    ]
    means = [format_interval(over[mode]) for mode in MODES if reports and mode in (over := over_runs(reports))]
    return f"{group.name:{width}}  {f'{len(reports)} of {len(group.runs)}':8}  {', '.join(means)}".rstrip()


def format_study(spec: Spec, study: Any) -> str:
    """The best trials of a search, and how to train with the settings of the first."""
    trials = study.get_trials(deepcopy=False)
    complete = [each for each in trials if each.state.name == "COMPLETE"]  # what is pruned has a value, too
    complete.sort(key=lambda each: -each.value)
    counts: dict[str, int] = {}
    for each in trials:
        counts[each.state.name.lower()] = counts.get(each.state.name.lower(), 0) + 1
    lines = ["trials: " + ", ".join(f"{number} {state}" for state, number in counts.items())]
    for each in complete[:_BEST]:
        params = "  ".join(f"{name}={_short(value)}" for name, value in each.params.items())
        lines.append(f"{each.number:6}  {each.value:12.1f}  {params}")
    if complete:
        place = spec.folder.glob(f"*/{spec.agent}/{TRIAL}{complete[0].number:04}/s{spec.seeds[0]}")
        run = shlex.quote(str(next(place)))
        lines.append(f"train:     {command('train')} --config {run} --seeds 100 101 102")
    return "\n".join(lines)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
