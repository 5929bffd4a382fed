"""Observations: their running statistics."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import torch
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from driftrl.agents.common.observations import RunningNorm


def test_running_statistics_are_those_of_all_batches_together() -> None:
    norm = RunningNorm(2)
    batches = [torch.randn(n, 2) * 3 + 100 for n in (1, 7, 64)]
    for batch in batches:
        norm.update(batch)
    everything = torch.cat(batches).numpy().astype(np.float64)
    np.testing.assert_allclose(norm.mean.numpy(), everything.mean(0), rtol=1e-12)
    np.testing.assert_allclose(norm.var.numpy(), everything.var(0), rtol=1e-9)
    assert norm.count.item() == 72
    assert norm(torch.full((1, 2), 1e6)).tolist() == [[10.0, 10.0]]


def test_a_batch_of_weight_two_counts_twice() -> None:
    first, second = (torch.randn(size, 3, generator=torch.Generator().manual_seed(size)) for size in (9, 5))
    weighted, repeated = RunningNorm(3), RunningNorm(3)
    for norm, weight, batch in ((weighted, 2.0, second), (repeated, 1.0, torch.cat([second, second]))):
        norm.update(first)
        norm.update(batch, weight=weight)
    for ours, theirs in zip(weighted.buffers(), repeated.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_epsilon_is_that_of_vec_normalize() -> None:
    batch = torch.randn(64, 2, generator=torch.Generator().manual_seed(0)) * torch.tensor([0.1, 3.0])
    norm = RunningNorm(2, epsilon=0.5)
    norm.update(batch)
    peer = VecNormalize(DummyVecEnv([lambda: gym.make("MountainCarContinuous-v0")]), epsilon=0.5)
    statistics = RunningMeanStd(shape=(2,))
    statistics.mean, statistics.var = norm.mean.numpy(), norm.var.numpy()
    peer.obs_rms = statistics  # type: ignore[assignment]  # a dictionary to the checker: it has Dict spaces, too
    np.testing.assert_allclose(norm(batch), np.asarray(peer.normalize_obs(batch.numpy())), rtol=1e-5, atol=1e-6)
