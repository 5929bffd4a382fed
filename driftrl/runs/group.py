"""Groups: runs that differ in their seed only, in one folder that is trained, resumed and evaluated as a whole.

A group lies in ``<root>/<env>/<agent>/<time>-group/``: group.json names its runs, s0/, s1/ and so on, one per seed.
Each of them is a run folder, which has its config.json from the beginning, and output.log, what the run printed.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Sequence
from pathlib import Path

from ..agents.storage.files import write_json
from .folder import RunSettings, has_saved, is_complete, new_folder, read_settings, write_settings
from .kinds import GROUP_FILE, is_group, is_shared, walk
from .results import read_results


def is_member(folder: Path) -> bool:
    """Whether a folder is that of a run of a group, which may not have begun yet."""
    return is_group(folder.resolve().parent) and (folder / "config.json").is_file()


def members(group: Path) -> list[Path]:
    """The folders of a group's runs, in the order of the seeds as they were given.

    Raises:
        ValueError: if group.json is damaged.
    """
    try:
        names = json.loads((group / GROUP_FILE).read_text())["runs"]
        if not names or len(set(names)) < len(names) or any(Path(name).name != name for name in names):
            raise ValueError("no folders, each once")
        return [group / name for name in names]
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"unreadable group: {group / GROUP_FILE} is damaged; restore it") from error


def record_demonstrations(folder: Path, digest: str) -> None:
    """Note in a run's config.json what it learns from; a run that was begun without such a note goes on with any.

    Args:
        folder: of the run.
        digest: of the demonstrations.

    Raises:
        ValueError: if it, or another run of its group, was begun with other demonstrations.
    """
    data = json.loads((folder / "config.json").read_text())
    others = [run for run in members(folder.parent) if (run / "config.json").is_file()] if is_member(folder) else []
    for run in dict.fromkeys((folder, *others)):
        known = json.loads((run / "config.json").read_text()).get("demonstrations_digest", digest)
        if known != digest:
            raise ValueError(
                f"demonstrations: got {data['demonstrations']} with digest {digest[:12]}, expected {known[:12]}, with "
                f"which {run} was begun; restore the data set, or begin a new run"
            )
    write_json(folder / "config.json", {**data, "demonstrations_digest": digest})


def runs_in(folder: Path) -> list[Path]:
    """The runs of a group, or those of a folder of runs and groups (`runs/Hopper-v5`), however deep.

    Single runs that have saved nothing are left out: they have just begun. What is neither, a run or a saved file say,
    is returned as it is.

    Raises:
        ValueError: if a group.json is damaged.
    """
    if is_group(folder):
        return members(folder)
    if not folder.is_dir() or (folder / "config.json").exists():
        return [folder]
    found: dict[Path, Path] = {}  # by where it lies: a link and its run are one
    for run in sorted(path for path, _, files in walk(folder) if "config.json" in files):
        if is_group(run.parent):
            found |= {member.resolve(): member for member in members(run.parent)}
        elif has_saved(run) and not is_shared(run):
            found.setdefault(run.resolve(), run)
    return list(found.values()) or [folder]


def new_group(root: Path, runs: Sequence[RunSettings]) -> Path:
    """Make the folder of a new group, with the folders of its runs, each with its config.json."""
    group = new_folder(_parent(root, runs[0]) / f"{time.strftime('%Y%m%d-%H%M%S')}-group")
    for run in runs:
        (group / f"s{run.seed}").mkdir()
        write_settings(group / f"s{run.seed}", run)
    write_json(group / GROUP_FILE, {"runs": [f"s{run.seed}" for run in runs]})  # last: what is half made is no group
    return group


def incomplete_group(root: Path, runs: Sequence[RunSettings]) -> Path | None:
    """The newest group of just these runs that are not all complete, None if there is none."""
    wanted = [_plain(run) for run in runs]
    for file in sorted(_parent(root, runs[0]).glob(f"*/{GROUP_FILE}"), reverse=True):
        folders = members(file.parent)
        if not all(map(is_trained, folders)) and [_plain(read_settings(each)) for each in folders] == wanted:
            return file.parent
    return None


def is_trained(folder: Path, total_timesteps: int | None = None) -> bool:
    """Whether a run has come to its end, or to that of so many steps."""
    if not is_complete(folder):
        return False
    results = read_results(folder)
    return results is not None and bool(
        results["timesteps"] >= (total_timesteps or read_settings(folder).total_timesteps)
    )


def _parent(root: Path, settings: RunSettings) -> Path:
    return root / settings.folder_name / settings.agent


def _plain(settings: RunSettings) -> object:
    """Settings as they are read again."""
    return json.loads(json.dumps(dataclasses.asdict(settings)))
