import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from driftrl.dynamics.adaptive_sde import sdeint_adaptive
from driftrl.dynamics.brownian import BrownianGrid
from driftrl.dynamics.brownian_tree import BrownianTree
from driftrl.dynamics.fields import MLPField, Time
from driftrl.dynamics.neural_sde import LangevinSDE, LinearNoiseSDE, interpolant_sde
from driftrl.dynamics.ode import odeint
from driftrl.dynamics.paths import LINEAR, TRIG, Path, brownian_bridge
from driftrl.dynamics.sde import SDE, sdeint

F64 = torch.float64


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=F64)


def grid(steps: int, batch: int, dim: int, t1: float = 1.0, seed: int = 0) -> BrownianGrid:
    return BrownianGrid.sample(steps, (batch, dim), dt=t1 / steps, generator=generator(seed), dtype=F64)


def mlp() -> MLPField:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return MLPField(3, 2, hidden=(8, 8), last_layer_scale=1.0).double()


def moments(sde: SDE, steps: int, t1: float, t0: float = 0.0) -> tuple[float, float, float]:
    """Of a linear equation with additive noise: the end is ``a x0 + b + sum_k c_k w_k``; a, b and the noise's variance.

    Exact, by derivatives: Euler-Maruyama's own discrete law without sampling.
    """

    def end(x: Tensor, w: Tensor) -> Tensor:
        return sdeint(sde, x, steps=steps, noise=BrownianGrid((t1 - t0) / steps, w), t0=t0, t1=t1)

    x, w = torch.zeros(1, 1, dtype=F64), torch.zeros(steps, 1, 1, dtype=F64)
    by_x, by_w = torch.autograd.functional.jacobian(end, (x, w))
    return by_x.item(), end(x, w).item(), (by_w.square().sum() * (t1 - t0) / steps).item()


# x0 ~ N(0, 1), x1 ~ N(m, s^2) independent: every marginal is N(b m, a^2 + b^2 s^2), the velocity a linear regression.
WEIGHTS: dict[str, Callable[[float], tuple[float, float, float, float]]] = {
    "linear": lambda t: (1 - t, t, -1.0, 1.0),
    "trig": lambda t: (
        math.cos(math.pi * t / 2),
        math.sin(math.pi * t / 2),
        -math.pi / 2 * math.sin(math.pi * t / 2),
        math.pi / 2 * math.cos(math.pi * t / 2),
    ),
}


@pytest.mark.parametrize("path", [LINEAR, TRIG], ids=lambda p: p.name)
@pytest.mark.parametrize("eps", [0.0, 0.5, 2.0, lambda t: 1 - t], ids=["0", "0.5", "2", "1-t"])
def test_interpolant_sde_has_the_marginals_of_the_flow(path: Path, eps: float | Callable[[float], float]) -> None:
    mean, s = 1.5, 0.6

    def velocity(t: Time, x: Tensor, cond: Tensor | None) -> Tensor:
        a, b, da, db = WEIGHTS[path.name](float(t))
        return db * mean + (da * a + db * b * s**2) / (a**2 + b**2 * s**2) * (x - b * mean)

    sde = interpolant_sde(velocity, eps, path)
    for t1 in (0.5, 1.0):
        a, b, *_ = WEIGHTS[path.name](t1)
        errors = []
        for steps in (100, 200):
            factor, shift, variance = moments(sde, steps, t1)
            error = (shift - b * mean, factor**2 + variance - (a**2 + b**2 * s**2))
            errors.append(max(map(abs, error)))
        assert errors[1] < 0.04  # Euler's first-order error at 200 steps, which halves with the step:
        assert errors[1] < 0.6 * errors[0]


# x0 ~ N(-1, 0.7^2), x1 ~ N(1.5, 0.4^2) of covariance c, on the bridge of scale 0.8: v and e are linear regressions.
M0, S0, M1, S1, SCALE, START = -1.0, 0.7, 1.5, 0.4, 0.8, 1e-3


def law(t: float, c: float) -> tuple[float, float]:
    """Mean and variance of x_t."""
    mean = (1 - t) * M0 + t * M1
    return mean, ((1 - t) * S0) ** 2 + (t * S1) ** 2 + 2 * t * (1 - t) * c + SCALE**2 * t * (1 - t)


def data_to_data(eps: float | Callable[[float], float], c: float) -> SDE:
    def velocity(t: Time, x: Tensor, cond: Tensor | None) -> Tensor:
        (mean, variance), t = law(float(t), c), float(t)
        covariance = t * S1**2 - (1 - t) * S0**2 + (1 - 2 * t) * c  # of x1 - x0 and x_t
        return M1 - M0 + covariance / variance * (x - mean)

    def denoiser(t: Time, x: Tensor, cond: Tensor | None) -> Tensor:
        (mean, variance), t = law(float(t), c), float(t)
        return SCALE * math.sqrt(t * (1 - t)) / variance * (x - mean)

    return interpolant_sde(velocity, eps, brownian_bridge(SCALE), denoiser)


@pytest.mark.parametrize("eps", [0.0, 0.32, 1.0, lambda t: 4 * t * (1 - t)], ids=["0", "0.32", "1", "falls"])
@pytest.mark.parametrize("c", [0.0, 0.15])
def test_interpolant_with_noise_joins_any_two_ends(eps: float | Callable[[float], float], c: float) -> None:
    sde, (mean0, variance0) = data_to_data(eps, c), law(START, c)
    for t1 in (0.5, 1.0):
        (mean, variance), errors = law(t1, c), []
        for steps in (200, 400):
            factor, shift, added = moments(sde, steps, t1, START)
            errors.append(max(abs(factor * mean0 + shift - mean), abs(factor**2 * variance0 + added - variance)))
        assert errors[1] < 0.03  # Euler's error at 400 steps, of order 1 but at the ends, where the score grows
        assert errors[1] < 0.75 * errors[0]


def test_interpolant_of_the_entropic_coupling_is_the_schroedinger_bridge() -> None:
    """The SDE keeps the covariance of the bridge's ends (Mallasto et al., arXiv 2006.03416), but no other's."""
    bridge = (math.sqrt(4 * S0**2 * S1**2 + SCALE**4) - SCALE**2) / 2
    found = {c: moments(data_to_data(SCALE**2 / 2, c), 800, 1.0, START)[0] * S0**2 for c in (0.0, bridge)}
    assert found[bridge] == pytest.approx(bridge, abs=0.005)
    assert abs(found[0.0]) > 0.05


def test_interpolant_with_noise_compiles_and_has_gradients() -> None:
    field, denoiser = mlp(), mlp()
    x, cond, noise = rand(4, 3), rand(4, 2, seed=1), grid(3, 4, 3, t1=0.75)

    def run(x: Tensor, cond: Tensor) -> Tensor:
        sde = interpolant_sde(field, 0.5, brownian_bridge(0.8), denoiser)
        return sdeint(sde, x, steps=3, noise=noise, cond=cond, t0=0.25)

    compiled = torch.compile(run, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x, cond), run(x, cond), rtol=0, atol=1e-13)
    assert torch.autograd.gradcheck(run, (x.requires_grad_(), cond.requires_grad_()))


def test_interpolant_sde_without_noise_is_the_flow() -> None:
    field, x, cond = mlp(), rand(4, 3), rand(4, 2, seed=1)
    ours = sdeint(interpolant_sde(field, 0.0), x, steps=5, noise=grid(5, 4, 3), cond=cond, solver="stochastic_heun")
    torch.testing.assert_close(ours, odeint(field, x, steps=5, solver="heun", cond=cond), rtol=0, atol=1e-13)


def test_correction_in_closed_form_is_that_of_a_backward_pass() -> None:
    x, sde = rand(5, 3), LinearNoiseSDE(lambda t, x, cond: x, lambda t: 0.3 + t)
    torch.testing.assert_close(sde.correction(0.5, x), SDE.correction(sde, 0.5, x))


def test_bad_arguments_are_refused() -> None:
    x, noise = torch.zeros(4, 2), BrownianGrid(0.5, torch.zeros(2, 4, 2))
    with pytest.raises(ValueError, match=r"eps must be at least 0, got -1\.0"):
        interpolant_sde(lambda t, x, cond: x, -1.0)
    with pytest.raises(ValueError, match="the score is singular at t = 1"):
        sdeint(interpolant_sde(lambda t, x, cond: x, 1.0), x, steps=2, noise=noise, solver="stochastic_heun")
    with pytest.raises(ValueError, match="path 'linear' has no noise term, got a denoiser; leave it out"):
        interpolant_sde(lambda t, x, cond: x, 1.0, LINEAR, lambda t, x, cond: x)
    with pytest.raises(ValueError, match="path 'brownian_bridge' has a noise term, got denoiser=None; fit one"):
        interpolant_sde(lambda t, x, cond: x, 1.0, brownian_bridge())
    sde = interpolant_sde(lambda t, x, cond: x, 1.0, brownian_bridge(), lambda t, x, cond: x)
    with pytest.raises(ValueError, match=r"singular at t = 0 and t = 1, got stages at \[0.0, 0.5\]; use t0=1e-3"):
        sdeint(sde, x, steps=2, noise=noise)


def test_levels_and_times_of_an_interpolant_that_make_no_sense_are_refused() -> None:
    x, field = rand(3, 2), MLPField(2, hidden=(8,)).double()
    with pytest.raises(ValueError, match=r"eps must be at least 0, got -0\.1 at t = 0"):
        sdeint(interpolant_sde(field, lambda t: -0.1), x, steps=4, generator=generator())
    with pytest.raises(ValueError, match="eps must be a number or a function of time, got a tensor"):
        interpolant_sde(field, torch.tensor(0.5))  # type: ignore[arg-type]
    for rows in (1, 3):
        with pytest.raises(ValueError, match="t must be one number for all rows with interpolant_sde: take sdeint"):
            noise = BrownianTree(0, (rows, 2), dtype=F64)
            sdeint_adaptive(interpolant_sde(field, 0.5), x[:rows], noise=noise, t0=0.1, t1=0.9)
    with pytest.raises(ValueError, match="singular at t = 0 and t = 1, got stages at"):
        sdeint(data_to_data(0.5, 1.0), x[:, :1], steps=4, solver="stochastic_heun", generator=generator(), t0=0.1)


def test_noise_level_of_another_type_is_refused() -> None:
    sde = LangevinSDE(lambda t, x, cond: -x, torch.tensor([0.3, 0.2], dtype=F64))
    with pytest.raises(ValueError, match=r"diffusion must be torch\.float32 like x, got torch\.float64"):
        sdeint(sde, torch.zeros(4, 2), steps=4, generator=generator())
