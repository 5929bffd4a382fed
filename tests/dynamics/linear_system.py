"""A linear system with known noise, and a small model to fit to it."""

from __future__ import annotations

import torch
from torch import Tensor

from driftrl.dynamics.transition import GaussianTransition
from driftrl.dynamics.transition_settings import TransitionSettings

MATRIX = torch.tensor([[0.9, 0.1], [-0.2, 0.8]])
NOISE = torch.tensor([0.3, 0.1])
REWARD_NOISE = 0.2


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def linear_system(n: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """obs, action, reward and next_obs of ``s' = A s + a (1, 1) + noise``, ``r = s_0 - a + noise``."""
    rng = generator(seed)
    obs = torch.randn(n, 2, generator=rng)
    action = 2 * torch.rand(n, 1, generator=rng) - 1
    next_obs = obs @ MATRIX.T + action + NOISE * torch.randn(n, 2, generator=rng)
    reward = obs[:, 0] - action[:, 0] + REWARD_NOISE * torch.randn(n, generator=rng)
    return obs, action, reward, next_obs


def gaussian(
    members: int = 1, elites: int = 1, probabilistic: bool = True, seed: int = 0, **settings: float
) -> GaussianTransition:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return GaussianTransition(
            2,
            1,
            TransitionSettings(**settings),  # type: ignore[arg-type]
            hidden=(32, 32),
            members=members,
            elites=elites,
            probabilistic=probabilistic,
        )
