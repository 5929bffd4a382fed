"""Reinforcement-learning agents with flow policies.

The agents load on first use: ``driftrl.dynamics`` alone needs neither Gymnasium nor Stable-Baselines3.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

__version__ = "0.1.0.dev0"

__all__ = ["PolicyFlow", "PolicyFlowConfig", "__version__"]

if TYPE_CHECKING:
    from .agents.policyflow import PolicyFlow, PolicyFlowConfig
else:  # out of a type checker's sight, for which a module-level __getattr__ would make every name valid

    def __getattr__(name: str) -> object:
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from .agents import policyflow

        return getattr(policyflow, name)
