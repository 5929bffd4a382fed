"""The ring buffer against a plain list; what is stored at ends of episodes."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import pytest
import torch

from driftrl.agents.lipschitz_mbpo.replay import TensorReplay, TransitionRing

CPU = torch.device("cpu")


def append(buffer: TransitionRing, numbers: list[int]) -> None:
    column = torch.tensor(numbers, dtype=torch.float32)[:, None]
    buffer.append(column.expand(-1, 2), column, column.expand(-1, 2) + 0.5, column[:, 0], column[:, 0] % 2 > 0)


@pytest.mark.parametrize("chunks", [[3], [3, 4], [5, 5, 1], [12], [2, 9, 3]])
def test_the_newest_rows_stay_in_order(chunks: list[int]) -> None:
    buffer, capacity = TransitionRing(5, 2, 1, CPU), 5
    everything: list[int] = []
    for size in chunks:
        numbers = list(range(len(everything), len(everything) + size))
        append(buffer, numbers)
        everything += numbers
    kept = everything[-capacity:]
    assert len(buffer) == len(kept)
    assert sorted(buffer.all().reward.tolist()) == kept
    for count in range(1, 7):
        assert buffer.unpack(buffer.newest(count)).reward.tolist() == kept[-count:]
    batch = buffer.unpack(buffer.newest(5))
    assert torch.equal(batch.next_obs, batch.obs + 0.5)
    assert torch.equal(batch.terminated, batch.action[:, 0] % 2)
    for capacity in (8, 3):
        buffer.resize(capacity)
        assert buffer.unpack(buffer.newest(9)).reward.tolist() == kept[-capacity:]
    append(buffer, [100, 101])
    assert buffer.unpack(buffer.newest(3)).reward.tolist() == [kept[-1], 100, 101]


def test_drawing_is_uniform_over_what_is_kept() -> None:
    buffer = TransitionRing(10, 2, 1, CPU)
    append(buffer, [0, 1, 2, 3])
    rewards = buffer.unpack(buffer.draw(8000, torch.Generator().manual_seed(0))).reward
    counts = torch.bincount(rewards.long(), minlength=4)
    assert ((counts - 2000).abs() < 4 * (2000 * 0.75) ** 0.5).all()  # four standard deviations


def test_a_time_limit_is_no_termination() -> None:
    space = gym.spaces.Box(-1, 1, (1,), np.float32)
    replay = TensorReplay(4, space, space, "cpu", n_envs=2)
    obs, reached = np.zeros((2, 1)), np.ones((2, 1))
    infos = [{"TimeLimit.truncated": True}, {"TimeLimit.truncated": False}]
    replay.add(obs, reached, np.zeros((2, 1)), np.ones(2), np.array([True, True]), infos)
    sample = replay.sample(64)
    assert replay.size() == 2 and set(sample.dones.flatten().tolist()) == {0.0, 1.0}
    assert replay.transitions.all().terminated.tolist() == [0.0, 1.0]
    replay.reset()
    assert replay.size() == 0
    with pytest.raises(ValueError, match="optimize_memory_usage: got True, expected False"):
        TensorReplay(4, space, space, optimize_memory_usage=True)
