"""The maze's script: it reaches its goals by several routes, fails as often as asked, and shows what the task does."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

pytest.importorskip("gymnasium_robotics", reason="needs the extra maze")

from driftrl.envs.episodes import Episode
from driftrl.envs.maze_demonstrations import MAZE, Cell, maze_demonstrations, route

from .courses import assert_course


def distances(episode: Episode) -> np.ndarray:
    assert isinstance(episode.observations, dict)
    ways = episode.observations["achieved_goal"] - episode.observations["desired_goal"]
    way: np.ndarray = np.linalg.norm(ways, axis=1)
    return way


def test_the_script_reaches_its_goal_and_others_as_often_as_asked() -> None:
    assert all(distances(each)[-1] < 0.1 for each in maze_demonstrations(12, 0))
    half = [distances(each)[-1] < 0.1 for each in maze_demonstrations(12, 0, success=0.5)]
    assert sum(half) == 6
    for failed in maze_demonstrations(4, 1, success=0.0):  # it stands at another goal, not somewhere
        assert isinstance(failed.observations, dict)
        assert distances(failed)[-1] > 1 and np.abs(failed.observations["observation"][-1, 2:]).max() < 0.1


def test_demonstrations_are_courses_of_the_environment() -> None:
    assert_course(MAZE, maze_demonstrations(1, 3)[0], 3, 600)


def test_routes_are_ways_through_free_cells_and_differ() -> None:
    ring = {(row, column) for row in range(4) for column in range(4)} - {(1, 1), (1, 2), (2, 1), (2, 2)}
    found = [route(ring, (0, 0), (3, 3), np.random.default_rng(seed)) for seed in range(40)]
    for cells in found:
        assert cells[0] == (0, 0) and cells[-1] == (3, 3) and len(cells) == len(set(cells)) == 7
        assert set(cells) <= ring
        assert all(abs(a[0] - b[0]) + abs(a[1] - b[1]) == 1 for a, b in pairwise(cells))
    by_the_left = sum((3, 0) in cells for cells in found)
    assert 10 <= by_the_left <= 30
    alone: set[Cell] = {(0, 0)}
    assert route(alone, (0, 0), (0, 0), np.random.default_rng(0)) == [(0, 0)]


def test_the_same_seed_gives_the_same_demonstrations() -> None:
    first, again, other = (maze_demonstrations(1, seed)[0].actions for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    with pytest.raises(ValueError, match=r"success: got 1\.5"):
        maze_demonstrations(1, 0, success=1.5)
