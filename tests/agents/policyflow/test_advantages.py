"""Recurrences over the steps of a rollout, by a loop and by doubling, which is for CUDA."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from driftrl.agents.policyflow.advantages import by_doubling, by_loop, discounted_returns, returns_by_doubling

BOTH = pytest.mark.parametrize("solve", [by_loop, by_doubling])


@BOTH
def test_a_constant_term_gives_a_geometric_series(solve: Any) -> None:
    steps, factor = 37, 0.9
    found = solve(torch.ones(steps, 2, dtype=torch.float64), torch.full((steps, 2), factor, dtype=torch.float64))
    left = torch.arange(steps, 0, -1, dtype=torch.float64)[:, None]
    torch.testing.assert_close(found, ((1 - factor**left) / (1 - factor)).expand(-1, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 31, 32, 33, 200])
def test_doubling_is_the_loop(steps: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(steps)
    terms, factors = torch.randn(2, steps, 5, generator=generator, dtype=dtype)
    factors = factors.sigmoid() * (torch.rand(steps, 5, generator=generator) < 0.9)  # zero where episodes end
    given = terms.clone(), factors.clone()
    torch.testing.assert_close(by_doubling(terms, factors), by_loop(terms, factors))
    assert torch.equal(terms, given[0]) and torch.equal(factors, given[1])


@pytest.mark.parametrize("solve", [discounted_returns, returns_by_doubling])
def test_returns_are_those_of_every_episode(solve: Any) -> None:
    rewards = torch.arange(1.0, 7.0)[:, None].repeat(1, 2)
    ended = torch.zeros(6, 2, dtype=torch.bool)
    ended[2, 0] = True
    found = solve(rewards, ended, torch.tensor([8.0, 0.0]), 0.5)
    assert found[:, 0].tolist() == [5.0, 4.5, 5.25, 4.0, 7.0, 9.5]  # 1 + 4, 2 + 5 / 2, ...; a new episode with 4
    assert found[:, 1].tolist() == [1.0, 2.5, 4.25, 6.125, 8.0625, 10.03125]


class Launches(TorchDispatchMode):
    """Counts operations that are no views."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


def test_doubling_launches_a_few_kernels_per_round_and_not_one_per_step() -> None:
    rewards: Tensor = torch.randn(1024, 3)
    with Launches() as launches:  # type: ignore[no-untyped-call]
        by_doubling(rewards, torch.rand(1024, 3))
    assert launches.count <= 3 * 10 + 2
