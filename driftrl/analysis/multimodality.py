"""Several solutions in numbers: which goals or routes a policy takes from one start, which cells of a maze it visits.

`multimodality` plays trajectories on the tasks that have several solutions (the `GOAL_TASKS`, Avoid and
Gymnasium-Robotics' PointMaze) and measures them; docs/multimodal.md has the formulas.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from stable_baselines3.common.type_aliases import PolicyPredictor
from stable_baselines3.common.vec_env import VecEnv

from ..agents.common.observations import batch_of_one
from ..envs.avoid import AVOID, Avoid, AvoidEnv
from ..envs.make import make_vec
from ..envs.multigoal import GOAL_TASKS

GOAL_TRAJECTORIES = 1000
MAZE_TRAJECTORIES = 20
_FOUND = 0.01  # share of the trajectories that must end at a goal for it to count as found


@dataclass(frozen=True)
class Trajectories:
    """N trajectories of at most T steps.

    Args:
        positions: where they are before the first step and after each, [T + 1, N, 2]; once ended, where they ended.
        returns: undiscounted sums of rewards, [N].
        lengths: steps until they ended or were cut off, [N].
    """

    positions: NDArray[Any]
    returns: NDArray[Any]
    lengths: NDArray[Any]


def play(policy: PolicyPredictor, env: VecEnv, steps: int, *, deterministic: bool) -> Trajectories:
    """One trajectory in each environment, of at most `steps` steps.

    The position is the observation's "achieved_goal", or its first two entries.
    """
    obs = env.reset()
    positions, alive = [_position(obs)], np.ones(env.num_envs, dtype=bool)
    returns, lengths = np.zeros(env.num_envs), np.zeros(env.num_envs, dtype=np.int64)
    state, starts = None, np.ones(env.num_envs, dtype=bool)
    for _ in range(steps):
        actions, state = policy.predict(obs, state, starts, deterministic=deterministic)  # type: ignore[arg-type]
        obs, rewards, dones, infos = env.step(actions)
        starts = dones
        reached = _position(obs)
        for i in np.flatnonzero(dones).tolist():
            reached[i] = _position(batch_of_one(infos[i]["terminal_observation"]))[0]
        positions.append(np.where(alive[:, None], reached, positions[-1]))
        returns += alive * rewards
        lengths += alive
        alive &= ~dones
    return Trajectories(np.stack(positions), returns, lengths)


def _position(obs: Any) -> NDArray[Any]:
    """Positions [N, 2] of a batch of observations."""
    position: NDArray[Any] = obs["achieved_goal"] if isinstance(obs, dict) else obs[:, :2]
    return position.copy()


def entropy_bits(counts: ArrayLike) -> float:
    """Entropy ``-sum_i p_i log2 p_i`` of the histogram p = counts / sum(counts), in bits; 0 of an empty one."""
    counts = np.asarray(counts, dtype=np.float64)
    p = counts[counts > 0] / max(counts.sum(), 1)
    return float(-(p * np.log2(p)).sum() + 0.0)  # no -0.0


def goal_metrics(distances: NDArray[Any], radius: float) -> dict[str, Any]:
    """How trajectories are spread over goals.

    Args:
        distances: from the end of each trajectory to each goal, [N, G].
        radius: a trajectory reaches the nearest goal if it ends closer than this.

    Returns:
        "reached": share of the trajectories that reach a goal. "fractions": share that reaches each goal, [G].
        "goals_found": number of goals that at least 1 % reach. "entropy_bits": entropy of the goals reached,
        of at most "entropy_bits_max" = log2 G.
    """
    reached = distances.min(axis=1) < radius
    counts = np.bincount(distances.argmin(axis=1)[reached], minlength=distances.shape[1])
    fractions = counts / len(distances)
    return {
        "reached": float(reached.mean()),
        "goals_found": int((fractions >= _FOUND).sum()),
        "entropy_bits": entropy_bits(counts),
        "entropy_bits_max": float(np.log2(distances.shape[1])),
        "fractions": fractions.tolist(),
    }


def route_metrics(routes: NDArray[Any], n_routes: int) -> dict[str, Any]:
    """How trajectories are spread over routes.

    Args:
        routes: the route of each trajectory, -1 where it fails, [N].
        n_routes: number of routes.

    Returns:
        "success": share of the trajectories that take a route to its end. "fractions": share of each route,
        [n_routes]. "routes_found": number of routes that at least 1 % take. "entropy_bits": entropy of the routes of
        those that succeed, of at most "entropy_bits_max" = log2 n_routes.
    """
    counts = np.bincount(routes[routes >= 0], minlength=n_routes)
    fractions = counts / len(routes)
    return {
        "success": float((routes >= 0).mean()),
        "routes_found": int((fractions >= _FOUND).sum()),
        "entropy_bits": entropy_bits(counts),
        "entropy_bits_max": float(np.log2(n_routes)),
        "fractions": fractions.tolist(),
    }


def visit_metrics(visits: NDArray[Any], free: NDArray[Any]) -> dict[str, Any]:
    """How visits are spread over the cells of a maze.

    Args:
        visits: number of steps that ended in each cell, [rows, columns].
        free: which cells are no walls, [rows, columns].

    Returns:
        "cells_visited": share of the free cells that were visited. "entropy_bits": entropy of the visits to free cells,
        of at most "entropy_bits_max" = log2 of the number of free cells, "free_cells". "visits": as given.
    """
    counts = visits[free]
    return {
        "free_cells": len(counts),
        "cells_visited": float((counts > 0).mean()),
        "entropy_bits": entropy_bits(counts),
        "entropy_bits_max": float(np.log2(len(counts))),
        "visits": visits.tolist(),
    }


def count_visits(positions: NDArray[Any], maze: Any) -> NDArray[np.int64]:
    """Number of positions [M, 2] in each cell of a maze of Gymnasium-Robotics, [rows, columns]."""
    rows = np.floor((maze.y_map_center - positions[:, 1]) / maze.maze_size_scaling).astype(int)
    columns = np.floor((positions[:, 0] + maze.x_map_center) / maze.maze_size_scaling).astype(int)
    visits = np.zeros((maze.map_length, maze.map_width), dtype=np.int64)
    np.add.at(visits, (rows, columns), 1)
    return visits


def free_cells(maze: Any) -> NDArray[np.bool_]:
    """Which cells of a maze of Gymnasium-Robotics are no walls, [rows, columns]."""
    return np.array([[cell != 1 for cell in row] for row in maze.maze_map])


def is_maze(env_id: str) -> bool:
    """Whether an id is that of a PointMaze."""
    return env_id.rpartition(":")[2].startswith(("PointMaze_", "driftrl/PointMaze"))


def has_several_solutions(env_id: str) -> bool:
    """Whether `multimodality` can measure a policy on the environment."""
    return env_id in GOAL_TASKS or env_id == AVOID or is_maze(env_id)


def play_from_start(
    policy: PolicyPredictor, env_id: str, env_kwargs: dict[str, Any], start: Sequence[float], number: int, seed: int, *,
    deterministic: bool,
) -> tuple[Trajectories, Any]:  # fmt: skip
    """Trajectories on a task with several solutions, with what describes it: its `GoalTask`, `Avoid`, or the maze.

    On a goal task they begin at rest at `start`, for the task's evaluation_steps; elsewhere where the environment
    says, until the time limit.

    Raises:
        ValueError: if the start is no point of the task.
    """
    task = GOAL_TASKS.get(env_id)
    if task is not None:
        env_kwargs = env_kwargs | {"start": start, "max_episode_steps": task.evaluation_steps}
    with contextlib.closing(make_vec(env_id, number, seed, **env_kwargs)) as env:
        description = task or (AvoidEnv.task if env_id == AVOID else env.get_attr("maze")[0])
        return play(policy, env, env.get_attr("spec")[0].max_episode_steps, deterministic=deterministic), description


def multimodality(
    policy: PolicyPredictor, env_id: str, env_kwargs: dict[str, Any], start: Sequence[float], seed: int, *,
    deterministic: bool,
) -> dict[str, Any]:  # fmt: skip
    """Metrics of a policy on a task with several solutions, and what was played.

    Those of `goal_metrics`, `route_metrics` or `visit_metrics`.

    Args:
        policy: what chooses the actions.
        env_id: Gymnasium id, see `has_several_solutions`.
        env_kwargs: arguments of the environment.
        start: point (x, y) where the trajectories of a goal task begin.
        seed: seed of the environments.
        deterministic: the deterministic actions; otherwise sampled ones.

    Raises:
        ValueError: if the start is no point of the task.
    """
    number = MAZE_TRAJECTORIES if is_maze(env_id) else GOAL_TRAJECTORIES
    played, task = play_from_start(policy, env_id, env_kwargs, start, number, seed, deterministic=deterministic)
    summary = {
        "trajectories": number,
        "steps": len(played.positions) - 1,
        "length_mean": float(played.lengths.mean()),
        "return_mean": float(played.returns.mean()),
        "return_std": float(played.returns.std()),
    }
    if env_id in GOAL_TASKS:
        distances = np.sqrt(task.squared_distances(played.positions[-1]))
        return summary | {"start": list(start), "radius": task.goal_radius} | goal_metrics(distances, task.goal_radius)
    if isinstance(task, Avoid):
        return summary | route_metrics(task.routes(played.positions), task.n_routes)
    return summary | visit_metrics(count_visits(played.positions[1:].reshape(-1, 2), task), free_cells(task))


def format_multimodality(report: dict[str, dict[str, Any]]) -> str:
    """The `multimodality` of each mode of acting as a table."""
    first = next(iter(report.values()))
    played = f"{first['trajectories']} trajectories of up to {first['steps']} steps"
    if "routes_found" in first:
        lines = [f"{'routes':14}{'success':>10}{'found':>10}{'entropy, bits':>18}{'return':>10}  % by each route"]
        end = f"{played}; success: the goal line is reached"
    elif "fractions" in first:
        lines = [f"{'goals':14}{'reached':>10}{'found':>10}{'entropy, bits':>18}{'return':>10}  % at each goal"]
        end = f"{played} from ({first['start'][0]:g}, {first['start'][1]:g}); reached: ends within {first['radius']:g}"
    else:
        lines = [f"{'maze':14}{'cells visited':>20}{'entropy, bits':>18}{'return':>10}"]
        end = f"{played}, all together"
    for mode, row in report.items():
        entropy = f"{row['entropy_bits']:.2f} of {row['entropy_bits_max']:.2f}"
        if "fractions" in row:
            found = f"{row.get('goals_found', row.get('routes_found'))} of {len(row['fractions'])}"
            shares = " ".join(f"{100 * share:.1f}" for share in row["fractions"])
            reached = row.get("reached", row.get("success"))
            rest = f"{reached:10.1%}{found:>10}{entropy:>18}{row['return_mean']:10.2f}  {shares}"
        else:
            cells = f"{row['cells_visited']:.0%} of {row['free_cells']}"
            rest = f"{cells:>20}{entropy:>18}{row['return_mean']:10.2f}"
        lines.append(f"{mode:14}{rest}")
    return "\n".join([*lines, end])
