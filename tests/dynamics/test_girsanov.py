import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from driftrl.dynamics.brownian import BrownianGrid
from driftrl.dynamics.fields import Time
from driftrl.dynamics.girsanov import girsanov_kl
from driftrl.dynamics.neural_sde import LangevinSDE, LinearNoiseSDE
from driftrl.dynamics.sde import Drift, sdeint_path

F64 = torch.float64


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=F64)


def grid(steps: int, batch: int, dim: int, t1: float = 1.0, seed: int = 0) -> BrownianGrid:
    return BrownianGrid.sample(steps, (batch, dim), dt=t1 / steps, generator=generator(seed), dtype=F64)


def test_girsanov_kl_of_constant_drifts() -> None:
    """Brownian motions with drifts u and v: KL = |(u - v) / s|^2 T / 2 on every path."""
    path, s = grid(5, 3, 2, t1=2.0).path(), torch.tensor([0.5, 2.0], dtype=F64)
    sde = LangevinSDE(lambda t, x, cond: torch.full_like(x, 1.0), s)
    kl = girsanov_kl(sde, lambda t, x, cond: torch.full_like(x, -0.5), path, t1=2.0)
    expected = 0.5 * 2.0 * (1.5**2 / 0.5**2 + 1.5**2 / 2.0**2)
    torch.testing.assert_close(kl, torch.full((3,), expected, dtype=F64))


def test_girsanov_kl_is_the_mean_log_ratio_of_the_transitions() -> None:
    sde = LinearNoiseSDE(lambda t, x, cond: -x, lambda t: 0.5 + t)
    other = LinearNoiseSDE(lambda t, x, cond: torch.sin(x) + t, lambda t: 0.5 + t)
    assert not isinstance(other.drift, torch.nn.Module)
    x = 2 + rand(20_000, 1).abs()
    path = sdeint_path(sde, x, steps=4, noise=grid(4, 20_000, 1))
    kl = girsanov_kl(sde, other.drift, path)

    def log_prob(sde: LinearNoiseSDE) -> Tensor:
        """Of the four Euler-Maruyama steps, ``N(x + f dt, g^2 dt)`` each."""
        steps = []
        for k in range(4):
            mean = path[k] + 0.25 * sde.bind(None)(k / 4, path[k])
            normal = torch.distributions.Normal(mean, 0.5 * sde.diffusion(k / 4, path[k]).abs())
            steps.append(normal.log_prob(path[k + 1])[:, 0])
        return torch.stack(steps).sum(0)

    log_ratio = log_prob(sde) - log_prob(other)
    difference = log_ratio - kl
    assert abs(difference.mean()) < 5 * difference.std() / math.sqrt(len(x))  # 5 standard errors
    assert kl.mean() > 10 * difference.std() / math.sqrt(len(x))  # else the comparison would be empty


def test_gradients_of_girsanov_kl_against_finite_differences() -> None:
    sde = LinearNoiseSDE(lambda t, x, cond: torch.sin(x), 0.7)
    x, y = (1 + rand(2, 3, seed=seed).abs() for seed in (0, 1))

    def kl(x: Tensor, y: Tensor) -> Tensor:
        return girsanov_kl(sde, lambda t, x, cond: x * x, torch.stack([x, y, x]))

    assert torch.autograd.gradcheck(kl, (x.requires_grad_(), y.requires_grad_()))


def test_times_and_conditioning_reach_both_drifts() -> None:
    """Drifts c t and 3 c t over [1, 3] in four steps, noise 1: KL = sum_k (2 c t_k)^2 h / 2."""
    cond, path = torch.tensor([[1.0], [2.0]], dtype=F64), torch.zeros(5, 2, 1, dtype=F64)

    def drift(t: Time, x: Tensor, cond: Tensor | None) -> Tensor:
        assert cond is not None
        return cond * t

    other = LangevinSDE(lambda t, x, cond: 3 * drift(t, x, cond), 1.0)
    kl = girsanov_kl(other, drift, path, cond=cond, t0=1.0, t1=3.0)
    expected = 0.25 * 4 * sum(t * t for t in (1.0, 1.5, 2.0, 2.5))
    torch.testing.assert_close(kl, expected * cond[:, 0].square())


def test_a_drift_or_noise_level_of_another_shape_is_refused() -> None:
    class Column(LangevinSDE):
        def bind(self, cond: Tensor | None, times: Sequence[float] = ()) -> Drift:
            return lambda t, x: -x[:, 0]

    with pytest.raises(ValueError, match=r"drift must return the shape of x, \[5, 1\], got \[5\]"):
        girsanov_kl(Column(lambda t, x, cond: x, 1.0), lambda t, x, cond: 0 * x, torch.ones(2, 5, 1))
    with pytest.raises(ValueError, match=r"diffusion must broadcast with x, \[5, 1\], got \[5\]"):
        girsanov_kl(LangevinSDE(lambda t, x, cond: x, torch.ones(5)), lambda t, x, cond: 0 * x, torch.ones(2, 5, 1))


def test_path_without_a_step_is_refused() -> None:
    sde, x = LangevinSDE(lambda t, x, cond: -x, 1.0), torch.zeros(4, 2)
    with pytest.raises(ValueError, match=r"path must have shape \[steps \+ 1, B, D\] .*got \[4, 2\]"):
        girsanov_kl(sde, lambda t, x, cond: x, x)
