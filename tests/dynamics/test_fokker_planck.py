import math
from functools import partial
from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor

from driftrl.dynamics.fields import MLPField, Time, VelocityField
from driftrl.dynamics.fokker_planck import fokker_planck_residual
from driftrl.dynamics.special_fields import LinearField

F64 = torch.float64


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def mlp(hidden: tuple[int, ...] = (8, 8)) -> MLPField:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return MLPField(3, 2, hidden, last_layer_scale=1.0).double()


class Schedule(VelocityField):
    """VP drift ``-beta(t) x / 2``, beta = 0.1 + 3 t."""

    def forward(self, t: Time, x: Tensor, cond: Tensor | None = None) -> Tensor:
        beta: Tensor = 0.1 + 3 * torch.as_tensor(t, dtype=x.dtype)
        return torch.mul(-0.5 * beta.reshape(-1, 1), x)


MEAN, VARIANCE = torch.tensor([1.0, -2.0], dtype=F64), 0.3


def vp_log_density(t: Time, x: Tensor, cond: Tensor | None = None) -> Tensor:
    """Of the VP process from N(MEAN, VARIANCE I): mean alpha MEAN, variance alpha^2 VARIANCE + 1 - alpha^2."""
    assert isinstance(t, Tensor)
    alpha = torch.exp(-0.5 * (0.1 * t + 1.5 * t**2))
    variance = alpha**2 * VARIANCE + 1 - alpha**2
    square = (x - alpha[:, None] * MEAN).square().sum(-1)
    log_density: Tensor = -0.5 * square / variance - torch.log(2 * math.pi * variance)
    return log_density


def test_fokker_planck_residual_of_a_vp_gaussian_is_zero() -> None:
    t, x = torch.linspace(0, 1, 50, dtype=F64), 2 * rand(50, 2)
    diffusion = torch.sqrt(0.1 + 3 * t)
    residual = fokker_planck_residual(vp_log_density, Schedule(2), diffusion, t, x)
    torch.testing.assert_close(residual, torch.zeros_like(t), rtol=0, atol=1e-12)
    wrong = fokker_planck_residual(vp_log_density, Schedule(2), 0.5 * diffusion, t, x)
    assert wrong.abs().median() > 0.5
    one = fokker_planck_residual(vp_log_density, Schedule(2), diffusion[7].item(), t[7].item(), x)
    torch.testing.assert_close(one, torch.zeros_like(t), rtol=0, atol=1e-12)


def test_fokker_planck_residual_of_a_linear_flow_is_zero() -> None:
    # dx/dt = A x carries N(0, I) to N(0, M M^T), M = exp(t A): no noise, a drift that is not a gradient.
    matrix = rand(2, 2)

    def log_density(t: Time, x: Tensor, cond: Tensor | None) -> Tensor:
        assert isinstance(t, Tensor)
        back: Tensor = (torch.linalg.matrix_exp(-t[:, None, None] * matrix) @ x.unsqueeze(-1)).squeeze(-1)
        return -0.5 * back.square().sum(-1) - t * matrix.trace()

    t, x = torch.linspace(0, 1, 20, dtype=F64), rand(20, 2)
    residual = fokker_planck_residual(log_density, LinearField(matrix), 0.0, t, x)
    torch.testing.assert_close(residual, torch.zeros_like(t), rtol=0, atol=1e-12)


def normal_log_density(t: Time, x: Tensor, cond: Tensor | None) -> Tensor:
    return -0.5 * x.square().sum(-1) + 0 * t


# N(0, I) at rest under dX = -theta x dt + g dW fails the equation by (g^2 / 2 - theta) (|x|^2 - D).
THETA, NOISE = 0.8, 0.6


def drifting() -> LinearField:
    return LinearField(-THETA * torch.eye(2, dtype=F64))


def test_strong_residual_in_closed_form() -> None:
    x = rand(9, 2)
    residual = fokker_planck_residual(normal_log_density, drifting(), NOISE, 0.3, x)
    torch.testing.assert_close(residual, (0.5 * NOISE**2 - THETA) * (x.square().sum(1) - 2), rtol=0, atol=1e-13)


def test_weak_residual_and_its_two_probe_product_are_unbiased() -> None:
    # The residual is a polynomial of degree 2 in each entry of the probe: three Gauss-Hermite nodes per dimension
    # integrate its square exactly. Averaged over N(x, w^2 I), |x|^2 becomes |x|^2 + 2 w^2.
    nodes, weights = np.polynomial.hermite_e.hermegauss(4)
    probes = torch.tensor(list(product(nodes, nodes)), dtype=F64)
    mass = torch.tensor([a * b / (2 * math.pi) for a, b in product(weights, weights)], dtype=F64)
    x, width = rand(1, 2), 0.4
    mean = ((0.5 * NOISE**2 - THETA) * (x.square().sum() + 2 * width**2 - 2)).item()
    weak = fokker_planck_residual(
        normal_log_density, drifting(), NOISE, 0.3, x.expand(16, 2), probe=probes, width=width
    )
    assert (mass @ weak).item() == pytest.approx(mean, abs=1e-12)
    pairs = mass @ (weak[:, None] * weak[None, :]) @ mass
    assert pairs.item() == pytest.approx(mean**2, abs=1e-12)
    assert (mass @ weak.square()).item() > mean**2 + 0.1  # the square of one probe's residual is biased


def test_weak_residual_of_a_vp_gaussian_averages_to_zero() -> None:
    x = 2 * rand(20000, 2)
    t, probe = torch.rand(20000, generator=torch.Generator().manual_seed(1), dtype=F64), rand(20000, 2, seed=2)
    diffusion = torch.sqrt(0.1 + 3 * t)
    weak = fokker_planck_residual(vp_log_density, Schedule(2), diffusion, t, x, probe=probe)
    assert weak.std() > 0.1
    assert weak.mean().abs() < 4 * weak.std() / 20000**0.5


def test_fokker_planck_residual_with_conditioning_has_right_gradients() -> None:
    drift, probe = mlp((4,)), rand(2, 3, seed=7)

    def run(form: Tensor | None, x: Tensor, cond: Tensor, scale: Tensor) -> Tensor:
        def log_density(t: Time, y: Tensor, c: Tensor | None) -> Tensor:
            assert c is not None
            return -scale * (y - torch.cat([c, c[:, :1]], 1)).pow(4).sum(-1) * (1 + t)

        return fokker_planck_residual(log_density, drift, 0.7, 0.3, x, cond, probe=form, width=0.2)

    inputs = (0.5 * rand(2, 3)).requires_grad_(), rand(2, 2).requires_grad_(), rand(1)[0].abs().requires_grad_()
    for form in (None, probe):
        assert torch.autograd.gradcheck(partial(run, form), inputs)


def test_bad_arguments_of_the_residual_are_refused() -> None:
    field, x = LinearField(torch.eye(2)), torch.zeros(4, 2)
    with pytest.raises(ValueError, match=r"probe must have the shape of x, \[4, 2\], got \[2\]"):
        fokker_planck_residual(normal_log_density, field, 1.0, 0.0, x, probe=torch.zeros(2))
    with pytest.raises(ValueError, match="width must be positive, got 0"):
        fokker_planck_residual(normal_log_density, field, 1.0, 0.0, x, width=0.0)
    with pytest.raises(ValueError, match=r"x must have shape \[B, 2\], got \[4, 3\]"):
        fokker_planck_residual(normal_log_density, field, 1.0, 0.0, torch.zeros(4, 3))
