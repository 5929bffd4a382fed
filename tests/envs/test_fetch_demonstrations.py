"""Scripts of the Fetch tasks: they solve them, fail as often as asked, and what they show is what the tasks do."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

pytest.importorskip("gymnasium_robotics", reason="needs the extra maze")

from driftrl.envs.episodes import Episode
from driftrl.envs.fetch_demonstrations import FETCH, fetch_demonstrations

from .courses import assert_course


def solved(episode: Episode) -> bool:
    return bool(episode.rewards[-1] == 0)  # -1 wherever the object is not at its goal


@pytest.mark.parametrize("env_id", FETCH)
def test_scripts_solve_their_task_and_fail_as_often_as_asked(env_id: str) -> None:
    assert np.mean([solved(each) for each in fetch_demonstrations(env_id, 20, 0)]) >= 0.85
    half = [solved(each) for each in fetch_demonstrations(env_id, 20, 0, success=0.5)]
    assert 0.3 <= np.mean(half) <= 0.6


@pytest.mark.parametrize("env_id", FETCH)
def test_demonstrations_are_courses_of_the_environment(env_id: str) -> None:
    assert_course(env_id, fetch_demonstrations(env_id, 1, 3)[0], 3, 50)


def test_the_same_seed_gives_the_same_demonstrations() -> None:
    first, again, other = (fetch_demonstrations("FetchPush-v4", 1, seed)[0].actions for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"episodes": 0}, "episodes: got 0"),
        ({"success": 1.5}, "success: got 1.5"),
        ({"noise": -1.0}, "noise: got -1.0"),
    ],
)
def test_what_is_out_of_range_is_refused(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fetch_demonstrations("FetchPush-v4", **{"episodes": 1, "seed": 0} | kwargs)
