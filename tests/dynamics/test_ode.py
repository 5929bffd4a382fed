import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from driftrl.dynamics.fields import MLPField, Time
from driftrl.dynamics.ode import (
    DOPRI5,
    EULER,
    HEUN,
    MIDPOINT,
    SOLVERS,
    Tableau,
    bind,
    error_estimate,
    get_tableau,
    least_growth,
    odeint,
    odeint_path,
    stability,
    stage_slopes,
    time_grid,
)
from driftrl.dynamics.reversible import odeint_reversible

from .known_fields import LinearField, SumField

F64 = torch.float64


NAMES = sorted(SOLVERS)


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def mlp(**options: object) -> MLPField:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return MLPField(3, 2, **{"hidden": (8, 8), "last_layer_scale": 1.0, **options}).double()  # type: ignore[arg-type]


def riccati(t: Time, x: Tensor, cond: Tensor | None) -> Tensor:
    """x' = -2 t x^2 has the solution 1 / (t^2 + 1 / x(0)): nonlinear and nonautonomous."""
    return -2 * t * x.square()


@pytest.mark.parametrize("name", NAMES)
def test_convergence_order_on_a_nonlinear_nonautonomous_problem(name: str) -> None:
    x0 = torch.tensor([[0.8], [1.3]], dtype=F64)
    exact = 1 / (1 + 1 / x0)
    errors = [(odeint(riccati, x0, steps=n, solver=name) - exact).abs().max().item() for n in (40, 80)]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(SOLVERS[name].order, abs=0.1)


@pytest.mark.parametrize("name", NAMES)
def test_linear_flow_converges_to_the_matrix_exponential(name: str) -> None:
    matrix, x0 = 0.5 * rand(3, 3), rand(4, 3, seed=1)
    exact = x0 @ torch.linalg.matrix_exp(matrix).T
    errors = [(odeint(LinearField(matrix), x0, steps=n, solver=name) - exact).abs().max().item() for n in (16, 32)]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(SOLVERS[name].order, abs=0.15)


@pytest.mark.parametrize("name", NAMES)
def test_one_linear_step_is_the_truncated_exponential(name: str) -> None:
    matrix, x0, h = rand(3, 3), rand(4, 3, seed=1), 0.3
    power, step = torch.eye(3, dtype=F64), torch.eye(3, dtype=F64)
    for k in range(1, SOLVERS[name].order + 1):
        power = power @ (h * matrix) / k
        step = step + power
    end = odeint(LinearField(matrix), x0, steps=1, solver=name, t1=h)
    torch.testing.assert_close(end, x0 @ step.T, rtol=0, atol=1e-14)


@pytest.mark.parametrize("tableau", [*SOLVERS.values(), DOPRI5], ids=lambda tableau: tableau.name)
def test_tableau_is_consistent(tableau: Tableau) -> None:
    assert math.fsum(tableau.b) == pytest.approx(1, abs=1e-15)
    assert [len(row) for row in tableau.a] == list(range(len(tableau.c)))
    assert [math.fsum(row) for row in tableau.a] == pytest.approx(tableau.c, abs=1e-15)
    assert SOLVERS.get(tableau.name, DOPRI5) is tableau


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 12), st.sampled_from(NAMES), st.floats(0, 3), st.floats(0.1, 3), st.booleans())
def test_time_grid_is_the_set_of_times_at_which_the_solver_calls(
    steps: int, name: str, start: float, length: float, backwards: bool
) -> None:
    t0, t1 = (start + length, start) if backwards else (start, start + length)
    called: list[float] = []

    def field(t: Time, x: Tensor, cond: Tensor | None) -> Tensor:
        assert isinstance(t, float)
        called.append(t)
        return x

    odeint(field, torch.ones(1, 1), steps=steps, solver=name, t0=t0, t1=t1)
    grid = time_grid(steps, name, t0, t1)
    assert len(grid) == {"euler": 1, "heun": 1, "midpoint": 2, "rk4": 2}[name] * steps + 1
    assert grid[0] == t0 and grid[-1] == t1
    assert all((b - a) * (t1 - t0) > 0 for a, b in pairwise(grid))
    assert max(min(abs(t - g) for g in grid) for t in called) < 1e-12
    assert max(min(abs(t - g) for t in called) for g in grid[:-1]) < 1e-12  # only t1 may go without a call
    assert len(called) == steps * len(SOLVERS[name].c)


@pytest.mark.parametrize("steps", [1, 3, 7, 10, 49, 1000])
def test_no_stage_lies_outside_the_unit_interval(steps: int) -> None:
    def field(t: Time, x: Tensor, cond: Tensor | None) -> Tensor:
        return x * math.sqrt(1 - t)  # fails for a t of 1 + 1e-16

    odeint(field, torch.ones(1, 1), steps=steps, solver="rk4")
    odeint(lambda t, x, cond: x * math.sqrt(t), torch.ones(1, 1), steps=steps, solver="rk4", t0=1.0, t1=0.0)


def test_midpoint_grid_of_policyflow() -> None:
    assert len(time_grid(10)) == 21
    assert time_grid(10) == pytest.approx([k / 20 for k in range(21)], abs=1e-15)
    assert time_grid(2, EULER) == (0.0, 0.5, 1.0)


def test_path_passes_through_every_step() -> None:
    field, x, cond = mlp(), rand(4, 3), rand(4, 2, seed=1)
    path = odeint_path(field, x, steps=5, solver="rk4", cond=cond)
    assert path.shape == (6, 4, 3)
    assert torch.equal(path[0], x)
    assert torch.equal(path[-1], odeint(field, x, steps=5, solver="rk4", cond=cond))
    times = time_grid(5, EULER)
    for k, (t, t_next) in enumerate(pairwise(times)):
        end = odeint(field, path[k], steps=1, solver="rk4", cond=cond, t0=t, t1=t_next)
        torch.testing.assert_close(path[k + 1], end)


@pytest.mark.parametrize("name", NAMES)
def test_agrees_with_torchdiffeq(name: str) -> None:
    torchdiffeq = pytest.importorskip("torchdiffeq")
    method = {"euler": "euler", "midpoint": "midpoint", "heun": "heun2", "rk4": "rk4"}[name]
    field, x, cond = mlp(), rand(4, 3), rand(4, 2, seed=1)
    if name == "rk4":  # torchdiffeq's "rk4" is the 3/8 rule
        tableau = Tableau(
            "rk4_38",
            4,
            a=((), (1 / 3,), (-1 / 3, 1.0), (1.0, -1.0, 1.0)),
            b=(1 / 8, 3 / 8, 3 / 8, 1 / 8),
            c=(0.0, 1 / 3, 2 / 3, 1.0),
        )
    else:
        tableau = SOLVERS[name]
    times = torch.linspace(0, 1, 6, dtype=F64)
    theirs = torchdiffeq.odeint(lambda t, y: field(t, y, cond), x, times, method=method)
    torch.testing.assert_close(odeint_path(field, x, steps=5, solver=tableau, cond=cond), theirs, rtol=0, atol=1e-12)


def test_conditioning_is_embedded_once() -> None:
    field, calls = mlp(), 0
    embed = field.embed

    def counted(cond: Tensor | None, times: Sequence[float] = ()) -> Any:
        nonlocal calls
        calls += 1
        return embed(cond, times)

    field.embed = counted  # type: ignore[method-assign]
    x, cond = rand(4, 3), rand(4, 2)
    result = odeint(field, x, steps=4, cond=cond)
    assert calls == 1
    plain = odeint(lambda t, y, c: mlp()(t, y, c), x, steps=4, cond=cond)
    torch.testing.assert_close(result, plain, rtol=0, atol=1e-14)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_against_finite_differences(name: str) -> None:
    field = SumField(LinearField(rand(3, 3)), mlp(hidden=(4,)))

    def run(x: Tensor, cond: Tensor, *parameters: Tensor) -> Tensor:
        return odeint(field, x, steps=2, solver=name, cond=cond)

    inputs = (rand(2, 3).requires_grad_(), rand(2, 2, seed=1).requires_grad_(), *field.parameters())
    assert torch.autograd.gradcheck(run, inputs)


@pytest.mark.parametrize("name", NAMES)
def test_untrained_field_is_the_identity(name: str) -> None:
    x = torch.randn(5, 3)
    assert torch.equal(odeint(MLPField(3, 2), x, steps=3, solver=name, cond=torch.randn(5, 2)), x)


def test_backward_integration_returns() -> None:
    field, x, cond = mlp(), rand(4, 3), rand(4, 2)
    there = odeint(field, x, steps=64, solver="rk4", cond=cond)
    back = odeint(field, there, steps=64, solver="rk4", cond=cond, t0=1.0, t1=0.0)
    torch.testing.assert_close(back, x, rtol=0, atol=1e-8)
    assert (there - x).abs().max() > 1e-2


def test_row_alone_equals_row_in_a_batch() -> None:
    field, x, cond = mlp(), rand(33, 3), rand(33, 2)
    batch = odeint(field, x, steps=4, cond=cond)
    torch.testing.assert_close(odeint(field, x[7:8], steps=4, cond=cond[7:8]), batch[7:8], rtol=0, atol=1e-12)


def test_float32_stays_float32() -> None:
    field = mlp().float()
    result = odeint(field, torch.zeros(2, 3), steps=2, cond=torch.zeros(2, 2))
    assert result.dtype == torch.float32


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # raised inside torch when inductor is imported
@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_without_graph_breaks(backend: str) -> None:
    field, x, cond = mlp(), rand(4, 3), rand(4, 2)
    torch.compiler.reset()
    compiled = torch.compile(lambda x, cond: odeint(field, x, steps=3, cond=cond), fullgraph=True, backend=backend)
    torch.testing.assert_close(compiled(x, cond), odeint(field, x, steps=3, cond=cond), rtol=0, atol=1e-12)
    trace = torch.compile(lambda x, cond: field.divergence(0.3, x, cond)[1], fullgraph=True, backend=backend)
    torch.testing.assert_close(trace(x, cond), field.divergence(0.3, x, cond)[1], rtol=0, atol=1e-12)


def test_dopri5_has_order_five() -> None:
    x0 = torch.tensor([[0.8], [1.3]], dtype=F64)
    exact = 1 / (1 + 1 / x0)
    errors = [(odeint(riccati, x0, steps=n, solver=DOPRI5) - exact).abs().max().item() for n in (24, 48)]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(5, abs=0.25)  # approached from above


def test_one_linear_dopri5_step_in_closed_form() -> None:
    # Stability polynomials of the pair: exp to order 5 plus z^6 / 600, and for the embedded method
    # 1 + z + z^2/2 + z^3/6 + z^4/24 + 1097 z^5 / 120000 + 161 z^6 / 120000 + z^7 / 24000 (Hairer et al. 1993).
    matrix, x, h = 2 * rand(3, 3), rand(4, 3, seed=1), 0.3
    powers = [torch.linalg.matrix_power(h * matrix, k) for k in range(8)]
    step = sum((powers[k] / math.factorial(k) for k in range(6)), powers[6] / 600)
    embedded = sum((powers[k] / math.factorial(k) for k in range(5)), powers[5] * 1097 / 120000)
    embedded = embedded + powers[6] * 161 / 120000 + powers[7] / 24000
    field = LinearField(matrix)
    end = odeint(field, x, steps=1, solver=DOPRI5, t1=h)
    torch.testing.assert_close(end, x @ step.T, rtol=0, atol=1e-13)
    slopes = [*stage_slopes(bind(field, None), DOPRI5, 0.0, h, x), field(h, end)]
    torch.testing.assert_close(error_estimate(DOPRI5, h, slopes), x @ (step - embedded).T, rtol=0, atol=1e-13)


def test_heun_error_is_its_difference_from_euler() -> None:
    x = rand(4, 1).abs()
    slopes = stage_slopes(bind(riccati, None), HEUN, 0.2, 0.1, x)
    ends = [odeint(riccati, x, steps=1, solver=solver, t0=0.2, t1=0.3) for solver in (HEUN, EULER)]
    expected = ends[0] - ends[1]
    torch.testing.assert_close(error_estimate(HEUN, 0.1, slopes), expected, rtol=0, atol=1e-15)


@pytest.mark.gpu
def test_gpu_equals_cpu() -> None:
    field, x, cond = mlp(), rand(4, 3), rand(4, 2)
    ends = [odeint(field, x, steps=4, solver=DOPRI5, cond=cond), odeint_reversible(field, x, steps=4, cond=cond)]
    field, x, cond = field.cuda(), x.cuda(), cond.cuda()
    theirs = [odeint(field, x, steps=4, solver=DOPRI5, cond=cond), odeint_reversible(field, x, steps=4, cond=cond)]
    torch.testing.assert_close([end.cpu() for end in theirs], ends, rtol=0, atol=1e-12)


def test_bad_arguments_are_refused() -> None:
    field, x = LinearField(torch.eye(2)), torch.zeros(4, 2)
    for integrate in (odeint, odeint_path):
        with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
            integrate(field, x, steps=0)
        with pytest.raises(ValueError, match=r"solver must be one of \['euler', .*got 'rk5'"):
            integrate(field, x, steps=1, solver="rk5")
        with pytest.raises(ValueError, match=r"x must have shape \[B, D\], got \[2\]"):
            integrate(lambda t, y, cond: y, torch.zeros(2), steps=1)
    with pytest.raises(ValueError, match="steps must be at least 1, got -1"):
        time_grid(-1, MIDPOINT)
    with pytest.raises(ValueError, match="solver must be one of"):
        time_grid(1, "dopri5")


@pytest.mark.parametrize(("solver", "least"), [("euler", 0.0), ("midpoint", 0.5), ("heun", 0.5), ("rk4", 0.2704)])
def test_stability_function_is_the_truncated_exponential(solver: str, least: float) -> None:
    w = torch.tensor([-1.5, -0.3, 0.0, 0.7], dtype=torch.float64)
    series = sum(w**k / math.factorial(k) for k in range(get_tableau(solver).order + 1))
    torch.testing.assert_close(stability(solver, w), series)
    assert least_growth(solver) == pytest.approx(least, abs=1e-4)
