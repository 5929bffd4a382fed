import math

import pytest
import torch
from torch import Tensor

from driftrl.dynamics.fields import MLPField, Time, VelocityField
from driftrl.dynamics.fokker_planck import fokker_planck_residual
from driftrl.dynamics.likelihood import flow_log_prob, standard_normal_log_prob
from driftrl.dynamics.paths import LINEAR, TRIG, Path, brownian_bridge, score_from_velocity

F64 = torch.float64


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def mlp(hidden: tuple[int, ...] = (8, 8)) -> MLPField:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return MLPField(3, 2, hidden, last_layer_scale=1.0).double()


CENTRES, DEVIATION = torch.tensor([[1.5, 0.0], [-1.0, 1.0], [0.0, -2.0]], dtype=F64), 0.4


class MixtureField(VelocityField):
    """``E[a' x0 + b' x1 | x_t]`` for x0 ~ N(0, I) and x1 of three Gaussians of equal weight, in closed form."""

    def __init__(self, path: Path) -> None:
        super().__init__(2)
        self.path = path

    def forward(self, t: Time, x: Tensor, cond: Tensor | None = None) -> Tensor:
        column = torch.as_tensor(t, dtype=x.dtype).reshape(-1, 1, 1)
        (a, da), (b, db) = self.path.a(column), self.path.b(column)
        variance, off = a**2 + (b * DEVIATION) ** 2, x.unsqueeze(1) - b * CENTRES
        weight = torch.softmax(-0.5 * off.square().sum(-1, keepdim=True) / variance, 1)
        mean: Tensor = (weight * (db * CENTRES + (a * da + b * db * DEVIATION**2) / variance * off)).sum(1)
        return mean


@pytest.mark.parametrize("path", [LINEAR, TRIG], ids=lambda p: p.name)
def test_residual_of_the_marginal_velocity_is_zero(path: Path) -> None:
    t, x = torch.linspace(0, 0.9, 40, dtype=F64), 1.5 * rand(40, 2)
    residual = fokker_planck_residual(MixtureField(path), t, x, path=path)
    torch.testing.assert_close(residual, torch.zeros_like(x), rtol=0, atol=1e-10)
    one = fokker_planck_residual(MixtureField(path), 0.5, x, path=path)
    torch.testing.assert_close(one, torch.zeros_like(x), rtol=0, atol=1e-11)
    other = TRIG if path is LINEAR else LINEAR
    wrong = fokker_planck_residual(MixtureField(path), t, x, path=other)
    assert wrong.norm(dim=1).median() > 0.1


def test_residual_of_a_constant_velocity_in_closed_form() -> None:
    """v = c moves N(0, I) to N(c t, I), whose score is c t - x; that of v is (c t - x) / (1 - t)."""

    class Constant(VelocityField):
        def forward(self, t: Time, x: Tensor, cond: Tensor | None = None) -> Tensor:
            return torch.tensor([2.0, -1.0], dtype=x.dtype).expand_as(x) + 0 * x

    t, x, c = torch.linspace(0, 0.9, 7, dtype=F64)[:, None], rand(7, 2), torch.tensor([2.0, -1.0], dtype=F64)
    rate = c / (1 - t) + (c * t - x) / (1 - t) ** 2
    residual = fokker_planck_residual(Constant(2), t[:, 0], x)
    torch.testing.assert_close(residual, rate - c / (1 - t), rtol=1e-12, atol=1e-12)


class Shortened(VelocityField):
    """The flow up to time `end`, in unit time."""

    def __init__(self, field: VelocityField, end: float) -> None:
        super().__init__(field.dim, field.cond_dim)
        self.field, self.end = field, end

    def forward(self, t: Time, x: Tensor, cond: Tensor | None = None) -> Tensor:
        return self.end * self.field(self.end * t, x, cond)


def test_residual_is_the_rate_at_which_the_score_of_a_field_leaves_that_of_its_flow() -> None:
    field, x, cond = mlp(), rand(5, 3), rand(5, 2, seed=1)
    residual = fokker_planck_residual(field, 0.0, x, cond)
    assert residual.norm(dim=1).min() > 1

    def miss(h: float) -> float:
        """By how much ``h r`` misses the difference at time h of the score of v and that of the flow's density."""

        def log_density(y: Tensor) -> Tensor:
            flow = Shortened(field, h)
            density: Tensor = flow_log_prob(flow, y, base_log_prob=standard_normal_log_prob, steps=8, cond=cond)
            return density.sum()

        true: Tensor = torch.func.grad(log_density)(x)
        gap = score_from_velocity(LINEAR, h, x, field(h, x, cond)) - true
        difference: float = (gap - h * residual).norm().item()
        return difference

    misses = [miss(h) for h in (0.02, 0.01)]
    assert misses[0] / misses[1] == pytest.approx(4, rel=0.15)  # of second order in h
    assert misses[1] < 0.1 * 0.01 * residual.norm().item()


@pytest.mark.parametrize("hidden", [(4,), (4, 4), (4, 4, 4)])
def test_residual_has_right_gradients(hidden: tuple[int, ...]) -> None:
    """Through closed forms of the divergence, and through the default one."""
    field, t = mlp(hidden), torch.tensor([0.1, 0.7], dtype=F64)
    inputs = (0.5 * rand(2, 3)).requires_grad_(), rand(2, 2).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, cond: fokker_planck_residual(field, t, x, cond), inputs)
    (weight,) = (each for name, each in field.named_parameters() if name == "output.weight")
    penalty = fokker_planck_residual(field, t, *inputs).square().sum()
    slope, h = torch.autograd.grad(penalty, weight)[0][0, 0].item(), 1e-6
    changed = []
    for sign in (1, -1):
        with torch.no_grad():
            weight[0, 0] += sign * h
            changed.append(fokker_planck_residual(field, t, *inputs).square().sum().item())
            weight[0, 0] -= sign * h
    assert slope == pytest.approx((changed[0] - changed[1]) / (2 * h), rel=1e-5)


def test_a_penalty_on_the_residual_closes_the_gap() -> None:
    field, x, cond = mlp(), rand(64, 3), rand(64, 2, seed=1)
    optimizer, t = torch.optim.Adam(field.parameters(), lr=3e-3), torch.linspace(0, 0.9, 64, dtype=F64)
    sizes = []
    for _ in range(200):
        residual = (1 - t[:, None]).square() * fokker_planck_residual(field, t, x, cond)
        sizes.append(residual.square().mean())
        optimizer.zero_grad()
        sizes[-1].backward()
        optimizer.step()
    assert sizes[-1] < 0.1 * sizes[0]


def test_residual_in_single_precision_without_gradients_and_compiled() -> None:
    field, x, cond = mlp(), rand(5, 3), rand(5, 2, seed=1)
    exact = fokker_planck_residual(field, 0.4, x, cond)
    with torch.no_grad():
        found = fokker_planck_residual(field.float(), 0.4, x.float(), cond.float())
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=1e-4)
    compiled = torch.compile(fokker_planck_residual, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(field, 0.4, x.float(), cond.float()), found, rtol=1e-5, atol=1e-5)


def test_bad_arguments_are_refused() -> None:
    field = mlp()
    with pytest.raises(ValueError, match=r"x must have shape \[B, 3\], got \[4, 2\]"):
        fokker_planck_residual(field, 0.5, torch.zeros(4, 2), torch.zeros(4, 2))
    with pytest.raises(ValueError, match="path 'brownian_bridge' has a noise term"):
        fokker_planck_residual(field, 0.5, rand(4, 3), rand(4, 2), path=brownian_bridge())
    assert math.isfinite(fokker_planck_residual(field, 0.0, rand(1, 3), rand(1, 2)).sum().item())
