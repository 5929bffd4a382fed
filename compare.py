"""Compare runs: `python compare.py runs --html report.html`. The command itself is driftrl/commands/compare.py."""

import sys

from driftrl.commands.compare import main

if __name__ == "__main__":
    sys.exit(main())
