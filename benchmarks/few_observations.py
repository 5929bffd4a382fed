"""Ant-v5 and Humanoid-v5 with the observations that model-based papers use, without contact forces and inertias.

python benchmarks/learning.py --envs few_observations:Ant27-v5 --arms policyflow:presets_of=Ant-v5 ...
"""

from __future__ import annotations

import gymnasium
from learning_arms import OBSERVATIONS

for _task, _kwargs in OBSERVATIONS.items():
    _name, _observations = {"Ant-v5": ("Ant", 27), "Humanoid-v5": ("Humanoid", 45)}[_task]
    gymnasium.register(
        f"{_name}{_observations}-v5",
        entry_point=gymnasium.spec(_task).entry_point,
        max_episode_steps=gymnasium.spec(_task).max_episode_steps,
        kwargs=_kwargs,
    )
