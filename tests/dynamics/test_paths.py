import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from driftrl.dynamics.fields import Time
from driftrl.dynamics.ode import odeint
from driftrl.dynamics.paths import (
    LINEAR,
    TRIG,
    Path,
    brownian_bridge,
    denoising_loss,
    flow_matching_loss,
    score_from_velocity,
)

from .known_fields import LinearField

F64 = torch.float64
PATHS = [LINEAR, TRIG, brownian_bridge(), brownian_bridge(0.3)]
# (a, b, a', b') at t, written down independently of the package.
WEIGHTS: dict[str, Callable[[float], tuple[float, float, float, float]]] = {
    "linear": lambda t: (1 - t, t, -1.0, 1.0),
    "trig": lambda t: (
        math.cos(math.pi * t / 2),
        math.sin(math.pi * t / 2),
        -math.pi / 2 * math.sin(math.pi * t / 2),
        math.pi / 2 * math.cos(math.pi * t / 2),
    ),
}


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def noise_for(path: Path, *shape: int) -> Tensor | None:
    return None if path.g is None else rand(*shape, seed=9)


@pytest.mark.parametrize("path", PATHS, ids=lambda p: p.name)
def test_path_joins_its_ends(path: Path) -> None:
    x0, x1 = rand(4, 3), rand(4, 3, seed=1)
    z = noise_for(path, 4, 3)
    torch.testing.assert_close(path.sample(0.0, x0, x1, z), x0, rtol=0, atol=1e-15)
    torch.testing.assert_close(path.sample(1.0, x0, x1, z), x1, rtol=0, atol=1e-15)


@pytest.mark.parametrize("path", PATHS, ids=lambda p: p.name)
@settings(max_examples=20, deadline=None)
@given(st.lists(st.floats(0.05, 0.95), min_size=1, max_size=4))
def test_velocity_is_the_time_derivative(path: Path, times: list[float]) -> None:
    t, n, h = torch.tensor(times, dtype=F64), len(times), 1e-5
    x0, x1 = rand(n, 3), rand(n, 3, seed=1)
    z = noise_for(path, n, 3)
    difference = (path.sample(t + h, x0, x1, z) - path.sample(t - h, x0, x1, z)) / (2 * h)
    of_noise = 0 if path.g is None or z is None else path.g(t[:, None])[1] * z
    torch.testing.assert_close(path.velocity(t, x0, x1) + of_noise, difference, rtol=1e-6, atol=1e-7)


def test_float_time_equals_one_time_per_row() -> None:
    x0, x1 = rand(4, 3), rand(4, 3, seed=1)
    for t in (torch.full((4,), 0.3, dtype=F64), torch.tensor(0.3, dtype=F64)):
        assert torch.equal(TRIG.sample(t, x0, x1), TRIG.sample(0.3, x0, x1))
        assert torch.equal(TRIG.velocity(t, x0, x1), TRIG.velocity(0.3, x0, x1))


@pytest.mark.parametrize("scale", [1.0, 0.4])
def test_bridge_noise_has_the_variance_of_a_brownian_bridge(scale: float) -> None:
    z = rand(20_000, 1)
    for t in (0.2, 0.5, 0.9):
        spread = brownian_bridge(scale).sample(t, torch.zeros_like(z), torch.zeros_like(z), z)
        assert spread.var().item() == pytest.approx(scale**2 * t * (1 - t), rel=0.05)


@settings(max_examples=30, deadline=None)
@given(st.floats(0, 0.95), st.floats(0.2, 3), st.floats(-3, 3), st.sampled_from([LINEAR, TRIG]))
def test_score_of_gaussian_data(t: float, deviation: float, mean: float, path: Path) -> None:
    """x0 ~ N(0, 1), x1 ~ N(mean, deviation^2): x_t is Gaussian, its velocity a linear regression on x_t."""
    a, b, da, db = WEIGHTS[path.name](t)
    variance = a**2 + b**2 * deviation**2
    x = torch.linspace(-3, 3, 5, dtype=F64)[:, None]
    slope = (da * a + db * b * deviation**2) / variance
    velocity = db * mean + slope * (x - b * mean)
    score = score_from_velocity(path, t, x, velocity)
    torch.testing.assert_close(score, -(x - b * mean) / variance, rtol=1e-9, atol=1e-9)
    per_row = score_from_velocity(path, torch.full((5,), t, dtype=F64), x, velocity)
    torch.testing.assert_close(per_row, score, rtol=1e-12, atol=1e-12)


def test_linear_score_is_the_printed_formula() -> None:
    x, v, t = rand(4, 2), rand(4, 2, seed=1), 0.3
    torch.testing.assert_close(score_from_velocity(LINEAR, t, x, v), (t * v - x) / (1 - t))


def test_loss_is_the_squared_error_per_row() -> None:
    x0, x1 = torch.tensor([[0.0, 0.0], [1.0, 0.0]]), torch.tensor([[1.0, 2.0], [1.0, 1.0]])
    loss = flow_matching_loss(lambda t, x, cond: x, LINEAR, x0, x1, torch.tensor([0.5, 0.0]))
    # rows: x_t = (.5, 1), velocity (1, 2) -> .25 + 1; x_t = (1, 0), velocity (0, 1) -> 1 + 1
    torch.testing.assert_close(loss, torch.tensor([1.25, 2.0]))


def test_loss_passes_conditioning_and_noise() -> None:
    x0, x1, z, cond = rand(4, 2), rand(4, 2, seed=1), rand(4, 2, seed=2), rand(4, 2, seed=3)
    t = torch.full((4,), 0.5, dtype=F64)  # here the bridge's g' = 0 and g = 1/2

    def shifted(t: Time, x: Tensor, cond: Tensor | None) -> Tensor:
        assert cond is not None
        return x + cond

    loss = flow_matching_loss(shifted, brownian_bridge(), x0, x1, t, cond, z)
    expected = ((x0 + x1 + z) / 2 + cond - (x1 - x0)).square().sum(1)
    torch.testing.assert_close(loss, expected)


def test_loss_is_minimal_at_the_marginal_velocity_which_carries_the_source_to_the_data() -> None:
    """N(0, 1) to N(0, s^2): the best linear field is the conditional expectation, its flow ends at s x0."""
    s, t, n = 2.0, 0.6, 200_000
    x0, x1 = rand(n, 1), s * rand(n, 1, seed=1)
    best = (t * s**2 - (1 - t)) / ((1 - t) ** 2 + t**2 * s**2)
    slope = torch.tensor([[best]], dtype=F64, requires_grad=True)

    def loss(shift: float) -> Tensor:
        return flow_matching_loss(LinearField(slope + shift), LINEAR, x0, x1, t).mean()

    (gradient,) = torch.autograd.grad(loss(0.0), slope)
    assert abs(gradient.item()) < 0.05  # standard error about 0.01
    assert loss(0.0) < loss(0.1) and loss(0.0) < loss(-0.1)
    assert torch.autograd.grad(loss(0.1), slope)[0].item() > 0.2
    ends = odeint(
        lambda t, x, cond: (t * s**2 - (1 - t)) / ((1 - t) ** 2 + t**2 * s**2) * x, x0[:5], steps=200, solver="rk4"
    )
    torch.testing.assert_close(ends, s * x0[:5], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_denoising_loss_is_minimal_at_minus_g_times_the_score(dtype: torch.dtype) -> None:
    """N(1, 0.6^2) to N(-1, 0.3^2) by the bridge of scale 0.8: the marginal is Gaussian, its score linear."""
    t, n, path = 0.3, 200_000, brownian_bridge(0.8)
    x0, x1, z = 1 + 0.6 * rand(n, 1).to(dtype), -1 + 0.3 * rand(n, 1, seed=1).to(dtype), rand(n, 1, seed=2).to(dtype)
    g = 0.8 * math.sqrt(t * (1 - t))
    mean, variance = 0.7 - 0.3, (0.7 * 0.6) ** 2 + (0.3 * 0.3) ** 2 + g**2
    slope = torch.tensor(g / variance, dtype=dtype, requires_grad=True)
    shift = torch.zeros((), dtype=dtype, requires_grad=True)
    loss = denoising_loss(lambda t, x, cond: slope * (x - mean) + shift, path, x0, x1, t, z)
    assert loss.shape == (n,)
    assert loss.dtype == dtype
    assert loss.mean().item() == pytest.approx(1 - g**2 / variance, abs=0.01)  # what x_t tells of z
    for gradient in torch.autograd.grad(loss.mean(), (slope, shift)):
        assert abs(gradient.item()) < 0.02  # standard error about 0.004; at slope 0 it is -0.8


def test_bad_arguments_are_refused() -> None:
    x = torch.zeros(4, 2)
    for method in (LINEAR.sample, LINEAR.velocity):
        with pytest.raises(ValueError, match=r"x0 and x1 must have the same shape .*got \[4, 2\] and \[4, 3\]"):
            method(0.5, x, torch.zeros(4, 3))
        with pytest.raises(ValueError, match=r"t must be a float or have shape \[4\], got \[3\]"):
            method(torch.zeros(3), x, x)
    with pytest.raises(ValueError, match="path 'linear' has no noise term, got z"):
        LINEAR.sample(0.5, x, x, x)
    with pytest.raises(ValueError, match="path 'linear' has no noise term, got z"):
        denoising_loss(lambda t, x, cond: x, LINEAR, x, x, 0.5, x)
    with pytest.raises(ValueError, match=r"x0 and z must have the same shape .*got \[4, 2\] and \[1, 2\]"):
        brownian_bridge().sample(0.5, x, x, torch.zeros(1, 2))
    with pytest.raises(ValueError, match="path 'brownian_bridge' has a noise term, got z=None"):
        brownian_bridge().sample(0.5, x, x)
    with pytest.raises(ValueError, match=r"scale must be positive, got 0\.0"):
        brownian_bridge(0.0)
    with pytest.raises(ValueError, match="path 'brownian_bridge' has a noise term"):
        score_from_velocity(brownian_bridge(), 0.5, x, x)
    with pytest.raises(ValueError, match=r"x and velocity must have the same shape .*got \[4, 2\] and \[4, 1\]"):
        score_from_velocity(LINEAR, 0.5, x, x[:, :1])


@pytest.mark.parametrize("wrong", [lambda t, x, c: x[:, 0], lambda t, x, c: x[:, :1]])
def test_fields_of_another_shape_are_refused_where_they_would_broadcast(wrong: Callable[..., Tensor]) -> None:
    x0, x1, t = rand(4, 2), rand(4, 2, seed=1), torch.full((4,), 0.3, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"field must return the shape of x, \[4, 2\], got"):
        flow_matching_loss(wrong, LINEAR, x0, x1, t)
    with pytest.raises(ValueError, match=r"field must return the shape of x, \[4, 2\], got"):
        denoising_loss(wrong, brownian_bridge(0.3), x0, x1, t, rand(4, 2, seed=2))
