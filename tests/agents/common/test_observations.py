"""Observations: their running statistics."""

from __future__ import annotations

import numpy as np
import torch

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
