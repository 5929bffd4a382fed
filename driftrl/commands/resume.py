"""`train.py --resume RUN`: go on with a run from its last checkpoint."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from ..runs.folder import alone, find_checkpoint, is_complete, load_newest, read_settings, record_resumption
from ..runs.log import warn
from .describe import command, describe
from .errors import Parser, whole_number
from .training import make_env, train


def resume(args: Sequence[str]) -> int:
    """Go on with a run from its last checkpoint."""
    parser = Parser(prog=Path(sys.argv[0]).name, description="Go on with a run, in its folder.", allow_abbrev=False)
    parser.add_argument("--resume", type=Path, metavar="RUN", required=True, help="run folder")
    parser.add_argument("--total-timesteps", type=whole_number, help="steps to train for in all (default: as the run)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), help="(default: as the run)")
    arguments = parser.parse_args(args)
    folder: Path = arguments.resume
    if folder.is_file():
        raise ValueError(f"resume: got the file {folder}, expected a run folder")
    find_checkpoint(folder)  # says what is wrong if there is none
    with alone(folder):
        return _resume_in(folder, arguments)


def _resume_in(folder: Path, arguments: argparse.Namespace) -> int:
    settings = read_settings(folder)
    settings = dataclasses.replace(
        settings,
        total_timesteps=settings.total_timesteps if arguments.total_timesteps is None else arguments.total_timesteps,
        device=arguments.device or settings.device,
    )
    with contextlib.closing(make_env(settings, None)) as env:
        found = load_newest(folder, settings.device, env)
        done = found.agent.num_timesteps
        for reason in found.skipped:
            warn(f"skipped {reason}")
        if done >= settings.total_timesteps and is_complete(folder):
            print(
                f"nothing left to do: {found.file} has {done:,} of {settings.total_timesteps:,} steps; to go on, raise "
                f"them\n  {command('train')} --resume {shlex.quote(str(folder))} --total-timesteps {2 * done}"
            )
            return 0
        record_resumption(folder, done, settings.total_timesteps)
        print(describe(found.agent, settings))
        print(f"resumed from {found.file} at {done:,} steps")
        return train(found.agent, folder, settings, found)
