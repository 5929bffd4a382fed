"""Run folders: what a training run leaves behind, and how it is read again.

A run lies in ``<root>/<env>/<agent>/<time>-s<seed>/``: config.json, progress.csv and TensorBoard's events,
checkpoints/step_*.zip, best.zip (best mean return while training) with best.json, final.zip and eval.json (once
training is complete). Files are written under a temporary name and renamed: a half-written one is never found.
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
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import torch
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import CSVOutputFormat, Logger, TensorBoardOutputFormat
from stable_baselines3.common.vec_env import VecEnv
from tqdm import tqdm

from .. import __version__
from .config import validate
from .registry import AGENTS

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
    backend: str = "auto"
    worker_timeout: float = 60.0
    worker_restarts: int = 10

    def __post_init__(self) -> None:
        validate(
            self,
            {
                "text": "agent env_id backend",
                "names with values": "env_kwargs config",
                "an integer of at least 1": "n_envs total_timesteps checkpoint_interval",
                "an integer of 1 .. 2**31 - 1": "threads",
                "an integer of 0 .. 2**31 - 1": "seed",
                "a number above 0": "worker_timeout",
                "an integer of at least 0": "worker_restarts",
            },
        )


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


def write_json(path: Path, data: object) -> None:
    """Write JSON, all or nothing; a ValueError if a number is not finite, which JSON cannot express."""
    text = json.dumps(data, indent=2, allow_nan=False)
    with _all_or_nothing(path) as partial:
        partial.write_text(text + "\n")


def save_agent(agent: BaseAlgorithm, path: Path) -> None:
    """Save an agent, all or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with _all_or_nothing(path) as partial, partial.open("wb") as file:
        agent.save(file)
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def _all_or_nothing(path: Path) -> Iterator[Path]:
    """A temporary name to write under, which becomes `path` at the end and goes away if the block fails."""
    partial = path.with_name(path.name + ".part")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def checkpoint_path(folder: Path, timesteps: int) -> Path:
    """Where the checkpoint after so many steps lies."""
    return folder / "checkpoints" / f"step_{timesteps}.zip"


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
    if (path / "final.zip").exists():
        return path / "final.zip"
    checkpoints = (path / "checkpoints").glob("step_*.zip")
    newest = max(checkpoints, key=lambda file: int(file.stem.removeprefix("step_")), default=path / "best.zip")
    if not newest.exists():
        raise ValueError(f"empty run: got {path}, expected final.zip, checkpoints/step_*.zip or best.zip; train anew")
    return newest


def run_folder_of(path: Path) -> Path | None:
    """The run folder that a folder or saved file belongs to, None if there is none."""
    for folder in (path, path.parent, path.parent.parent):
        with contextlib.suppress(ValueError, OSError):  # no config.json, or somebody else's
            read_settings(folder)
            return folder
    return None


def load_agent(path: Path, device: str = "auto", env: VecEnv | None = None) -> BaseAlgorithm:
    """Load the agent of a run folder or a saved file (see `find_checkpoint`).

    Raises:
        ValueError: if there is none, it is damaged or not one of this library's, it does not fit env, or the device is
            not there.
    """
    check_device(device)
    file = find_checkpoint(path)
    agent = AGENTS[_agent_name(file)].agent
    try:
        with file.open("rb") as stream:
            return agent.load(stream, env=env, device=device)
    except ValueError as error:  # of Stable-Baselines3: the spaces of env are others
        raise ValueError(f"{file}: {error}") from error
    except Exception as error:  # whatever unpickling and incomplete data lead to
        raise ValueError(f"damaged checkpoint: {file} does not load ({error!r}); {_REMEDY}") from error


def check_device(device: str) -> None:
    """Refuse CUDA where there is none, in place of Stable-Baselines3's silent change to the CPU."""
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device: got {device}, but torch finds no CUDA device; use cpu, or install torch for CUDA")


def _agent_name(file: Path) -> str:
    """Name of the agent in a saved file, told by the class of its config."""
    try:
        with zipfile.ZipFile(file) as archive:
            damaged = archive.testzip() is not None
            data = json.loads(archive.read("data"))
    except Exception:  # a flipped bit can name another compression, a password, ...
        damaged = True
    if damaged:
        raise ValueError(f"no checkpoint: got {file}, which is damaged or something else; {_REMEDY}")
    config = data.get("config") if isinstance(data, dict) else None
    for name, entry in AGENTS.items():
        if isinstance(config, dict) and config.get(":type:") == str(entry.config):
            return name
    raise ValueError(f"foreign checkpoint: got {file}, which no agent of this library saved; {_REMEDY}")


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


def open_logger(folder: Path) -> Logger:
    """Logger to TensorBoard's events and progress.csv, which are continued where they exist."""
    return Logger(str(folder), [TensorBoardOutputFormat(str(folder)), _ProgressFile(folder / "progress.csv")])


class _ProgressFile(CSVOutputFormat):
    """progress.csv, continued where there is one."""

    def __init__(self, path: Path) -> None:
        path.touch()
        super().__init__(os.devnull)
        self.file.close()
        self.file = path.open("r+")
        self.keys = [key for key in self.file.readline().strip().split(",") if key]
        self.file.seek(0, os.SEEK_END)


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


class StopOnSignal(BaseCallback):
    """Ends training after the current step on the first SIGINT or SIGTERM; the next one is handled as outside."""

    def __init__(self) -> None:
        super().__init__()
        self.signal: int | None = None

    def __enter__(self) -> StopOnSignal:
        self._handlers = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        self.__exit__()
        os.write(2, b"\nstopping after this step (again: at once, without saving)\n")  # print is not reentrant

    def _on_step(self) -> bool:
        return self.signal is None


class Checkpoints(BaseCallback):
    """Saves the agent at intervals, and as best.zip when the mean return of training is the best so far.

    It looks for a new best every 1 % of the run, once 10 episodes are known: saving costs next to nothing then.
    """

    def __init__(self, folder: Path, interval: int, total_timesteps: int) -> None:
        super().__init__()
        self._folder, self._interval, self._best_interval = folder, interval, max(total_timesteps // 100, 1)

    def _on_training_start(self) -> None:
        self._last = self._last_best = self.model.num_timesteps
        path = self._folder / "best.json"
        self._best = json.loads(path.read_text())["mean_return"] if path.exists() else -float("inf")

    def _on_step(self) -> bool:
        return True

    def _on_rollout_start(self) -> None:  # the policy was just updated
        steps = self.model.num_timesteps
        if steps // self._interval > self._last // self._interval:
            self._last = steps
            save_agent(self.model, checkpoint_path(self._folder, steps))
        if steps - self._last_best >= self._best_interval and len(self.model.ep_info_buffer or ()) >= 10:
            self._last_best = steps
            mean_return = _mean_return(self.model)
            if mean_return > self._best:
                self._best = mean_return
                save_agent(self.model, self._folder / "best.zip")
                write_json(self._folder / "best.json", {"mean_return": mean_return, "timesteps": steps})


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
