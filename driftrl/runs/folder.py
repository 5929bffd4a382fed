"""Run folders: what a training run leaves behind, and how it is read again.

A run lies in ``<root>/<env>/<agent>/<time>-s<seed>/``: config.json, progress.csv and TensorBoard's events,
checkpoints/step_*.zip with all that training goes on from, best.zip with best.json (best mean return of the evaluations
while training, or else of training itself), final.zip and eval.json (once training is complete). Files are written
under a temporary name, brought to the disk and renamed: a half-written one is never found.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import json
import platform
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from stable_baselines3.common.vec_env import VecEnv

from .. import __version__
from ..agents.common.config import validate
from ..agents.common.ranks import present
from ..agents.registry import AGENTS
from ..agents.storage import format as checkpoint
from ..agents.storage import saving
from ..agents.storage.files import all_or_nothing, write_json
from ..agents.storage.saving import Checkpointed
from ..agents.storage.values import CheckpointError
from .kinds import AGENT, RESULTS
from .rank_states import documents, state_in
from .results import read_results
from .warnings import warn

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
    warp_solver: Literal["model", "newton"] = "model"
    warp_contacts: int | None = None
    warp_constraints: int | None = None
    worker_timeout: float = 60.0
    worker_restarts: int = 10
    eval_interval: int | None = None
    eval_episodes: int = 10
    demonstrations: str | None = None
    demonstration_keys: list[str] = dataclasses.field(default_factory=list)
    demonstration_return: float | None = None
    pretrain_steps: int = 0
    pretrain_batch_size: int = 512
    pretrain_learning_rate: float = 3e-3
    track: Literal["none", "wandb", "trackio", "mlflow"] = "none"

    def __post_init__(self) -> None:
        validate(
            self,
            {
                "text": "agent env_id backend",
                "names with values": "env_kwargs config",
                "an integer of at least 1": "n_envs checkpoint_interval keep_checkpoints eval_episodes "
                "pretrain_batch_size" + ("" if self.pretrain_steps else " total_timesteps"),
                "an integer of at least 1, or None": "eval_interval warp_contacts warp_constraints",
                "an integer of 1 .. 2**31 - 1": "threads",
                "an integer of 0 .. 2**31 - 1": "seed",
                "a number above 0": "worker_timeout pretrain_learning_rate",
                "an integer of at least 0": "worker_restarts total_timesteps pretrain_steps",
            },
        )

    @property
    def folder_name(self) -> str:
        """The environment's id as the name of a folder."""
        return self.env_id.replace("/", "_").replace(":", "_")


COMPLETE = ("final.zip", RESULTS)
PRETRAIN, PRETRAINED = "pretrain.zip", "pretrained.zip"  # see pretraining.py


@contextlib.contextmanager
def new_run(root: Path, settings: RunSettings) -> Iterator[Path]:
    """Make the folder of a new run, with its config.json; leave nothing if the block fails before an agent is saved."""
    name = f"{time.strftime('%Y%m%d-%H%M%S')}-s{settings.seed}"
    parent = root / settings.folder_name / settings.agent
    made = [each for each in (parent, *parent.parents) if not each.exists()]
    folder = new_folder(parent / name)
    try:
        write_settings(folder, settings)
        yield folder
    except BaseException:
        if not has_saved(folder):
            shutil.rmtree(folder, ignore_errors=True)
            for each in made:
                with contextlib.suppress(OSError):  # other runs lie there
                    each.rmdir()
        raise


def new_folder(path: Path) -> Path:
    """Make a folder of that name; where there is one, with a number after it."""
    folder, number = path, 1
    while True:
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            number += 1
            folder = path.with_name(f"{path.name}-{number}")


def write_settings(folder: Path, settings: RunSettings) -> None:
    """Write config.json of a run that begins."""
    write_json(folder / "config.json", {**dataclasses.asdict(settings), **_provenance(), "resumed": []})


def has_saved(folder: Path) -> bool:
    """Whether a run folder holds a saved agent."""
    return any(folder.rglob("*.zip"))


def is_complete(folder: Path) -> bool:
    """Whether training came to its end and was evaluated; a damaged evaluation is none, and a warning names it."""
    try:
        return (folder / "final.zip").exists() and read_results(folder) is not None
    except ValueError as error:
        warn(f"{error}; the run counts as not complete")
        return False


def record_resumption(folder: Path, timesteps: int, settings: RunSettings) -> None:
    """Note in config.json that training goes on from `timesteps`, up to the settings' total, and on what."""
    data = json.loads((folder / "config.json").read_text())
    data["total_timesteps"] = settings.total_timesteps
    if settings.demonstrations is not None:
        data["demonstrations"] = settings.demonstrations
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
    except (AttributeError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"unreadable run: {folder / 'config.json'} is damaged ({error}); restore it") from error
    if settings.agent not in AGENTS:
        raise ValueError(f"unknown agent: {folder} is a run of {settings.agent!r}, expected one of {', '.join(AGENTS)}")
    return settings


def save_agent(agent: Checkpointed, path: Path) -> None:
    """Save an agent, all or nothing."""
    _save(path, {"agent": checkpoint.encode(agent.contents())})


def save_checkpoint(
    agent: Checkpointed, folder: Path, keep: int, progress: dict[str, Any], lost: str | None = None
) -> Path:
    """Save an agent and all that its training goes on from, all or nothing; of the older ones `keep` - 1 stay.

    Newer ones can only be broken: training went on from before them, and will replace them. Of several ranks rank 0
    calls this, the others `rank_states.hand_over`. `lost` says what a run that goes on from it lacks.
    """
    path = checkpoint_path(folder, agent.num_timesteps)
    _save(path, {"agent": checkpoint.encode(agent.contents()), **documents(agent, progress, lost)})
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


def saved_steps(folder: Path) -> int | None:
    """The steps of a run's newest checkpoint; None where there is none."""
    return next(map(_steps, checkpoints(folder)), None)


def _steps(checkpoint_file: Path) -> int:
    return int(checkpoint_file.stem.removeprefix("step_"))


def find_checkpoint(path: Path) -> Path:
    """The saved agent of a run folder: final.zip; if training is not complete the newest checkpoint, else best.zip.

    Args:
        path: a run folder; or a folder for the Hub, which has one agent; or a saved file, which is returned as it is.

    Raises:
        ValueError: if there is none.
    """
    return _saved_files(path)[0]


def _saved_files(path: Path) -> list[Path]:
    """The saved agents of a run folder, the one to take first; see `find_checkpoint`."""
    if path.is_file():
        return [path]
    if not path.exists():
        raise ValueError(f"no such run: got {path}, expected an existing run folder or saved .zip file; check the path")
    read_settings(path)
    last = [path / name for name in ("best.zip", PRETRAINED, PRETRAIN)]
    found = [file for file in (path / "final.zip", *checkpoints(path), *last, path / AGENT) if file.exists()]
    if not found:
        raise ValueError(f"empty run: got {path}, expected final.zip, checkpoints/step_*.zip or best.zip; train anew")
    return found


class Saved(NamedTuple):
    """A saved agent that was read.

    Args:
        file: what was read.
        agent: the agent in it.
        skipped: what comes before it and does not read, and why.
    """

    file: Path
    agent: Checkpointed
    skipped: list[str]


def load_saved(path: Path, device: str = "auto") -> Saved:
    """Load the agent of a run folder or file (see `find_checkpoint`), of a folder the first that reads well.

    Raises:
        ValueError: as `load_agent`.
    """
    files, skipped = _saved_files(path), list[str]()
    for file in files:
        try:
            return Saved(file, load_agent(file, device), skipped)
        except CheckpointError as error:
            if len(files) == 1:
                raise
            skipped.append(str(error))
    raise ValueError(f"no saved agent of {path} reads: {'; '.join(skipped)}")


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
        state: for `saving.restore`, see `state_in`; None if the file is no checkpoint but best.zip or final.zip.
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
    for half in (*folder.glob("*.part"), *folder.glob("*/*.part")):  # of a process that was killed while it wrote
        if half.is_file():
            half.unlink(missing_ok=True)  # another rank did
    skipped: list[str] = []
    names = ("final.zip", "best.zip", PRETRAINED, PRETRAIN)
    for file in filter(Path.exists, (*checkpoints(folder), *(folder / name for name in names))):
        try:
            state = state_in(file) if file.parent.name == "checkpoints" else None
            exact = state is not None and saving.tells_its_state(env) and "missing" not in state
            agent = load_agent(file, device, env, force_reset=not exact)
            if exact and state is not None:
                vars(agent).update(state.get("attributes", {}))
            return Resumption(file, agent, state, skipped)
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
    if (size := present().size) > 1:
        versions["ranks"] = str(size)
    root, revision = Path(__file__).resolve().parents[2], None
    if (root / ".git").exists():
        command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        with contextlib.suppress(OSError):  # no git
            revision = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or None
    return {"versions": versions, "git": revision}
