"""Train the runs of a sweep: `python sweep.py SPEC.yaml`. Called again it goes on with what is not complete."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from .. import __version__
from ..sweeps.cluster import Cluster
from ..sweeps.executors import Executor, Local
from ..sweeps.plan import check_runs, grid
from ..sweeps.source import GridSource, Source
from ..sweeps.space import check_space
from ..sweeps.spec import RayOptions, Spec, read_spec
from ..sweeps.study import StudySource
from ..sweeps.tables import format_grid, format_plan, format_study
from .errors import Parser, fail, import_from_here, output_closed, until_output_closes, whole_number
from .processes import Signals
from .ranks import started_by_torchrun
from .seeds import check_jobs, warn_of_few_cores

_TICK = 0.2
"""Seconds between two looks at the runs."""
_EVERY = 30.0
"""Seconds between two lines about the runs that train."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Returns:
        Exit code: 0, 1 if runs failed, 2 for bad input, 130, 141 or 143 where a signal ended it.
    """
    return until_output_closes(partial(_main, argv))


def _main(argv: Sequence[str] | None) -> int:
    import_from_here()
    parser = Parser(
        prog=Path(sys.argv[0]).name, usage="%(prog)s SPEC [options]", description="Train the runs of a sweep: tasks x "
        "seeds x settings, or an Optuna search. The same command again goes on with what is not complete.",
    )  # fmt: skip
    parser.add_argument("spec", type=Path, metavar="SPEC", help="YAML or JSON file of the sweep")
    parser.add_argument("--version", action="version", version=f"driftrl {__version__}")
    parser.add_argument("--jobs", type=whole_number, help="runs at a time, >= 1 (default: as the file says)")
    parser.add_argument("--executor", choices=("local", "ray"), help="where runs train (default: as the file says)")
    parser.add_argument("--dry-run", action="store_true", help="say what would be trained, and train nothing")
    try:
        return _sweep(parser.parse_args(argv))
    except (ValueError, OSError) as error:
        if output_closed():
            raise
        return fail(error)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _sweep(args: argparse.Namespace) -> int:
    if started_by_torchrun():
        size = os.environ["WORLD_SIZE"]
        raise ValueError(f"ranks: got {size} for a sweep, whose runs are one process each; start it without torchrun")
    spec = _changed(read_spec(args.spec), args)
    if spec.search is not None:
        check_space(spec)
    else:
        groups = grid(spec)
        check_runs(groups, spec)
    if args.dry_run:
        print(format_plan(spec))
        return 0
    source: Source
    with _executor(spec) as executor:
        if spec.search is not None:
            source = study = StudySource(spec, executor)
        else:
            source = GridSource(groups, executor)
        print(f"sweep folder: {spec.folder}, {executor.at_a_time} at a time", flush=True)
        number = _train(source, executor.at_a_time)
        table = format_study(spec, study.study) if spec.search is not None else format_grid(groups)
    print(f"\n{table}")
    if spec.search is not None and number is None and not source.jobs:
        print(
            f"nothing left to do: {source.progress()}; failed trials are not tried again; for more trials raise "
            f"search.trials in {spec.path}"
        )
    if number is not None:
        return 128 + number
    return 1 if any(job.failed for job in source.jobs) else 0


def _changed(spec: Spec, args: argparse.Namespace) -> Spec:
    """The sweep with what the command line says in place of the file."""
    if args.jobs is not None:
        check_jobs(args.jobs)
    executor = args.executor or spec.executor
    if spec.ray is not None and "ray" not in (executor, spec.executor):
        raise ValueError(f"{spec.path}: ray: got it, but it changes nothing without executor: ray")
    ray = spec.ray if executor == "ray" else None
    return dataclasses.replace(spec, jobs=args.jobs or spec.jobs, executor=executor, ray=ray)


def _executor(spec: Spec) -> Executor:
    """Where the runs train."""
    if spec.executor == "ray":
        return Cluster(spec.ray or RayOptions(), spec.jobs, spec.retries)
    jobs = spec.jobs or 1
    warn_of_few_cores(jobs)
    return Local(jobs, spec.retries)


def _train(source: Source, at_a_time: int) -> int | None:
    """Train what the source gives; returns the number of the signal that ended it, if one did."""
    news = _News(source)
    with Signals(lambda: source.jobs) as signals:
        try:
            while source.is_open:
                if signals.number is None:
                    _start_some(source, at_a_time)
                source.look()
                if signals.number is not None:
                    source.close()
                signals.insist()
                news.show()
                time.sleep(_TICK)
        finally:  # nobody reads our output, say
            for job in source.jobs:
                job.stop()
            for job in source.jobs:
                job.wait()
        source.look()
        news.show()
    return signals.number


def _start_some(source: Source, at_a_time: int) -> None:
    """Start runs up to the number that train at a time."""
    for _ in range(at_a_time - sum(job.is_running for job in source.jobs)):
        job = source.next()
        if job is None:
            return
        job.start()


class _News:
    """Prints a line for each run that ends, and now and then how far the others are."""

    def __init__(self, source: Source) -> None:
        self._source, self._shown_at = source, time.monotonic()
        self._told = {job for job in source.jobs if not job.is_open}
        if self._told:
            print(f"{len(self._told)} of {len(source.jobs)} runs were complete", flush=True)

    def show(self) -> None:
        """Print what is new."""
        jobs = self._source.jobs
        for job in jobs:
            if not job.is_open and job not in self._told:
                self._told.add(job)
                print(f"{job.state.label}: {job.state.ended}  ({self._source.progress()})", flush=True)
        if time.monotonic() - self._shown_at >= _EVERY:
            self._shown_at = time.monotonic()
            for job in jobs:
                if job.is_running:
                    print(f"  {job.state.label}: {job.state.share:4.0%}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
