"""Scripted demonstrations of `driftrl/PointMazeMedium-v0`: from waypoint to waypoint, by different routes.

The script plans in the grid of cells and then looks at the observation alone. Where the maze has loops, routes differ
from episode to episode, also between the same start and goal. An episode that shall fail goes to another of the three
goals: so data of half-good demonstrations show, in equal shares, the goal that is asked for and others.

Needs the extra `maze` (Gymnasium-Robotics).
"""

from __future__ import annotations

import heapq
from typing import Any

import gymnasium
import numpy as np

from .episodes import Array, Episode, play, scripted

MAZE = "driftrl/PointMazeMedium-v0"
Cell = tuple[int, int]
"""Row and column."""
STIFFNESS, DAMPING, REACHED = 6.0, 2.0, 0.35
"""Action per metre of way to the next waypoint, per m/s of velocity, and how near one must come to it, in metres."""


def route(free: set[Cell], start: Cell, goal: Cell, rng: np.random.Generator) -> list[Cell]:
    """Cells from start to goal: the shortest way where each step has a random length between 1 and 2."""
    best, before, reached = {start: 0.0}, dict[Cell, Cell](), [(0.0, start)]
    while reached:
        length, cell = heapq.heappop(reached)
        if cell == goal:
            break
        row, column = cell
        for after in ((row + 1, column), (row - 1, column), (row, column + 1), (row, column - 1)):
            further = length + rng.uniform(1, 2)
            if after in free and further < best.get(after, np.inf):
                best[after], before[after] = further, cell
                heapq.heappush(reached, (further, after))
    cells = [goal]
    while cells[-1] != start:
        cells.append(before[cells[-1]])
    return cells[::-1]


def maze_demonstrations(episodes: int, seed: int, *, success: float = 1.0, noise: float = 0.1) -> list[Episode]:
    """Play the script.

    Args:
        episodes: how many, at least 1.
        seed: of starts, goals, routes and noise.
        success: share of the episodes that go to their goal, in [0, 1].
        noise: standard deviation of the actions' noise, at least 0.

    Raises:
        ValueError: if an argument is outside its range.
    """
    return scripted(MAZE, episodes, seed, success, noise, _episode)


def _episode(env: gymnasium.Env[Any, Any], good: bool, noise: float, rng: np.random.Generator) -> Episode:
    obs, _ = env.reset(seed=int(rng.integers(2**31)))
    maze = env.unwrapped.maze  # type: ignore[attr-defined]
    free = {
        (int(row), int(column)) for row, column in np.argwhere([[cell != 1 for cell in row] for row in maze.maze_map])
    }

    def cell(position: Array) -> Cell:
        row, column = maze.cell_xy_to_rowcol(position)
        return int(row), int(column)

    end = obs["desired_goal"]
    if not good:
        others = [each for each in maze.unique_goal_locations if cell(each) != cell(end)]
        end = others[int(rng.integers(len(others)))]
    cells = route(free, cell(obs["achieved_goal"]), cell(end), rng)
    waypoints = [*(maze.cell_rowcol_to_xy(np.array(each)) for each in cells[1:-1]), end]

    def act(seen: dict[str, Array]) -> Array:
        position, velocity = seen["observation"][:2], seen["observation"][2:]
        if len(waypoints) > 1 and np.linalg.norm(waypoints[0] - position) < REACHED:
            waypoints.pop(0)
        steered: Array = STIFFNESS * (waypoints[0] - position) - DAMPING * velocity
        return steered + noise * rng.standard_normal(2)

    return play(env, obs, act)
