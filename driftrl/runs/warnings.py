"""Warnings to the user of a run."""

from __future__ import annotations

import sys

from tqdm import tqdm


def warn(text: str) -> None:
    """Tell the user, beside a progress bar."""
    tqdm.write(f"warning: {text}", file=sys.stderr)
