"""PolicyFlow's maze: Gymnasium-Robotics' ``PointMaze_Medium_Diverse_GDense-v3`` with the paper's reward.

Needs the extra `maze`. The observation is a Dict: "observation" (position and velocity, [4]), "desired_goal" and
"achieved_goal" (the position again), each [2], in metres.
"""

from __future__ import annotations

import os
from typing import Any, Literal, cast

from gymnasium.utils import EzPickle
from gymnasium_robotics.envs.maze.maps import MEDIUM_MAZE_DIVERSE_G
from gymnasium_robotics.envs.maze.point_maze import PointMazeEnv

_SCALES = {"paper": 0.1, "dense": 1.0}


class PointMazeMedium(PointMazeEnv):  # type: ignore[misc]  # Gymnasium-Robotics has no types
    """A ball that is pushed through a maze of 26 free cells to one of three goals, for 600 steps.

    The task is continuing: a ball at its goal stays there and earns on. ``info["is_success"]`` tells whether it is
    within 0.45 m of its goal.

    Args:
        reward: "paper" for ``0.1 exp(-distance)``, as PolicyFlow's paper has it (Yang, Liu, Chen 2026, arXiv
            2602.01156); "dense" for ``exp(-distance)``, as Gymnasium-Robotics has it. Distance to the goal in metres.
        render_mode: as in Gymnasium-Robotics.

    Raises:
        ValueError: if reward is another.
    """

    def __init__(self, reward: Literal["paper", "dense"] = "paper", render_mode: str | None = None) -> None:
        if reward not in _SCALES:
            raise ValueError(f"reward: got {reward!r}, expected {' or '.join(_SCALES)}")
        self._scale = _SCALES[reward]
        super().__init__(MEDIUM_MAZE_DIVERSE_G, render_mode, reward_type="dense", continuing_task=True)
        os.unlink(self.tmp_xml_file_path)  # the model is loaded; Gymnasium-Robotics would leave a file per environment
        EzPickle.__init__(self, reward, render_mode)  # the parent noted its own arguments

    def compute_reward(self, achieved_goal: Any, desired_goal: Any, info: dict[str, Any]) -> Any:
        """Reward of positions [..., 2] with goals [..., 2]."""
        return self._scale * super().compute_reward(achieved_goal, desired_goal, info)

    def step(self, action: Any) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        """Push by an action [2] in [-1, 1] for 0.01 s."""
        obs, reward, terminated, truncated, info = super().step(action)
        return cast(dict[str, Any], obs), float(reward), terminated, truncated, info | {"is_success": info["success"]}
