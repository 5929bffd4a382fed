"""Evaluate a saved policy: `python evaluate.py RUN`. The command itself is driftrl/commands/evaluate.py."""

import sys

from driftrl.commands.evaluate import main

if __name__ == "__main__":
    sys.exit(main())
