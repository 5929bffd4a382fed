import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from driftrl.dynamics.brownian import BrownianGrid
from driftrl.dynamics.brownian_tree import BrownianTree
from driftrl.dynamics.fields import MLPField, Time
from driftrl.dynamics.neural_sde import GeometricSDE, LangevinSDE, LinearNoiseSDE, interpolant_sde
from driftrl.dynamics.ode import odeint
from driftrl.dynamics.sde import SDE, SDE_SOLVERS, Drift, sdeint, sdeint_path

from .known_fields import LinearField

F64 = torch.float64


NAMES = sorted(SDE_SOLVERS)


DIAGONAL = [name for name in NAMES if not SDE_SOLVERS[name].additive_only]


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


def moments(sde: SDE, steps: int, solver: str, t1: float = 1.0) -> tuple[float, float, float]:
    """Of a linear equation with additive noise: the end is ``a x0 + b + sum_k c_k w_k``; a, b and the noise's variance.

    Exact, by derivatives: the solver's own discrete law without sampling.
    """

    def end(x: Tensor, w: Tensor, h: Tensor) -> Tensor:
        return sdeint(sde, x, steps=steps, solver=solver, noise=BrownianGrid(t1 / steps, w, h), t1=t1)

    x, w = torch.zeros(1, 1, dtype=F64), torch.zeros(steps, 1, 1, dtype=F64)
    by_x, by_w, by_h = torch.autograd.functional.jacobian(end, (x, w, w.clone()))
    variance = (by_w.square().sum() + by_h.square().sum() / 12) * t1 / steps
    return by_x.item(), end(x, w, w).item(), variance.item()


class SineNoise(SDE):
    """dx = -x dt + sin(x) dW: noise without a closed-form correction."""

    def bind(self, cond: Tensor | None, times: Sequence[float] = ()) -> Drift:
        return lambda t, x: -x

    def diffusion(self, t: Time, x: Tensor) -> Tensor:
        return torch.sin(x)


def test_euler_has_its_own_discrete_moments_on_an_ornstein_uhlenbeck_process() -> None:
    """x' = (1 - h k) x + s dW: mean factor (1 - h k)^n, variance s^2 h (1 - r^2n) / (1 - r^2) for r = 1 - h k."""
    k, s, n, t1 = 1.5, 0.7, 10, 2.0
    h = t1 / n
    r = 1 - h * k
    for solver in ("euler_maruyama", "milstein"):
        a, _, variance = moments(LangevinSDE(LinearField(torch.tensor([[-k]], dtype=F64)), s), n, solver, t1)
        assert a == pytest.approx(r**n, rel=1e-12)
        assert variance == pytest.approx(s**2 * h * (1 - r ** (2 * n)) / (1 - r**2), rel=1e-12)


@pytest.mark.parametrize(
    ("solver", "order"),
    [("euler_maruyama", 1), ("milstein", 1), ("stochastic_heun", 2), ("reversible_heun", 2), ("sra1", 2)],
)
def test_weak_order_on_an_ornstein_uhlenbeck_process(solver: str, order: int) -> None:
    """Without sampling: the error of the variance, which is (1 - e^(-2 k t)) s^2 / (2 k)."""
    sde, exact = LangevinSDE(lambda t, x, cond: -1.5 * x, 0.7), 0.49 * -math.expm1(-3.0) / 3
    errors = [abs(moments(sde, n, solver)[2] - exact) for n in (100, 200)]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.1)


def strong_order(
    sde: SDE, solver: str, x0: float, solution: Callable[[Tensor], Tensor], paths: int = 4000
) -> tuple[float, float]:
    """Slope of the root mean square error at t = 1 over 16 and 128 steps of the same paths, and the finer error."""
    fine = grid(128, paths, 1)
    exact = solution(fine.path()[-1])
    errors = []
    for factor in (8, 1):
        noise = fine.coarsen(factor)
        end = sdeint(sde, torch.full((paths, 1), x0, dtype=F64), steps=128 // factor, solver=solver, noise=noise)
        errors.append((end - exact).square().mean().sqrt().item())
    return math.log2(errors[0] / errors[1]) / 3, errors[1]


@pytest.mark.parametrize("solver", DIAGONAL)
@pytest.mark.parametrize("kind", [LinearNoiseSDE, GeometricSDE])
def test_strong_order_on_geometric_brownian_motion(solver: str, kind: type[LinearNoiseSDE]) -> None:
    """All solvers, Stratonovich ones too, meet Ito's solution x0 exp((mu - s^2 / 2) t + s W)."""
    mu, s = 0.5, 0.8
    drift = (lambda t, x, cond: torch.full_like(x, mu)) if kind is GeometricSDE else (lambda t, x, cond: mu * x)
    order, error = strong_order(kind(drift, s), solver, 1.0, lambda w: torch.exp((mu - s**2 / 2) + s * w))
    # 4000 paths: a slope over three octaves from errors known to some 5 %, and higher-order terms; 0.12 covers both.
    # On this commutative noise reversible Heun, of order 0.5 in general, attains 1.
    expected = {"reversible_heun": 1.0}.get(solver, SDE_SOLVERS[solver].order)
    assert order == pytest.approx(expected, abs=0.12)
    assert error < 0.2


@pytest.mark.parametrize("solver", NAMES)
def test_strong_order_for_additive_noise(solver: str) -> None:
    """dx = (m + b e^-x) dt + s dW has x = log(e^(x0 + m t + s W_t) + b integral_0^t e^(m (t - r) + s (W_t - W_r)) dr).

    The integral by quadrature over 4096 steps, each with the mean of W over it: good to s^2 / (12 * 4096) = 1e-5.
    """
    m, b, s, x0 = 0.2, 1.0, 0.8, -0.5
    fine = grid(4096, 500, 1)
    assert fine.h is not None
    mean = fine.path()[:-1] + 0.5 * fine.w + fine.h
    midpoints = ((torch.arange(4096, dtype=F64) + 0.5) / 4096).view(-1, 1, 1)
    growth = m + s * fine.path()[-1]
    exact = torch.log(torch.exp(x0 + growth) + b * torch.exp(growth - m * midpoints - s * mean).mean(0))
    sde = LangevinSDE(lambda t, x, cond: m + b * torch.exp(-x), s)
    errors = []
    for steps in (8, 64):
        noise = fine.coarsen(4096 // steps)
        end = sdeint(sde, torch.full((500, 1), x0, dtype=F64), steps=steps, solver=solver, noise=noise)
        errors.append((end - exact).square().mean().sqrt().item())
    order = 1.5 if solver == "sra1" else 1.0
    # 500 paths: both errors known to some 10 %, and strongly correlated; higher-order terms add to that.
    assert math.log2(errors[0] / errors[1]) / 3 == pytest.approx(order, abs=0.2)
    assert errors[1] < (1e-3 if solver == "sra1" else 1e-2)


def test_sra1_needs_its_area() -> None:
    """With the area of another path it falls back to order 1 and errs more: the area is used, in the right place."""
    sde, x = LangevinSDE(lambda t, x, cond: -torch.sin(3 * x), 1.0), rand(2000, 1)
    fine = grid(256, 2000, 1)
    exact = sdeint(sde, x, steps=256, solver="sra1", noise=fine)
    noise = fine.coarsen(32)
    other = grid(8, 2000, 1, seed=1)
    right, wrong = (
        (sdeint(sde, x, steps=8, solver="sra1", noise=BrownianGrid(1 / 8, noise.w, h)) - exact).square().mean().sqrt()
        for h in (noise.h, other.h)
    )
    assert right < 0.6 * wrong


@pytest.mark.parametrize("steps", [1, 4])
def test_sra1_integrates_a_linear_noise_level_exactly(steps: int) -> None:
    """The integral of 1 + 3 t against dW over [0, 1] is w + 3 (w / 2 - h), by parts."""
    noise, sde = grid(steps, 5, 2), LangevinSDE(lambda t, x, cond: torch.zeros_like(x), lambda t: 1 + 3 * t)
    whole = noise.coarsen(steps)
    assert whole.h is not None
    end = sdeint(sde, torch.zeros(5, 2, dtype=F64), steps=steps, solver="sra1", noise=noise)
    torch.testing.assert_close(end, whole.w[0] + 3 * (0.5 * whole.w[0] - whole.h[0]), rtol=0, atol=1e-13)


def test_solvers_without_noise_are_those_of_the_ode() -> None:
    field, x, cond = mlp(), rand(4, 3), rand(4, 2, seed=1)
    noise = BrownianGrid(0.2, torch.zeros(5, 4, 3, dtype=F64), torch.zeros(5, 4, 3, dtype=F64))
    for solver, same in (("euler_maruyama", "euler"), ("milstein", "euler"), ("stochastic_heun", "heun")):
        ours = sdeint(LangevinSDE(field, 1.0), x, steps=5, solver=solver, noise=noise, cond=cond)
        torch.testing.assert_close(ours, odeint(field, x, steps=5, solver=same, cond=cond), rtol=0, atol=1e-13)


def test_correction_by_a_backward_pass() -> None:
    x = rand(5, 3)
    torch.testing.assert_close(SineNoise().correction(0.0, x), torch.sin(x) * torch.cos(x))


def test_milstein_and_heun_agree_on_nonlinear_noise() -> None:
    """Two schemes of order 1, one for Ito and one for Stratonovich, one with and one without derivatives of g."""
    x, fine = torch.full((1000, 1), 1.0, dtype=F64), grid(256, 1000, 1)
    gaps = []
    for factor in (8, 1):
        noise = fine.coarsen(factor)
        ends = [
            sdeint(SineNoise(), x, steps=256 // factor, solver=s, noise=noise) for s in ("milstein", "stochastic_heun")
        ]
        gaps.append((ends[0] - ends[1]).square().mean().sqrt().item())
    assert math.log2(gaps[0] / gaps[1]) / 3 == pytest.approx(1, abs=0.15)


def test_reversible_heun_is_reversible() -> None:
    """The step back is the step with -h and -w, from the whole carried state; exact up to rounding."""
    solver, x = SDE_SOLVERS["reversible_heun"], rand(4, 3)
    sde = LinearNoiseSDE(lambda t, x, cond: torch.sin(x) * (1 + t), 0.7)
    seen: list[Any] = []

    def spy(*arguments: Any) -> Any:
        seen.append((arguments, solver.step(*arguments)))
        return seen[-1][1]

    sdeint(sde, x, steps=3, noise=grid(3, 4, 3), solver=type(solver)(**{**vars(solver), "step": spy}))
    for (equation, t, h, before, w, _), after in seen:
        for old, new in zip(before, solver.step(equation, t + h, -h, after, -w, None), strict=True):
            torch.testing.assert_close(new, old, rtol=0, atol=1e-13)


def test_path_passes_through_every_step() -> None:
    sde, x, noise = LinearNoiseSDE(mlp(), 0.5), rand(4, 3), grid(5, 4, 3)
    cond = rand(4, 2, seed=1)
    for solver in DIAGONAL:
        path = sdeint_path(sde, x, steps=5, solver=solver, noise=noise, cond=cond)
        assert path.shape == (6, 4, 3)
        assert torch.equal(path[0], x)
        assert torch.equal(path[-1], sdeint(sde, x, steps=5, solver=solver, noise=noise, cond=cond))


def test_conditioning_is_embedded_once() -> None:
    field, seen = mlp(), []
    embed, forward = field.embed, field.forward_embedded

    def counted(cond: Tensor | None, times: Sequence[float] = ()) -> Any:
        seen.append(tuple(times))
        return embed(cond, times)

    def checked(t: Time, x: Tensor, embedded: Any) -> Tensor:
        assert t in embedded.by_time  # no stage's time is embedded late
        return forward(t, x, embedded)

    field.embed, field.forward_embedded = counted, checked  # type: ignore[method-assign]
    for solver in NAMES:
        sdeint(LangevinSDE(field, 1.0), rand(4, 3), steps=7, solver=solver, noise=grid(7, 4, 3), cond=rand(4, 2))
    assert len(seen) == len(NAMES)


def additive_and_linear(solver: str, field: MLPField, scale: float | Tensor = 0.6) -> SDE:
    return (LangevinSDE if SDE_SOLVERS[solver].additive_only else LinearNoiseSDE)(field, scale)


@pytest.mark.parametrize("solver", NAMES)
def test_gradients_against_finite_differences(solver: str) -> None:
    field, scale = mlp(), torch.tensor([0.3, 0.5, 0.7], dtype=F64, requires_grad=True)
    noise = grid(2, 2, 3)
    assert noise.h is not None

    def run(x: Tensor, cond: Tensor, scale: Tensor, w: Tensor, h: Tensor, *parameters: Tensor) -> Tensor:
        sde = additive_and_linear(solver, field, scale)
        return sdeint(sde, x, steps=2, solver=solver, noise=BrownianGrid(0.5, w, h), cond=cond)

    tensors = (rand(2, 3), rand(2, 2, seed=1), scale, noise.w, noise.h)
    assert torch.autograd.gradcheck(run, (*(v.detach().requires_grad_() for v in tensors), field.output.bias))


@pytest.mark.parametrize("solver", NAMES)
def test_row_alone_equals_row_in_a_batch(solver: str) -> None:
    sde, x, cond, noise = additive_and_linear(solver, mlp()), rand(33, 3), rand(33, 2), grid(4, 33, 3)
    assert noise.h is not None
    batch = sdeint(sde, x, steps=4, solver=solver, noise=noise, cond=cond)
    row = BrownianGrid(noise.dt, noise.w[:, 7:8], noise.h[:, 7:8])
    alone = sdeint(sde, x[7:8], steps=4, solver=solver, noise=row, cond=cond[7:8])
    torch.testing.assert_close(alone, batch[7:8], rtol=0, atol=1e-12)


@pytest.mark.parametrize("solver", NAMES)
def test_float32_follows_float64_and_draws_from_the_generator_only(solver: str) -> None:
    sde, x, state = additive_and_linear(solver, mlp()), rand(4, 3), torch.get_rng_state()
    noise = grid(4, 4, 3)
    assert noise.h is not None
    precise = sdeint(sde, x, steps=4, solver=solver, noise=noise, cond=x[:, :2])
    narrow = BrownianGrid(noise.dt, noise.w.float(), noise.h.float())
    single = sdeint(sde.float(), x.float(), steps=4, solver=solver, noise=narrow, cond=x[:, :2].float())
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), precise, rtol=1e-5, atol=1e-5)
    ends = [
        sdeint(sde, x.float(), steps=4, solver=solver, generator=generator(1), cond=x[:, :2].float()) for _ in range(2)
    ]
    assert torch.equal(*ends)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_tree_drives_the_solvers() -> None:
    """Brownian motion itself: the end is x + s W."""
    tree = BrownianTree(1, (4, 3), t1=2.0, dtype=F64)
    sde = LangevinSDE(lambda t, x, cond: torch.zeros_like(x), 0.5)
    for solver in NAMES:
        end = sdeint(sde, rand(4, 3), steps=5, solver=solver, noise=tree.grid(5), t1=2.0)
        torch.testing.assert_close(end, rand(4, 3) + 0.5 * tree(2.0), rtol=0, atol=1e-13)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # raised inside torch when inductor is imported
@pytest.mark.parametrize(
    ("solver", "backend"),
    [*((name, "eager") for name in NAMES), pytest.param("stochastic_heun", "inductor", marks=pytest.mark.slow)],
)
def test_compiles_without_graph_breaks(solver: str, backend: str) -> None:
    x, cond, noise = rand(4, 3), rand(4, 2), grid(3, 4, 3)
    for sde in (additive_and_linear(solver, mlp()), interpolant_sde(mlp(), 0.3)):

        def run(x: Tensor, cond: Tensor, noise: BrownianGrid, sde: SDE = sde) -> Tensor:
            return sdeint(sde, x, steps=3, solver=solver, noise=noise, cond=cond, t1=0.9)

        scaled = BrownianGrid(0.3, noise.w, noise.h)
        torch.compiler.reset()
        compiled = torch.compile(run, fullgraph=True, backend=backend)
        torch.testing.assert_close(compiled(x, cond, scaled), run(x, cond, scaled), rtol=0, atol=1e-12)


@pytest.mark.gpu
@pytest.mark.parametrize("solver", NAMES)
def test_results_on_a_gpu_are_those_on_the_cpu(solver: str) -> None:
    sde, x, cond, noise = additive_and_linear(solver, mlp()), rand(4, 3), rand(4, 2), grid(3, 4, 3)
    assert noise.h is not None
    there = sdeint(
        additive_and_linear(solver, mlp()).cuda(),
        x.cuda(),
        steps=3,
        solver=solver,
        noise=BrownianGrid(noise.dt, noise.w.cuda(), noise.h.cuda()),
        cond=cond.cuda(),
    )
    here = sdeint(sde, x, steps=3, solver=solver, noise=noise, cond=cond)
    torch.testing.assert_close(there.cpu(), here, rtol=0, atol=1e-12)


def test_bad_arguments_are_refused() -> None:
    sde, x, noise = LangevinSDE(lambda t, x, cond: -x, 1.0), torch.zeros(4, 2), grid(2, 4, 2)
    good = BrownianGrid(0.5, noise.w.float())

    for integrate in (sdeint, sdeint_path):

        def run(sde: SDE = sde, x: Tensor = x, integrate: Any = integrate, **options: Any) -> Tensor:
            return integrate(sde, x, **{"steps": 2, "noise": good, **options})  # type: ignore[no-any-return]

        with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
            run(steps=0)
        with pytest.raises(ValueError, match=r"solver must be one of \['euler_maruyama', .*got 'euler'"):
            run(solver="euler")
        with pytest.raises(ValueError, match=r"x must have shape \[B, D\], got \[2\]"):
            run(x=x[0])
        with pytest.raises(ValueError, match=r"t1 must be above t0, got t0=1\.0 and t1=0\.0"):
            run(t0=1.0, t1=0.0)
        with pytest.raises(ValueError, match="solver 'sra1' needs additive noise, got LinearNoiseSDE"):
            run(sde=LinearNoiseSDE(lambda t, x, cond: x, 1.0), solver="sra1")
        with pytest.raises(ValueError, match="solver 'sra1' needs the Levy area, got noise without h"):
            run(solver="sra1")
        with pytest.raises(ValueError, match="exactly one of noise and generator, got neither"):
            run(noise=None)
        with pytest.raises(ValueError, match="exactly one of noise and generator, got both"):
            run(generator=generator())
        with pytest.raises(ValueError, match=r"noise must be \(\[3, 4, 2\], .*got \(\[2, 4, 2\]"):
            run(steps=3)
        with pytest.raises(ValueError, match=r"noise must be .*float32.*got .*float64"):
            run(noise=noise)
        with pytest.raises(ValueError, match=r"noise must be .*cpu.*got .*meta"):
            run(noise=BrownianGrid(0.5, good.w.to("meta")))
        with pytest.raises(ValueError, match=r"noise must have dt = \(t1 - t0\) / steps = 1\.0, got 0\.5"):
            run(t1=2.0)


def test_terms_that_would_enlarge_the_state_are_refused() -> None:
    x, generator = torch.ones(4, 1, dtype=F64), torch.Generator().manual_seed(0)
    with pytest.raises(ValueError, match=r"field must return the shape of x, \[4, 1\], got \[4\]"):
        sdeint(LangevinSDE(lambda t, x, c: -x[:, 0], 0.3), x, steps=3, generator=generator)
    with pytest.raises(ValueError, match=r"diffusion must broadcast with x, \[4, 1\], got \[4\]"):
        sdeint(LangevinSDE(lambda t, x, c: -x, lambda t: torch.ones(4, dtype=F64)), x, steps=3, generator=generator)


def test_a_drift_of_another_shape_is_refused() -> None:
    class Column(LangevinSDE):
        def bind(self, cond: Tensor | None, times: Sequence[float] = ()) -> Drift:
            return lambda t, x: -x[:, 0]

    for solver in NAMES:
        with pytest.raises(ValueError, match=r"drift must return the shape of x, \[5, 1\], got \[5\]"):
            sdeint(Column(lambda t, x, cond: x, 1.0), rand(5, 1), steps=2, solver=solver, noise=grid(2, 5, 1))
