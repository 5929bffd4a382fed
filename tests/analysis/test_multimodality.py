import math
from typing import Any

import gymnasium as gym
import numpy as np
import pytest

from driftrl.analysis.multimodality import (
    GOAL_TRAJECTORIES,
    count_visits,
    entropy_bits,
    format_multimodality,
    free_cells,
    goal_metrics,
    has_several_solutions,
    multimodality,
    play,
    route_metrics,
    visit_metrics,
)
from driftrl.envs import make_vec
from driftrl.envs.multigoal import GOAL_TASKS

MULTI, SOFT = "driftrl/MultiGoal-v0", "driftrl/SoftMultiGoal-v0"


class Spread:
    """Steers trajectory i to goal i mod G, or all of them to goal 0 where it is deterministic."""

    def __init__(self, id: str) -> None:
        self.task = GOAL_TASKS[id]

    def predict(self, observation: Any, *args: Any, deterministic: bool = False) -> tuple[np.ndarray, None]:
        goals = self.task.goals
        chosen = goals[(0 if deterministic else 1) * np.arange(len(observation)) % len(goals)]
        pull = chosen - observation[:, :2] - (observation[:, 2:] if observation.shape[1] == 4 else 0)
        high = self.task.action_space.high
        return pull.clip(-high, high), None


class Constant:
    def __init__(self, *action: float) -> None:
        self.action = np.array(action)

    def predict(self, observation: Any, *args: Any, deterministic: bool = False) -> tuple[np.ndarray, None]:
        number = len(observation["observation"] if isinstance(observation, dict) else observation)
        return np.tile(self.action, (number, 1)), None


@pytest.mark.parametrize(
    ("counts", "bits"),
    [([7] * 6, math.log2(6)), ([0, 9, 0], 0.0), ([1, 1, 2], 1.5), ([3, 1], 0.8112781244591328), ([0], 0)],
)
def test_entropy_of_known_histograms(counts: list[int], bits: float) -> None:
    assert entropy_bits(counts) == pytest.approx(bits, abs=1e-15)
    assert math.copysign(1, entropy_bits(counts)) == 1  # no -0.0 in reports


def test_goal_metrics_of_a_hand_made_set() -> None:
    # 200 trajectories and three goals: 100 end at the first, 49 at the second, 1 at the third, 50 nowhere.
    rows = [[0.0, 9, 9]] * 100 + [[5, 0.99, 4]] * 49 + [[3, 3, 0.5]] + [[1.0, 2, 2]] * 50
    metrics = goal_metrics(np.array(rows), radius=1.0)
    assert metrics["reached"] == 0.75
    assert metrics["fractions"] == [0.5, 0.245, 0.005]
    assert metrics["goals_found"] == 2  # half a per cent is not enough
    p = [100 / 150, 49 / 150, 1 / 150]
    assert metrics["entropy_bits"] == pytest.approx(-sum(x * math.log2(x) for x in p), rel=1e-12)
    assert metrics["entropy_bits_max"] == pytest.approx(1.584962500721156)
    assert goal_metrics(np.full((4, 6), 2.0), 1.0)["entropy_bits"] == 0


def test_visit_metrics_of_a_hand_made_map() -> None:
    free = np.array([[False, True, True], [True, True, False]])
    metrics = visit_metrics(np.array([[0, 6, 0], [3, 3, 0]]), free)
    assert (metrics["free_cells"], metrics["cells_visited"]) == (4, 0.75)
    assert (metrics["entropy_bits"], metrics["entropy_bits_max"]) == (1.5, 2.0)


def test_trajectories_end_where_their_episodes_do() -> None:
    played = play(Constant(5, 0), make_vec(MULTI, 3, 0, start=(0, 0)), 30, deterministic=True)
    # 0.025 k (k - 1) is 7.65 for k = 18 and 8.55 for k = 19, which is beyond 8
    assert played.lengths.tolist() == [19] * 3
    assert played.positions.shape == (31, 3, 2)
    assert played.positions[18, 0, 0] == pytest.approx(7.65)
    np.testing.assert_allclose(played.positions[19:, :, 0], 8.55, rtol=1e-6)  # not where the next episode began
    env = gym.make(MULTI, start=(0, 0))
    env.reset()
    total = sum(float(env.step(np.array([5.0, 0.0]))[1]) for _ in range(19))
    np.testing.assert_allclose(played.returns, total, rtol=1e-5)


@pytest.mark.parametrize("id", [MULTI, SOFT])
def test_a_policy_that_goes_everywhere_and_one_that_does_not(id: str) -> None:
    goals = len(GOAL_TASKS[id].goals)
    everywhere, one = (multimodality(Spread(id), id, {}, (0, 0), 0, deterministic=d) for d in (False, True))
    assert everywhere["reached"] == one["reached"] == 1
    assert (everywhere["goals_found"], one["goals_found"]) == (goals, 1)
    assert everywhere["entropy_bits"] == pytest.approx(math.log2(goals), abs=1e-4)
    assert one["entropy_bits"] == 0
    assert one["fractions"] == [1.0] + [0.0] * (goals - 1)
    assert one["return_mean"] == pytest.approx(everywhere["return_mean"], rel=1e-5)
    assert (one["trajectories"], one["steps"]) == (GOAL_TRAJECTORIES, GOAL_TASKS[id].evaluation_steps)
    table = format_multimodality({"deterministic": one, "sampled": everywhere}).splitlines()
    assert f"1 of {goals}" in table[1] and f"{goals} of {goals}" in table[2]
    assert f"1000 trajectories of up to {one['steps']} steps from (0, 0)" in table[-1]


def test_a_start_and_the_arguments_of_the_environment_are_used() -> None:
    metrics = multimodality(Constant(0, 0), MULTI, {"max_episode_steps": 3}, (5, 0), 0, deterministic=True)
    assert (metrics["length_mean"], metrics["start"]) == (100, [5, 0])
    assert metrics["return_mean"] == pytest.approx(100 * 0.2, rel=1e-6)  # rests on a goal
    with pytest.raises(ValueError, match=r"start: got \(9, 0\)"):
        multimodality(Constant(0, 0), MULTI, {}, (9, 0), 0, deterministic=True)


def test_cells_are_those_of_gymnasium_robotics() -> None:
    pytest.importorskip("gymnasium_robotics")
    maze = gym.make("driftrl/PointMazeMedium-v0").unwrapped.maze  # type: ignore[attr-defined]
    positions = np.random.default_rng(0).uniform(-4, 4, (500, 2))
    expected = np.zeros((8, 8), dtype=int)
    for position in positions:
        row, column = maze.cell_xy_to_rowcol(position)
        expected[row, column] += 1
    np.testing.assert_array_equal(count_visits(positions, maze), expected)
    assert free_cells(maze).sum() == 26


def test_a_ball_that_rests_visits_one_cell() -> None:
    pytest.importorskip("gymnasium_robotics")
    metrics = multimodality(
        Constant(0, 0), "driftrl/PointMazeMedium-v0", {"max_episode_steps": 5}, (0, 0), 0, deterministic=True
    )
    assert (metrics["trajectories"], metrics["steps"]) == (20, 5)
    assert (metrics["cells_visited"], metrics["entropy_bits"]) == (1 / 26, 0)
    assert np.array(metrics["visits"])[1, 1] == 20 * 5
    assert "4% of 26" in format_multimodality({"deterministic": metrics})


def test_other_tasks_have_one_solution() -> None:
    ids = ["PointMaze_UMaze-v3", "gymnasium_robotics:PointMaze_UMaze-v3", "driftrl/PointMazeMedium-v0", MULTI, SOFT]
    assert all(has_several_solutions(id) for id in ids)
    assert not has_several_solutions("Hopper-v5")


class Router:
    """Steers trajectory i along route i mod 6, and along route 0 where it is deterministic; some stop at once."""

    def predict(self, observation: Any, *args: Any, deterministic: bool = False) -> tuple[np.ndarray, None]:
        index = np.arange(len(observation)) * (not deterministic)
        x, y = observation.T[:2]
        goal = np.where(y < -0.12, np.where(index % 6 < 3, -0.55, 0.55), np.array([-0.85, 0.0, 0.85])[index % 3])
        up = np.where((np.abs(goal - x) < 0.05) | (y < -0.85), 1.0, 0.0)
        action = np.stack([(10 * (goal - x)).clip(-1, 1), up], axis=1)
        return np.where((index % 10 == 9)[:, None], 0.0, action), None


def test_routes_of_a_policy_that_is_known() -> None:
    report = {
        mode: multimodality(Router(), "driftrl/Avoid-v0", {}, (0, 0), 0, deterministic=mode == "deterministic")
        for mode in ("deterministic", "sampled")
    }
    one, all_routes = report["deterministic"], report["sampled"]
    assert (one["success"], one["routes_found"], one["entropy_bits"]) == (1.0, 1, 0.0)
    # Of 1000 trajectories those with i mod 10 = 9 stop: 100 of odd i, of which routes 1, 3 and 5 lose a third each.
    lost = [sum(i % 10 == 9 and i % 6 == route for i in range(1000)) for route in range(6)]
    shares = [(sum(i % 6 == route for i in range(1000)) - n) / 1000 for route, n in enumerate(lost)]
    assert all_routes["success"] == 0.9 and all_routes["routes_found"] == 6
    assert all_routes["fractions"] == pytest.approx(shares, abs=1e-12)
    table = format_multimodality(report)
    assert "success" in table and "6 of 6" in table and "90.0%" in table


def test_route_metrics_of_a_hand_made_set() -> None:
    routes = np.array([0] * 50 + [1] * 25 + [2] * 25 + [-1] * 100)
    metrics = route_metrics(routes, 6)
    assert (metrics["success"], metrics["routes_found"], metrics["entropy_bits"]) == (0.5, 3, 1.5)
    assert metrics["fractions"] == [0.25, 0.125, 0.125, 0, 0, 0]
