"""An Optuna search as a source of runs: each trial is a group, its value the mean return over the group's seeds.

The study is a journal file beside the runs, so that several machines can work on it at once. A trial belongs to the
process that holds the lock of its folder. One whose process has died is taken over by the next that looks for work:
its runs go on from their checkpoints.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np

from ..commands.processes import Job
from ..runs.group import is_trained
from ..runs.lock import alone, exclusively
from ..runs.results import read_results
from ..runs.warnings import warn
from .executors import Executor
from .plan import Planned, begin
from .progress_file import evaluations
from .source import jobs_of, next_of
from .space import TRIAL, distributions, trial_group
from .spec import Search, Spec

_NAME, _JOURNAL = "sweep", "study.journal"
_LOST = "lost"
"""Attribute of a trial that was asked for and never began: its process was killed in between. It does not count."""
_LOOK = 2.0
"""Seconds between two looks for trials whose process has died."""


class StudySource:
    """The runs of the trials that this process works on.

    Args:
        spec: of the sweep, with a search.
        executor: where runs train.

    Raises:
        ValueError: if Optuna is not installed, a corner of the space cannot be trained, or the folder holds another
            search.
    """

    def __init__(self, spec: Spec, executor: Executor) -> None:
        assert spec.search is not None
        self.jobs: list[Job] = []
        self._spec, self._search, self._executor = spec, spec.search, executor
        self._trials: list[_Trial] = []
        self._closed, self._looked_at = False, -math.inf
        self._lock = spec.folder / "study.lock"
        self.study = open_study(spec)
        if self._search.pruner != "none" and executor.at_a_time < len(spec.seeds):
            warn(
                f"jobs: got {executor.at_a_time} for {len(spec.seeds)} seeds: a trial can be pruned only while "
                "its last runs train; give as many jobs as seeds, or say pruner: none"
            )

    @property
    def is_open(self) -> bool:
        """Whether a trial of ours is not over, or others can be begun, here or by those who work on the rest."""
        return bool(self._trials) or (not self._closed and self._count() < self._search.trials) or self._others()

    def progress(self) -> str:
        """How many trials are over, of all that are asked for; those of others count, too."""
        return f"{trials_over(self.study)} of {self._search.trials} trials over"

    def next(self) -> Job | None:
        """A run of a trial that is open, else of one that nobody works on any longer, else of a new one."""
        job = next_of([job for trial in self._trials for job in trial.jobs])
        if job is None and not self._closed and (trial := self._adopted() or self._new()):
            self._trials.append(trial)
            self.jobs += trial.jobs
            job = next_of(trial.jobs)
        return job

    def look(self) -> None:
        """Report evaluations, stop what is pruned, and tell what has ended."""
        for trial in list(self._trials):
            if trial.look(self._closed):
                self._trials.remove(trial)

    def close(self) -> None:
        """No more trials; those that are not over stay open in the study, and the next call goes on with them."""
        self._closed = True
        for trial in self._trials:
            for job in trial.jobs:
                if job.is_waiting:
                    job.end_stopped()

    def _count(self) -> int:
        """Trials that count: not those that never began."""
        return sum(_LOST not in trial.user_attrs for trial in self.study.get_trials(deepcopy=False))

    def _others(self) -> bool:
        """Whether trials that somebody else works on are not over: if that process dies, we take them over."""
        return not self._closed and any(not each.state.is_finished() for each in self.study.get_trials(deepcopy=False))

    def _adopted(self) -> _Trial | None:
        """A trial whose process has died."""
        import optuna

        if time.monotonic() - self._looked_at < _LOOK:
            return None
        self._looked_at = time.monotonic()
        ours = {trial.number for trial in self._trials}
        with exclusively(self._lock):
            for frozen in self.study.get_trials(deepcopy=False, states=[optuna.trial.TrialState.RUNNING]):
                if frozen.number in ours:
                    continue
                if set(frozen.params) != set(self._search.space):
                    self.study._storage.set_trial_user_attr(frozen._trial_id, _LOST, True)
                    self.study.tell(frozen.number, state=optuna.trial.TrialState.FAIL)
                elif trial := self._taken(
                    optuna.trial.Trial(self.study, frozen._trial_id), max(frozen.intermediate_values, default=-1)
                ):
                    self._looked_at = -math.inf  # there may be more
                    return trial
        return None

    def _new(self) -> _Trial | None:
        """A new trial, unless there are as many as were asked for."""
        with exclusively(self._lock):
            if (count := self._count()) >= self._search.trials:
                return None
            self.study.sampler = _sampler(self._search, count)
            return self._taken(self.study.ask(distributions(self._spec)))

    def _taken(self, trial: Any, reported: int = -1) -> _Trial | None:
        """A trial with its folder and lock; None where another process has it, or its values do not go together.

        Args:
            trial: of the study.
            reported: the last evaluation that the study knows.
        """
        import optuna

        try:
            group = trial_group(self._spec, trial.number, trial.params)
        except ValueError as error:  # of a pair that `check_space`, which changes one value at a time, has not tried
            warn(f"trial {trial.number} counts as failed: {error}")
            self.study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
            return None
        begin(group)
        held = contextlib.ExitStack()
        try:
            held.enter_context(alone(group.folder))
        except ValueError:
            return None
        jobs = jobs_of(group, self._executor, group.name)
        return _Trial(self.study, trial, group, jobs, self._search.pruner != "none", reported, held)


class _Trial:
    """A trial that this process works on."""

    def __init__(
        self, study: Any, trial: Any, group: Planned, jobs: list[Job], prunes: bool, reported: int,
        held: contextlib.ExitStack,
    ) -> None:  # fmt: skip
        self.number, self.jobs = trial.number, jobs
        self._study, self._trial, self._group, self._held = study, trial, group, held
        self._prunes, self._reported = prunes, reported
        self._is_checked = self._is_pruned = False

    def look(self, closed: bool) -> bool:
        """Report, prune, tell; returns whether nothing is left to do."""
        for job in self.jobs:
            job.look()
        if self._prunes and not self._is_pruned and not closed:
            self._report()
        if any(job.is_open for job in self.jobs):
            return False
        self._tell()
        self._held.close()
        return True

    def _report(self) -> None:
        """Report the mean over the seeds of each evaluation that all of them have, by its number."""
        interval = self._group.runs[0].eval_interval
        assert interval is not None
        logs = [evaluations(self._group.run_folder(run)) for run in self._group.runs]
        by_number = [{steps // interval: value for steps, value in reversed(log.items())} for log in logs]
        for number in sorted(set.intersection(*(set(each) for each in by_number))):
            if number > self._reported:
                self._reported, self._is_checked = number, False
                value = sum(each[number] for each in by_number) / len(by_number)
                self._trial.report(value, number)
        if not self._is_checked and self._reported >= 0:
            self._is_checked = True
            if any(job.is_open for job in self.jobs) and self._trial.should_prune():
                self._is_pruned = True
                for job in self.jobs:
                    if job.is_open:
                        job.drop()

    def _tell(self) -> None:
        """Tell the study how the trial ended; one that was stopped stays open."""
        import optuna

        states = optuna.trial.TrialState
        if self._is_pruned:
            self._study.tell(self.number, state=states.PRUNED)
        elif any(job.failed for job in self.jobs):
            self._study.tell(self.number, state=states.FAIL)
        elif all(is_trained(job.folder, job.state.total) for job in self.jobs):
            value = sum(_return(job.folder) for job in self.jobs) / len(self.jobs)
            if math.isfinite(value):
                self._study.tell(self.number, value)
            else:
                warn(f"{self._group.name}: its return is {value}; the trial counts as failed")
                self._study.tell(self.number, state=states.FAIL)


def trials_over(study: Any) -> int:
    """How many trials of a study are over, but for those that never began."""
    return sum(each.state.is_finished() and _LOST not in each.user_attrs for each in study.get_trials(deepcopy=False))


def open_study(spec: Spec, makes: bool = True) -> Any:
    """The study of a sweep, made where there is none; None where there is none and none is to be made.

    Raises:
        ValueError: if Optuna is not installed, or the folder holds another search.
    """
    try:
        import optuna
        from optuna.storages.journal import JournalFileBackend
    except ModuleNotFoundError as error:
        raise ValueError(f"search: {error.name} is not installed; run pip install 'driftrl[sweep]'") from error
    if not makes and not (spec.folder / _JOURNAL).exists():
        check_journal(spec)
        return None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    assert spec.search is not None
    spec.folder.mkdir(parents=True, exist_ok=True)
    path = (spec.folder / _JOURNAL).resolve()

    with exclusively(spec.folder / "study.lock"):
        check_journal(spec)
        study = optuna.create_study(
            storage=optuna.storages.JournalStorage(JournalFileBackend(str(path), _Lock(path))),
            study_name=_NAME, direction="maximize", load_if_exists=True, pruner=_pruner(spec.search),
        )  # fmt: skip
        what = {
            "agent": spec.agent, "envs": list(spec.envs), "seeds": list(spec.seeds), "settings": dict(spec.settings),
            "space": {name: {**vars(each), "choices": list(each.choices)} for name, each in spec.search.space.items()},
        }  # fmt: skip
        what = json.loads(json.dumps(what))
        before = study.user_attrs.get("spec")
        if before is None:
            study.set_user_attr("spec", what)
        elif before != what:
            name = next(name for name in what if before.get(name) != what[name])
            raise ValueError(
                f"{spec.path}: {name}: got {what[name]}, but the search of {path} was begun with {before.get(name)}; "
                f"choose another folder, or move {spec.folder} away"
            )
    return study


def check_journal(spec: Spec) -> None:
    """Refuse a folder with trials and without their study: new ones would take them for their own.

    Raises:
        ValueError: if it is one.
    """
    if not (spec.folder / _JOURNAL).exists() and (found := next(spec.folder.glob(f"*/*/{TRIAL}*"), None)):
        raise ValueError(
            f"{spec.path}: folder: {found} is of a search whose {_JOURNAL} is gone; choose another folder, or move "
            f"{spec.folder} away"
        )


class _Lock:
    """The lock of the journal, as Optuna wants it.

    Optuna's own one stays for half a minute where its holder is killed; the system frees this one at once. What such a
    process wrote of a line is cut off, for the line would be unreadable once the next one is appended to it.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._held = path, contextlib.ExitStack()

    def acquire(self) -> bool:
        """Wait for the lock; returns True."""
        self._held.enter_context(exclusively(self._path.with_suffix(".journal.lock")))
        if self._path.exists() and (content := self._path.read_bytes()) and not content.endswith(b"\n"):
            with self._path.open("r+b") as file:
                file.truncate(content.rfind(b"\n") + 1)
        return True

    def release(self) -> None:
        """Give it back."""
        self._held.close()


def _pruner(search: Search) -> Any:
    import optuna

    if search.pruner == "none":
        return optuna.pruners.NopPruner()
    return optuna.pruners.MedianPruner(n_startup_trials=search.pruner_startup)


def _sampler(search: Search, count: int) -> Any:
    """The sampler of a trial."""
    import optuna

    seed = trial_seed(search, count)
    if search.sampler == "random":
        return optuna.samplers.RandomSampler(seed=seed)
    return optuna.samplers.TPESampler(seed=seed)


def trial_seed(search: Search, count: int) -> int:
    """The seed of a trial's sampler: its own, else two processes that begin alike would suggest the same."""
    return int(np.random.SeedSequence([search.seed, count]).generate_state(1)[0])


def _return(folder: Path) -> float:
    results = read_results(folder)
    assert results is not None  # of a run that is trained
    return float(results["deterministic"]["mean"])
