import math

import pytest
import torch
from torch import Tensor

from driftrl.dynamics.fields import MLPField, Time, VelocityField
from driftrl.dynamics.likelihood import Mode, flow_log_prob, flow_push, standard_normal_log_prob
from driftrl.dynamics.ode import SOLVERS, odeint
from driftrl.dynamics.special_fields import PotentialField

from .known_fields import LinearField, SumField

F64 = torch.float64
NAMES = sorted(SOLVERS)
MODES: tuple[Mode, ...] = ("ode", "map")


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def mlp(dim: int = 3, **options: object) -> MLPField:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return MLPField(dim, 2, **{"hidden": (8, 8), "last_layer_scale": 1.0, **options}).double()  # type: ignore[arg-type]


def step_matrix(matrix: Tensor, h: float, order: int) -> Tensor:
    """The linear map of one step: the exponential's series up to the order, true of all our solvers."""
    power = step = torch.eye(len(matrix), dtype=F64)
    for k in range(1, order + 1):
        power = power @ (h * matrix) / k
        step = step + power
    return step


class Square(VelocityField):
    """v = -x^2, whose Euler step x - h x^2 folds at x = 1 / (2 h)."""

    def forward(self, t: Time, x: Tensor, cond: Tensor | None = None) -> Tensor:
        return -x.square()


def test_standard_normal() -> None:
    x = rand(5, 3)
    expected = torch.distributions.MultivariateNormal(torch.zeros(3, dtype=F64), torch.eye(3, dtype=F64)).log_prob(x)
    torch.testing.assert_close(standard_normal_log_prob(x), expected)


@pytest.mark.parametrize("name", NAMES)
def test_linear_log_det_and_its_gradient_in_closed_form(name: str) -> None:
    matrix, x0, steps = rand(3, 3).requires_grad_(), rand(4, 3, seed=1), 3
    _, log_det = flow_push(LinearField(matrix), x0, steps=steps, solver=name, mode="map")
    (gradient,) = torch.autograd.grad(log_det[0], matrix)
    one = step_matrix(matrix.detach(), 1 / steps, SOLVERS[name].order)
    expected = math.log(abs(torch.linalg.det(torch.linalg.matrix_power(one, steps)).item()))
    torch.testing.assert_close(log_det, torch.full((4,), expected, dtype=F64), rtol=0, atol=1e-12)
    if name == "euler":  # d log|det(I + hA)^K| / dA = (I + hA)^-T
        torch.testing.assert_close(gradient, torch.linalg.inv(one).T, rtol=0, atol=1e-12)
    x1, log_det = flow_push(LinearField(matrix), x0, steps=steps, solver=name, mode="ode")
    torch.testing.assert_close(x1, x0 @ torch.linalg.matrix_power(one, steps).T)
    torch.testing.assert_close(log_det, matrix.trace().expand(4), rtol=0, atol=1e-12)
    torch.testing.assert_close(torch.autograd.grad(log_det[0], matrix)[0], torch.eye(3, dtype=F64), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "field",
    [
        mlp(),
        mlp(hidden=(6, 5, 4), activation="mish"),
        SumField(LinearField(rand(3, 3)), mlp()),
    ],
    ids=["two layers", "three layers", "residual"],
)
def test_map_log_det_equals_that_of_the_autodiff_jacobian_of_odeint(name: str, field: VelocityField) -> None:
    x0, cond = rand(4, 3), rand(4, 2, seed=1)
    x1, log_det = flow_push(field, x0, steps=3, solver=name, cond=cond, mode="map")
    torch.testing.assert_close(x1, odeint(field, x0, steps=3, solver=name, cond=cond), rtol=0, atol=1e-14)
    for b in range(4):
        jacobian = torch.func.jacrev(
            lambda y, b=b: odeint(field, y[None], steps=3, solver=name, cond=cond[b : b + 1])[0]
        )(x0[b])
        torch.testing.assert_close(log_det[b], torch.linalg.slogdet(jacobian)[1], rtol=0, atol=1e-12)


def test_modes_differ_for_few_steps_and_meet_for_many() -> None:
    field, x0, cond = SumField(LinearField(2 * torch.eye(3, dtype=F64)), mlp()), rand(4, 3), rand(4, 2)
    gaps = {
        steps: (
            flow_push(field, x0, steps=steps, solver="rk4", cond=cond, mode="map")[1]
            - flow_push(field, x0, steps=steps, solver="rk4", cond=cond, mode="ode")[1]
        )
        for steps in (1, 32, 64)
    }
    assert gaps[1].abs().min() > 0.05
    order = torch.log2(gaps[32].abs() / gaps[64].abs())
    assert order.min() > 3.5


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("mode", MODES)
def test_push_does_what_odeint_does_and_is_differentiable(name: str, mode: Mode) -> None:
    field = mlp(dim=2, hidden=(4,))

    def run(x: Tensor, cond: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        return flow_push(field, x, steps=2, solver=name, cond=cond, mode=mode)

    inputs = (rand(2, 2).requires_grad_(), rand(2, 2, seed=1).requires_grad_(), *field.parameters())
    torch.testing.assert_close(run(*inputs)[0], odeint(field, inputs[0], steps=2, solver=name, cond=inputs[1]))
    assert torch.autograd.gradcheck(run, inputs)


@pytest.mark.parametrize("name", NAMES)
def test_map_log_prob_inverts_the_push_exactly(name: str) -> None:
    field, x0, cond = mlp(), rand(5, 3), rand(5, 2, seed=1)
    x1, log_det = flow_push(field, x0, steps=3, solver=name, cond=cond, mode="map")
    log_prob = flow_log_prob(
        field, x1, base_log_prob=standard_normal_log_prob, steps=3, solver=name, cond=cond, mode="map"
    )
    torch.testing.assert_close(log_prob, standard_normal_log_prob(x0) - log_det, rtol=0, atol=1e-12)


@pytest.mark.parametrize("mode", MODES)
def test_log_prob_is_differentiable(mode: Mode) -> None:
    field = mlp(dim=2, hidden=(4,))

    def run(x: Tensor, cond: Tensor, *parameters: Tensor) -> Tensor:
        return flow_log_prob(
            field, x, base_log_prob=standard_normal_log_prob, steps=2, solver="midpoint", cond=cond, mode=mode
        )

    inputs = (rand(2, 2).requires_grad_(), rand(2, 2, seed=1).requires_grad_(), *field.parameters())
    assert torch.autograd.gradcheck(run, inputs)


# The loose tolerance tells rows that keep iterating with their batch from rows that stop by themselves.
@pytest.mark.parametrize(("mode", "tolerance"), [("ode", None), ("map", None), ("map", 1e-2)])
def test_log_prob_alone_equals_log_prob_in_a_batch(mode: Mode, tolerance: float | None) -> None:
    field, x, cond = SumField(LinearField(rand(3, 3)), mlp()), 2 * rand(33, 3), rand(33, 2, seed=1)

    def log_prob(rows: slice) -> Tensor:
        return flow_log_prob(
            field,
            x[rows],
            base_log_prob=standard_normal_log_prob,
            steps=4,
            cond=cond[rows],
            mode=mode,
            tolerance=tolerance,
        )

    together = log_prob(slice(None))
    alone = torch.cat([log_prob(slice(b, b + 1)) for b in range(33)])
    torch.testing.assert_close(alone, together, rtol=0, atol=1e-12)


@pytest.mark.parametrize("mode", MODES)
def test_density_of_a_linear_gaussian_flow(mode: Mode) -> None:
    matrix, offset, x1, steps = 0.5 * rand(2, 2), rand(2, seed=1), rand(6, 2, seed=2), 4
    field = LinearField(matrix, offset)
    log_prob = flow_log_prob(
        field,
        x1,
        base_log_prob=standard_normal_log_prob,
        steps=400 if mode == "ode" else steps,
        solver="rk4",
        mode=mode,
    )
    if mode == "map":
        transport = torch.linalg.matrix_power(step_matrix(matrix, 1 / steps, 4), steps)
        mean = odeint(field, torch.zeros(1, 2, dtype=F64), steps=steps, solver="rk4")[0]
    else:
        transport = torch.linalg.matrix_exp(matrix)
        mean = torch.linalg.solve(matrix, (transport - torch.eye(2, dtype=F64)) @ offset)
    expected = torch.distributions.MultivariateNormal(mean, transport @ transport.T).log_prob(x1)
    torch.testing.assert_close(log_prob, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("mode", MODES)
def test_density_integrates_to_one(mode: Mode) -> None:
    field, cond = mlp(dim=1, hidden=(16, 16)), torch.zeros(1, 2, dtype=F64)
    x1 = torch.linspace(-12, 12, 4001, dtype=F64)[:, None]
    log_prob = flow_log_prob(
        field, x1, base_log_prob=standard_normal_log_prob, steps=2 if mode == "map" else 100, cond=cond, mode=mode
    )
    mass = torch.trapezoid(log_prob.exp(), x1[:, 0]).item()
    assert mass == pytest.approx(1, abs=1e-8 if mode == "map" else 1e-4)


def test_agrees_with_zuko() -> None:
    zuko = pytest.importorskip("zuko")
    field, x1, cond = mlp(), rand(5, 3), rand(5, 2, seed=1)
    # zuko's transform maps data to base: from t = 1 to t = 0 here.
    transform = zuko.transforms.FreeFormJacobianTransform(
        lambda t, x: field(t, x, cond), 1.0, 0.0, phi=tuple(field.parameters()), atol=1e-10, rtol=1e-10, exact=True
    )
    x0, log_det = transform.call_and_ladj(x1)
    expected = standard_normal_log_prob(x0) + log_det
    ours = flow_log_prob(field, x1, base_log_prob=standard_normal_log_prob, steps=128, solver="rk4", cond=cond)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-7)


def test_untrained_field_leaves_the_base_density() -> None:
    field, x, cond = MLPField(3, 2), torch.randn(5, 3), torch.randn(5, 2)
    for mode in MODES:
        log_prob = flow_log_prob(field, x, base_log_prob=standard_normal_log_prob, steps=3, cond=cond, mode=mode)
        torch.testing.assert_close(log_prob, standard_normal_log_prob(x), rtol=0, atol=0)


def test_potential_flow_under_no_grad() -> None:
    class Well(torch.nn.Module):
        def forward(self, x: Tensor, cond: Tensor | None) -> Tensor:
            return x.square().sum(-1)

    x0 = rand(4, 2)
    with torch.no_grad():
        x1, log_det = flow_push(PotentialField(Well(), 2), x0, steps=2, solver="euler", mode="map")
    # v = -2 x: an Euler step of size 1/2 ends at zero, so the map is singular.
    torch.testing.assert_close(x1, torch.zeros(4, 2, dtype=F64))
    assert (log_det == -math.inf).all()


def test_probe_is_exact_for_diagonal_and_unbiased_for_all() -> None:
    field, cond = mlp(), rand(1, 2)
    x0 = rand(1, 3, seed=1)
    exact = flow_push(field, x0, steps=3, cond=cond)[1]
    signs = torch.tensor([[(1.0 if k >> i & 1 else -1.0) for i in range(3)] for k in range(8)], dtype=F64)
    x1, estimates = flow_push(field, x0.expand(8, 3), steps=3, cond=cond, probe=signs)
    # The mean over all sign vectors is the expectation over Rademacher probes, without Monte Carlo error.
    torch.testing.assert_close(estimates.mean(), exact[0], rtol=0, atol=1e-13)
    assert estimates.std() > 1e-3
    torch.testing.assert_close(x1[:1], odeint(field, x0, steps=3, cond=cond))
    diagonal = LinearField(torch.diag(torch.tensor([0.3, -0.2, 0.5], dtype=F64)))
    _, log_det = flow_push(diagonal, x0, steps=2, probe=signs[2:3])
    torch.testing.assert_close(log_det, torch.tensor([0.6], dtype=F64))
    log_prob = flow_log_prob(diagonal, x0, base_log_prob=lambda x: 0 * x.sum(-1), steps=2, probe=signs[:1])
    torch.testing.assert_close(log_prob, torch.tensor([-0.6], dtype=F64))


def test_a_step_that_folds_is_reported() -> None:
    x1 = torch.tensor([[0.1], [3.0]], dtype=F64)  # the Euler step x - x^2 never exceeds 1/4
    with pytest.raises(RuntimeError, match=r"euler step from t=0 was not inverted for 1 of 2 rows .* use more steps"):
        flow_log_prob(Square(1), x1, base_log_prob=standard_normal_log_prob, steps=1, solver="euler", mode="map")


def test_float32_inversion_converges_to_its_default_tolerance() -> None:
    field, x0, cond = mlp().float(), torch.randn(64, 3), torch.randn(64, 2)
    x1, log_det = flow_push(field, x0, steps=4, cond=cond, mode="map")
    log_prob = flow_log_prob(field, x1, base_log_prob=standard_normal_log_prob, steps=4, cond=cond, mode="map")
    torch.testing.assert_close(log_prob, standard_normal_log_prob(x0) - log_det, rtol=0, atol=2e-5)


def test_bad_arguments_are_refused() -> None:
    field, x = LinearField(torch.eye(2)), torch.zeros(4, 2)
    base = standard_normal_log_prob
    with pytest.raises(ValueError, match="mode must be 'ode' or 'map', got 'exact'"):
        flow_push(field, x, steps=1, mode="exact")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="mode must be 'ode' or 'map', got 'exact'"):
        flow_log_prob(field, x, base_log_prob=base, steps=1, mode="exact")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="mode 'map' is exact and takes no probe"):
        flow_push(field, x, steps=1, mode="map", probe=x)
    with pytest.raises(ValueError, match="mode 'map' is exact and takes no probe"):
        flow_log_prob(field, x, base_log_prob=base, steps=1, mode="map", probe=x)
    with pytest.raises(ValueError, match=r"probe must have the shape of x, \[4, 2\], got \[1, 2\]"):
        flow_push(field, x, steps=1, probe=x[:1])
    with pytest.raises(ValueError, match="tolerance belongs to the inversion of mode='map'"):
        flow_log_prob(field, x, base_log_prob=base, steps=1, tolerance=1e-3)
    for mode in MODES:
        with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
            flow_log_prob(field, x, base_log_prob=base, steps=0, mode=mode)
        with pytest.raises(ValueError, match="solver must be one of"):
            flow_push(field, x, steps=1, solver="none", mode=mode)
        with pytest.raises(ValueError, match=r"x must have shape \[B, D\], got \[2\]"):
            flow_push(field, x[0], steps=1, mode=mode)
