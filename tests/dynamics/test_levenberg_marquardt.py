import pytest
import torch
from scipy import integrate, stats
from torch import Tensor

from driftrl.dynamics.langevin import mala
from driftrl.dynamics.levenberg_marquardt import damped_metric, levenberg_marquardt

F64 = torch.float64


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def uniforms(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(3), dtype=F64)


def quartic(x: Tensor, cond: Tensor | None) -> Tensor:
    return (0.25 * x**4 - 0.5 * x.square()).sum(-1)


@pytest.mark.parametrize("k", [2, 4, 6, 9])
def test_metric_of_a_gaussian_is_the_damped_hessian_in_the_span_of_the_chains(k: int) -> None:
    """Wherever they are: here off centre and with a spread of their own."""
    root = rand(5, 5)
    hessian, v = root @ root.mT + 0.1 * torch.eye(5, dtype=F64), rand(4, 5, seed=1)
    x = 3 + rand(k, 5, seed=2) * torch.logspace(-1, 1, 5, dtype=F64)
    span = torch.linalg.svd(x - x.mean(0), full_matrices=False)[2][: min(k - 1, 5)]
    onto = span.mT @ span
    dense = 0.7 * torch.eye(5, dtype=F64) + onto @ hessian @ onto
    power = damped_metric(x, x @ hessian, 0.7)
    torch.testing.assert_close(power(v, 1.0), torch.linalg.solve(dense, v.mT).mT, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(power(power(v, 0.5), 0.5), power(v, 1.0))
    torch.testing.assert_close(power(power(v, -0.5), -0.5), v @ dense, rtol=1e-7, atol=1e-7)


def test_chains_at_one_point_step_by_the_damping_alone() -> None:
    power, v = damped_metric(torch.ones(3, 2, dtype=F64), torch.ones(3, 2, dtype=F64), 4.0), rand(3, 2)
    torch.testing.assert_close(power(v, 0.5), v / 2)


@pytest.mark.parametrize(("dtype", "c"), [(F64, 2.0**-70), (torch.float32, 2.0**-30)])
def test_metric_does_not_depend_on_units(dtype: torch.dtype, c: float) -> None:
    """U stays, x is c times as large: gradients c^-1, the damping c^-2 and M c^2 times, exactly for a power of two."""
    x, v = rand(6, 3).to(dtype), rand(2, 3, seed=1).to(dtype)
    hessian = torch.diag(torch.tensor([1.0, 10.0, 100.0], dtype=dtype))
    ours, theirs = damped_metric(x, x @ hessian, 0.5), damped_metric(c * x, x @ hessian / c, 0.5 / c**2)
    torch.testing.assert_close(theirs(v, 1.0) / c**2, ours(v, 1.0))


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_independent_samples_stay_independent_samples(temperature: float) -> None:
    """4,000 times two pairs of chains, begun at samples of a double well, are still that, though pairs show little."""
    edges = torch.linspace(-4, 4, 4001, dtype=F64)
    density = torch.exp(-quartic(edges[:, None], None) / temperature)
    mass = torch.as_tensor(integrate.cumulative_trapezoid(density.numpy(), edges.numpy(), initial=0))
    mass = mass / mass[-1]
    place = torch.searchsorted(mass, uniforms(4000, 4, 2).flatten().contiguous()).clamp(1, 4000)
    x = edges[place].view(4000, 4, 2)

    def run(x: Tensor, noise: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
        return levenberg_marquardt(quartic, x, noise, uniform, step=0.6, damping=0.5, temperature=temperature)

    moved, probability = torch.vmap(run)(x, rand(4000, 8, 4, 2), uniforms(4000, 8, 4))
    assert 0.3 < probability.mean() < 0.95  # else there would be nothing to see
    assert (moved - x).abs().mean() > 0.5

    def cdf(values: object) -> object:
        return torch.lerp(mass[:-1], mass[1:], 0.5)[
            ((torch.as_tensor(values) + 4) / 0.002).long().clamp(0, 3999)
        ].numpy()

    assert stats.kstest(moved.flatten().numpy(), cdf).pvalue > 0.01
    across = torch.corrcoef(moved.view(4000, 8).mT) - torch.eye(8, dtype=F64)
    assert across.abs().max() < 0.07  # 4.5 standard errors
    squares = torch.corrcoef(moved.view(4000, 8).square().mT) - torch.eye(8, dtype=F64)
    assert squares.abs().max() < 0.07


def test_steps_are_newtons_whatever_the_condition() -> None:
    """Curvatures 1 to 10^4 along random axes: 40 steps reach the variances in all directions; MALA's do not."""
    curvature, (axes, _) = torch.logspace(0, 4, 6, dtype=F64), torch.linalg.qr(rand(6, 6))

    def energy(x: Tensor, cond: Tensor | None) -> Tensor:
        value: Tensor = 0.5 * (curvature * (x @ axes).square()).sum(-1)
        return value

    start, noise, uniform = 3 * rand(400, 6, seed=1), rand(40, 400, 6, seed=2), uniforms(40, 400)
    x, probability = levenberg_marquardt(energy, start, noise, uniform, step=0.7, damping=0.5)
    found = (x @ axes).square().mean(0) * curvature
    assert 0.3 < probability[-10:].mean() < 0.97
    torch.testing.assert_close(found, torch.ones(6, dtype=F64), rtol=0, atol=0.35)
    other, _ = mala(energy, start, noise, uniform, step=0.7e-4)
    assert (other @ axes)[:, 0].square().mean() > 5


def test_each_half_has_its_own_conditioning() -> None:
    """A half that is moved with its energy takes the same steps: the metric of the other half does not change."""
    x, cond = rand(8, 2), torch.zeros(8, 2, dtype=F64)
    cond[4:] = 5.0

    def shifted(x: Tensor, cond: Tensor | None) -> Tensor:
        assert cond is not None
        return quartic(x - cond, None)

    def run(x: Tensor, cond: Tensor) -> Tensor:
        noise, uniform = rand(6, 8, 2, seed=1), uniforms(6, 8)
        return levenberg_marquardt(shifted, x, noise, uniform, step=0.3, damping=1.0, cond=cond)[0]

    torch.testing.assert_close(run(x + cond, cond), run(x, 0 * cond) + cond, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(run(x, torch.zeros(1, 2, dtype=F64)), run(x, 0 * cond))


def test_conditioning_dtype_and_compilation() -> None:
    x, noise, uniform, cond = rand(6, 2), rand(3, 6, 2, seed=1), uniforms(3, 6), rand(1, 2, seed=2).expand(6, -1)

    def shifted(x: Tensor, cond: Tensor | None) -> Tensor:
        assert cond is not None
        return quartic(x - cond, None)

    def run(x: Tensor, noise: Tensor, uniform: Tensor, cond: Tensor) -> Tensor:
        return levenberg_marquardt(shifted, x, noise, uniform, step=0.5, damping=1.0, cond=cond)[0]

    here, probability = levenberg_marquardt(quartic, x - cond, noise, uniform, step=0.5, damping=1.0)
    torch.testing.assert_close(run(x, noise, uniform, cond), cond + here)
    assert probability.shape == (3, 6)
    single = run(x.float(), noise.float(), uniform.float(), cond.float())
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), cond + here, rtol=1e-4, atol=1e-4)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, noise, uniform, cond), cond + here)


def test_bad_arguments_are_refused() -> None:
    x, noise, uniform = rand(4, 2), rand(3, 4, 2), uniforms(3, 4)
    with pytest.raises(ValueError, match=r"damping must be positive, got 0\.0"):
        levenberg_marquardt(quartic, x, noise, uniform, step=0.1, damping=0.0)
    with pytest.raises(ValueError, match=r"x must have an even number of rows, 4 at least, got \[3, 2\]"):
        levenberg_marquardt(quartic, x[:3], noise[:, :3], uniform[:, :3], step=0.1, damping=1.0)
    with pytest.raises(ValueError, match=r"uniform must have shape \[3, 4\], got \[3, 2\]"):
        levenberg_marquardt(quartic, x, noise, uniform[:, :2], step=0.1, damping=1.0)
    with pytest.raises(ValueError, match=r"energy must return shape \[2\], got \[2, 1\]; squeeze it"):
        levenberg_marquardt(lambda x, cond: x[:, :1], x, noise, uniform, step=0.1, damping=1.0)
    with pytest.raises(ValueError, match="step must be positive, got 0"):
        levenberg_marquardt(quartic, x, noise, uniform, step=0, damping=1.0)
