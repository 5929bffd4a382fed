"""What a command line asks to evaluate: a saved file, and the environment to play it in."""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..analysis.evaluation import MAX_STEPS
from ..envs import parse_env_kwargs
from ..envs.known import full_id
from ..envs.make import has_time_limit
from ..runs.folder import RunSettings, find_checkpoint, read_settings, run_folder_of


class Target(NamedTuple):
    """A saved agent and where it is evaluated.

    Args:
        file: the saved file.
        settings: of its run; None if it lies in no run folder.
        env_id: Gymnasium id.
        env_kwargs: the environment's arguments.
    """

    file: Path
    settings: RunSettings | None
    env_id: str
    env_kwargs: dict[str, Any]


def target_of(path: Path, args: argparse.Namespace) -> Target:
    """The saved agent of a run folder or file, in the run's environment or the one that --env and --env-kwargs name.

    Raises:
        ValueError: if there is none, or neither a run nor --env tells the environment.
    """
    file = find_checkpoint(path)
    folder = run_folder_of(file)
    if folder is None and args.env is None:
        raise ValueError(f"env: got none, and {file} lies in no run folder that would tell it; add --env ID")
    settings = read_settings(folder) if folder else None
    env_id = settings.env_id if settings and args.env is None else full_id(args.env)
    env_kwargs = settings.env_kwargs if settings and env_id == settings.env_id else {}
    if args.env_kwargs is not None:
        env_kwargs = parse_env_kwargs(args.env_kwargs)
    return Target(file, settings, env_id, env_kwargs)


def longest_episode(given: int | None, tasks: Sequence[tuple[str, dict[str, Any]]]) -> int:
    """Where episodes without a time limit are cut off.

    Args:
        given: what the command line says; None: `MAX_STEPS`.
        tasks: environments with their arguments, known to exist.

    Raises:
        ValueError: if it was given and all environments have time limits of their own.
    """
    if given is None:
        return MAX_STEPS
    if all(has_time_limit(env_id, env_kwargs) for env_id, env_kwargs in tasks):
        env_id, env_kwargs = tasks[0]
        changed = (f"{key}={json.dumps(value)}" for key, value in {**env_kwargs, "max_episode_steps": given}.items())
        raise ValueError(
            f"max-steps: got {given}, expected an environment without a time limit, {env_id} has one; use --env-kwargs "
            f"{shlex.join(changed)}"
        )
    return given
