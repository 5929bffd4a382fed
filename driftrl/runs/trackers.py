"""`--track`: a run's log in wandb, trackio or MLflow as well, with the hyperparameters by their names.

A resumed run goes on in the same run of the tracker, whose id lies in tracker.json of the run folder. A tracker that
fails while the run trains is reported once; training goes on.
"""

from __future__ import annotations

import abc
import importlib.util
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from stable_baselines3.common.logger import KVWriter

from ..agents.storage.files import write_json
from .folder import RunSettings
from .warnings import warn

_PROJECT = "driftrl"
_FILE = "tracker.json"
_MLFLOW_PATIENCE = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}
"""MLflow's own are 7 retries of 120 seconds, minutes in which a run stands still where no server answers."""


def check_tracker(name: str, folder: Path | None = None) -> None:
    """Refuse a tracker that is not installed, without the second that its import takes, and a damaged tracker.json.

    Args:
        name: of the tracker, or none.
        folder: of the run that goes on.

    Raises:
        ValueError: if it is not installed, or the file is damaged.
    """
    if name != "none" and importlib.util.find_spec(name) is None:
        raise ValueError(f"track: {name} is not installed; run pip install 'driftrl[{name}]'")
    if name != "none" and folder is not None:
        _known_runs(folder)


def _known_runs(folder: Path) -> dict[str, str]:
    """The ids of a run in its trackers, by tracker."""
    path = folder / _FILE
    try:
        known = json.loads(path.read_text()) if path.exists() else {}
    except (ValueError, RecursionError):
        known = None
    if not isinstance(known, dict) or not all(isinstance(each, str) for each in known.values()):
        raise ValueError(f"track: {path} is damaged; restore it, or remove it to begin a new run of the tracker")
    return known


def hyperparameters(settings: RunSettings) -> dict[str, Any]:
    """What determines a run, by the names of the command line; lists in place of tuples."""
    names = ["seed", "n_envs", "total_timesteps", "device", "threads", "backend"]
    names += ["warp_solver", "warp_contacts", "warp_constraints"] if settings.backend == "warp" else []
    if settings.demonstrations is not None:
        names += ["demonstrations", "demonstration_keys"]
        names += [f"pretrain_{name}" for name in ("steps", "batch_size", "learning_rate")]
    run = {"agent": settings.agent, "env": settings.env_id, **{name: getattr(settings, name) for name in names}}
    env = {f"env_kwargs.{name}": value for name, value in settings.env_kwargs.items()}
    return run | env | {name: list(each) if isinstance(each, tuple) else each for name, each in settings.config.items()}


def settings_rows(settings: RunSettings) -> str:
    """The hyperparameters as rows of a Markdown table; nothing in a value ends its cell."""
    return "".join(f"| {_cell(name)} | {_cell(value)} |\n" for name, value in hyperparameters(settings).items())


def _cell(value: Any) -> str:
    return "<br>".join(str(value).replace("|", r"\|").splitlines())


def open_tracker(folder: Path, settings: RunSettings) -> KVWriter:
    """Begin, or go on with, the tracker's run of a run.

    Raises:
        ValueError: if the tracker is not installed or does not begin: it wants an account, say.
    """
    check_tracker(settings.track, folder)
    kinds: dict[str, Callable[[Path, RunSettings], KVWriter]] = {
        "wandb": _Wandb, "trackio": _Trackio, "mlflow": _MLflow
    }  # fmt: skip
    try:
        return kinds[settings.track](folder, settings)
    except Exception as error:  # each has errors of its own
        text = " ".join(str(error).split())
        raise ValueError(f"track: {settings.track} does not begin: {text}; see docs/commands.md") from error


class _Tracker(KVWriter, abc.ABC):
    """A tracker's run as an output of Stable-Baselines3's logger."""

    def __init__(self, folder: Path, settings: RunSettings) -> None:
        self._name, self._is_lost, known = settings.track, False, _known_runs(folder)
        title = f"{settings.folder_name}-{settings.agent}-{folder.resolve().name}"
        known[self._name] = self._begin(folder, title, hyperparameters(settings), known.get(self._name))
        write_json(folder / _FILE, known)

    def write(self, key_values: dict[str, Any], key_excluded: dict[str, tuple[str, ...]], step: int = 0) -> None:
        """Log the numbers of a row."""
        numbers = {name: float(each) for name, each in key_values.items() if not isinstance(each, str)}
        try:
            if not self._is_lost:
                self._log(numbers, step)
        except Exception as error:  # each has errors of its own, and none is a reason to end a run
            self._is_lost = True
            warn(f"{self._name} failed at {step:,} steps ({error}); training goes on without it")

    def close(self) -> None:
        """End the tracker's run, unless the tracker has failed: it would make the run wait once more."""
        try:
            if not self._is_lost:
                self._end()
        except Exception as error:
            warn(f"{self._name} failed at its end ({error})")

    @abc.abstractmethod
    def _begin(self, folder: Path, title: str, names: dict[str, Any], known: str | None) -> str:
        """Begin a run, or go on with the known one; returns its id."""

    @abc.abstractmethod
    def _log(self, numbers: dict[str, float], step: int) -> None:
        """Log a row."""

    @abc.abstractmethod
    def _end(self) -> None:
        """End the run."""


class _Wandb(_Tracker):
    """Weights & Biases; WANDB_PROJECT, WANDB_MODE and the like hold. Its files lie in the run folder."""

    def _begin(self, folder: Path, title: str, names: dict[str, Any], known: str | None) -> str:
        import wandb

        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", _PROJECT), name=title, id=known, resume="allow", config=names,
            dir=str(folder), settings=wandb.Settings(silent=True),
        )  # fmt: skip
        self._run.define_metric("*", step_metric="global_step")  # wandb's own steps may not go back, a resumed run does
        return str(self._run.id)

    def _log(self, numbers: dict[str, float], step: int) -> None:
        self._run.log({**numbers, "global_step": step})

    def _end(self) -> None:
        self._run.finish()


class _Trackio(_Tracker):
    """Trackio; TRACKIO_DIR, TRACKIO_SPACE_ID and the like hold."""

    def _begin(self, folder: Path, title: str, names: dict[str, Any], known: str | None) -> str:
        import trackio

        project = os.environ.get("TRACKIO_PROJECT", _PROJECT)
        name = known or title
        self._run = trackio.init(project=project, name=name, config=names, resume="allow", embed=False)
        return name

    def _log(self, numbers: dict[str, float], step: int) -> None:
        self._run.log(numbers, step=step)

    def _end(self) -> None:
        self._run.finish()


class _MLflow(_Tracker):
    """MLflow; MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME and the like hold."""

    def _begin(self, folder: Path, title: str, names: dict[str, Any], known: str | None) -> str:
        for name, value in _MLFLOW_PATIENCE.items():
            os.environ.setdefault(name, value)
        from mlflow.tracking import MlflowClient

        self._client = MlflowClient()
        if known is not None:
            self._id = known
            self._client.set_terminated(known, "RUNNING")
            return known
        project = os.environ.get("MLFLOW_EXPERIMENT_NAME", _PROJECT)
        experiment = self._client.get_experiment_by_name(project)
        number = experiment.experiment_id if experiment else self._client.create_experiment(project)
        self._id = str(self._client.create_run(number, run_name=title).info.run_id)
        for option, chosen in names.items():
            self._client.log_param(self._id, option, chosen)
        return self._id

    def _log(self, numbers: dict[str, float], step: int) -> None:
        for name, value in numbers.items():
            self._client.log_metric(self._id, name, value, step=step)

    def _end(self) -> None:
        self._client.set_terminated(self._id)
