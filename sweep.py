"""Train the runs of a sweep: `python sweep.py SPEC.yaml`. The command itself is driftrl/commands/sweep.py."""

import sys

from driftrl.commands.sweep import main

if __name__ == "__main__":
    sys.exit(main())
