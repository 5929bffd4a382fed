"""rl_zoo3 with DriftRL's agents: `python -m driftrl.zoo train --algo policyflow --env Hopper-v5`."""
