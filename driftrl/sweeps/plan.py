"""The runs of a sweep: what each of them is, and the folder that says how far it is."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..agents.registry import AGENTS
from ..agents.storage.files import write_json
from ..commands.config_file import options_of
from ..commands.settings import default_interval, settings_of_file
from ..commands.training import make_agent, make_env
from ..runs.fields import made_of
from ..runs.folder import RunSettings, read_settings, write_settings
from ..runs.group import members
from ..runs.kinds import GROUP_FILE
from ..runs.lock import exclusively
from .spec import Spec

_LONGEST = 100
"""Characters of a folder's name: file systems take 255, and paths have an end, too."""


@dataclass(frozen=True)
class Planned:
    """Runs that differ in their seed only, and the folder of their group.

    Args:
        name: of the settings, as the table shows it.
        folder: of the group.
        runs: one per seed.
    """

    name: str
    folder: Path
    runs: tuple[RunSettings, ...]

    def run_folder(self, run: RunSettings) -> Path:
        """The folder of one of the runs."""
        return self.folder / f"s{run.seed}"


def grid(spec: Spec) -> list[Planned]:
    """All groups of a grid: tasks x settings.

    Raises:
        ValueError: if an option is none of the agent's, or its value is outside its range.
    """
    found: dict[Path, Planned] = {}
    for env in spec.envs:
        for values in itertools.product(*spec.grid.values()):
            chosen = dict(zip(spec.grid, values, strict=True))
            group = planned(spec, env, chosen, None, "grid")
            if group.folder in found:
                raise ValueError(f"{spec.path}: grid: got {group.name} for {env} twice, expected each value once")
            found[group.folder] = group
    return list(found.values())


def planned(spec: Spec, env: str, chosen: Mapping[str, Any], name: str | None, place: str) -> Planned:
    """The group of some settings.

    Args:
        spec: of the sweep.
        env: Gymnasium id.
        chosen: options beside those of all runs.
        name: of the group; None: what is chosen.
        place: where the sweep's file has the chosen options, for errors.

    Raises:
        ValueError: if an option's value is outside its range, or changes nothing beside the others.
    """
    data = {"agent": spec.agent, "env": env, "seed": spec.seeds[0], **spec.settings, **chosen}
    try:
        file = options_of(data, spec.path, None)
        settings = settings_of_file(file)
    except ValueError as error:
        raise _blamed(spec, chosen, place, error) from None
    runs = tuple(dataclasses.replace(settings, seed=seed) for seed in spec.seeds)
    if name is None:  # as the values were read: 1e-3 and 0.001 are the same
        values = {key: {**file.run, **file.fields}[key.replace("-", "_")] for key in chosen}
        name = ",".join(f"{key}={_text(value)}" for key, value in values.items()) or "all"
    return Planned(name, spec.folder / settings.folder_name / spec.agent / _folder_name(name), runs)


def _blamed(spec: Spec, chosen: Mapping[str, Any], place: str, error: ValueError) -> ValueError:
    """The error with the field of the sweep that it is about."""
    text = str(error).removeprefix(f"{spec.path}: ")
    name = text.partition(":")[0]
    where = next((f"{part}." for part, names in ((place, chosen), ("settings", spec.settings)) if name in names), "")
    field = "envs" if name == "env" else f"{where}{name}"
    return ValueError(f"{spec.path}: {field}:{text.partition(':')[2]}")


def check_runs(groups: Sequence[Planned], spec: Spec, place: str = "grid") -> None:
    """Refuse what the runs would refuse, before any of them begins: environments and agents are made once.

    Raises:
        ValueError: if one cannot be made, or a folder holds a run of other settings.
    """
    for _, those in itertools.groupby(groups, key=lambda group: group.runs[0].env_id):
        with contextlib.ExitStack() as stack:
            envs: dict[str, Any] = {}
            for group in those:
                run = group.runs[0]
                warp = run.warp_solver, run.warp_contacts, run.warp_constraints
                key = json.dumps([run.n_envs, run.backend, run.env_kwargs, warp])
                try:
                    if key not in envs:
                        envs[key] = stack.enter_context(contextlib.closing(make_env(run, run.seed)))
                    config = made_of(AGENTS[run.agent].config, run.config)
                    make_agent(dataclasses.replace(run, device="cpu"), envs[key], config, {*spec.settings, *spec.grid})
                except ValueError as error:
                    raise ValueError(f"{spec.path}: {group.name}: {error}") from error
    for group in groups:
        for run in group.runs:
            _check_folder(group.run_folder(run), run)


def _check_folder(folder: Path, run: RunSettings) -> None:
    """Refuse a folder that holds a run of other settings; more steps than it was begun for are fine."""
    if not (folder / "config.json").exists():
        return
    there, wanted = (dataclasses.asdict(each) for each in (read_settings(folder), _as_read(run)))
    if all(each["checkpoint_interval"] == default_interval(each["total_timesteps"]) for each in (there, wanted)):
        del wanted["checkpoint_interval"]  # nobody chose it
    for before, now in ((there, wanted), (there.pop("config"), wanted.pop("config"))):
        for name, value in now.items():
            if name in before and before[name] != value and not (
                name == "total_timesteps" and before[name] < value
            ):  # fmt: skip
                raise ValueError(
                    f"{folder} holds a run with {name} {before[name]}, the sweep says {value}; move it away, or choose "
                    "another folder"
                )


def begin(group: Planned) -> None:
    """Make the folders of a group's runs, where they are not there yet.

    Raises:
        ValueError: if one holds a run of other settings.
    """
    group.folder.mkdir(parents=True, exist_ok=True)
    with exclusively(group.folder / "begin.lock"):  # the same command may begin on another machine
        for run in group.runs:
            folder = group.run_folder(run)
            folder.mkdir(exist_ok=True)
            _check_folder(folder, run)
            if not (folder / "config.json").exists():
                write_settings(folder, run)
        file, names = group.folder / GROUP_FILE, [f"s{run.seed}" for run in group.runs]
        if not file.exists() or not set(names) <= {folder.name for folder in members(group.folder)}:
            others = sorted(path.parent.name for path in group.folder.glob("s*/config.json"))
            write_json(file, {"runs": [*names, *(name for name in others if name not in names)]})


def _as_read(run: RunSettings) -> RunSettings:
    """Settings as they are read again: tuples as lists."""
    return RunSettings(**json.loads(json.dumps(dataclasses.asdict(run))))


def _text(value: Any) -> str:
    return "x".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _folder_name(name: str) -> str:
    """A name for a folder; where characters have to go, a digest of all of it keeps two names apart."""
    plain = re.sub(r"[^\w.,=+-]", "_", name)[:_LONGEST]
    return plain if plain == name else f"{plain}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
