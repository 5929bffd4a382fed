"""Train an agent: `python train.py policyflow --env Hopper-v5`. The command itself is driftrl/commands/train.py."""

import sys

from driftrl.commands.train import main

if __name__ == "__main__":
    sys.exit(main())
