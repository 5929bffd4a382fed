import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from driftrl.dynamics.adaptive_sde import sdeint_adaptive
from driftrl.dynamics.brownian_tree import BrownianTree
from driftrl.dynamics.fields import Time
from driftrl.dynamics.neural_sde import GeometricSDE, LangevinSDE, LinearNoiseSDE
from driftrl.dynamics.sde import SDE, Drift, sdeint
from driftrl.dynamics.step_control import AdaptiveResult, Status

from .draws import mlp, rand

F64 = torch.float64
MU, SIGMA = 0.5, 0.8
GEOMETRIC = LinearNoiseSDE(lambda t, x, cond: MU * x, SIGMA)
WELL = LangevinSDE(lambda t, x, cond: 20 * (x - x**3), 1.0)
"""Two wells at -1 and 1; from x = 4 it falls at a rate of 1,000, in a well it relaxes at a rate of 40."""


def tree(batch: int, dim: int = 1, t0: float = 0.0, t1: float = 1.0) -> BrownianTree:
    return BrownianTree(0, (batch, dim), t0=t0, t1=t1, dtype=F64)


def rms(error: Tensor) -> float:
    return error.square().mean().sqrt().item()


@pytest.mark.parametrize("solver", ["milstein", "stochastic_heun"])
@pytest.mark.parametrize("kind", [LinearNoiseSDE, GeometricSDE])
def test_error_on_geometric_brownian_motion_follows_the_tolerance(solver: str, kind: type[LinearNoiseSDE]) -> None:
    """x = exp((mu - s^2 / 2) t + s W_t), Ito's solution, on the path of the tree."""
    drift = (lambda t, x, cond: torch.full_like(x, MU)) if kind is GeometricSDE else (lambda t, x, cond: MU * x)
    paths = tree(400)
    exact = torch.exp((MU - SIGMA**2 / 2) + SIGMA * paths(1.0))
    errors = []
    for tolerance in (1e-3, 1e-5):
        result = sdeint_adaptive(
            kind(drift, SIGMA),
            torch.ones(400, 1, dtype=F64),
            noise=paths,
            rtol=tolerance,
            atol=tolerance,
            solver=solver,
        )
        errors.append(rms(result.checked() / exact - 1))
        assert (result.t == 1).all()
    # In proportion to r^(2/3) in the limit: a factor of 21 for 100; larger steps are not quite of their order yet.
    assert 12 < errors[0] / errors[1] < 30
    assert errors[1] < 1.5e-3


def test_error_for_additive_noise_against_equal_steps_on_the_same_path() -> None:
    paths, x = tree(32, t1=0.25), torch.linspace(1.5, 4, 32, dtype=F64).unsqueeze(1)
    fine = sdeint(WELL, x, steps=2048, solver="sra1", noise=paths.grid(2048), t1=0.25)
    errors, calls = [], []
    for tolerance in (1e-2, 1e-3, 1e-4):
        result = sdeint_adaptive(WELL, x, noise=paths, rtol=tolerance, atol=tolerance)
        errors.append(rms(result.checked() - fine))
        calls.append(result.calls.double().mean().item())
    # r^(3/4): a factor of 5.6 each in the limit.
    assert errors[0] > 3 * errors[1] > 9 * errors[2]
    assert errors[2] < 2e-4
    # As many equal steps do not get through the first fall from a little higher.
    steps, high = math.ceil(calls[1] / 2), torch.full_like(x, 12.0)
    assert not sdeint(WELL, high, steps=steps, solver="sra1", noise=paths.grid(steps), t1=0.25).isfinite().any()
    assert (sdeint_adaptive(WELL, high, noise=paths).checked() - fine).abs().max() < 0.02  # what fell, forgot


def test_solvers_meet_on_one_path() -> None:
    """The tree defines it; a result depends on the noise in the step only, however often steps are rejected."""
    paths, x = tree(8, t1=0.1), torch.full((8, 1), 2.0, dtype=F64)
    solvers = ("euler_maruyama", "milstein", "stochastic_heun", "sra1")
    ends = [sdeint_adaptive(WELL, x, noise=paths, solver=solver).checked() for solver in solvers]
    for end in ends[1:]:
        assert rms(end - ends[0]) < 5e-3
    other = sdeint_adaptive(WELL, x, noise=BrownianTree(1, (8, 1), t1=0.1, dtype=F64)).checked()
    assert rms(other - ends[0]) > 0.05


def test_brownian_motion_itself_is_exact_over_any_part_of_the_tree() -> None:
    paths = tree(5, 2, t0=-1.0, t1=2.0)
    still = LangevinSDE(lambda t, x, cond: torch.zeros_like(x), 0.5)
    for t0, t1 in ((-1.0, 2.0), (0.1, 0.3)):
        result = sdeint_adaptive(still, rand(5, 2), noise=paths, t0=t0, t1=t1)
        torch.testing.assert_close(result.checked(), rand(5, 2) + 0.5 * (paths(t1) - paths(t0)), rtol=0, atol=1e-12)
        assert (result.t == t1).all()
        assert result.error.abs().max() < 1e-12


def test_time_of_each_row_reaches_drift_and_noise_level() -> None:
    """The integral of t against dt and of 1 + 3 t against dW is 1/2 + w + 3 (w / 2 - h), by parts."""
    sde = LangevinSDE(lambda t, x, cond: t.unsqueeze(-1) + 0 * x, lambda t: 1 + 3 * t)  # type: ignore[union-attr]
    paths = tree(5, 2)
    w, h = paths.increment(0.0, 1.0)
    result = sdeint_adaptive(sde, torch.zeros(5, 2, dtype=F64), noise=paths, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(result.checked(), 0.5 + w + 3 * (0.5 * w - h), rtol=0, atol=1e-9)


def test_row_alone_equals_row_in_a_batch_bit_for_bit() -> None:
    paths, x = tree(16), torch.linspace(-4, 4, 16, dtype=F64).unsqueeze(1)
    batch = sdeint_adaptive(WELL, x, noise=paths)
    assert len(batch.accepted.unique()) > 5
    for b in range(0, 16, 5):
        alone = sdeint_adaptive(WELL, x[b : b + 1], noise=paths.rows(torch.tensor([b])))
        for name in AdaptiveResult.__dataclass_fields__.keys() - {"states"}:
            assert torch.equal(getattr(alone, name), getattr(batch, name)[b : b + 1]), name


def test_calls_are_those_of_the_drift() -> None:
    rows = 0

    def counted(t: Time, x: Tensor, cond: Tensor | None) -> Tensor:
        nonlocal rows
        rows += len(x)
        return 20 * (x - x**3)

    x = torch.full((1, 1), 3.0, dtype=F64)
    result = sdeint_adaptive(LangevinSDE(counted, 2.0), x, noise=tree(1))
    assert result.rejected > 0
    assert result.calls.item() == rows == 1 + 5 * (result.accepted + result.rejected).item()


def test_gradient_in_closed_form() -> None:
    x, paths = (1 + rand(8, 1).abs()).requires_grad_(), tree(8)
    result = sdeint_adaptive(GEOMETRIC, x, noise=paths, rtol=1e-4, atol=1e-4)
    (gradient,) = torch.autograd.grad(result.checked().sum(), x)
    torch.testing.assert_close(gradient, torch.exp((MU - SIGMA**2 / 2) + SIGMA * paths(1.0)), rtol=1e-2, atol=0)
    with torch.no_grad():
        assert torch.equal(sdeint_adaptive(GEOMETRIC, x, noise=paths, rtol=1e-4, atol=1e-4).x, result.x)


def test_gradients_against_finite_differences() -> None:
    field, scale, paths = mlp(), torch.tensor([0.3, 0.5, 0.7], dtype=F64, requires_grad=True), tree(2, 3)

    def run(x: Tensor, cond: Tensor, scale: Tensor, *parameters: Tensor) -> Tensor:
        # Loose, so that a small change of the inputs leaves the sizes of the steps, ten binary digits, as they are.
        return sdeint_adaptive(LinearNoiseSDE(field, scale), x, noise=paths, rtol=0.1, atol=0.1, cond=cond).x

    inputs = (rand(2, 3).requires_grad_(), rand(2, 2, seed=1).requires_grad_(), scale, field.output.bias)
    assert torch.autograd.gradcheck(run, inputs)


def slow_well(length: float) -> SDE:
    return LangevinSDE(lambda t, x, cond: 3 * (x - x**3) / length, 0.0)


def test_error_is_in_units_of_time_also_where_the_tree_is_longer_than_1() -> None:
    """Four times as slow over four times the time: the same steps of the tree, four times as long."""
    x = torch.linspace(1.5, 4, 5, dtype=F64).unsqueeze(1)
    for wanted in (False, True):
        errors = []
        for length in (1.0, 4.0):
            result = sdeint_adaptive(slow_well(length), x.clone().requires_grad_(wanted), noise=tree(5, t1=length))
            errors.append(result.error.detach())
        assert (errors[0] > 0).all()
        torch.testing.assert_close(errors[1], 4 * errors[0])


def test_rows_keep_their_conditioning_where_a_gradient_is_wanted() -> None:
    cond, x = torch.tensor([[1.0], [40.0], [5.0]], dtype=F64), torch.ones(3, 1, dtype=F64)
    sde = LangevinSDE(lambda t, x, cond: 0 * x if cond is None else -cond * x, 0.3)
    plain = sdeint_adaptive(sde, x, noise=tree(3), cond=cond).checked()
    again = sdeint_adaptive(sde, x.clone().requires_grad_(), noise=tree(3), cond=cond).checked()
    torch.testing.assert_close(again.detach(), plain, rtol=1e-12, atol=0)


def test_the_end_time_in_the_type_of_the_state_is_one_of_the_tree() -> None:
    paths = BrownianTree(0, (2, 1), t1=0.1)
    result = sdeint_adaptive(LangevinSDE(lambda t, x, cond: -x, 1.0), torch.zeros(2, 1), noise=paths)
    torch.testing.assert_close(paths(result.t), paths(0.1))


def test_rows_that_fail_are_reported_and_leave_the_others_alone() -> None:
    escaping = LangevinSDE(lambda t, x, cond: x.square(), 0.1)  # x0 / (1 - x0 t) without noise: a pole at 1 / x0
    x = torch.tensor([[0.2], [3.0], [math.nan]], dtype=F64)
    result = sdeint_adaptive(escaping, x, noise=tree(3))
    assert result.status.tolist() == [Status.DONE, Status.STEP_TOO_SMALL, Status.NOT_FINITE]
    assert result.t[1].item() == pytest.approx(1 / 3, abs=0.1)
    alone = sdeint_adaptive(escaping, x[:1], noise=tree(3).rows(torch.tensor([0])))
    assert torch.equal(result.x[:1], alone.x)
    few = sdeint_adaptive(WELL, x[:1], noise=tree(1), max_steps=3)
    assert few.status.tolist() == [Status.MAX_STEPS] and few.t < 1
    with pytest.raises(RuntimeError, match="raise max_steps"):
        few.checked()


def test_float32_follows_float64() -> None:
    x, narrow = torch.ones(4, 1, dtype=F64), BrownianTree(0, (4, 1))
    result = sdeint_adaptive(WELL, x.float(), noise=narrow)
    assert result.x.dtype == result.t.dtype == torch.float32
    torch.testing.assert_close(result.checked().double(), sdeint_adaptive(WELL, x, noise=tree(4)).x, rtol=0, atol=5e-3)


class Outgrowing(SDE):
    additive = True

    def bind(self, cond: Tensor | None, times: Sequence[float] = ()) -> Drift:
        return lambda t, x: t * x

    def diffusion(self, t: Time, x: Tensor) -> float:
        return 1.0


@pytest.mark.gpu
def test_gpu_equals_cpu() -> None:
    x = torch.linspace(-3, 3, 8, dtype=F64).unsqueeze(1)
    there = sdeint_adaptive(WELL, x.cuda(), noise=BrownianTree(0, (8, 1), dtype=F64, device="cuda"))
    torch.testing.assert_close(there.checked().cpu(), sdeint_adaptive(WELL, x, noise=tree(8)).x, rtol=0, atol=1e-9)


def test_bad_arguments_are_refused() -> None:
    x, paths = torch.zeros(4, 1, dtype=F64), tree(4)
    with pytest.raises(
        ValueError, match=r"solver must be of order 1 or more for LinearNoiseSDE, got 'euler_maruyama' of"
    ):
        sdeint_adaptive(GEOMETRIC, x, noise=paths, solver="euler_maruyama")
    with pytest.raises(ValueError, match=r"solver must have one state, got 'reversible_heun'; use 'stochastic_heun'"):
        sdeint_adaptive(WELL, x, noise=paths, solver="reversible_heun")
    with pytest.raises(ValueError, match="solver 'sra1' needs additive noise, got LinearNoiseSDE"):
        sdeint_adaptive(GEOMETRIC, x, noise=paths, solver="sra1")
    with pytest.raises(ValueError, match=r"noise must be like x, \[4, 1\] torch.float32 on cpu, got .*float64"):
        sdeint_adaptive(WELL, x.float(), noise=paths)
    with pytest.raises(ValueError, match=r"noise must be like x, \[3, 1\]"):
        sdeint_adaptive(WELL, x[:3], noise=paths)
    with pytest.raises(ValueError, match=r"t0 and t1 must lie in the tree's \[0\.0, 1\.0\], got 0\.0 and 1\.5"):
        sdeint_adaptive(WELL, x, noise=paths, t1=1.5)
    with pytest.raises(ValueError, match=r"t1 must be above t0, got t0=0\.5 and t1=0\.5"):
        sdeint_adaptive(WELL, x, noise=paths, t0=0.5, t1=0.5)
    with pytest.raises(ValueError, match="rtol must be at least 0 and atol positive"):
        sdeint_adaptive(WELL, x, noise=paths, atol=0.0)
    with pytest.raises(ValueError, match="max_steps must be at least 1, got 0"):
        sdeint_adaptive(WELL, x, noise=paths, max_steps=0)
    with pytest.raises(
        ValueError, match=r"drift must return the shape of x, \[4, 1\], got \[4, 4\]; t has shape \[4\]"
    ):
        sdeint_adaptive(Outgrowing(), x, noise=paths)
