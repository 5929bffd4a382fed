"""Folders to share an agent by, as `evaluate.py RUN --hub FOLDER` writes them; they are no runs."""

from __future__ import annotations

from pathlib import Path

AGENT, VIDEO = "agent.zip", "replay.mp4"
FILES = (AGENT, "config.json", "results.json", "README.md", VIDEO)
"""All that such a folder holds when it is written; a download of it may hold more."""


def is_shared(folder: Path) -> bool:
    """Whether a folder is one of these, written or downloaded."""
    return (folder / AGENT).is_file() and (folder / "config.json").is_file()
