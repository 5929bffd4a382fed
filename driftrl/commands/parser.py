"""What the commands share: a parser whose errors are one line."""

from __future__ import annotations

import argparse
import sys
from typing import NoReturn


class Parser(argparse.ArgumentParser):
    """An argument parser that raises ValueError, for a one-line error in place of its usage."""

    def error(self, message: str) -> NoReturn:
        """Raise what argparse would print."""
        raise ValueError(f"{message}; see {self.prog} --help")


def fail(error: Exception) -> int:
    """Print an error in one line to stderr and return the exit code of bad input."""
    print("error:", " ".join(str(error).split()), file=sys.stderr)
    return 2
