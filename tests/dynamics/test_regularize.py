import math
from collections.abc import Callable
from functools import partial
from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from driftrl.dynamics.fields import MLPField, Time, VelocityField
from driftrl.dynamics.fokker_planck import fokker_planck_residual
from driftrl.dynamics.lipschitz import adversarial_states, spectral_bound_, spectral_norms
from driftrl.dynamics.ode import EULER, HEUN
from driftrl.dynamics.regularize import jacobian_penalty, local_error_penalty, stiffness_penalty
from driftrl.dynamics.special_fields import LinearField

F64 = torch.float64


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def mlp(hidden: tuple[int, ...] = (8, 8)) -> MLPField:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return MLPField(3, 2, hidden, last_layer_scale=1.0).double()


def test_linear_penalty_and_gradient_in_closed_form() -> None:
    matrix = rand(3, 3).requires_grad_()
    penalty = jacobian_penalty(LinearField(matrix), 0.0, rand(4, 3, seed=1))
    torch.testing.assert_close(penalty, torch.linalg.matrix_norm(matrix).square().expand(4))
    torch.testing.assert_close(torch.autograd.grad(penalty.sum(), matrix)[0], 8 * matrix)


def test_penalty_equals_autodiff() -> None:
    field, x, cond, t = mlp(), rand(4, 3), rand(4, 2), torch.rand(4, dtype=F64)
    penalty = jacobian_penalty(field, t, x, cond)
    for b in range(4):
        jacobian = torch.func.jacrev(lambda y, b=b: field(t[b : b + 1], y[None], cond[b : b + 1])[0])(x[b])
        torch.testing.assert_close(penalty[b], torch.linalg.matrix_norm(jacobian).square())


def test_weight_scales_each_row() -> None:
    field, x, cond, weight = mlp(), rand(4, 3), rand(4, 2), torch.tensor([0.0, 1.0, 2.0, 0.5], dtype=F64)
    for probe in (None, rand(4, 3)):
        plain = jacobian_penalty(field, 0.3, x, cond, probe=probe)
        torch.testing.assert_close(jacobian_penalty(field, 0.3, x, cond, weight=weight, probe=probe), weight * plain)


def test_probe_estimate_is_unbiased() -> None:
    field, x, cond = mlp(), rand(1, 3), rand(1, 2)
    signs = torch.tensor([[(1.0 if k >> i & 1 else -1.0) for i in range(3)] for k in range(8)], dtype=F64)
    estimates = jacobian_penalty(field, 0.3, x.expand(8, 3), cond.expand(8, 2), probe=signs)
    torch.testing.assert_close(estimates.mean(), jacobian_penalty(field, 0.3, x, cond)[0], rtol=0, atol=1e-13)
    assert estimates.std() > 1e-3


@pytest.mark.parametrize("probe", [None, rand(2, 3, seed=5)], ids=["exact", "probe"])
def test_gradient_in_state_conditioning_and_parameters(probe: Tensor | None) -> None:
    field = mlp((4,))

    def run(x: Tensor, cond: Tensor, *parameters: Tensor) -> Tensor:
        return jacobian_penalty(field, 0.3, x, cond, probe=probe)

    inputs = (rand(2, 3).requires_grad_(), rand(2, 2).requires_grad_(), *field.parameters())
    assert torch.autograd.gradcheck(run, inputs)


def test_descending_the_penalty_flattens_the_field() -> None:
    field, x, cond = mlp(), rand(16, 3), rand(16, 2)
    optimizer = torch.optim.Adam(field.parameters(), 1e-2)
    before = jacobian_penalty(field, 0.5, x, cond).mean().item()
    for _ in range(100):
        optimizer.zero_grad()
        jacobian_penalty(field, 0.5, x, cond).mean().backward()
        optimizer.step()
    assert jacobian_penalty(field, 0.5, x, cond).mean().item() < 0.05 * before


def test_bad_arguments_are_refused() -> None:
    field, x = LinearField(torch.eye(2)), torch.zeros(4, 2)
    with pytest.raises(ValueError, match=r"weight must have shape \[4\], got \[4, 1\]"):
        jacobian_penalty(field, 0.0, x, weight=torch.zeros(4, 1))
    with pytest.raises(ValueError, match=r"probe must have the shape of x, \[4, 2\], got \[2\]"):
        jacobian_penalty(field, 0.0, x, probe=torch.zeros(2))
    with pytest.raises(ValueError, match=r"t must be a float or have shape \[4\], got \[1\]"):
        jacobian_penalty(field, torch.zeros(1), x)
    with pytest.raises(ValueError, match="cond must be None"):
        jacobian_penalty(field, 0.0, x, x)


class BatchedLinear(nn.Module):
    """Three critics at once: a weight [3, out, in]."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.stack([rand(5, 9), 0.01 * rand(5, 9, seed=1), torch.zeros(5, 9, dtype=F64)]))
        self.norm = nn.LayerNorm(5)


def test_spectral_norms_are_those_of_a_singular_value_decomposition() -> None:
    network = nn.Sequential(nn.Linear(4, 9), nn.LayerNorm(9), nn.ReLU(), nn.Linear(9, 2), BatchedLinear()).double()
    norms = spectral_norms(network)
    assert set(norms) == {"0.weight", "3.weight", "4.weight"}
    for name, norm in norms.items():
        torch.testing.assert_close(norm, torch.linalg.matrix_norm(network.get_parameter(name), 2), rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [F64, torch.float32])
@pytest.mark.parametrize("bound", [0.3, 1.0, 100.0])
def test_spectral_bound_holds_and_touches_only_what_exceeds_it(bound: float, dtype: torch.dtype) -> None:
    network = nn.Sequential(mlp((8, 8)), BatchedLinear()).to(dtype)
    before = {name: p.clone() for name, p in network.named_parameters()}
    spectral_bound_(network, bound)
    bounded = {"0.x_weight", "0.layers.0.weight", "0.output.weight", "1.weight"}
    assert set(spectral_norms(network)) == bounded
    for name, p in network.named_parameters():
        if name not in bounded:
            assert torch.equal(p, before[name])
            continue
        old, new = torch.linalg.matrix_norm(before[name], 2), torch.linalg.matrix_norm(p, 2)
        torch.testing.assert_close(new, old.clamp(max=bound), rtol=20 * torch.finfo(dtype).eps, atol=0)
        torch.testing.assert_close(p, before[name] * (bound / old).clamp(max=1.0)[..., None, None])
        assert torch.equal(p[new < 0.99 * bound], before[name][new < 0.99 * bound]) or p.ndim == 2


@pytest.mark.parametrize(("activation", "slope"), [("tanh", 1.0), ("mish", 1.09), ("silu", 1.1)])
def test_product_of_the_norms_bounds_the_jacobian(activation: str, slope: float) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        field = MLPField(3, 2, (16, 16), activation, last_layer_scale=1.0).double()
    x, cond = 3 * rand(500, 3), rand(500, 2)
    largest = torch.linalg.matrix_norm(field.jacobian(0.3, x, cond)[1], 2).max().item()
    bound = math.prod(norm.item() for norm in spectral_norms(field).values()) * slope**2
    assert 0.1 * bound < largest <= bound
    spectral_bound_(field, 0.5)
    assert torch.linalg.matrix_norm(field.jacobian(0.3, x, cond)[1], 2).max() <= 0.5**3 * slope**2


def test_norms_can_be_penalised() -> None:
    layer = nn.Linear(3, 3, bias=False).double()
    with torch.no_grad():
        layer.weight.copy_(torch.diag(torch.tensor([1.0, -3.0, 2.0])))
    spectral_norms(layer)["weight"].backward()
    torch.testing.assert_close(layer.weight.grad, torch.diag(torch.tensor([0.0, -1.0, 0.0], dtype=F64)))


SCALES = torch.tensor([0.1, 1.0, 3.0], dtype=F64)
WAYS: dict[str, dict[str, object]] = {
    "fgsm": {},
    "fgsm from a random start": {"random_start": True},
    "pgd": {"steps": 8, "step_size": 0.25},
    "langevin": {"steps": 200, "step_size": 0.005, "temperature": 1.0},
    "langevin from a random start": {"steps": 20, "step_size": 3.0, "temperature": 5.0, "random_start": True},
}


def attack(loss: object, x: Tensor, way: str, radius: float | Tensor, seed: int = 0) -> Tensor:
    options, generator = dict(WAYS[way]), torch.Generator().manual_seed(seed)
    if options.pop("random_start", False):
        options["start"] = torch.empty_like(x).uniform_(-1, 1, generator=generator)
    if "temperature" in options:
        options["noise"] = torch.randn(options["steps"], *x.shape, dtype=x.dtype, generator=generator)  # type: ignore[call-overload]
    return adversarial_states(loss, x, radius=radius, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [F64, torch.float32])
@pytest.mark.parametrize("way", WAYS)
def test_adversary_stays_in_its_ball_and_raises_the_loss(way: str, dtype: torch.dtype) -> None:
    field, cond = mlp().to(dtype), rand(64, 2).to(dtype)
    x, radius = rand(64, 3).to(dtype), 0.2 * SCALES.to(dtype)

    def loss(states: Tensor) -> Tensor:
        return 30 * field(0.3, states, cond).square().sum(-1)

    there = attack(loss, x, way, radius)
    assert there.dtype == dtype and not there.requires_grad
    assert ((there - x).abs() <= radius + 8 * torch.finfo(dtype).eps).all()  # rounding of x + radius u
    assert ((there - x).abs() > 0.5 * radius).any(0).all()
    if way != "langevin from a random start":  # that one is mostly noise
        assert loss(there).mean() > 1.2 * loss(x).mean()
    assert all(p.grad is None for p in field.parameters())


@pytest.mark.parametrize("way", ["fgsm", "pgd"])
def test_sign_steps_reach_the_maximum_of_a_linear_loss(way: str) -> None:
    slope, x = torch.tensor([1.0, -2.0, 0.1], dtype=F64), rand(4, 3)
    torch.testing.assert_close(attack(lambda s: s @ slope, x, way, 0.2 * SCALES), x + 0.2 * SCALES * slope.sign())


def test_pgd_finds_a_maximum_inside_that_fgsm_leaps_over() -> None:
    x = torch.zeros(1, 2, dtype=F64)
    top = torch.tensor([0.25, -0.5], dtype=F64)

    def loss(states: Tensor) -> Tensor:
        return -(states - top).square().sum(-1)

    far = adversarial_states(loss, x, radius=1.0)
    near = adversarial_states(loss, x, radius=1.0, steps=40, step_size=0.05)
    assert (near - top).abs().max() <= 0.05 + 1e-12 < (far - top).abs().max()


def test_random_start_leaves_a_saddle() -> None:
    x = rand(64, 3)
    still = attack(lambda s: (s - x).square().sum(-1), x, "fgsm", 1.0)
    assert torch.equal(still, x)
    moved = attack(lambda s: (s - x).square().sum(-1), x, "fgsm from a random start", 1.0)
    torch.testing.assert_close((moved - x).abs(), torch.ones_like(x))


def test_langevin_ascent_samples_the_density_it_claims() -> None:
    # L = a u on [-1, 1] at temperature T: density ~ exp(a u / T), of mean coth(a/T) - T/a (Langevin's function) and
    # second moment 1 - 2 T/a mean. Reflection is of weak order 1/2 to 1 in the step: bias about 0.01 at h = 0.002.
    generator = torch.Generator().manual_seed(0)
    x = torch.zeros(4000, 1, dtype=F64)
    noise = torch.randn(800, 4000, 1, dtype=F64, generator=generator)
    u = adversarial_states(
        lambda s: 3 * s[:, 0], x, radius=1.0, steps=800, step_size=0.002, temperature=1.5, noise=noise.unbind()
    )
    ratio = 3 / 1.5
    mean = 1 / math.tanh(ratio) - 1 / ratio
    assert u.mean().item() == pytest.approx(mean, abs=0.01 + 4 * 0.5 / 4000**0.5)
    assert u.square().mean().item() == pytest.approx(1 - 2 * mean / ratio, abs=0.01 + 4 * 0.3 / 4000**0.5)


def test_adversary_is_repeatable_and_radius_may_differ_by_row() -> None:
    x, radius = rand(5, 3), torch.arange(5, dtype=F64)[:, None].expand(-1, 3)
    first, again, other = (attack(lambda s: s.sum(-1), x, "langevin", radius, seed) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(first[0], x[0])
    with torch.no_grad():
        assert torch.equal(attack(lambda s: s.sum(-1), x, "langevin", radius, 1), first)


def test_bad_arguments_of_the_adversary_are_refused() -> None:
    x = torch.zeros(4, 2)
    for options in ({"steps": 0}, {"step_size": 0.0}, {"temperature": -1.0}):
        with pytest.raises(ValueError, match="steps must be at least 1, step_size positive, temperature positive or N"):
            adversarial_states(lambda s: s.sum(-1), x, radius=1.0, **options)
    for more, wanted in (({"noise": [x]}, 0), ({"temperature": 1.0, "steps": 2}, 2)):
        with pytest.raises(ValueError, match=f"noise must hold {wanted} tensors"):
            adversarial_states(lambda s: s.sum(-1), x, radius=1.0, **more)
    with pytest.raises(ValueError, match=r"start must have the shape of x, \[4, 2\], got \[2\]"):
        adversarial_states(lambda s: s.sum(-1), x, radius=1.0, start=x[0])
    with pytest.raises(ValueError, match=r"loss must return shape \[4\], got \[\]"):
        adversarial_states(lambda s: s.sum(), x, radius=1.0)
    with pytest.raises(ValueError, match=r"x must have shape \[B, D\], got \[2\]"):
        adversarial_states(lambda s: s, x[0], radius=1.0)
    with pytest.raises(ValueError, match="bound must be positive, got 0"):
        spectral_bound_(nn.Linear(2, 2), 0.0)
    with pytest.raises(ValueError, match="module must have a weight of 2 or 3 dimensions, got ReLU without"):
        spectral_bound_(nn.ReLU())


def test_local_error_on_a_linear_field_in_closed_form() -> None:
    matrix, x, h = 2 * rand(3, 3), rand(4, 3, seed=1), 0.3
    field, powers = LinearField(matrix), [torch.linalg.matrix_power(h * matrix, k) for k in range(8)]
    # Heun minus Euler is (hA)^2 x / 2. For DOPRI5 the difference of the two stability polynomials (see test_ode).
    heun = h * (x @ powers[2].T / 2).norm(dim=1)
    torch.testing.assert_close(local_error_penalty(field, 0.0, x, h=h, solver=HEUN), heun)
    dopri5 = -97 / 120000 * powers[5] + 13 / 40000 * powers[6] - powers[7] / 24000
    torch.testing.assert_close(local_error_penalty(field, 0.0, x, h=h), h * (x @ dopri5.T).norm(dim=1))


def test_local_error_vanishes_where_the_solver_is_exact() -> None:
    def field(t: Time, x: Tensor, cond: Tensor | None) -> Tensor:
        assert isinstance(t, Tensor)
        return (1 - t[:, None]) ** 3 + 0 * x

    x, t = rand(4, 1), torch.linspace(0, 0.7, 4, dtype=F64)
    torch.testing.assert_close(local_error_penalty(field, t, x, h=0.3), torch.zeros(4, dtype=F64), rtol=0, atol=1e-16)
    # Heun minus Euler on a function of time is h/2 times its increment.
    expected = 0.3 * 0.15 * ((1 - t) ** 3 - (0.7 - t) ** 3)
    torch.testing.assert_close(local_error_penalty(field, t, x, h=0.3, solver=HEUN), expected)


def test_stiffness_of_linear_fields() -> None:
    x = rand(4, 3)
    scaled = stiffness_penalty(LinearField(-7 * torch.eye(3, dtype=F64)), 0.0, x)
    torch.testing.assert_close(scaled, torch.full((4,), 7.0, dtype=F64), rtol=1e-9, atol=0)
    matrix = torch.diag(torch.tensor([-50.0, -2.0, 1.0], dtype=F64))
    estimate = stiffness_penalty(LinearField(matrix), 0.0, x, h=0.5)
    # |A d| / |d| lies between the singular values. d is the matrix' seventh power on x: the largest eigenvalue governs.
    assert (estimate <= 50 + 1e-9).all() and (estimate > 49.9).all()


@pytest.mark.parametrize("penalty", [local_error_penalty, stiffness_penalty])
def test_solver_penalties_have_right_gradients_and_rest_at_rest(penalty: Callable[..., Tensor]) -> None:
    field = mlp((4,))
    t = torch.tensor([0.2, 0.7], dtype=F64)

    def run(x: Tensor, cond: Tensor, *parameters: Tensor) -> Tensor:
        return 1e4 * penalty(field, t, x, cond, h=0.3)

    inputs = (rand(2, 3).requires_grad_(), rand(2, 2).requires_grad_(), *field.parameters())
    if penalty is local_error_penalty:  # the other's differences are too small for finite ones
        assert torch.autograd.gradcheck(run, inputs, fast_mode=True)
    gradients = torch.autograd.grad(run(*inputs).sum(), inputs)
    assert all(g.isfinite().all() and g.any() for g in gradients)
    untrained = MLPField(3, 2)
    value = penalty(untrained, 0.3, torch.randn(4, 3), torch.randn(4, 2))
    value.sum().backward()
    assert not value.any()
    assert all(p.grad is None or p.grad.isfinite().all() for p in untrained.parameters())


def test_descending_the_local_error_saves_work() -> None:
    field, x, cond = mlp(), rand(16, 3), rand(16, 2)
    optimizer = torch.optim.Adam(field.parameters(), 1e-2)
    generator = torch.Generator().manual_seed(0)
    before = local_error_penalty(field, 0.45, x, cond).mean().item()
    for _ in range(100):
        optimizer.zero_grad()
        t = 0.9 * torch.rand(16, generator=generator, dtype=F64)
        local_error_penalty(field, t, x, cond).mean().backward()
        optimizer.step()
    assert local_error_penalty(field, 0.45, x, cond).mean().item() < 0.3 * before


def test_solver_without_error_estimate_is_refused() -> None:
    with pytest.raises(ValueError, match="solver must have an error estimate, as DOPRI5 and HEUN have, got 'euler'"):
        local_error_penalty(LinearField(torch.eye(2)), 0.0, torch.zeros(4, 2), solver=EULER)


class Schedule(VelocityField):
    """VP drift ``-beta(t) x / 2``, beta = 0.1 + 3 t."""

    def forward(self, t: Time, x: Tensor, cond: Tensor | None = None) -> Tensor:
        beta: Tensor = 0.1 + 3 * torch.as_tensor(t, dtype=x.dtype)
        return torch.mul(-0.5 * beta.reshape(-1, 1), x)


MEAN, VARIANCE = torch.tensor([1.0, -2.0], dtype=F64), 0.3


def vp_log_density(t: Time, x: Tensor, cond: Tensor | None = None) -> Tensor:
    """Of the VP process from N(MEAN, VARIANCE I): mean alpha MEAN, variance alpha^2 VARIANCE + 1 - alpha^2."""
    assert isinstance(t, Tensor)
    alpha = torch.exp(-0.5 * (0.1 * t + 1.5 * t**2))
    variance = alpha**2 * VARIANCE + 1 - alpha**2
    square = (x - alpha[:, None] * MEAN).square().sum(-1)
    log_density: Tensor = -0.5 * square / variance - torch.log(2 * math.pi * variance)
    return log_density


def test_fokker_planck_residual_of_a_vp_gaussian_is_zero() -> None:
    t, x = torch.linspace(0, 1, 50, dtype=F64), 2 * rand(50, 2)
    diffusion = torch.sqrt(0.1 + 3 * t)
    residual = fokker_planck_residual(vp_log_density, Schedule(2), diffusion, t, x)
    torch.testing.assert_close(residual, torch.zeros_like(t), rtol=0, atol=1e-12)
    wrong = fokker_planck_residual(vp_log_density, Schedule(2), 0.5 * diffusion, t, x)
    assert wrong.abs().median() > 0.5
    one = fokker_planck_residual(vp_log_density, Schedule(2), diffusion[7].item(), t[7].item(), x)
    torch.testing.assert_close(one, torch.zeros_like(t), rtol=0, atol=1e-12)


def test_fokker_planck_residual_of_a_linear_flow_is_zero() -> None:
    # dx/dt = A x carries N(0, I) to N(0, M M^T), M = exp(t A): no noise, a drift that is not a gradient.
    matrix = rand(2, 2)

    def log_density(t: Time, x: Tensor, cond: Tensor | None) -> Tensor:
        assert isinstance(t, Tensor)
        back: Tensor = (torch.linalg.matrix_exp(-t[:, None, None] * matrix) @ x.unsqueeze(-1)).squeeze(-1)
        return -0.5 * back.square().sum(-1) - t * matrix.trace()

    t, x = torch.linspace(0, 1, 20, dtype=F64), rand(20, 2)
    residual = fokker_planck_residual(log_density, LinearField(matrix), 0.0, t, x)
    torch.testing.assert_close(residual, torch.zeros_like(t), rtol=0, atol=1e-12)


def normal_log_density(t: Time, x: Tensor, cond: Tensor | None) -> Tensor:
    return -0.5 * x.square().sum(-1) + 0 * t


# N(0, I) at rest under dX = -theta x dt + g dW fails the equation by (g^2 / 2 - theta) (|x|^2 - D).
THETA, NOISE = 0.8, 0.6


def drifting() -> LinearField:
    return LinearField(-THETA * torch.eye(2, dtype=F64))


def test_strong_residual_in_closed_form() -> None:
    x = rand(9, 2)
    residual = fokker_planck_residual(normal_log_density, drifting(), NOISE, 0.3, x)
    torch.testing.assert_close(residual, (0.5 * NOISE**2 - THETA) * (x.square().sum(1) - 2), rtol=0, atol=1e-13)


def test_weak_residual_and_its_two_probe_product_are_unbiased() -> None:
    # The residual is a polynomial of degree 2 in each entry of the probe: three Gauss-Hermite nodes per dimension
    # integrate its square exactly. Averaged over N(x, w^2 I), |x|^2 becomes |x|^2 + 2 w^2.
    nodes, weights = np.polynomial.hermite_e.hermegauss(4)
    probes = torch.tensor(list(product(nodes, nodes)), dtype=F64)
    mass = torch.tensor([a * b / (2 * math.pi) for a, b in product(weights, weights)], dtype=F64)
    x, width = rand(1, 2), 0.4
    mean = ((0.5 * NOISE**2 - THETA) * (x.square().sum() + 2 * width**2 - 2)).item()
    weak = fokker_planck_residual(
        normal_log_density, drifting(), NOISE, 0.3, x.expand(16, 2), probe=probes, width=width
    )
    assert (mass @ weak).item() == pytest.approx(mean, abs=1e-12)
    pairs = mass @ (weak[:, None] * weak[None, :]) @ mass
    assert pairs.item() == pytest.approx(mean**2, abs=1e-12)
    assert (mass @ weak.square()).item() > mean**2 + 0.1  # the square of one probe's residual is biased


def test_weak_residual_of_a_vp_gaussian_averages_to_zero() -> None:
    x = 2 * rand(20000, 2)
    t, probe = torch.rand(20000, generator=torch.Generator().manual_seed(1), dtype=F64), rand(20000, 2, seed=2)
    diffusion = torch.sqrt(0.1 + 3 * t)
    weak = fokker_planck_residual(vp_log_density, Schedule(2), diffusion, t, x, probe=probe)
    assert weak.std() > 0.1
    assert weak.mean().abs() < 4 * weak.std() / 20000**0.5


def test_fokker_planck_residual_with_conditioning_has_right_gradients() -> None:
    drift, probe = mlp((4,)), rand(2, 3, seed=7)

    def run(form: Tensor | None, x: Tensor, cond: Tensor, scale: Tensor) -> Tensor:
        def log_density(t: Time, y: Tensor, c: Tensor | None) -> Tensor:
            assert c is not None
            return -scale * (y - torch.cat([c, c[:, :1]], 1)).pow(4).sum(-1) * (1 + t)

        return fokker_planck_residual(log_density, drift, 0.7, 0.3, x, cond, probe=form, width=0.2)

    inputs = (0.5 * rand(2, 3)).requires_grad_(), rand(2, 2).requires_grad_(), rand(1)[0].abs().requires_grad_()
    for form in (None, probe):
        assert torch.autograd.gradcheck(partial(run, form), inputs)


def test_bad_arguments_of_the_residual_are_refused() -> None:
    field, x = LinearField(torch.eye(2)), torch.zeros(4, 2)
    with pytest.raises(ValueError, match=r"probe must have the shape of x, \[4, 2\], got \[2\]"):
        fokker_planck_residual(normal_log_density, field, 1.0, 0.0, x, probe=torch.zeros(2))
    with pytest.raises(ValueError, match="width must be positive, got 0"):
        fokker_planck_residual(normal_log_density, field, 1.0, 0.0, x, width=0.0)
    with pytest.raises(ValueError, match=r"x must have shape \[B, 2\], got \[4, 3\]"):
        fokker_planck_residual(normal_log_density, field, 1.0, 0.0, torch.zeros(4, 3))


@pytest.mark.gpu
def test_gpu_equals_cpu() -> None:
    field, x, cond = mlp(), rand(9, 3), rand(9, 2)

    def results(field: MLPField, x: Tensor, cond: Tensor) -> list[Tensor]:
        def loss(states: Tensor) -> Tensor:
            return field(0.3, states, cond).square().sum(-1)

        return [
            local_error_penalty(field, 0.3, x, cond),
            stiffness_penalty(field, 0.3, x, cond, h=0.5),
            adversarial_states(loss, x, radius=0.1, steps=4, step_size=0.5),
            *spectral_norms(field).values(),
        ]

    ours = results(field, x, cond)
    theirs = [result.cpu() for result in results(field.cuda(), x.cuda(), cond.cuda())]
    torch.testing.assert_close(theirs, ours, rtol=1e-8, atol=1e-10)
