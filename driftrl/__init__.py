"""Reinforcement-learning agents with flow policies.

The agents load on first use: ``driftrl.dynamics`` alone needs neither Gymnasium nor Stable-Baselines3.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

__version__ = "0.1.0.dev0"

__all__ = ["LipschitzMBPO", "LipschitzMBPOConfig", "PolicyFlow", "PolicyFlowConfig", "__version__"]

if TYPE_CHECKING:
    from .agents.lipschitz_mbpo import LipschitzMBPO, LipschitzMBPOConfig
    from .agents.policyflow import PolicyFlow, PolicyFlowConfig
else:  # out of a type checker's sight, for which a module-level __getattr__ would make every name valid

    def __getattr__(name: str) -> object:
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from .agents import lipschitz_mbpo, policyflow

        return getattr(policyflow if name.startswith("PolicyFlow") else lipschitz_mbpo, name)
