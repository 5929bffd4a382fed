"""What tells folders apart, without loading torch: groups of runs, and folders to share an agent by."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

GROUP_FILE = "group.json"
"""What makes a folder that of a group."""
RESULTS = "eval.json"
"""The evaluation of a run after training."""
AGENT, VIDEO = "agent.zip", "replay.mp4"
SHARED_FILES = (AGENT, "config.json", "results.json", "README.md", VIDEO)
"""All that `evaluate.py RUN --hub FOLDER` writes; a download may hold more."""


def is_group(folder: Path) -> bool:
    """Whether a folder is a group's."""
    return (folder / GROUP_FILE).is_file()


def is_shared(folder: Path) -> bool:
    """Whether a folder is one to share an agent by, written or downloaded; it is no run."""
    return (folder / AGENT).is_file() and (folder / "config.json").is_file()


def walk(place: Path) -> Iterator[tuple[Path, list[str], list[str]]]:
    """`os.walk`, by name, which follows links to folders and sees each folder once."""
    seen = set[str]()
    for path, folders, files in os.walk(place, followlinks=True):
        real = os.path.realpath(path)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders.sort()
        yield Path(path), folders, files
