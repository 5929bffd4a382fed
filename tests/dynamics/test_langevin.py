import math
from typing import Any

import pytest
import torch
from scipy import stats
from scipy.linalg import solve_discrete_lyapunov
from torch import Tensor, nn

from driftrl.dynamics.fields import Time
from driftrl.dynamics.langevin import kinetic, mala, overdamped
from driftrl.dynamics.langevin_flow import KineticTransition, OscillatorField
from driftrl.dynamics.special_fields import PotentialField

from .known_fields import LinearField

F64 = torch.float64


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def harmonic(*stiffness: float) -> LinearField:
    """The force of ``U = sum_i k_i x_i^2 / 2``."""
    return LinearField(-torch.diag(torch.tensor(stiffness, dtype=F64)))


def quartic(x: Tensor, cond: Tensor | None) -> Tensor:
    return (0.25 * x**4 - 0.5 * x.square()).sum(-1)


def quartic_force(t: Time, x: Tensor, cond: Tensor | None) -> Tensor:
    return x - x**3


def stationary_covariance(run: Any, state: int, draws: int) -> Tensor:
    """Of the linear map ``run(state [B, S], draws [B, R]) -> [B, S]``, exactly: the solution of Lyapunov's equation."""
    a = run(torch.eye(state, dtype=F64), torch.zeros(state, draws, dtype=F64))
    b = run(torch.zeros(draws, state, dtype=F64), torch.eye(draws, dtype=F64))
    return torch.as_tensor(solve_discrete_lyapunov(a.mT.numpy(), (b.mT @ b).numpy()))


@pytest.mark.parametrize("temperature", [1.0, 0.3])
@pytest.mark.parametrize("h", [0.1, 0.7])
def test_variance_of_overdamped_steps(h: float, temperature: float) -> None:
    """T / (k (1 - h k / 2)), in each direction by itself."""
    k = (2.0, 0.5)

    def run(x: Tensor, z: Tensor) -> Tensor:
        return overdamped(harmonic(*k), x, z[None], step=h, temperature=temperature)

    expected = torch.diag(torch.tensor([temperature / (c * (1 - h * c / 2)) for c in k], dtype=F64))
    torch.testing.assert_close(stationary_covariance(run, 2, 2), expected, rtol=0, atol=1e-12)


def test_preconditioned_steps_err_equally_in_all_directions() -> None:
    """Stiffnesses 1 and 100, M their inverse: variance 1 / (k (1 - h / 2)), although h k = 50 would diverge without."""
    k, h = torch.tensor([1.0, 100.0], dtype=F64), 0.5

    def run(x: Tensor, z: Tensor) -> Tensor:
        return overdamped(harmonic(1.0, 100.0), x, z[None], step=h, preconditioner=1 / k)

    expected = torch.diag(1 / (k * (1 - h / 2)))
    torch.testing.assert_close(stationary_covariance(run, 2, 2), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("friction", [0.2, 5.0])
def test_variances_of_kinetic_steps(friction: float) -> None:
    """BAOAB: T / k exactly, and T (1 - h^2 k / 4). OBABO: T / (k (1 - h^2 k / 4)), and T exactly. No correlation."""
    k, h, temperature = 2.0, 0.6, 0.7

    def run(state: Tensor, draws: Tensor) -> Tensor:
        x, p = kinetic(
            harmonic(k),
            state[:, :1],
            state[:, 1:],
            draws.mT[..., None],
            step=h,
            friction=friction,
            temperature=temperature,
        )
        return torch.cat([x, p], 1)

    shadow = 1 - h**2 * k / 4
    expected = temperature * torch.diag(torch.tensor((1 / k, shadow), dtype=F64))
    for steps in (1, 3):
        torch.testing.assert_close(stationary_covariance(run, 2, steps), expected, rtol=0, atol=1e-12)


def test_frictionless_limit_conserves_energy_to_second_order() -> None:
    x, p, drifts = rand(5, 2), rand(5, 2, seed=1), []
    for steps in (50, 100):
        zero = torch.zeros(steps, 5, 2, dtype=F64)
        y, q = kinetic(quartic_force, x, p, zero, step=1 / steps, friction=1e-12)
        energy = quartic(y, None) + 0.5 * q.square().sum(1) - quartic(x, None) - 0.5 * p.square().sum(1)
        drifts.append(energy.abs().max().item())
    assert math.log2(drifts[0] / drifts[1]) == pytest.approx(2, abs=0.1)


def test_friction_slows_a_free_particle_exponentially() -> None:
    """p' = -g p: exactly e^(-g t), whatever the step, and per dimension where friction is a tensor."""
    x, g = torch.zeros(1, 2, dtype=F64), torch.tensor([0.5, 3.0], dtype=F64)
    zero = torch.zeros(4, 1, 2, dtype=F64)
    _, p = kinetic(lambda t, x, cond: 0 * x, x, x + 1, zero, step=0.3, friction=g)
    torch.testing.assert_close(p, torch.exp(-1.2 * g)[None], rtol=1e-12, atol=0)


def test_several_steps_are_single_steps() -> None:
    x, p, noise = rand(5, 2), rand(5, 2, seed=1), rand(6, 5, 2, seed=2)
    options: dict[str, Any] = {"step": 0.1, "friction": 1.5}
    together = kinetic(quartic_force, x, p, noise, **options)
    y, q = x, p
    for draws in noise.split(1):
        y, q = kinetic(quartic_force, y, q, draws, **options)
    torch.testing.assert_close(together, (y, q))
    y = x
    for draws in noise:
        y = overdamped(quartic_force, y, draws[None], step=0.1)
    torch.testing.assert_close(overdamped(quartic_force, x, noise, step=0.1), y)


@pytest.mark.parametrize("preconditioner", [None, torch.tensor([0.5, 2.0], dtype=F64)])
def test_metropolis_acceptance_obeys_detailed_balance(preconditioner: Tensor | None) -> None:
    """p(x) q(y|x) a(x, y) = p(y) q(x|y) a(y, x), with the densities written out."""
    h, temperature = 0.4, 0.7
    x, y = rand(50, 2), rand(50, 2, seed=1)
    m = torch.ones(2, dtype=F64) if preconditioner is None else preconditioner
    spread = (2 * h * temperature * m).sqrt()

    def acceptance_flow(x: Tensor, y: Tensor) -> Tensor:
        mean = x + h * m * quartic_force(0.0, x, None)
        reached, probability = mala(
            quartic,
            x,
            ((y - mean) / spread)[None],
            torch.zeros(1, 50, dtype=F64),
            step=h,
            temperature=temperature,
            preconditioner=preconditioner,
        )
        torch.testing.assert_close(reached, y)  # a uniform number of 0 accepts
        log_proposal = torch.as_tensor(stats.norm.logpdf(y, mean, spread)).sum(1)
        return -quartic(x, None) / temperature + log_proposal + probability[0].log()

    torch.testing.assert_close(acceptance_flow(x, y), acceptance_flow(y, x), rtol=0, atol=1e-10)


def test_metropolis_keeps_the_target_at_a_step_where_unadjusted_steps_do_not() -> None:
    n, h = 40_000, 1.2
    x, noise = rand(n, 1), rand(3, n, 1, seed=1)
    uniform = torch.rand(3, n, generator=torch.Generator().manual_seed(2), dtype=F64)
    y, probability = mala(lambda x, cond: 0.5 * x.square().sum(1), x, noise, uniform, step=h)
    # From the target N(0, 1) itself: 5 standard errors sqrt(2 / n). Unadjusted, the variance grows towards 2.5.
    assert y.var().item() == pytest.approx(1, abs=5 * math.sqrt(2 / n))
    assert overdamped(harmonic(1.0), x, noise, step=h).var().item() > 2
    assert probability.shape == (3, n)
    assert 0.3 < probability.mean().item() < 0.9
    # A refused row stays where it is, and only those.
    one, first = mala(lambda x, cond: 0.5 * x.square().sum(1), x, noise[:1], uniform[:1], step=h)
    assert torch.equal((one == x)[:, 0], uniform[0] >= first[0])


def test_metropolis_carries_energy_and_force_of_accepted_rows_only() -> None:
    x, noise = rand(50, 2), rand(4, 50, 2, seed=1)
    uniform = torch.rand(4, 50, generator=torch.Generator().manual_seed(2), dtype=F64)
    together, probabilities = mala(quartic, x, noise, uniform, step=0.5)
    y = x
    for k in range(4):
        y, probability = mala(quartic, y, noise[k : k + 1], uniform[k : k + 1], step=0.5)
        torch.testing.assert_close(probability[0], probabilities[k])
    torch.testing.assert_close(together, y)
    assert 0.1 < (uniform < probabilities).double().mean() < 0.95


def test_metropolis_refuses_what_has_no_finite_energy() -> None:
    def box(x: Tensor, cond: Tensor | None) -> Tensor:
        return torch.where(x.abs() < 1, 0.0, math.inf).sum(1) + 0 * x.sum(1)

    def barrier(x: Tensor, cond: Tensor | None) -> Tensor:
        return -torch.log(1 - x * x).sum(1)  # not a number outside

    for energy in (box, barrier):
        x, probability = mala(energy, torch.zeros(3, 1), torch.full((1, 3, 1), 5.0), torch.zeros(1, 3), step=1.0)
        assert torch.equal(probability, torch.zeros(1, 3))
        assert torch.equal(x, torch.zeros(3, 1))


class Quartic(nn.Module):
    def forward(self, x: Tensor, cond: Tensor | None) -> Tensor:
        return quartic(x if cond is None else x - cond, None)


def test_potentials_and_conditioning_are_passed_on() -> None:
    x, noise, cond = rand(5, 2), rand(3, 5, 2, seed=1), rand(5, 2, seed=2)
    field = PotentialField(Quartic(), 2, 2)
    torch.testing.assert_close(
        overdamped(field, x, noise, step=0.1, cond=cond), cond + overdamped(quartic_force, x - cond, noise, step=0.1)
    )
    uniform = torch.rand(3, 5, generator=torch.Generator().manual_seed(2), dtype=F64)
    moved, _ = mala(Quartic(), x, noise, uniform, step=0.1, cond=cond)
    torch.testing.assert_close(moved, cond + mala(quartic, x - cond, noise, uniform, step=0.1)[0])
    there, velocity = kinetic(field, x, x, noise, step=0.1, friction=1.0, cond=cond)
    here, same = kinetic(quartic_force, x - cond, x, noise, step=0.1, friction=1.0)
    torch.testing.assert_close((there, velocity), (cond + here, same))


def oscillators(dim: int = 3, cond_dim: int = 2) -> OscillatorField:
    field = OscillatorField(dim, cond_dim).double()
    for seed, parameter in enumerate(field.parameters()):
        parameter.data = rand(*parameter.shape, seed=seed)
    return field


@pytest.mark.parametrize("dim", [1, 2, 4])
def test_oscillator_force_is_the_gradient_of_the_printed_potential(dim: int) -> None:
    field, x, cond = oscillators(dim), rand(5, dim).requires_grad_(), rand(5, 2, seed=1)
    assert field.drive is not None
    k, c, energy = field.log_stiffness.exp(), field.log_coupling.exp(), torch.zeros((), dtype=F64)
    for i in range(dim):
        energy = energy + 0.5 * (k[i] * x[:, i] ** 2 + c[i] * (x[:, i] - x[:, (i + 1) % dim]) ** 2).sum()
    energy = energy - (x * (cond @ field.drive.T)).sum()
    torch.testing.assert_close(field(0.0, x, cond), -torch.autograd.grad(energy, x)[0])


def test_kinetic_transition_settles_in_its_potential() -> None:
    """Its stationary covariance of position is T times the inverse of the potential's Hessian: BAOAB is exact there."""
    field = oscillators(3, 0)
    hessian = -field.jacobian(0.0, torch.zeros(1, 3, dtype=F64))[1][0].detach()
    assert torch.linalg.eigvalsh(hessian).min() > 0
    transition = KineticTransition(field, step=0.2, friction=0.8, temperature=0.5).double()

    def run(state: Tensor, draws: Tensor) -> Tensor:
        with torch.no_grad():
            return torch.cat(transition(state[:, :3], state[:, 3:], draws[None]), 1)

    covariance = stationary_covariance(run, 6, 3)
    torch.testing.assert_close(covariance[:3, :3], 0.5 * torch.linalg.inv(hessian), rtol=0, atol=1e-6)


def test_gradients_against_finite_differences() -> None:
    x, noise, cond = rand(2, 3).requires_grad_(), rand(2, 2, 3, seed=1).requires_grad_(), rand(2, 2, seed=2)
    transition = KineticTransition(oscillators(), step=0.3).double()

    def learned(x: Tensor, noise: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        moved: tuple[Tensor, Tensor] = transition(x, 0.5 * x, noise, cond)
        return moved

    assert torch.autograd.gradcheck(learned, (x, noise, *transition.parameters()))
    m = torch.tensor([0.5, 1.0, 2.0], dtype=F64, requires_grad=True)

    def diffused(x: Tensor, noise: Tensor, m: Tensor) -> Tensor:
        return overdamped(quartic_force, x, noise, step=0.1, preconditioner=m)

    assert torch.autograd.gradcheck(diffused, (x, noise, m))

    def underdamped(x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        return kinetic(quartic_force, x, 0.5 * x, noise, step=0.3, friction=0.7)

    assert torch.autograd.gradcheck(underdamped, (x, noise))


def everything(x: Tensor, noise: Tensor, uniform: Tensor, cond: Tensor) -> Tensor:
    """One run of each sampler."""
    field = oscillators().to(x)
    ends = [overdamped(field, x, noise, step=0.1, cond=cond), mala(quartic, x, noise, uniform, step=0.1)[0]]
    ends.extend(kinetic(field, x, x, noise, step=0.1, friction=1.0, cond=cond))
    return torch.cat(ends, 1)


def inputs(batch: int = 9) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    uniform = torch.rand(4, batch, generator=torch.Generator().manual_seed(2), dtype=F64)
    return rand(batch, 3), rand(4, batch, 3, seed=1), uniform, rand(batch, 2, seed=2)


def test_row_alone_equals_row_in_a_batch() -> None:
    x, noise, uniform, cond = inputs()
    alone = everything(x[7:8], noise[:, 7:8], uniform[:, 7:8], cond[7:8])
    torch.testing.assert_close(alone, everything(x, noise, uniform, cond)[7:8], rtol=0, atol=1e-12)


def test_float32_follows_float64_without_global_randomness() -> None:
    state = torch.get_rng_state()
    single = everything(*(value.float() for value in inputs()))
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), everything(*inputs()), rtol=1e-4, atol=1e-5)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # raised inside torch when inductor is imported
@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_without_graph_breaks(backend: str) -> None:
    x, noise, uniform, cond = inputs()
    transition = KineticTransition(oscillators(), step=0.3).double()

    def run(x: Tensor, noise: Tensor, uniform: Tensor, cond: Tensor) -> tuple[Tensor, ...]:
        diffused = overdamped(quartic_force, x, noise, step=0.1)
        return diffused, *mala(quartic, x, noise, uniform, step=0.1), *transition(x, x, noise, cond)

    torch.compiler.reset()
    compiled = torch.compile(run, fullgraph=True, backend=backend)
    arguments = (x, noise, uniform, cond)
    torch.testing.assert_close(compiled(*arguments), run(*arguments), rtol=0, atol=1e-12)


@pytest.mark.gpu
def test_results_on_a_gpu_are_those_on_the_cpu() -> None:
    there = everything(*(value.cuda() for value in inputs()))
    torch.testing.assert_close(there.cpu(), everything(*inputs()), rtol=0, atol=1e-12)


def test_bad_arguments_are_refused() -> None:
    x, noise, uniform = torch.zeros(4, 2), torch.zeros(3, 4, 2), torch.zeros(3, 4)

    def run_overdamped(x: Tensor = x, noise: Tensor = noise, **options: Any) -> Any:
        return overdamped(quartic_force, x, noise, **{"step": 0.1, **options})

    def run_mala(x: Tensor = x, noise: Tensor = noise, uniform: Tensor = uniform, **options: Any) -> Any:
        return mala(quartic, x, noise, uniform, **{"step": 0.1, **options})

    def run_kinetic(x: Tensor = x, noise: Tensor = noise, velocity: Tensor = x, **options: Any) -> Any:
        return kinetic(quartic_force, x, velocity, noise, **{"step": 0.1, "friction": 1.0, **options})

    for run in (run_overdamped, run_mala, run_kinetic):
        for temperature in (0.0, -1.0):
            with pytest.raises(ValueError, match=f"temperature must be positive, got {temperature}"):
                run(temperature=temperature)
        with pytest.raises(ValueError, match=r"step must be positive, got 0\.0"):
            run(step=0.0)
        with pytest.raises(ValueError, match=r"x must have shape \[B, D\], got \[2\]"):
            run(x=x[0])
        for bad in (noise[0], noise[:0], noise[:, :1]):
            with pytest.raises(ValueError, match=r"noise must have shape \[steps, 4, 2\], got "):
                run(noise=bad)
        with pytest.raises(ValueError, match=r"noise must be torch\.float32 on cpu, got torch\.float64 on cpu"):
            run(noise=noise.double())
        with pytest.raises(ValueError, match=r"noise must be torch\.float32 on cpu, got torch\.float32 on meta"):
            run(noise=noise.to("meta"))
    for adjusted in (run_overdamped, run_mala):
        with pytest.raises(ValueError, match=r"preconditioner must have shape \[2\] or \[4, 2\], got \[3\]"):
            adjusted(preconditioner=torch.ones(3))
    with pytest.raises(ValueError, match=r"uniform must have shape \[3, 4\], got \[3, 1\]"):
        run_mala(uniform=uniform[:, :1])
    with pytest.raises(ValueError, match=r"energy must return shape \[4\], got \[4, 2\]; squeeze it"):
        mala(lambda x, cond: x, x, noise, uniform, step=0.1)
    with pytest.raises(ValueError, match=r"velocity must have the shape of position, \[4, 2\].*got \[4, 1\]"):
        run_kinetic(velocity=x[:, :1])
    with pytest.raises(ValueError, match=r"friction must be positive, got 0\.0"):
        run_kinetic(friction=0.0)
    with pytest.raises(ValueError, match=r"friction must be positive, got 0\.0"):
        KineticTransition(OscillatorField(2), step=0.1, friction=0.0)
    with pytest.raises(ValueError, match=r"temperature must be positive, got -1\.0"):
        KineticTransition(OscillatorField(2), step=0.1, temperature=-1.0)
    with pytest.raises(ValueError, match=r"step must be positive, got 0\.0"):
        KineticTransition(OscillatorField(2), step=0.0)
