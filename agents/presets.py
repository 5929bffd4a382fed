"""Tuned settings by environment id: data, applied by `train.py` and printed at its start."""

from __future__ import annotations

from typing import Any

# n_envs belongs to the training run; everything else is a field of PolicyFlowConfig.
DEFAULT: dict[str, Any] = {"n_envs": 16, "n_steps": 128, "batch_size": 256}

POLICYFLOW: dict[str, dict[str, Any]] = {
    "HalfCheetah-v5": {"n_envs": 16, "n_steps": 128, "batch_size": 256, "gamma": 0.98, "gae_lambda": 0.92},
}
