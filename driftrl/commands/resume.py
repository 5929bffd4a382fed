"""`train.py --resume RUN`: go on with a run from its last checkpoint, or with all runs of a group."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from ..agents.common.ranks import check_alone, present
from ..agents.registry import AGENTS
from ..agents.storage.datasets import lasting_name
from ..runs.callbacks import Report
from ..runs.fields import made_of
from ..runs.folder import (
    RunSettings,
    check_device,
    find_checkpoint,
    has_saved,
    is_complete,
    load_newest,
    read_settings,
    record_resumption,
    write_settings,
)
from ..runs.group import is_member
from ..runs.kinds import is_group, is_shared
from ..runs.lock import alone
from ..runs.trackers import check_tracker
from ..runs.warnings import warn
from .describe import command, describe, further_steps
from .errors import Parser, whole_number
from .ranks import check_agent, check_same_file
from .seeds import check_jobs, train_group
from .training import make_agent, make_env, train


def resume(args: Sequence[str], report_to: Report | None = None) -> int:
    """Go on with a run from its last checkpoint, or with those runs of a group that are not complete."""
    about = "Go on with a run in its folder, or with the runs of a group."
    parser = Parser(prog=Path(sys.argv[0]).name, description=about, allow_abbrev=False)
    parser.add_argument("--resume", type=Path, metavar="RUN", required=True, help="folder of a run or of a group")
    parser.add_argument("--total-timesteps", type=whole_number, help="steps to train for in all (default: as the run)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), help="(default: as the run)")
    parser.add_argument(
        "--demonstrations", metavar="DATA", help="where the run's data set lies now; others are refused"
    )
    parser.add_argument("--jobs", type=whole_number, help="of a group: runs at a time, >= 1 (default: 1)")
    arguments = parser.parse_args(args)
    folder: Path = arguments.resume
    if folder.is_file():
        raise ValueError(f"resume: got the file {folder}, expected a run folder")
    if is_shared(folder):
        raise ValueError(f"resume: got {folder}, a folder for the Hub without training state, expected a run folder")
    if is_group(folder):
        if arguments.demonstrations is not None:
            raise ValueError(f"demonstrations: got them for the group {folder}; name them for each of its runs")
        check_alone("a group of runs")
        return _resume_group(folder, arguments)
    if arguments.jobs is not None:
        raise ValueError(f"jobs: got {arguments.jobs}, but {folder} is one run; --jobs is for groups")
    begins = is_member(folder) and not has_saved(folder)
    if begins:
        check_alone("a run of a group that has not begun")
    else:
        find_checkpoint(folder)  # says what is wrong if there is none
    with contextlib.nullcontext() if present().rank else alone(folder):
        return (_begin_in if begins else _resume_in)(folder, arguments, report_to)


def _resume_group(group: Path, arguments: argparse.Namespace) -> int:
    jobs, total = 1 if arguments.jobs is None else arguments.jobs, arguments.total_timesteps
    check_jobs(jobs)
    if total is not None and total < 1:
        raise ValueError(f"total_timesteps: got {total}, expected an integer of at least 1")
    if arguments.device:
        check_device(arguments.device)
    return train_group(group, jobs, total, arguments.device)


def _begin_in(folder: Path, arguments: argparse.Namespace, report_to: Report | None) -> int:
    """Train a run of a group from its beginning."""
    settings = _changed(read_settings(folder), arguments)
    check_device(settings.device)
    check_tracker(settings.track, folder)
    write_settings(folder, settings)
    config = made_of(AGENTS[settings.agent].config, settings.config)
    with contextlib.closing(make_env(settings, settings.seed)) as env:
        agent = make_agent(settings, env, config)
        print(describe(settings, agent.device))
        return train(agent, folder, settings, report_to=report_to)


def _changed(settings: RunSettings, arguments: argparse.Namespace) -> RunSettings:
    """The settings of a run with those that the command line names in place of its own."""
    total = settings.total_timesteps if arguments.total_timesteps is None else arguments.total_timesteps
    data: str | None = settings.demonstrations
    if arguments.demonstrations is not None:
        if data is None:
            raise ValueError(f"demonstrations: got {arguments.demonstrations}, but the run learns from none")
        data = lasting_name(arguments.demonstrations)
    device = arguments.device or settings.device
    return dataclasses.replace(settings, total_timesteps=total, device=device, demonstrations=data)


def _resume_in(folder: Path, arguments: argparse.Namespace, report_to: Report | None) -> int:
    settings = _changed(read_settings(folder), arguments)
    check_agent(settings.agent)
    check_tracker(settings.track, folder)
    with contextlib.closing(make_env(settings, None)) as env:
        found = load_newest(folder, settings.device, env)
        done = found.agent.num_timesteps
        check_same_file(found.file)
        for reason in found.skipped:
            warn(f"skipped {reason}")
        if done >= settings.total_timesteps and is_complete(folder):
            more = f"{command('train')} --resume {shlex.quote(str(folder))} --total-timesteps {further_steps(done)}"
            print(
                f"nothing left to do: {found.file} has {done:,} of {settings.total_timesteps:,} steps; to go on, raise "
                f"them\n  {more}"
            )
            return 0
        if arguments.total_timesteps is not None and arguments.total_timesteps < done:
            raise ValueError(f"total_timesteps: got {arguments.total_timesteps}, expected at least the {done} done")
        if present().rank:
            return train(found.agent, None, settings, found)
        record_resumption(folder, done, settings)
        print(describe(settings, found.agent.device))
        print(f"resumed from {found.file} at {done:,} steps")
        return train(found.agent, folder, settings, found, report_to)
