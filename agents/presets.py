"""Settings by environment id: data, applied by `train.py` and printed at its start.

n_envs belongs to the training run; everything else is a field of PolicyFlowConfig. An id's entry replaces DEFAULT.
HalfCheetah-v5 and Hopper-v5 were tuned; docs/policyflow.md has the measurements. The others start from them and adapt
what the task is known to need (discount, rollout size).
"""

from __future__ import annotations

from typing import Any

# Many environments for few steps: cheaper than 16 x 128, and it learns as well (docs/policyflow.md).
DEFAULT: dict[str, Any] = {"n_envs": 64, "n_steps": 32, "batch_size": 256}
WIDE: dict[str, Any] = {"actor_hidden": (128, 128), "critic_hidden": (128, 128)}

POLICYFLOW: dict[str, dict[str, Any]] = {
    "HalfCheetah-v5": DEFAULT | WIDE | {"gamma": 0.98, "gae_lambda": 0.92, "ema_decay": 0.995, "desired_kl": 0.02},
    "Hopper-v5": DEFAULT | WIDE | {"ema_decay": 0.995, "clip_range_vf": None},
    "Walker2d-v5": DEFAULT | WIDE | {"ema_decay": 0.995, "clip_range_vf": None},
    "Ant-v5": DEFAULT | WIDE | {"gamma": 0.98, "gae_lambda": 0.92, "ema_decay": 0.995},
    "Humanoid-v5": DEFAULT | WIDE | {"n_steps": 64, "batch_size": 512, "gamma": 0.98, "gae_lambda": 0.92},
    # Small rollouts: episodes are short at first and the task is learned within tens of thousands of steps.
    "InvertedPendulum-v5": {"n_envs": 8, "n_steps": 64, "batch_size": 128},
    # A discount near 1: with 0.99 the swimmer never learns the slow stroke that pays.
    "Swimmer-v5": DEFAULT | {"n_envs": 4, "n_steps": 1024, "gamma": 0.9999, "gae_lambda": 0.98},
    # Reaching takes a dozen of the 50 steps.
    "Reacher-v5": DEFAULT | {"gamma": 0.9},
}
