from typing import Any

import numpy as np
import pytest
from gymnasium import spaces

from driftrl.agents.common.demonstrations import Demonstrations
from driftrl.envs.episodes import Episode

BOX, ACTIONS = spaces.Box(-9, 9, (1,)), spaces.Box(-2, 2, (1,))


def episode(*rewards: float, obs: float = 0.0, **parts: Any) -> Episode:
    steps = len(rewards)
    ends = np.arange(steps) == steps - 1
    made = Episode(np.full((steps + 1, 1), obs), np.zeros((steps, 1)), np.array(rewards), ends, ends & False)
    return made._replace(**parts)


def test_returns_are_sums_over_episodes() -> None:
    data = Demonstrations.of([("a", episode(1, 2)), ("b", episode(4)), ("c", episode(0.5, 0.25, 1))], BOX, ACTIONS)
    assert data.lengths.tolist() == [2, 1, 3]
    assert data.returns.tolist() == [3, 4, 1.75]
    better = data.returning(3)
    assert better.lengths.tolist() == [2, 1] and better.rewards.tolist() == [1, 2, 4]
    with pytest.raises(ValueError, match="got no episode that returns 5, at most 4"):
        data.returning(5)


def test_the_digest_tells_what_is_learned_from() -> None:
    def digest(*rewards: tuple[float, ...], **parts: Any) -> str:
        return Demonstrations.of([("a", episode(*each, **parts)) for each in rewards], BOX, ACTIONS).digest

    first = digest((1, 2), (4,))
    assert len(first) == 64 and first == digest((1, 2), (4,)) == digest((3, 2), (4,))
    others = {first, digest((1,), (2, 4)), digest((1, 2), (4,), obs=0.5), digest((1, 2, 4))}
    others.add(digest((1,), actions=np.ones((1, 1))))
    others.add(digest((1,)))
    assert len(others) == 6


def test_a_split_keeps_episodes_whole_and_loses_none() -> None:
    data = Demonstrations.of([(str(k), episode(*[1.0] * (k % 4 + 1), obs=k / 10)) for k in range(50)], BOX, ACTIONS)
    rest, held_out = data.split(0.2, np.random.default_rng(0))
    assert (len(rest.lengths), len(held_out.lengths)) == (40, 10)
    seen = [set(part.observations[:, 0].tolist()) for part in (rest, held_out)]
    assert not seen[0] & seen[1] and len(seen[0] | seen[1]) == 50
    for part in (rest, held_out):
        assert part.lengths.sum() == len(part.observations) == len(part.actions) == len(part.rewards)
    again = data.split(0.2, np.random.default_rng(0))[1]
    np.testing.assert_array_equal(again.observations, held_out.observations)
    assert [len(part.lengths) for part in data.split(1e-9, np.random.default_rng(0))] == [49, 1]
    with pytest.raises(ValueError, match="got one episode, expected two at least"):
        Demonstrations.of([("a", episode(1))], BOX, ACTIONS).split(0.5, np.random.default_rng(0))


def test_actions_on_the_bounds_to_rounding_are_brought_inside() -> None:
    data = Demonstrations.of([("a", episode(0, 0, actions=np.array([[2.00001], [-2.0]])))], BOX, ACTIONS)
    assert data.actions[:, 0].tolist() == [2.0, -2.0]
    with pytest.raises(ValueError, match=r"a: step 1: actions: got 2.001 in dimension 0, expected \[-2, 2\]"):
        Demonstrations.of([("a", episode(0, 0, actions=np.array([[2.0], [2.001]])))], BOX, ACTIONS)


def test_keys_and_spaces_must_fit_each_other() -> None:
    named = spaces.Dict({"p": spaces.Box(-9, 9, (1,))})
    with pytest.raises(ValueError, match="a: observations: got one array, expected p"):
        Demonstrations.of([("a", episode(1))], named, ACTIONS)
    with pytest.raises(ValueError, match="a: observations: got q, expected p among them"):
        Demonstrations.of([("a", episode(1, observations={"q": np.zeros((2, 1))}))], named, ACTIONS)
    with pytest.raises(ValueError, match="demonstration_keys: got p, but the environment's observations have keys"):
        Demonstrations.of([("a", episode(1))], named, ACTIONS, ["p"])
    with pytest.raises(ValueError, match="demonstration_keys: got p, but a has observations without keys"):
        Demonstrations.of([("a", episode(1))], BOX, ACTIONS, ["p"])
    single = Demonstrations.of([("a", episode(1, observations={"q": np.ones((2, 1))}))], BOX, ACTIONS)
    assert single.observations.tolist() == [[1.0]]
    with pytest.raises(ValueError, match="got no episode, expected one at least"):
        Demonstrations.of([], BOX, ACTIONS)
