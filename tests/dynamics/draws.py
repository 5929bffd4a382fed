"""Small things that the tests of solvers draw: numbers of a seed, a network, a time as a column."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from driftrl.dynamics.fields import MLPField, Time


def rand(*shape: int, seed: int = 0) -> Tensor:
    """Standard normals, float64."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def mlp() -> MLPField:
    """A field of D = 3, C = 2 with two hidden layers of 8, float64."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return MLPField(3, 2, hidden=(8, 8), last_layer_scale=1.0).double()


def saved_numbers(run: Callable[[], object]) -> int:
    """How many numbers a computation keeps for its gradient."""
    numbers = 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal numbers
        numbers += tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return numbers


def column(t: Time) -> Tensor:
    """Times [B] as [B, 1]."""
    assert isinstance(t, Tensor)
    return t.unsqueeze(-1)
