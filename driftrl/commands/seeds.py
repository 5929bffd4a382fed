"""Train the runs of a group: one process per run, some at a time, with their progress and a table at the end."""

from __future__ import annotations

import shlex
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from ..analysis.several import Row, format_runs, over_runs
from ..envs.mujoco_batch import available_cores
from ..runs.folder import read_settings
from ..runs.group import members
from ..runs.lock import alone
from ..runs.results import read_results
from ..runs.warnings import warn
from .describe import command, further_steps
from .processes import RunProcess, Signals
from .progress import Board

_TICK = 0.2
"""Seconds between two looks at the processes."""


def check_seeds(seeds: Sequence[int]) -> None:
    """Refuse seeds of which no group can be made; their range is checked with the other settings."""
    if not seeds:
        raise ValueError("seeds: got none, expected different integers of 0 .. 2**31 - 1")
    if twice := sorted({seed for seed in seeds if seeds.count(seed) > 1}):
        raise ValueError(f"seeds: got {', '.join(map(str, twice))} more than once, expected different integers")


def check_jobs(jobs: int) -> None:
    """Refuse a number of runs at a time that trains none."""
    if jobs < 1:
        raise ValueError(f"jobs: got {jobs}, expected an integer of at least 1")


def warn_of_few_cores(jobs: int) -> None:
    """Say so where runs at a time have to share a core."""
    if jobs > (cores := available_cores()):
        warn(f"jobs: {jobs} runs at a time share {cores} core{'s' if cores > 1 else ''}; each gets slower")


def train_group(group: Path, jobs: int, total_timesteps: int | None = None, device: str | None = None) -> int:
    """Train those runs of a group that are not complete; returns 0, 1 if some failed, 130 or 143 after a signal.

    Args:
        group: its folder.
        jobs: how many runs train at a time, at least 1.
        total_timesteps: steps of each run in all; None: as the runs say.
        device: likewise.
    """
    warn_of_few_cores(jobs)
    changed = {"--total-timesteps": total_timesteps, "--device": device}
    options = [str(text) for flag, value in changed.items() if value is not None for text in (flag, value)]
    seeds = {folder: read_settings(folder).seed for folder in members(group)}
    runs = [RunProcess(folder, f"seed {seed:<10}", options, total_timesteps) for folder, seed in seeds.items()]
    print(f"group folder: {group}", flush=True)
    with alone(group), Signals(lambda: runs) as signals, Board([run.state for run in runs]) as board:
        try:
            while any(run.is_open for run in runs):
                _start_some(runs, jobs, signals)
                for run in runs:
                    run.look()
                signals.insist()
                board.show()
                time.sleep(_TICK)
        finally:  # nobody reads our output, say
            for run in runs:
                run.stop()
            for run in runs:
                run.wait()
    print(f"\n{_table(runs, list(seeds.values()))}\n")
    print(_next_commands(group, runs))
    if signals.number is not None:
        return 128 + signals.number
    return 1 if any(run.failed for run in runs) else 0


def _start_some(runs: Sequence[RunProcess], jobs: int, signals: Signals) -> None:
    """Start waiting runs up to the number of jobs; after a signal none."""
    for run in runs:
        if run.is_waiting and signals.number is not None:
            run.end_stopped()
        elif run.is_waiting and sum(each.is_running for each in runs) < jobs:
            run.start()


def _table(runs: Sequence[RunProcess], seeds: Sequence[int]) -> str:
    rows = [_row(run, str(seed)) for run, seed in zip(runs, seeds, strict=True)]
    reports = [row.report for row in rows if row.report is not None]
    summaries = [("all", over_runs(reports))] if len(reports) > 1 else []
    return format_runs("seed", rows, summaries)


def _row(run: RunProcess, name: str) -> Row:
    if run.state.ended == "complete":
        return Row(name, read_results(run.folder))
    return Row(name, None, run.state.ended or "")


def _next_commands(group: Path, runs: Sequence[RunProcess]) -> str:
    """What can be done next with a group."""
    folder = shlex.quote(str(group))
    return "\n".join(_lines(folder, all(run.state.ended == "complete" for run in runs), runs[0].state.total))


def _lines(folder: str, complete: bool, total: int) -> Iterator[str]:
    yield f"evaluate:  {command('evaluate')} {folder} --episodes 20"
    yield f"curves:    {command('tensorboard')} --logdir {folder}"
    more = f" --total-timesteps {further_steps(total)}" if complete else ""
    yield f"resume:    {command('train')} --resume {folder}{more}"
