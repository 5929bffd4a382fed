"""Tasks of dm_control with their observations as one vector: some are scalars, which agents do not take.

pip install shimmy dm_control==1.0.41          # the release that goes with MuJoCo 3.8.1
python benchmarks/learning.py --envs dm_tasks:dm/cheetah-run-v0 dm_tasks:dm/walker-walk-v0 ...
"""

from __future__ import annotations

from typing import Any

import gymnasium
from gymnasium.wrappers import FlattenObservation

TASKS = ("cheetah-run", "walker-walk", "finger-spin", "cartpole-swingup", "reacher-easy", "hopper-hop")


def make(task: str, **options: Any) -> gymnasium.Env[Any, Any]:
    """The task, 1,000 steps an episode, rewards in [0, 1] a step."""
    import shimmy  # noqa: F401  # registers them

    return FlattenObservation(gymnasium.make(f"dm_control/{task}-v0", **options))


for _task in TASKS:
    gymnasium.register(f"dm/{_task}-v0", entry_point="dm_tasks:make", kwargs={"task": _task})
