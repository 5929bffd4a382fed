import math

import numpy as np
import pytest
import torch
from scipy import integrate, stats
from torch import Tensor

from driftrl.dynamics.brownian import BrownianGrid
from driftrl.dynamics.brownian_tree import _GOLDEN, BrownianTree, _hash
from driftrl.dynamics.fractional import FractionalNoise, FractionalSteps
from driftrl.dynamics.noise import OrnsteinUhlenbeck, OrnsteinUhlenbeckSteps, StepNoise, step_noise

F64 = torch.float64
N = 40_000
# Sample second moments of N standardised Gaussian pairs deviate by sqrt(2 / N) = 0.7 % (variance) or 0.5 % (product):
# 5 standard errors.
TOLERANCE = 5 * math.sqrt(2 / N)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def assert_independent(parts: dict[str, tuple[Tensor, float]]) -> None:
    """Each (sample [N], variance) has that variance, and no two are correlated."""
    z = torch.stack([sample.flatten() / math.sqrt(variance) for sample, variance in parts.values()])
    second = z @ z.mT / z.shape[1]
    torch.testing.assert_close(second, torch.eye(len(parts), dtype=z.dtype), rtol=0, atol=TOLERANCE)
    assert z.mean(1).abs().max() < 5 / math.sqrt(z.shape[1])


def grid(
    steps: int = 8, batch: int = 3, dim: int = 2, dt: float = 0.25, levy: bool = True, seed: int = 0
) -> BrownianGrid:
    return BrownianGrid.sample(steps, (batch, dim), dt=dt, generator=generator(seed), levy=levy, dtype=F64)


def test_grid_moments() -> None:
    sample = grid(2, N, 1, dt=0.3)
    assert sample.h is not None
    assert_independent(
        {"w0": (sample.w[0], 0.3), "w1": (sample.w[1], 0.3), "h0": (sample.h[0], 0.025), "h1": (sample.h[1], 0.025)}
    )


def test_refined_halves_are_independent_and_have_the_moments_of_a_finer_grid() -> None:
    fine = grid(1, N, 1, dt=1.0).refine(generator(1))
    assert fine.h is not None
    assert fine.dt == 0.5
    assert_independent(
        {"w0": (fine.w[0], 1 / 2), "w1": (fine.w[1], 1 / 2), "h0": (fine.h[0], 1 / 24), "h1": (fine.h[1], 1 / 24)}
    )
    plain = grid(1, N, 1, dt=1.0, levy=False).refine(generator(1))
    assert_independent({"w0": (plain.w[0], 1 / 2), "w1": (plain.w[1], 1 / 2)})


@pytest.mark.parametrize("levy", [True, False])
def test_coarsening_undoes_refining(levy: bool) -> None:
    coarse = grid(4, levy=levy)
    again = coarse.refine(generator(1)).refine(generator(2)).coarsen(4)
    assert again.dt == coarse.dt
    torch.testing.assert_close(again.w, coarse.w, rtol=0, atol=1e-14)
    if levy:
        torch.testing.assert_close(again.h, coarse.h, rtol=0, atol=1e-14)
    else:
        assert again.h is None


def test_levy_area_is_the_area_between_path_and_chord() -> None:
    """A path of straight pieces has no area within them; the trapezoidal rule is exact for it."""
    fine = BrownianGrid(0.1, grid(6).w, torch.zeros(6, 3, 2, dtype=F64))
    coarse, path = fine.coarsen(6), fine.path()
    chord = torch.linspace(0, 1, 7, dtype=F64).view(-1, 1, 1) * path[-1]
    assert coarse.h is not None
    torch.testing.assert_close(coarse.h[0], torch.trapezoid(path - chord, dim=0) / 6, rtol=0, atol=1e-14)
    torch.testing.assert_close(coarse.path()[-1], path[-1])


def test_path_covariance_is_the_earlier_time_and_that_of_the_bridge() -> None:
    path = grid(4, N, 1, dt=0.25).path()[..., 0]
    times = torch.linspace(0, 1, 5, dtype=F64)
    earlier = torch.minimum(times[:, None], times)
    torch.testing.assert_close(path @ path.mT / N, earlier, rtol=0, atol=TOLERANCE)
    bridge = path - times[:, None] * path[-1]
    torch.testing.assert_close(bridge @ bridge.mT / N, earlier - times[:, None] * times, rtol=0, atol=TOLERANCE)


def test_grid_draws_from_the_generator_only_in_any_dtype() -> None:
    state = torch.get_rng_state()
    a, b = (BrownianGrid.sample(3, (2, 2), dt=0.1, generator=generator(5)) for _ in range(2))
    assert torch.equal(a.w, b.w)
    assert a.w.dtype == torch.float32
    assert torch.equal(torch.get_rng_state(), state)


QUERIES = [0.1, 0.7, 0.0, 1.0, 0.25, 1 / 3, 0.7 + 1e-9, 0.5, 1e-7]


def test_tree_gives_the_same_path_whatever_the_order_of_queries() -> None:
    tree = BrownianTree(3, (4, 2), dtype=F64)
    kept = {name: repr(value) for name, value in vars(tree).items()}
    forwards = {t: tree(t) for t in QUERIES}
    backwards = {t: BrownianTree(3, (4, 2), dtype=F64)(t) for t in reversed(QUERIES)}
    assert all(torch.equal(forwards[t], backwards[t]) for t in QUERIES)
    assert {name: repr(value) for name, value in vars(tree).items()} == kept  # nothing is stored
    assert not torch.equal(BrownianTree(4, (4, 2), dtype=F64)(0.1), forwards[0.1])
    assert torch.equal(BrownianTree(3 + 2**64, (4, 2), dtype=F64)(0.1), forwards[0.1])
    assert torch.equal(forwards[0.0], torch.zeros(4, 2, dtype=F64))


def test_tree_draws_from_splitmix64() -> None:
    """The published test vector: the first outputs of the generator for the seed 1234567."""
    state = 1234567 + torch.arange(1, 6) * _GOLDEN
    expected = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    assert [value % 2**64 for value in _hash(state).tolist()] == expected


def test_tree_rows_do_not_depend_on_the_batch() -> None:
    torch.testing.assert_close(BrownianTree(3, (7, 2), dtype=F64)(0.3)[:4], BrownianTree(3, (4, 2), dtype=F64)(0.3))


def test_tree_increments_and_areas_are_independent_with_the_right_variance() -> None:
    """Steps of very different size at odd times, among them one that starts where another ends."""
    tree = BrownianTree(0, (N, 1), t0=-1.0, t1=2.0, dtype=F64)
    parts: dict[str, tuple[Tensor, float]] = {}
    for start, end in [(0.3, 0.3 + 1e-6), (-1.0, 0.1), (0.1, 0.3), (1.3, 2.0), (0.5, 0.75)]:
        w, h = tree.increment(start, end)
        parts |= {f"w{start}": (w, end - start), f"h{start}": (h, (end - start) / 12)}
    assert_independent(parts)


def test_tree_halves_have_variance_half_and_area_a_24th() -> None:
    tree = BrownianTree(1, (N, 1), dtype=F64)
    (w_left, h_left), (w_right, h_right) = tree.increment(0.0, 0.5), tree.increment(0.5, 1.0)
    assert_independent({"wl": (w_left, 1 / 2), "wr": (w_right, 1 / 2), "hl": (h_left, 1 / 24), "hr": (h_right, 1 / 24)})


def test_tree_is_gaussian_and_has_the_covariance_of_brownian_motion() -> None:
    tree = BrownianTree(2, (N, 1), dtype=F64)
    times = torch.tensor([0.1, 1 / 3, 0.7, 1.0], dtype=F64)
    path = torch.stack([tree(t)[:, 0] for t in times.tolist()])
    torch.testing.assert_close(path @ path.mT / N, torch.minimum(times[:, None], times), rtol=0, atol=TOLERANCE)
    for row, t in zip(path, times.tolist(), strict=True):
        assert stats.kstest(row.numpy(), stats.norm(scale=math.sqrt(t)).cdf).pvalue > 1e-4


def test_tree_increments_add_up() -> None:
    """The grid over small steps, coarsened, is the increment over the large one: W and its integral are consistent."""
    tree = BrownianTree(5, (3, 2), t0=1.0, t1=4.0, dtype=F64)
    coarse, (w, h) = tree.grid(7, 1.5, 3.25).coarsen(7), tree.increment(1.5, 3.25)
    torch.testing.assert_close(coarse.w[0], w, rtol=0, atol=1e-13)
    torch.testing.assert_close(coarse.h, h[None], rtol=0, atol=1e-13)
    torch.testing.assert_close(tree.grid(4).path()[2], tree(2.5), rtol=0, atol=1e-13)
    assert tree.grid(4).dt == 0.75


def test_tree_results_have_the_requested_dtype() -> None:
    tree, precise = BrownianTree(5, (3, 2)), BrownianTree(5, (3, 2), dtype=F64)
    (w, h), (w64, h64) = tree.increment(0.3, 0.3001), precise.increment(0.3, 0.3001)
    assert (tree(0.3).dtype, w.dtype) == (torch.float32, torch.float32)
    torch.testing.assert_close(torch.stack([w, h]).double(), torch.stack([w64, h64]), rtol=1e-6, atol=0)


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


def test_gradients_reach_state_and_rate() -> None:
    def run(x: Tensor, z: Tensor, rate: Tensor, sigma: Tensor) -> Tensor:
        return OrnsteinUhlenbeck(rate, sigma, 0.3).step(x, z, 0.4)

    inputs = [torch.rand(*shape, generator=generator(), dtype=F64) + 0.5 for shape in ((2, 3), (2, 3), (3,), (3,))]
    assert torch.autograd.gradcheck(run, [value.requires_grad_() for value in inputs])


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
    assert OrnsteinUhlenbeck(1.0, 1.0).step(torch.ones(2, 3), torch.ones(2, 3), 0.1).dtype == torch.float32


@pytest.mark.gpu
def test_tree_is_the_same_on_a_gpu() -> None:
    cpu, gpu = (BrownianTree(3, (5, 2), dtype=F64, device=device) for device in ("cpu", "cuda"))
    for t in QUERIES:
        torch.testing.assert_close(gpu(t).cpu(), cpu(t), rtol=0, atol=1e-12)


def test_bad_arguments_are_refused() -> None:
    w = torch.zeros(2, 3, 1)
    with pytest.raises(ValueError, match=r"dt must be positive, got 0\.0"):
        BrownianGrid(0.0, w)
    with pytest.raises(ValueError, match=r"w must have shape \[steps, B, D\] .*got \[3, 1\]"):
        BrownianGrid(0.1, w[0])
    with pytest.raises(ValueError, match=r"h must be like w, \(\[2, 3, 1\], torch.float32, .*float64"):
        BrownianGrid(0.1, w, w.double())
    with pytest.raises(ValueError, match="steps must be at least 1 and dt positive, got 0 and"):
        BrownianGrid.sample(0, (3, 1), dt=0.1, generator=generator())
    with pytest.raises(ValueError, match="factor must divide the 2 steps, got 3"):
        BrownianGrid(0.1, w).coarsen(3)
    with pytest.raises(ValueError, match=r"t1 must be above t0, got t0=1\.0 and t1=1\.0"):
        BrownianTree(0, (3, 1), t0=1.0)
    with pytest.raises(ValueError, match=r"shape must be \(B, D\), each at least 1, got \(0, 1\)"):
        BrownianTree(0, (0, 1))
    tree = BrownianTree(0, (3, 1))
    with pytest.raises(ValueError, match=r"t must lie in \[0\.0, 1\.0\], got 1\.5"):
        tree(1.5)
    with pytest.raises(ValueError, match=r"times must increase, got 0\.5 before 0\.5"):
        tree.increment(0.5, 0.5)
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        tree.grid(0)
    with pytest.raises(ValueError, match=r"rate must be positive, got 0\.0"):
        OrnsteinUhlenbeck(0.0, 1.0)
    with pytest.raises(ValueError, match=r"sigma must be at least 0, got -1\.0"):
        OrnsteinUhlenbeck(1.0, -1.0)
    with pytest.raises(ValueError, match=r"noise must have the shape of x, \[3, 1\], got \[3\]"):
        OrnsteinUhlenbeck(1.0, 1.0).step(w[0], w[0, :, 0], 0.1)
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
        noise.step(noise.initial(3, 1), w[0], noise.transition(0.1))


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
    with pytest.raises(ValueError, match="hurst must lie in"):
        FractionalSteps(0.2, (2, 1))
    with pytest.raises(ValueError, match="must be gaussian, ou or fractional, got 'pink'"):
        step_noise("pink", 1.0, 0.7, (2, 1))
