import math

import numpy as np
import pytest
import torch
from scipy import integrate
from torch import Tensor

from driftrl.dynamics.fractional import FractionalNoise, FractionalSteps, _fractional_weights, fractional_sdeint

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


def moments_of(hurst: float, rates: Tensor) -> Tensor:
    """``1 / Gamma(a) integral_0^1 (1 - u) u^(a - 1) e^(-r u) du``, a = H + 1/2, by quadrature."""
    a = hurst + 0.5
    values = [
        integrate.quad(lambda u, r=r: (1 - u) * math.exp(-r * u), 0, 1, weight="alg", wvar=(a - 1, 0))[0]
        for r in rates.tolist()
    ]
    return torch.tensor(values, dtype=F64) / math.gamma(a)


@pytest.mark.parametrize("hurst", [0.31, 0.5, 0.8, 0.99])
def test_weights_and_their_derivative_against_quadrature(hurst: float) -> None:
    """Where two terms keep the system far from singular: A w = b, and A dw = db."""
    rates = torch.tensor([0.1, 200.0], dtype=F64)
    h = torch.tensor(hurst, dtype=F64, requires_grad=True)
    weights = _fractional_weights(h, rates, 1.0)
    pairs = (rates[:, None] + rates).tolist()
    gram = [[integrate.quad(lambda u, p=p: (1 - u) * math.exp(-p * u), 0, 1)[0] for p in row] for row in pairs]
    expected = torch.linalg.solve(torch.tensor(gram, dtype=F64), moments_of(hurst, rates))
    torch.testing.assert_close(weights.detach(), expected, rtol=1e-7, atol=1e-9)
    step = 1e-4
    change = (moments_of(hurst + step, rates) - moments_of(hurst - step, rates)) / (2 * step)
    slope = torch.stack([torch.autograd.grad(w, h, retain_graph=True)[0] for w in weights])
    torch.testing.assert_close(slope, torch.linalg.solve(torch.tensor(gram, dtype=F64), change), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("horizon", [1.0, 5.0])
def test_a_learned_exponent_has_the_gradient_of_the_variance(horizon: float) -> None:
    """``E[B_t^2] = t^(2 H) / (2 H Gamma(H + 1/2)^2)``, whose derivative in H is that through the weights."""
    noise = FractionalNoise(0.6, horizon=horizon, learnable=True).double()
    pairs = noise.rates[:, None] + noise.rates
    covariance = -torch.expm1(-pairs * horizon) / pairs
    variance = noise.weights @ covariance @ noise.weights
    assert noise.logit is not None
    (slope,) = torch.autograd.grad(variance, noise.logit)
    (by_logit,) = torch.autograd.grad(noise.hurst, noise.logit)
    assert noise.hurst.item() == pytest.approx(0.6, abs=1e-6)
    assert variance.item() == pytest.approx(type_two_covariance(0.6, horizon, horizon), rel=1e-3)
    step = 1e-4
    ends = [type_two_covariance(0.6 + sign * step, horizon, horizon) for sign in (1, -1)]
    # The approximation's own error, 0.1 %, changes with H.
    assert (slope / by_logit).item() == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=0.02)


def test_what_is_learned_is_one_number() -> None:
    fixed, learned = FractionalNoise(0.7), FractionalNoise(0.7, learnable=True)
    assert not list(fixed.parameters())
    assert [name for name, _ in learned.named_parameters()] == ["logit"]
    torch.testing.assert_close(learned.weights, fixed.weights, rtol=1e-4, atol=1e-4)
    learned.load_state_dict(FractionalNoise(0.4, learnable=True).state_dict())
    assert learned.hurst.item() == pytest.approx(0.4, abs=1e-6)


def test_equation_without_drift_is_the_noise_itself() -> None:
    noise, x = FractionalNoise(0.7).double(), torch.ones(3, 2, dtype=F64)
    z = torch.randn(5, 3, 2, 6, generator=generator(), dtype=F64)
    path, divergence = fractional_sdeint(noise, lambda t, x: 0 * x, x, z, dt=0.2, scale=0.5)
    y, transition = noise.initial(3, 2), noise.transition(0.2)
    for normal in z:
        y = noise.step(y, normal, transition)
    assert path.shape == (6, 3, 2) and torch.equal(path[0], x)
    torch.testing.assert_close(path[-1], 1 + 0.5 * noise.value(y), rtol=0, atol=1e-13)
    assert not divergence.any()


def test_divergence_and_mean_of_a_constant_control() -> None:
    """The Brownian motion beneath gets the drift u: B the mean ``u t^(H + 1/2) / Gamma(H + 3/2)``, KL ``u^2 t / 2``."""
    noise, u = FractionalNoise(0.7).double(), 1.5
    z = torch.zeros(8, 1, 2, 6, dtype=F64)
    x = torch.zeros(1, 2, dtype=F64)
    path, divergence = fractional_sdeint(
        noise, lambda t, x: 0 * x, x, z, dt=1 / 8, control=lambda t, x, y: torch.full_like(x, u)
    )
    times = torch.linspace(0, 1, 9, dtype=F64)
    expected = u * times**1.2 / math.gamma(2.2)
    torch.testing.assert_close(path[:, 0], expected[:, None].expand(9, 2), rtol=0, atol=3e-3)
    torch.testing.assert_close(divergence, torch.tensor([u * u], dtype=F64))  # two dimensions of u^2 / 2


def test_short_steps_of_float32_keep_the_digits_of_a_control() -> None:
    """A control of 1 held over a short step moves each Y_k by (1 - e^(-r_k dt)) / r_k."""
    noise, dt = FractionalNoise(0.7), 1e-4
    x, z = torch.zeros(1, 1), torch.zeros(1, 1, 1, 6)
    path, _ = fractional_sdeint(noise, lambda t, x: 0 * x, x, z, dt=dt, control=lambda t, x, y: torch.ones_like(x))
    terms = zip(noise.weights.tolist(), noise.rates.tolist(), strict=True)
    assert path[1].item() == pytest.approx(-sum(w * math.expm1(-r * dt) / r for w, r in terms), rel=1e-5)


def test_increments_over_long_horizons_keep_the_digits_of_slow_rates() -> None:
    steps = FractionalSteps(0.7, (1, 1), horizon=1e4)
    expected = [math.expm1(-rate) for rate in steps._process.rates.tolist()]
    assert steps._change.tolist() == pytest.approx(expected, rel=1e-6)


def test_bound_is_below_the_evidence_and_reaches_it_with_the_best_control() -> None:
    """One observation o of ``B_1`` with noise s: the evidence is N(o; 0, w C w + s^2) for the covariance C of the Y.

    The best control is the one that conditions: ``u_t = k(1 - t) (o - E[B_1 | Y_t]) / (left + s^2)`` with ``k(v) =
    sum_k w_k e^(-r_k v)``, the kernel, and left the variance of B_1 that is left.
    """
    noise, steps, s, o = FractionalNoise(0.7).double(), 256, 0.3, 0.9
    rates, weights = noise.rates, noise.weights
    pairs = rates[:, None] + rates

    def control(t: float, x: Tensor, y: Tensor) -> Tensor:
        left = 1 - t - 0.5 / steps  # the middle of the step, which is of second order
        mean = y @ (weights * torch.exp(-rates * left))
        variance = weights @ (-torch.expm1(-pairs * left) / pairs) @ weights
        return (weights @ torch.exp(-rates * left)) * (o - mean) / (variance + s**2)

    x = torch.zeros(4000, 1, dtype=F64)
    z = torch.randn(steps, 2000, 1, 6, generator=generator(), dtype=F64)
    z = torch.cat([z, -z], 1)  # takes the part that is linear in the noise out of the mean
    total = weights @ (-torch.expm1(-pairs) / pairs) @ weights + s**2
    evidence = torch.distributions.Normal(0.0, total.sqrt()).log_prob(torch.tensor(o, dtype=F64))
    bounds = []
    for each in (control, None):
        path, divergence = fractional_sdeint(noise, lambda t, x: 0 * x, x, z, dt=1 / steps, control=each)
        fits = torch.distributions.Normal(path[-1, :, 0], s).log_prob(torch.tensor(o, dtype=F64))
        bounds.append((fits - divergence).mean().item())
    assert bounds[0] == pytest.approx(evidence.item(), abs=0.02)
    assert bounds[1] < evidence.item() - 1


def test_drift_and_control_see_their_time_and_the_state_before_the_step() -> None:
    """Without noise, step by step: a drift of t, a control of 1 + the sum of the processes."""
    noise, dt, steps = FractionalNoise(0.7, horizon=2.0).double(), 0.3, 5
    zero = torch.zeros(steps, 1, 1, len(noise.rates), dtype=F64)
    start = torch.zeros(1, 1, dtype=F64)
    path, divergence = fractional_sdeint(
        noise, lambda t, x: torch.full_like(x, t), start, zero, dt=dt, control=lambda t, x, y: 1 + y.sum(-1)
    )
    decay = torch.exp(-noise.rates * dt)
    x, y, cost, found = 0.0, torch.zeros_like(decay), 0.0, [0.0]
    for k in range(steps):
        u = 1 + y.sum()
        after = decay * y + u * (1 - decay) / noise.rates
        x, cost = x + dt * (k * dt) + float((after - y) @ noise.weights), cost + 0.5 * dt * float(u) ** 2
        y = after
        found.append(x)
    torch.testing.assert_close(path[:, 0, 0], torch.tensor(found, dtype=F64))
    assert divergence.item() == pytest.approx(cost)


def test_gradients_of_the_equation_against_finite_differences() -> None:
    noise = FractionalNoise(0.6, terms=3, learnable=True).double()
    z, level = torch.randn(3, 2, 2, 3, generator=generator(), dtype=F64), torch.tensor([0.5, 0.8], dtype=F64)

    def run(x: Tensor, level: Tensor, gain: Tensor, logit: Tensor) -> tuple[Tensor, Tensor]:
        return fractional_sdeint(
            noise, lambda t, x: -x, x, z, dt=0.2, scale=level, control=lambda t, x, y: gain * x + y.sum(-1)
        )

    assert noise.logit is not None
    x, gain = torch.ones(2, 2, dtype=F64), torch.tensor(0.3, dtype=F64)
    assert torch.autograd.gradcheck(run, (*(v.requires_grad_() for v in (x, level, gain)), noise.logit))


def test_equation_compiles_without_graph_breaks() -> None:
    noise, x, z = FractionalNoise(0.7), torch.ones(2, 3), torch.ones(4, 2, 3, 6)

    def run(x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        return fractional_sdeint(noise, lambda t, x: -x, x, z, dt=0.1, control=lambda t, x, y: x)

    torch.compiler.reset()
    compiled = torch.compile(run, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x, z), run(x, z))
    assert run(x, z)[0].dtype == torch.float32


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
    for hurst in (0.3, 1.0):
        with pytest.raises(ValueError, match=rf"hurst must lie within \(0\.3, 1\) to be learned, got {hurst}"):
            FractionalNoise(hurst, learnable=True)
    with pytest.raises(ValueError, match="build the noise with learnable=True"):
        FractionalNoise(0.5).hurst  # noqa: B018
    with pytest.raises(ValueError, match=r"normal must have shape \[steps, \*\[3, 1, 6\]\], got \[3, 1, 6\]"):
        fractional_sdeint(FractionalNoise(0.5), lambda t, x: x, torch.zeros(3, 1), torch.zeros(3, 1, 6), dt=0.1)
    with pytest.raises(ValueError, match=r"terms must lie in \[2, 8\], got 9"):
        FractionalNoise(0.5, terms=9)
    with pytest.raises(ValueError, match=r"horizon must be positive and finite, got 0\.0"):
        FractionalNoise(0.5, horizon=0.0)
    noise = FractionalNoise(0.5)
    with pytest.raises(ValueError, match=r"dt must be positive, got 0\.0"):
        noise.transition(0.0)
    with pytest.raises(ValueError, match=r"noise must have the shape of y, \[3, 1, 6\], got \[3, 1\]"):
        noise.step(noise.initial(3, 1), torch.zeros(3, 1), noise.transition(0.1))
    with pytest.raises(ValueError, match="hurst must lie in"):
        FractionalSteps(0.2, (2, 1))


def test_controls_of_another_shape_and_steps_beyond_the_horizon_are_refused() -> None:
    noise, x = FractionalNoise(0.7), torch.zeros(3, 2)
    normal = torch.randn(4, *noise.initial(3, 2).shape, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match=r"control must return the shape of x, \[3, 2\], got \[3, 1\]"):
        fractional_sdeint(noise, lambda t, x: -x, x, normal, dt=0.25, control=lambda t, x, y: torch.ones(3, 1))
    with pytest.raises(ValueError, match=r"dt must be at most horizon / steps = 0\.25, got 1"):
        fractional_sdeint(noise, lambda t, x: -x, x, normal, dt=1.0)


def test_drift_of_another_shape_is_refused() -> None:
    noise, x = FractionalNoise(0.7), torch.zeros(3, 3)
    with pytest.raises(ValueError, match=r"drift must return the shape of x, \[3, 3\], got \[3\]"):
        fractional_sdeint(noise, lambda t, x: x.mean(1), x, torch.zeros(8, 3, 3, len(noise.rates)), dt=1 / 8)


def test_saved_noise_keeps_its_horizon() -> None:
    saved = FractionalNoise(0.6, horizon=3.0, learnable=True)
    other = FractionalNoise(0.6, learnable=True)
    other.load_state_dict(saved.state_dict())
    assert other.horizon == pytest.approx(saved.horizon, rel=1e-6)
    torch.testing.assert_close(other.weights, saved.weights)
    with pytest.raises(ValueError, match="horizon must be positive and finite, got inf"):
        FractionalNoise(0.6, horizon=math.inf)
