"""`evaluate.py RUN RUN2 ...`: several runs, a group or a folder of them, in one table, with the IQM by setting."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..agents.storage.files import write_json
from ..analysis.evaluation import evaluate_modes
from ..analysis.several import MODES, Row, format_runs, over_runs
from ..envs import check_env
from ..runs.folder import has_saved, load_saved
from ..runs.group import is_member
from .record import record
from .target import longest_episode, target_of

_OF_ONE = ("video", "plot", "export", "start", "hub")
"""Options that are about one policy."""


def evaluate_several(paths: Sequence[Path], args: argparse.Namespace) -> int:
    """Evaluate several runs; returns 0, or 1 where runs of a group have nothing saved.

    Args:
        paths: runs or saved files.
        args: the options of `evaluate.py`.

    Raises:
        ValueError: if an option is about one policy, a path is no run or named twice, or nothing at all is saved.
    """
    if wrong := [name for name in _OF_ONE if getattr(args, name)]:
        raise ValueError(f"{wrong[0]}: got several runs, expected one; name one of them, such as {_newest(paths)}")
    _check_different(paths)
    runs = [_Run(path, args) for path in paths]
    if not any(run.is_saved for run in runs):
        raise ValueError(f"got {args.paths[0]}, where no run has saved anything yet, expected saved agents; train on")
    for run in runs:
        if run.is_saved:
            check_env(run.env_id, **run.env_kwargs)
    tasks = [(run.env_id, run.env_kwargs) for run in runs if run.is_saved]
    args.max_steps = longest_episode(args.max_steps, tasks)
    out = sys.stderr if args.json == "-" else sys.stdout
    episodes = f"{args.episodes} episode{'s' if args.episodes != 1 else ''} each"
    print(f"{len(runs)} runs, {episodes}", file=out, flush=True)
    if args.record:
        record([run.path for run in runs if run.is_saved], args, out)
    for run in runs:
        run.evaluate(args)
    groups = _over_groups(runs)
    summaries = [(name, summary) for name, _, summary in groups]
    print(format_runs("run", [run.row() for run in runs], summaries), file=out)
    data = {
        "runs": [{"file": str(run.file), **run.report} for run in runs if run.report is not None],
        "groups": [{"files": [str(run.file) for run in those], **summary} for _, those, summary in groups],
    }
    if args.json == "-":
        print(json.dumps(data, indent=2, allow_nan=False))
    elif args.json is not None:
        write_json(Path(args.json), data)
    return 0 if all(run.is_saved for run in runs) else 1


class _Run:
    """One run or saved file and what came of it."""

    def __init__(self, path: Path, args: argparse.Namespace) -> None:
        self.path = path
        self.report: dict[str, Any] | None = None
        self.setting: str | None = None
        self.is_saved = not is_member(path) or has_saved(path)
        if not self.is_saved:
            self.file, self.env_id, self.env_kwargs = path, "", dict[str, Any]()
            return
        self.file, settings, self.env_id, self.env_kwargs = target_of(path, args)
        if settings is not None:
            fields = dataclasses.asdict(settings) | {"seed": None}
            group = str(path.parent) if is_member(path) else ""  # two of one command are not one of twice the size
            self.setting = json.dumps([group, fields, self.file.name if path.is_file() else ""], sort_keys=True)

    def evaluate(self, args: argparse.Namespace) -> None:
        """Play its episodes, if it has saved anything."""
        if not self.is_saved:
            return
        self.file, agent, skipped = load_saved(self.path, args.device)
        for reason in skipped:
            print(f"warning: skipped {reason}", file=sys.stderr)
        modes = ("sampled",) if args.sample else MODES
        self.report = evaluate_modes(
            agent, self.env_id, self.env_kwargs, args.episodes, args.seed, modes, max_steps=args.max_steps
        )

    def row(self) -> Row:
        """Its row of the table, with what the numbers leave out."""
        if self.report is None:
            return Row(str(self.path), None, "nothing saved yet")
        notes = []
        for key, text in (("cut_off", "cut off"), ("left_out", "left out")):
            if count := sum(self.report[mode].get(key, 0) for mode in MODES if mode in self.report):
                notes.append(f"{count} episodes {text}")
        return Row(str(self.path), self.report, ", ".join(notes))


def _check_different(paths: Sequence[Path]) -> None:
    """Refuse a run that is named twice: it would count twice."""
    places = [path.resolve() for path in paths]
    if twice := [path for path, place in zip(paths, places, strict=True) if places.count(place) > 1]:
        raise ValueError(f"got {twice[0]} twice, expected different runs")


def _newest(paths: Sequence[Path]) -> Path:
    """The path that was written last."""
    return max(paths, key=lambda path: path.stat().st_mtime if path.exists() else 0.0)


def _over_groups(runs: Sequence[_Run]) -> list[tuple[str, list[_Run], dict[str, Any]]]:
    """For each setting of which there are two runs or more: what to call it, the runs, their IQM."""
    found = []
    for setting in dict.fromkeys(run.setting for run in runs if run.setting):
        those = [run for run in runs if run.setting == setting and run.report is not None]
        if len(those) > 1:
            summary = over_runs([run.report for run in those if run.report is not None])
            names = ", ".join(run.path.name for run in those)
            where = those[0].path.parent if is_member(those[0].path) else f"{those[0].env_id}: {names}"
            found.append((str(where), those, summary))
    return found
