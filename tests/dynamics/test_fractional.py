import math

import numpy as np
import pytest
import torch
from scipy import integrate
from torch import Tensor

from driftrl.dynamics.fractional import FractionalNoise, FractionalSteps

F64 = torch.float64


N = 40_000


# Sample second moments of N standardised Gaussian pairs deviate by sqrt(2 / N) = 0.7 % (variance) or 0.5 % (product):
# 5 standard errors.
TOLERANCE = 5 * math.sqrt(2 / N)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def type_two_covariance(hurst: float, s: float, t: float) -> float:
    """``E[B_s B_t]``, by quadrature of the product of the two kernels; s <= t."""
    a = hurst - 0.5
    if s == t:
        return float(t ** (2 * hurst) / (2 * hurst) / math.gamma(hurst + 0.5) ** 2)
    # The singularity at the kernel's end is handed to the quadrature as an algebraic weight.
    value = integrate.quad(lambda u: (t - s + u) ** a, 0, s, weight="alg", wvar=(a, 0))[0]
    return float(value / math.gamma(hurst + 0.5) ** 2)


@pytest.mark.parametrize(
    ("hurst", "bound"), [(0.3, 4e-3), (0.4, 1e-3), (0.5, 2e-4), (0.7, 5e-4), (0.9, 1e-3), (1.0, 1e-3)]
)
def test_fractional_covariance(hurst: float, bound: float) -> None:
    """Propagated through the exact steps, on ten times up to the horizon; bounds as stated in the docstring."""
    noise = FractionalNoise(hurst, horizon=10.0).double()
    decay, factor = noise.transition(1.0)
    state, states = torch.zeros_like(factor), []
    for _ in range(10):
        state = decay[:, None] * state * decay + factor @ factor.mT
        states.append(state)
    times = range(1, 11)
    largest = type_two_covariance(hurst, 10, 10)
    for s in times:
        for t in range(s, 11):
            ours = noise.weights @ (states[s - 1] * decay ** (t - s)) @ noise.weights
            assert ours.item() == pytest.approx(type_two_covariance(hurst, s, t), abs=bound * largest)


def test_fractional_weights_are_optimal() -> None:
    """The mean squared error, by quadrature over time, rises for any change of any weight."""
    hurst = 0.7
    noise = FractionalNoise(hurst, terms=4).double()
    rates, weights = noise.rates.numpy(), noise.weights.detach().numpy()
    nodes, quadrature = np.polynomial.legendre.leggauss(400)
    u, quadrature = (nodes + 1) / 2, quadrature / 2

    def error(w: np.ndarray) -> float:
        """``integral_0^1 (1 - u) (kernel(u) - sum_k w_k e^(-r_k u))^2 du``: Ito's isometry, time integrated first."""
        residual = u ** (hurst - 0.5) / math.gamma(hurst + 0.5) - np.exp(-np.outer(u, rates)) @ w
        return float(quadrature @ ((1 - u) * residual**2))

    for k in range(4):
        change = 0.01 * np.eye(4)[k]
        up, down, here = error(weights + change), error(weights - change), error(weights)
        assert here < min(up, down)
        assert abs(up - down) < 0.05 * (up + down - 2 * here)  # the minimum lies within 5 % of a change


def test_fractional_step_is_exact_for_one_brownian_motion() -> None:
    noise = FractionalNoise(0.7, terms=3).double()
    decay, factor = noise.transition(0.2)
    rates = noise.rates.tolist()
    for i, a in enumerate(rates):
        assert decay[i].item() == pytest.approx(math.exp(-0.2 * a), rel=1e-6)  # the rates were stored in float32
        for j, b in enumerate(rates):
            shared = integrate.quad(lambda s, a=a, b=b: math.exp(-a * s) * math.exp(-b * s), 0, 0.2)[0]
            assert (factor @ factor.mT)[i, j].item() == pytest.approx(shared, rel=1e-6)


def test_fractional_path_simulated() -> None:
    noise = FractionalNoise(0.8).double()
    transition, y = noise.transition(0.25), noise.initial(N, 1)
    assert y.shape == (N, 1, 6)
    for k in range(4):
        y = noise.step(y, torch.randn(N, 1, 6, generator=generator(k), dtype=F64), transition)
    variance = type_two_covariance(0.8, 1, 1)
    assert noise.value(y).var().item() == pytest.approx(variance, rel=TOLERANCE + 1e-3)


def test_fractional_weights_are_learnable_on_request() -> None:
    assert not any(p.requires_grad for p in FractionalNoise(0.7).parameters())
    noise = FractionalNoise(0.7, learnable=True).double()
    transition, z = noise.transition(0.1), torch.randn(2, 3, 6, generator=generator(), dtype=F64)
    assert noise.weights.requires_grad

    def run(weights: Tensor, z: Tensor) -> Tensor:
        return torch.func.functional_call(  # type: ignore[no-any-return]
            _Value(noise), {"noise.weights": weights}, (noise.step(torch.ones_like(z), z, transition),)
        )

    assert torch.autograd.gradcheck(run, (noise.weights, z.requires_grad_()))


class _Value(torch.nn.Module):
    def __init__(self, noise: FractionalNoise) -> None:
        super().__init__()
        self.noise = noise

    def forward(self, y: Tensor) -> Tensor:
        return self.noise.value(y)


def test_float32_stays_float32() -> None:
    noise = FractionalNoise(0.3)
    y = noise.step(noise.initial(2, 3), torch.ones(2, 3, 6), noise.transition(0.1))
    precise = noise.double()
    expected = precise.value(
        precise.step(precise.initial(2, 3), torch.ones(2, 3, 6, dtype=F64), precise.transition(0.1))
    )
    value = FractionalNoise(0.3).value(y)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.double(), expected, rtol=1e-4, atol=1e-4)


def test_bad_arguments_are_refused() -> None:
    for hurst in (0.29, 1.1):
        with pytest.raises(ValueError, match=rf"hurst must lie in \[0\.3, 1\], got {hurst}"):
            FractionalNoise(hurst)
    with pytest.raises(ValueError, match=r"terms must lie in \[2, 8\], got 9"):
        FractionalNoise(0.5, terms=9)
    with pytest.raises(ValueError, match=r"horizon must be positive, got 0\.0"):
        FractionalNoise(0.5, horizon=0.0)
    noise = FractionalNoise(0.5)
    with pytest.raises(ValueError, match=r"dt must be positive, got 0\.0"):
        noise.transition(0.0)
    with pytest.raises(ValueError, match=r"noise must have the shape of y, \[3, 1, 6\], got \[3, 1\]"):
        noise.step(noise.initial(3, 1), torch.zeros(3, 1), noise.transition(0.1))
    with pytest.raises(ValueError, match="hurst must lie in"):
        FractionalSteps(0.2, (2, 1))
