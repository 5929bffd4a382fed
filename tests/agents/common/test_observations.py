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
