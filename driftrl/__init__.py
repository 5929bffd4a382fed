"""Reinforcement-learning agents with flow policies.

The import registers the environments ``driftrl/...`` with Gymnasium. The agents load on first use: ``driftrl.dynamics``
alone needs neither Stable-Baselines3 nor MuJoCo.

In a checkout the packages agents, dynamics and envs lie beside this folder, which holds symbolic links to them. Where
those are plain files (a zip download, Windows, ``git -c core.symlinks=false``), the lines below find the packages.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import gymnasium

__version__ = "0.1.0.dev0"

_folder = Path(__file__).resolve().parent
if not (_folder / "agents").is_dir():
    __path__.append(str(_folder.parent))

__all__ = ["LipschitzMBPO", "LipschitzMBPOConfig", "PolicyFlow", "PolicyFlowConfig", "__version__"]

gymnasium.register("driftrl/MultiGoal-v0", "driftrl.envs.multigoal:MultiGoalEnv", max_episode_steps=50)
gymnasium.register("driftrl/SoftMultiGoal-v0", "driftrl.envs.multigoal:SoftMultiGoalEnv", max_episode_steps=30)
gymnasium.register("driftrl/Avoid-v0", "driftrl.envs.avoid:AvoidEnv", max_episode_steps=50)
gymnasium.register("driftrl/PointMazeMedium-v0", "driftrl.envs.point_maze:PointMazeMedium", max_episode_steps=600)

if TYPE_CHECKING:
    from .agents.lipschitz_mbpo import LipschitzMBPO, LipschitzMBPOConfig
    from .agents.policyflow import PolicyFlow, PolicyFlowConfig
else:  # out of a type checker's sight, for which a module-level __getattr__ would make every name valid

    def __getattr__(name: str) -> object:
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from .agents.lipschitz_mbpo import algorithm as lipschitz_mbpo
        from .agents.policyflow import algorithm as policyflow

        return getattr(policyflow if name.startswith("PolicyFlow") else lipschitz_mbpo, name)

    def __dir__() -> list[str]:
        return sorted(__all__)
