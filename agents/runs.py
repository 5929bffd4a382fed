"""Run folders: what a training run leaves behind, and how it is read again.

A run lies in ``<root>/<env>/<agent>/<time>-s<seed>/``: config.json, progress.csv and TensorBoard's events,
checkpoints/step_*.zip with all that training goes on from, best.zip (best mean return while training) with best.json,
final.zip and eval.json (once training is complete). Files are written under a temporary name, brought to the disk and
renamed: a half-written one is never found.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Literal, NamedTuple

import torch
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import VecEnv
from tqdm import tqdm

from .. import __version__
from . import checkpoint, resume
from .checkpoint import CheckpointError
from .config import validate
from .durable import all_or_nothing, write_json
from .registry import AGENTS
from .run_log import warn
from .saving import Checkpointed

_REMEDY = f"expected a .zip file saved by {' or '.join(AGENTS)}, or a run folder"


@dataclass(frozen=True)
class RunSettings:
    """What determines a training run; `config` holds every field of the agent's Config.

    Raises:
        ValueError: if a field is outside its range.
    """

    agent: str
    env_id: str
    env_kwargs: dict[str, Any]
    n_envs: int
    seed: int
    total_timesteps: int
    checkpoint_interval: int
    device: Literal["auto", "cpu", "cuda"]
    threads: int
    config: dict[str, Any]
    keep_checkpoints: int = 3
    backend: str = "auto"
    worker_timeout: float = 60.0
    worker_restarts: int = 10

    def __post_init__(self) -> None:
        validate(
            self,
            {
                "text": "agent env_id backend",
                "names with values": "env_kwargs config",
                "an integer of at least 1": "n_envs total_timesteps checkpoint_interval keep_checkpoints",
                "an integer of 1 .. 2**31 - 1": "threads",
                "an integer of 0 .. 2**31 - 1": "seed",
                "a number above 0": "worker_timeout",
                "an integer of at least 0": "worker_restarts",
            },
        )


_COMPLETE = ("final.zip", "eval.json")


@contextlib.contextmanager
def new_run(root: Path, settings: RunSettings) -> Iterator[Path]:
    """Make the folder of a new run, with its config.json; leave nothing if the block fails before an agent is saved."""
    environment = settings.env_id.replace("/", "_").replace(":", "_")
    name = f"{time.strftime('%Y%m%d-%H%M%S')}-s{settings.seed}"
    folder, number = root / environment / settings.agent / name, 1
    made = [parent for parent in folder.parents if not parent.exists()]
    while True:
        try:
            folder.mkdir(parents=True)
            break
        except FileExistsError:
            number += 1
            folder = folder.with_name(f"{name}-{number}")
    try:
        write_json(folder / "config.json", {**dataclasses.asdict(settings), **_provenance(), "resumed": []})
        yield folder
    except BaseException:
        if not has_saved(folder):
            shutil.rmtree(folder, ignore_errors=True)
            for parent in made:
                with contextlib.suppress(OSError):  # other runs lie there
                    parent.rmdir()
        raise


def has_saved(folder: Path) -> bool:
    """Whether a run folder holds a saved agent."""
    return any(folder.rglob("*.zip"))


def is_complete(folder: Path) -> bool:
    """Whether training came to its end and was evaluated."""
    return all((folder / name).exists() for name in _COMPLETE)


def record_resumption(folder: Path, timesteps: int, total_timesteps: int) -> None:
    """Note in config.json that training goes on from `timesteps`, up to `total_timesteps`, and on what."""
    data = json.loads((folder / "config.json").read_text())
    data["total_timesteps"] = total_timesteps
    data["resumed"] = [*data.get("resumed", []), {"timesteps": timesteps, **_provenance()}]
    write_json(folder / "config.json", data)


def read_settings(folder: Path) -> RunSettings:
    """Read config.json of a run folder.

    Raises:
        ValueError: if there is none, or it is none of ours.
    """
    try:
        data = json.loads((folder / "config.json").read_text())
        names = {field.name for field in dataclasses.fields(RunSettings)}
        settings = RunSettings(**{name: data[name] for name in names & data.keys()})
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"no run: got {folder}, expected the folder of a run, with a config.json") from None
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"unreadable run: {folder / 'config.json'} is damaged ({error!r}); restore it") from error
    if settings.agent not in AGENTS:
        raise ValueError(f"unknown agent: {folder} is a run of {settings.agent!r}, expected one of {', '.join(AGENTS)}")
    return settings


def save_agent(agent: Checkpointed, path: Path) -> None:
    """Save an agent, all or nothing."""
    _save(path, {"agent": checkpoint.encode(agent.contents())})


def save_checkpoint(agent: Checkpointed, folder: Path, keep: int, progress: dict[str, Any]) -> Path:
    """Save an agent and all that its training goes on from, all or nothing; of the older ones `keep` - 1 stay.

    Newer ones can only be broken: training went on from before them, and will replace them.
    """
    path = checkpoint_path(folder, agent.num_timesteps)
    run = {**resume.capture(agent), "progress": progress}
    _save(path, {"agent": checkpoint.encode(agent.contents()), "run": checkpoint.encode(run)})
    for old in [file for file in checkpoints(folder) if _steps(file) < agent.num_timesteps][keep - 1 :]:
        old.unlink()
    return path


def _save(path: Path, documents: dict[str, checkpoint.Document]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with all_or_nothing(path) as partial, partial.open("wb") as file:
        checkpoint.write(file, documents)


def checkpoint_path(folder: Path, timesteps: int) -> Path:
    """Where the checkpoint after so many steps lies."""
    return folder / "checkpoints" / f"step_{timesteps}.zip"


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run, newest first."""
    return sorted((folder / "checkpoints").glob("step_*.zip"), key=_steps, reverse=True)


def _steps(checkpoint_file: Path) -> int:
    return int(checkpoint_file.stem.removeprefix("step_"))


def find_checkpoint(path: Path) -> Path:
    """The saved agent of a run folder: final.zip; if training is not complete the newest checkpoint, else best.zip.

    Args:
        path: a run folder; or a saved file, which is returned as it is.

    Raises:
        ValueError: if there is none.
    """
    if path.is_file():
        return path
    if not path.exists():
        raise ValueError(f"no such run: got {path}, expected an existing run folder or saved .zip file; check the path")
    read_settings(path)
    candidates = (path / "final.zip", *checkpoints(path), path / "best.zip")
    found = next((file for file in candidates if file.exists()), None)
    if found is None:
        raise ValueError(f"empty run: got {path}, expected final.zip, checkpoints/step_*.zip or best.zip; train anew")
    return found


def run_folder_of(path: Path) -> Path | None:
    """The run folder that a folder or saved file belongs to, None if there is none."""
    for folder in (path, path.parent, path.parent.parent):
        with contextlib.suppress(ValueError, OSError):  # no config.json, or somebody else's
            read_settings(folder)
            return folder
    return None


def load_agent(path: Path, device: str = "auto", env: VecEnv | None = None, force_reset: bool = True) -> Checkpointed:
    """Load the agent of a run folder or a saved file (see `find_checkpoint`).

    Raises:
        ValueError: if there is none, it is damaged or not one of this library's, it does not fit env, or the device is
            not there.
    """
    check_device(device)
    file = find_checkpoint(path)
    with file.open("rb") as stream:
        name = checkpoint.config_name(stream, str(file))
    agents = {entry.config.__name__: entry.agent for entry in AGENTS.values()}
    if name not in agents:
        raise ValueError(f"foreign checkpoint: got {file} with a config {name!r}; {_REMEDY}")
    try:
        return agents[name].load(file, env=env, device=device, force_reset=force_reset)
    except CheckpointError:
        raise
    except ValueError as error:  # of Stable-Baselines3: the spaces of env are others
        raise ValueError(f"{file}: {error}") from error


class Resumption(NamedTuple):
    """Where a run can go on.

    Args:
        file: what was read.
        agent: the agent in it.
        state: for `resume.restore`; None if the file is no checkpoint but best.zip or final.zip.
        skipped: what is newer and does not read, and why.
    """

    file: Path
    agent: Checkpointed
    state: dict[str, Any] | None
    skipped: list[str]


def load_newest(folder: Path, device: str, env: VecEnv) -> Resumption:
    """Load what a run goes on from: the newest checkpoint that reads well, else final.zip, else best.zip.

    Raises:
        ValueError: if there is none, or env or the device do not fit.
    """
    for half in folder.rglob("*.part"):  # of a process that was killed while it wrote
        half.unlink()
    skipped: list[str] = []
    for file in filter(Path.exists, (*checkpoints(folder), folder / "final.zip", folder / "best.zip")):
        try:
            state = None
            if file.parent.name == "checkpoints":
                with file.open("rb") as stream:
                    state = checkpoint.read(stream, "run", str(file))
            exact = state is not None and resume.tells_its_state(env)
            return Resumption(file, load_agent(file, device, env, force_reset=not exact), state, skipped)
        except CheckpointError as error:
            skipped.append(str(error))
    raise ValueError(f"no checkpoint of {folder} reads: {'; '.join(skipped)}")


def check_device(device: str) -> None:
    """Refuse CUDA where there is none, in place of Stable-Baselines3's silent change to the CPU."""
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device: got {device}, but torch finds no CUDA device; use cpu, or install torch for CUDA")


def _provenance() -> dict[str, Any]:
    """Versions of what results depend on, and the git revision if this file lies in a checkout."""
    versions = {"python": platform.python_version(), "driftrl": __version__}
    for package in ("torch", "numpy", "mujoco", "gymnasium", "stable-baselines3"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    root, revision = Path(__file__).resolve().parents[1], None
    if (root / ".git").exists():
        command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        with contextlib.suppress(OSError):  # no git
            revision = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or None
    return {"versions": versions, "git": revision}


@contextlib.contextmanager
def sigterm_as_interrupt() -> Iterator[None]:
    """Within the block SIGTERM raises KeyboardInterrupt, as SIGINT does: what is open gets closed."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt(number)

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def exit_code(interrupt: KeyboardInterrupt) -> int:
    """Exit code of a process that a signal ended: 130 for SIGINT, 143 for SIGTERM."""
    number: int = interrupt.args[0] if interrupt.args else signal.SIGINT
    return 128 + number


class StopOnSignal:
    """Within the block the first SIGINT or SIGTERM asks training to stop; the next one is handled as outside.

    `Checkpoints` stops it where nothing is lost, between an update and the next rollout. Where that takes longer than
    `PATIENCE` seconds, training is interrupted: the last checkpoint is what remains.
    """

    PATIENCE = 6.0

    def __init__(self) -> None:
        self.signal: int | None = None

    def __enter__(self) -> StopOnSignal:
        self._handlers = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        self._handlers[signal.SIGALRM] = signal.signal(signal.SIGALRM, self._interrupt)
        return self

    def __exit__(self, *exception: object) -> None:
        self.be_patient()
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def be_patient(self) -> None:
        """Do not interrupt: training has stopped."""
        signal.setitimer(signal.ITIMER_REAL, 0)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, self._handlers[each])
        signal.setitimer(signal.ITIMER_REAL, self.PATIENCE)
        os.write(2, b"\nstopping after this iteration (again: at once, without saving)\n")  # print is not reentrant

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt(self.signal)


class Checkpoints(BaseCallback):
    """Saves a checkpoint at intervals and when a signal came, and best.zip when the mean return is the best so far.

    It looks for a new best every 1 % of the run, once 10 episodes are known: saving costs next to nothing then. What
    cannot be written is reported, and training goes on.

    Args:
        folder: of the run.
        settings: of the run.
        stop: asks for an early end.
        progress: of the run that goes on, from its checkpoint; None where there is none.
    """

    model: Checkpointed

    def __init__(
        self, folder: Path, settings: RunSettings, stop: StopOnSignal, progress: dict[str, Any] | None = None
    ) -> None:
        super().__init__()
        self._folder, self._settings, self._stop, self._progress = folder, settings, stop, progress

    def _on_training_start(self) -> None:
        self._last = self.model.num_timesteps
        self._was_final = (self._folder / "final.zip").exists()
        if self._progress is None:
            path = self._folder / "best.json"
            best = json.loads(path.read_text())["mean_return"] if path.exists() else -float("inf")
            self._progress = {"best": best, "looked_at": self._last}

    def _on_step(self) -> bool:
        return True

    def _on_rollout_start(self) -> None:  # the policy was just updated
        steps, interval = self.model.num_timesteps, self._settings.checkpoint_interval
        if self._stop.signal is not None:
            self._stop.be_patient()
            self.save()
            raise KeyboardInterrupt(self._stop.signal)
        if steps // interval > self._last // interval or self._was_final:
            self._last, self._was_final = steps, False
            self.save()
        self._look_for_best(steps)

    def save(self) -> None:
        """Save a checkpoint."""
        assert self._progress is not None
        with _reported("checkpoint", self.model.num_timesteps):
            save_checkpoint(self.model, self._folder, self._settings.keep_checkpoints, self._progress)
            for name in _COMPLETE:  # of a run that goes on: they are final no longer
                (self._folder / name).unlink(missing_ok=True)

    def _look_for_best(self, steps: int) -> None:
        progress, interval = self._progress, max(self._settings.total_timesteps // 100, 1)
        assert progress is not None
        if steps - progress["looked_at"] >= interval and len(self.model.ep_info_buffer or ()) >= 10:
            progress["looked_at"] = steps
            mean_return = _mean_return(self.model)
            if mean_return > progress["best"]:
                progress["best"] = mean_return
                with _reported("best.zip", steps):
                    save_agent(self.model, self._folder / "best.zip")
                    write_json(self._folder / "best.json", {"mean_return": mean_return, "timesteps": steps})


@contextlib.contextmanager
def _reported(what: str, steps: int) -> Iterator[None]:
    """A file that cannot be written is no reason to end training; the one before it is still there."""
    try:
        yield
    except OSError as error:
        warn(f"no {what} at {steps:,} steps ({error}); the one before is kept, training goes on")


class Progress(BaseCallback):
    """Shows steps, speed, return and time left: as a bar on a terminal, else in a line per 10 % or 30 s."""

    def __init__(self, begin: int, total: int) -> None:
        super().__init__()
        self._begin = self._shown = begin
        self._total = total
        self._start = self._shown_at = time.monotonic()
        self._bar = tqdm(
            total=total, initial=begin, unit=" steps", unit_scale=True, smoothing=0, dynamic_ncols=True,
            disable=not sys.stderr.isatty(), bar_format="{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} "
            "[{elapsed}, {remaining} left, {rate_fmt}{postfix}]",
        )  # fmt: skip

    def _on_step(self) -> bool:
        self._bar.update(min(self.num_timesteps, self._total) - self._bar.n)
        return True

    def _on_rollout_end(self) -> None:
        now, steps = time.monotonic(), self.model.num_timesteps
        mean = f"return {_mean_return(self.model):.1f}" if self.model.ep_info_buffer else "return -"
        self._bar.set_postfix_str(mean, refresh=False)
        if self._bar.disable and (steps - self._shown >= self._total / 10 or now - self._shown_at >= 30):
            self._shown, self._shown_at = steps, now
            speed = (steps - self._begin) / (now - self._start)
            left = tqdm.format_interval(max(self._total - steps, 0) / speed)
            print(
                f"{min(steps / self._total, 1):4.0%}  {steps:,} steps  {speed:,.0f} steps/s  {mean}  {left} left",
                flush=True,
            )

    def close(self) -> None:
        """Leave the bar as it is, also where training was cut short."""
        self._bar.close()


def _mean_return(model: BaseAlgorithm) -> float:
    """Mean return of the last training episodes, of which there is at least one."""
    episodes = model.ep_info_buffer or ()
    return sum(float(episode["r"]) for episode in episodes) / len(episodes)
