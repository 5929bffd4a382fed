"""Scripted demonstrations of `driftrl/Avoid-v0`: all routes in equal shares, some of the episodes failures on purpose.

The script steers at full speed from waypoint to waypoint, with normal noise on the actions. An episode that shall fail
takes the obstacle beside its gap of the second row for the gap. So data of half-good demonstrations show, in equal
shares, where to go and where not to go.
"""

from __future__ import annotations

import numpy as np

from .avoid import Avoid
from .episodes import Array, Episode, check_script, good_episodes


def avoid_demonstrations(episodes: int, seed: int, *, success: float = 1.0, noise: float = 0.1) -> list[Episode]:
    """Play the script.

    Args:
        episodes: how many, at least 1; routes take turns, so a multiple of 6 has them in equal shares.
        seed: of starts and noise.
        success: share of the episodes that aim at a gap of the second row, in [0, 1]; the others aim at an obstacle.
        noise: standard deviation of the actions' noise, at least 0.

    Raises:
        ValueError: if an argument is outside its range.
    """
    check_script(episodes, success, noise)
    task, rng = Avoid(), np.random.default_rng(seed)
    good = good_episodes(episodes, success, task.n_routes)  # each route has its share of failures
    return [_episode(task, i % task.n_routes, bool(good[i]), noise, rng) for i in range(episodes)]


def _episode(task: Avoid, route: int, good: bool, noise: float, rng: np.random.Generator) -> Episode:
    """One episode along a route; the script does not look at where obstacles are, only at its waypoints."""
    state, waypoints = task.draw_start(rng), _waypoints(task, route, good, rng)
    observations, actions, rewards, ends = [state.astype(np.float32)], [], [], []
    for _ in range(task.steps):
        while len(waypoints) > 1 and state[1] >= waypoints[0][1]:
            waypoints.pop(0)
        direction = waypoints[0] - state[:2]
        action = direction / np.sqrt(np.square(direction).sum()) + noise * rng.standard_normal(2)
        action = action.clip(-1, 1).astype(np.float32)
        moved, reward, terminated = task.step(state[None], action[None].astype(np.float64))
        state = moved[0]
        observations.append(state.astype(np.float32))
        actions.append(action)
        rewards.append(float(reward[0]))
        ends.append(bool(terminated[0]))
        if ends[-1]:
            break
    truncated_at = np.zeros(len(ends), dtype=bool)
    truncated_at[-1] = not ends[-1]
    return Episode(np.stack(observations), np.stack(actions), np.array(rewards), np.array(ends), truncated_at)


def _waypoints(task: Avoid, route: int, good: bool, rng: np.random.Generator) -> list[Array]:
    """Points to steer for: through the middle of each gap, then straight up."""
    (first_y, _), (second_y, obstacles) = task.rows
    first, second = (-0.55, 0.55)[route // 3], (-0.85, 0.0, 0.85)[route % 3]
    if not good:  # the obstacle beside the gap; the middle gap has two
        beside = [x for x in obstacles if abs(x - second) < 0.5]
        second = beside[int(rng.integers(len(beside)))]
    ways = [(first, first_y), (first, first_y + 0.2), (second, second_y - 0.25), (second, second_y)]
    return [np.array(point) for point in (*ways, (second, task.goal_y + 0.5))]
