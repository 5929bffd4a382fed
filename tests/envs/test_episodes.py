"""Which scripted episodes succeed: the share that is asked for, spread over routes and time."""

from __future__ import annotations

import hashlib

import pytest

from driftrl.envs.episodes import good_episodes


@pytest.mark.parametrize("routes", [1, 6])
@pytest.mark.parametrize("episodes", [1, 6, 7, 100, 600, 2000])
@pytest.mark.parametrize("success", [0.0, 0.1, 0.29, 0.5, 0.57, 0.6, 0.9, 1.0])
def test_as_many_succeed_as_asked_on_each_route(success: float, episodes: int, routes: int) -> None:
    good = good_episodes(episodes, success, routes)
    assert good.sum() == round(episodes * success)
    for route in range(routes):
        mine = good[route::routes]
        assert abs(mine.sum() - len(mine) * good.mean()) < 1
        for part in (mine[: len(mine) // 2], mine[len(mine) // 2 :]):  # not first the good, then the bad
            assert abs(part.sum() - len(part) * good.mean()) < 1


@pytest.mark.parametrize(
    ("episodes", "success", "routes", "digest"),
    [
        (600, 0.0, 6, "bd50e12c"),
        (600, 0.5, 6, "dcf1a53b"),
        (600, 0.6, 6, "45933413"),
        (600, 1.0, 6, "14cd7fd4"),
        (600, 1.0, 1, "14cd7fd4"),
        (2000, 0.0, 1, "2da42fb1"),
        (2000, 0.5, 1, "632a36a6"),
        (2000, 0.6, 1, "1e854164"),
        (2000, 1.0, 1, "236b232f"),
    ],
)
def test_data_sets_that_results_rest_on_stay_the_same(episodes: int, success: float, routes: int, digest: str) -> None:
    assert hashlib.sha256(good_episodes(episodes, success, routes).tobytes()).hexdigest()[:8] == digest
