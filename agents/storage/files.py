"""Files that are whole or not there, whatever ends the program or the power."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def all_or_nothing(path: Path) -> Iterator[Path]:
    """A temporary name to write under, which becomes `path` at the end and goes away if the block fails.

    The file is on the disk before it gets its name, and the name when the block ends: a power failure loses neither.
    """
    partial = path.with_name(path.name + ".part")
    try:
        yield partial
        _to_disk(partial)
        partial.replace(path)
        _to_disk(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def _to_disk(path: Path) -> None:
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def write_json(path: Path, data: object) -> None:
    """Write JSON, all or nothing; a ValueError if a number is not finite, which JSON cannot express."""
    text = json.dumps(data, indent=2, allow_nan=False)
    with all_or_nothing(path) as partial:
        partial.write_text(text + "\n")
