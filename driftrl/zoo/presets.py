"""The agents' presets in rl_zoo3's form, a dictionary by environment id."""

from __future__ import annotations

from typing import Any

from ..agents.registry import AGENTS

_STEPS = 1_000_000
"""As `train.py`, where a preset says nothing."""
_DICTIONARY = ("PointMaze", "driftrl/PointMaze")
"""Environments whose observations are a dictionary begin with one of these."""


def zoo_hyperparameters(agent: str) -> dict[str, dict[str, Any]]:
    """The hyperparameters of an agent's first preset by environment id, and those of other ids as "default"."""
    spec = AGENTS[agent]
    name = next(iter(spec.presets))
    found = {env: _entry(env, fields) for env, fields in spec.presets[name].items()}
    return found | {"default": _entry("", spec.default_presets[name])}


def _entry(env: str, preset: Any) -> dict[str, Any]:
    fields = {name: list(value) if isinstance(value, tuple) else value for name, value in preset.items()}
    steps = fields.pop("total_timesteps", _STEPS)
    policy = "MultiInputPolicy" if env.startswith(_DICTIONARY) else "MlpPolicy"
    return {"n_timesteps": steps, "policy": policy, **fields}
