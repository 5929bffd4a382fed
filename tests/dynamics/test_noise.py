import math

import pytest
import torch
from scipy import integrate
from torch import Tensor

from driftrl.dynamics.noise import OrnsteinUhlenbeck, OrnsteinUhlenbeckSteps, StepNoise, step_noise

F64 = torch.float64


N = 40_000


# Sample second moments of N standardised Gaussian pairs deviate by sqrt(2 / N) = 0.7 % (variance) or 0.5 % (product):
# 5 standard errors.
TOLERANCE = 5 * math.sqrt(2 / N)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("dt", [1e-9, 0.1, 3.0])
def test_ornstein_uhlenbeck_transition_is_exact(dt: float) -> None:
    rate, sigma, mean = 0.7, 1.3, 2.0
    process = OrnsteinUhlenbeck(rate, sigma, mean)
    x, zero = torch.tensor([[0.5]], dtype=F64), torch.zeros(1, 1, dtype=F64)
    moment = process.step(x, zero, dt)
    deviation = process.step(x, zero + 1, dt) - moment
    # The mean solves m' = -rate (m - mean); the variance is the integral of the squared kernel.
    solution = integrate.solve_ivp(lambda t, m: -rate * (m - mean), (0, dt), [0.5], rtol=1e-12, atol=1e-14).y[0, -1]
    variance = integrate.quad(lambda s: (sigma * math.exp(-rate * s)) ** 2, 0, dt)[0]
    assert moment.item() == pytest.approx(solution, rel=1e-10)
    assert deviation.item() == pytest.approx(math.sqrt(variance), rel=1e-6 if dt < 1e-6 else 1e-10)
    tensors = OrnsteinUhlenbeck(*(torch.tensor(v, dtype=F64) for v in (rate, sigma, mean)))
    torch.testing.assert_close(tensors.step(x, zero + 1, dt), process.step(x, zero + 1, dt))


def test_ornstein_uhlenbeck_is_stationary_with_exponential_correlation() -> None:
    process = OrnsteinUhlenbeck(0.7, 1.3)
    z = torch.randn(3, N, 1, generator=generator(), dtype=F64)
    path = [process.stationary(z[0])]
    for noise, dt in zip(z[1:], (0.2, 1.5), strict=True):
        path.append(process.step(path[-1], noise, dt))
    x, times = torch.stack(path)[..., 0], torch.tensor([0.0, 0.2, 1.7], dtype=F64)
    expected = torch.exp(-0.7 * (times[:, None] - times).abs()) * 1.3**2 / 1.4
    torch.testing.assert_close(x @ x.mT / N, expected, rtol=0, atol=TOLERANCE * 1.3**2 / 1.4)
    assert torch.equal(process.step(path[0], z[1], 0.0), path[0])


def test_gradients_reach_state_and_rate() -> None:
    def run(x: Tensor, z: Tensor, rate: Tensor, sigma: Tensor) -> Tensor:
        return OrnsteinUhlenbeck(rate, sigma, 0.3).step(x, z, 0.4)

    inputs = [torch.rand(*shape, generator=generator(), dtype=F64) + 0.5 for shape in ((2, 3), (2, 3), (3,), (3,))]
    assert torch.autograd.gradcheck(run, [value.requires_grad_() for value in inputs])


def test_float32_stays_float32() -> None:
    assert OrnsteinUhlenbeck(1.0, 1.0).step(torch.ones(2, 3), torch.ones(2, 3), 0.1).dtype == torch.float32


def test_bad_arguments_are_refused() -> None:
    x = torch.zeros(3, 1)
    with pytest.raises(ValueError, match=r"rate must be positive, got 0\.0"):
        OrnsteinUhlenbeck(0.0, 1.0)
    with pytest.raises(ValueError, match=r"sigma must be at least 0, got -1\.0"):
        OrnsteinUhlenbeck(1.0, -1.0)
    with pytest.raises(ValueError, match=r"noise must have the shape of x, \[3, 1\], got \[3\]"):
        OrnsteinUhlenbeck(1.0, 1.0).step(x, x[:, 0], 0.1)


def sequence(noise: StepNoise, steps: int, restart: int) -> tuple[Tensor, Tensor, Tensor]:
    """Values, means [steps, N, 2] and scales [steps, N, 1]; all episodes start at 0 and the first half at `restart`."""
    source = generator()
    rows = []
    for t in range(steps):
        start = torch.full((N,), t == 0)
        start[: N // 2] |= t == restart
        rows.append(noise.step(torch.randn(noise.terms, N, 2, generator=source), start))
    values, means, scales = zip(*rows, strict=True)
    return torch.stack(values), torch.stack(means), torch.stack(scales)


def fractional_covariance(hurst: float, s: float, t: float) -> float:
    """E[B_s B_t] of type II, ``integral_0^s ((s - u) (t - u))^(H - 1/2) du / Gamma(H + 1/2)^2`` for s <= t."""
    s, t = min(s, t), max(s, t)
    if s == t:
        return float(s ** (2 * hurst)) / (2 * hurst) / math.gamma(hurst + 0.5) ** 2
    a = hurst + 0.5  # x = (s - u)^a takes the singularity out
    value, _ = integrate.quad(lambda x: (t - s + x ** (1 / a)) ** (hurst - 0.5) / a, 0, s**a, limit=200)
    return float(value) / math.gamma(a) ** 2


def increment_covariance(hurst: float, i: int, j: int) -> float:
    def c(s: int, t: int) -> float:
        return fractional_covariance(hurst, s, t)

    return c(i + 1, j + 1) - c(i, j + 1) - c(i + 1, j) + c(i, j)


@pytest.mark.parametrize("name", ["ou 0.5", "ou 5", "fractional 0.3", "fractional 0.7", "fractional 0.95"])
def test_step_noise_is_standard_with_the_stated_correlations_and_forgets_at_a_start(name: str) -> None:
    kind, parameter = name.split()
    steps, restart = 30, 12
    noise = step_noise(kind, float(parameter), float(parameter) if kind == "fractional" else 0.7, (N, 2))
    assert noise is not None
    values, means, scales = sequence(noise, steps, restart)
    went_on = values[:, N // 2 :].flatten(1)
    torch.testing.assert_close(values.flatten(1).square().mean(1), torch.ones(steps), rtol=0, atol=TOLERANCE)
    for i, j in [(0, 1), (0, 5), (3, 4), (3, 12), (11, 12), (20, 21), (20, 28)]:
        if kind == "ou":
            expected, bias = math.exp(-(j - i) / float(parameter)), 0.0
        else:
            variances = [increment_covariance(float(parameter), k, k) for k in (i, j)]
            expected, bias = increment_covariance(float(parameter), i, j) / math.sqrt(math.prod(variances)), 0.025
        correlation = (went_on[i] * went_on[j]).mean().item()
        assert correlation == pytest.approx(expected, abs=bias + 5 * math.sqrt(2 / N))
    # mean and scale are the conditional moments: what they leave is standard and unrelated to all that was before
    rest = (values - means) / scales
    torch.testing.assert_close(rest.flatten(1).square().mean(1), torch.ones(steps), rtol=0, atol=TOLERANCE)
    for i in (5, 20):
        assert abs((rest[i] * means[i]).mean().item()) < TOLERANCE
        assert abs((rest[i] * values[i - 1]).mean().item()) < TOLERANCE
    again = slice(0, N // 2)
    assert means[0].abs().max() == 0 and means[restart, again].abs().max() == 0
    torch.testing.assert_close(scales[restart, again], torch.ones(N // 2, 1))
    torch.testing.assert_close(scales[restart : 2 * restart, 0], scales[:restart, 0])
    assert abs((values[restart - 1, again] * values[restart, again]).mean().item()) < TOLERANCE
    assert scales[restart, N // 2 :].max() < 0.995


def test_step_noise_without_memory_and_bad_values() -> None:
    assert step_noise("gaussian", 1.0, 0.7, (2, 1)) is None
    with pytest.raises(ValueError, match="time must be positive, got 0"):
        OrnsteinUhlenbeckSteps(0.0, (2, 1))
    with pytest.raises(ValueError, match="must be gaussian, ou or fractional, got 'pink'"):
        step_noise("pink", 1.0, 0.7, (2, 1))
