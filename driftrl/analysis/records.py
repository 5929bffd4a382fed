"""Records of training runs, found in folders: ours, and those that Stable-Baselines3's tools left behind."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from ..runs.kinds import RESULTS, is_group, is_shared, walk
from ..runs.results import read_results
from .logs import Curve, Log, read_evaluations, read_monitors, read_progress, read_zoo_file, thinned

_NOT_SETTINGS = {
    "agent", "env_id", "env_kwargs", "seed", "config", "versions", "git", "resumed",
    "checkpoint_interval", "keep_checkpoints", "worker_timeout", "worker_restarts", "eval_interval", "eval_episodes",
    "track",
}  # fmt: skip
"""Entries of config.json that are no settings, or settings that do not change what is learned."""
_LOGS = ("progress.csv", "evaluations.npz")
_VIDEOS = (".mp4", ".gif", ".webm")
_ENVIRONMENT = re.compile(r"([A-Za-z][\w.]*-v\d+)(?:_\d+)?")  # Hopper-v5, or rl_zoo3's Hopper-v5_1
_SEED = re.compile(r"(?:(.*)[-_.])?s(?:eed)?[-_=]?(\d+)", re.IGNORECASE)
_NUMBER = re.compile(r"(?:(.+)[-_])?(\d+)")


@dataclass(frozen=True)
class Record:
    """One training run as a comparison sees it.

    Args:
        folder: of the run, relative to the working directory where it lies below that.
        agent: the algorithm, or what its folder is called.
        env_id: Gymnasium id; None where nothing tells it.
        seed: of the run; None where nothing tells it.
        settings: all that may differ between runs beside agent, environment and seed.
        curves: returns while training, "training" and "evaluation".
        evaluation: mean return of the last evaluation of the deterministic policy; None where there was none, NaN where
            it is not finite.
        steps: environment steps that were trained.
        complete: whether the run came to its end, as far as one can tell.
        tells_its_end: whether the logs tell that; those of Stable-Baselines3 do not.
        env_kwargs: arguments of the environment.
        versions: of what results depend on.
        notes: what a reader should know.
        videos: in the run's folder.
        name: of the group that the user puts the run into; None: the settings decide.
        group: name of the folder of its group, where it lies in one.
    """

    folder: Path
    agent: str
    env_id: str | None
    seed: int | None
    settings: Mapping[str, Any]
    curves: Mapping[str, Curve]
    evaluation: float | None
    steps: int
    complete: bool
    env_kwargs: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    videos: tuple[Path, ...] = ()
    name: str | None = None
    group: str | None = None
    tells_its_end: bool = True

    @property
    def state(self) -> str:
        """How far it is, for readers."""
        return "unfinished" if not self.complete else "complete" if self.tells_its_end else "not known"

    @property
    def label(self) -> str:
        """What tells a run from the others of its group."""
        return self.folder.resolve().name if self.seed is None else f"seed {self.seed}"

    def evaluations(self) -> list[tuple[float, float]]:
        """Points (step, return) of the deterministic policy: those while training, and the last if it is later."""
        points: list[tuple[float, float]] = []
        if "evaluation" in self.curves:
            few = thinned(self.curves["evaluation"])
            points = list(zip(few.steps.tolist(), few.returns.tolist(), strict=True))
        last = self.evaluation
        if last is not None and math.isfinite(last) and (not points or points[-1][0] < self.steps):
            points.append((float(self.steps), last))
        return points


@dataclass(frozen=True)
class Found:
    """The runs found, and in one line each what could not be read."""

    records: list[Record]
    problems: list[str]


def find_records(places: Sequence[tuple[str | None, Path]]) -> Found:
    """Read all runs in some folders, however deep.

    A folder that is a run is not searched further. A run found twice counts once; a name given to it wins.

    Args:
        places: folders, each with the name of the group that its runs belong to, or None.

    Raises:
        ValueError: if one of the places is no folder, or holds no run, or a run has two names.
    """
    names: dict[Path, str | None] = {}
    for name, place in places:
        if not place.is_dir():
            raise ValueError(f"no such folder: got {place}, expected run folders or folders that hold some")
        folders = [_shown(folder) for folder in _run_folders(place)]
        if not folders:
            raise ValueError(
                f"no runs: got {place}, expected folders of train.py (config.json), or logs of Stable-Baselines3 "
                "(progress.csv, monitor.csv, evaluations.npz)"
            )
        for folder in folders:
            if name and (other := names.get(folder)) and other != name:
                raise ValueError(f"{folder}: got it as {other} and as {name}, expected one name for each run")
            names[folder] = name or names.get(folder)
    records, problems = [], list[str]()
    for folder, name in names.items():
        try:
            config = _read_config(folder)
            record = _read_foreign(folder, name) if config is None else _read_ours(folder, config, name)
            records.append(record)
        except (ValueError, OSError) as error:
            problems.append(" ".join(str(error).split()))
    return Found(records, problems)


def _run_folders(place: Path) -> Iterator[Path]:
    for path, folders, files in walk(place):
        folder = path.resolve()
        if is_shared(folder):
            folders.clear()
            continue
        if any(name in files for name in _LOGS) or _monitors(folder) or _is_ours(folder):
            folders.clear()
            yield folder


def _shown(folder: Path) -> Path:
    """A folder as it reads best from here, and without the names above it in a report that is sent to others."""
    return folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder


def _is_ours(folder: Path) -> bool:
    """Whether a folder with a config.json and no log yet is a run of ours; a damaged one counts, to be reported."""
    try:
        return _read_config(folder) is not None
    except (ValueError, OSError):
        return True


def _monitors(folder: Path) -> list[Path]:
    return sorted(folder.glob("*monitor.csv"))


def _read_config(folder: Path) -> dict[str, Any] | None:
    """config.json of a run of ours; None where there is none, or another program's."""
    path = folder / "config.json"
    if not path.is_file():
        return None
    try:
        data = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if not isinstance(data, dict) or not {"agent", "env_id", "config"} <= data.keys():
        return None
    kinds = {"agent": str, "env_id": str, "seed": int, "config": dict, "env_kwargs": dict}
    for key, kind in kinds.items():
        if not isinstance(data.get(key), kind):
            raise ValueError(f"{path} is damaged: {key} is {data.get(key)!r}, expected {kind.__name__}")
    return data


def _read_ours(folder: Path, config: dict[str, Any], name: str | None) -> Record:
    resumed = [each["timesteps"] for each in config.get("resumed", []) if isinstance(each, dict)]
    logs, notes = _read_logs(folder, [(folder / "progress.csv", partial(read_progress, resumed=resumed))])
    evaluation, steps = None, max((log.steps for log in logs), default=0.0)
    path = folder / RESULTS
    try:
        if results := read_results(folder):
            returns = list(map(float, results["deterministic"]["returns"]))
            evaluation, steps = sum(returns) / len(returns), results["timesteps"]
    except (ValueError, OSError):
        notes.append(f"{path} is damaged; the run counts as not evaluated")
    recorded = config.get("versions")
    versions = {key: str(value) for key, value in recorded.items()} if isinstance(recorded, dict) else {}
    complete = path.is_file() and (folder / "final.zip").is_file()
    above = folder.resolve().parent
    return Record(
        folder, config["agent"], config["env_id"], config["seed"],
        {**{key: value for key, value in config.items() if key not in _NOT_SETTINGS}, **config["config"]},
        _merged(logs), evaluation, int(steps), complete, config["env_kwargs"], versions,
        tuple(notes + _not_finite(path, evaluation)), _videos(folder), name, above.name if is_group(above) else None,
    )  # fmt: skip


def _read_foreign(folder: Path, name: str | None) -> Record:
    """A run of Stable-Baselines3: logs of its CSV logger, of Monitor, of EvalCallback; or a folder of rl_zoo3."""
    readers = [(folder / "progress.csv", read_progress), (folder / "evaluations.npz", read_evaluations)]
    logs, notes = _read_logs(folder, readers)
    if replaced := sum(log.replaced for log in logs):
        notes.append(
            f"{folder}: its logs go back to an earlier step; the {replaced} returns before, from that step on, are "
            "left out. To see two calls of learn(), log them into two folders, or call learn(reset_num_timesteps=False)"
        )
    if monitors := _monitors(folder):
        try:
            log = read_monitors(monitors)
            logs.append(log)
            notes += log.notes
        except (ValueError, OSError) as error:
            notes.append(str(error))
    if not any(log.curves for log in logs):
        raise ValueError("; ".join(notes) or f"{folder} is empty: no return was logged")
    arguments = {key: value for path in folder.glob("*/args.yml") for key, value in read_zoo_file(path).items()}
    settings = {key: value for path in folder.glob("*/config.yml") for key, value in read_zoo_file(path).items()}
    if (steps := arguments.get("n_timesteps", "")).isdigit():
        settings["n_timesteps"] = steps  # `-n`, -1 without it; config.yml has the preset's
    whole = folder.resolve()
    stem, seed = _by_name(whole.name)
    above = [match[1] for each in (whole, *whole.parents) if (match := _ENVIRONMENT.fullmatch(each.name))]
    env_id = next((log.env_id for log in logs if log.env_id), None) or arguments.get("env") or next(iter(above), None)
    if arguments.get("seed", "").isdigit():
        seed = int(arguments["seed"])
    curves = _merged(logs)
    evaluation = float(curves["evaluation"].returns[-1]) if "evaluation" in curves else None
    return Record(
        folder, arguments.get("algo") or _agent_of(whole, stem), env_id, seed, settings, curves, evaluation,
        int(max(log.steps for log in logs)), True, notes=tuple(notes), videos=_videos(folder), name=name,
        tells_its_end=False,
    )  # fmt: skip


def _read_logs(folder: Path, readers: Sequence[tuple[Path, Any]]) -> tuple[list[Log], list[str]]:
    logs, notes = [], list[str]()
    for path, read in readers:
        if path.is_file():
            try:
                logs.append(read(path))
                notes += logs[-1].notes
            except (ValueError, OSError) as error:
                notes.append(str(error))
    return logs, notes


def _merged(logs: Sequence[Log]) -> dict[str, Curve]:
    """The curves of all logs; of two that show the same that of the earlier log."""
    return {kind: curve for log in reversed(logs) for kind, curve in log.curves.items()}


def _by_name(name: str) -> tuple[str | None, int | None]:
    """What a folder's name says before the seed or the number of the run, and the seed: ppo-s3, seed_3, 3; PPO_1."""
    if match := _SEED.fullmatch(name):
        return match[1], int(match[2])
    if match := _NUMBER.fullmatch(name):
        return match[1], int(match[2]) if match[1] is None else None  # PPO_1 is the first run, of whatever seed
    return name, None


def _agent_of(folder: Path, stem: str | None) -> str:
    """What the folders of a run call it; a seed or an environment is no name."""
    names = [stem or "", *(parent.name for parent in folder.parents)]
    return next((name for name in names if name and not _ENVIRONMENT.fullmatch(name)), "unknown")


def _videos(folder: Path) -> tuple[Path, ...]:
    return tuple(sorted(path for path in folder.rglob("*") if path.suffix in _VIDEOS and path.is_file()))


def _not_finite(path: Path, value: float | None) -> list[str]:
    return [f"{path}: the return is {value}"] if value is not None and not math.isfinite(value) else []
