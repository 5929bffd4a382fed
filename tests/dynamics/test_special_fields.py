import pytest
import torch
from torch import Tensor, nn

from driftrl.dynamics.fields import MLPField, VelocityField
from driftrl.dynamics.special_fields import AffineField, LinearField, PotentialField, ResidualField


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def mlp(dim: int = 3, cond_dim: int = 2, **options: object) -> MLPField:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        field = MLPField(dim, cond_dim, **{"hidden": (7, 5), "last_layer_scale": 1.0, **options}).double()  # type: ignore[arg-type]
        for p in field.parameters():  # the zero biases would hide a forgotten bias
            if p.ndim == 1:
                nn.init.normal_(p)
    return field


class Quartic(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.25, dtype=torch.float64))

    def forward(self, x: Tensor, cond: Tensor | None) -> Tensor:
        return self.scale * x.square().sum(-1).square()


def test_linear_field() -> None:
    matrix, offset, x = rand(3, 3), rand(3, seed=1), rand(4, 3, seed=2)
    field = LinearField(matrix, offset)
    v, jacobian = field.jacobian(0.0, x)
    torch.testing.assert_close(v, torch.stack([matrix @ row + offset for row in x]))
    torch.testing.assert_close(jacobian[2], matrix)
    torch.testing.assert_close(field.divergence(0.0, x)[1], matrix.trace().expand(4))
    assert set(field.state_dict()) == {"matrix", "offset"}


def test_residual_field_is_the_sum() -> None:
    known, learned = LinearField(rand(3, 3)), mlp()
    field = ResidualField(known, learned)
    x, cond, t = rand(4, 3, seed=1), rand(4, 2), 0.3
    assert field.cond_dim == 2
    torch.testing.assert_close(field(t, x, cond), known(t, x) + learned(t, x, cond))
    v, trace = field.divergence(t, x, cond)
    torch.testing.assert_close(v, known(t, x) + learned(t, x, cond))
    torch.testing.assert_close(trace, known.matrix.trace() + learned.divergence(t, x, cond)[1])
    v, jacobian = field.jacobian(t, x, cond)
    torch.testing.assert_close(v, known(t, x) + learned(t, x, cond))
    torch.testing.assert_close(jacobian, known.matrix + learned.jacobian(t, x, cond)[1])


def test_potential_field_is_minus_the_gradient_with_and_without_grad() -> None:
    potential = Quartic()
    field, x = PotentialField(potential, 3), rand(4, 3)
    square = x.square().sum(-1, keepdim=True)
    with torch.no_grad():
        torch.testing.assert_close(field(0.0, x), -square * x)
    _, jacobian = field.jacobian(0.0, x)
    torch.testing.assert_close(jacobian, -(square[..., None] * torch.eye(3) + 2 * x[:, :, None] * x[:, None, :]))
    (gradient,) = torch.autograd.grad(field(0.0, x).sum(), potential.scale)
    torch.testing.assert_close(gradient, (-4 * square * x).sum())
    assert torch.autograd.gradcheck(lambda y: field(0.0, y), (x.clone().requires_grad_(),))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: LinearField(torch.zeros(2, 3)), r"matrix must have shape \[D, D\], got \[2, 3\]"),
        (lambda: LinearField(torch.eye(2), torch.zeros(3)), r"offset must have shape \[2\], got \[3\]"),
        (lambda: ResidualField(MLPField(2), MLPField(3)), "equal dim, got 2 and 3"),
        (lambda: ResidualField(MLPField(2, 1), MLPField(2, 3)), "equal cond_dim, or 0, got 1 and 3"),
    ],
)
def test_bad_construction_is_refused(build: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()  # type: ignore[operator]


def test_bad_inputs_of_a_sum_are_refused() -> None:
    field, x, cond = ResidualField(LinearField(torch.eye(3)), MLPField(3, 2)), torch.zeros(4, 3), torch.zeros(4, 2)
    with pytest.raises(ValueError, match=r"x must have shape \[B, 3\], got"):
        field(0.0, torch.zeros(4, 2), cond)
    with pytest.raises(ValueError, match=r"t must be a float or have shape \[4\], got"):
        field(torch.zeros(3), x, cond)
    with pytest.raises(ValueError, match=r"cond must have shape \[B, 2\], got None"):
        field(0.0, x)
    with pytest.raises(ValueError, match=r"cond must have shape \[B, 2\], got \[4, 3\]"):
        field(0.0, x, torch.zeros(4, 3))
    with pytest.raises(ValueError, match="cond must have 4 rows like x, or 1 row, got 3"):
        field(0.0, x, torch.zeros(3, 2))


@pytest.mark.parametrize("field", [LinearField(torch.eye(3)), PotentialField(Quartic(), 3)])
def test_unexpected_conditioning_is_refused(field: VelocityField) -> None:
    with pytest.raises(ValueError, match=r"cond must be None, got shape \[4, 2\]"):
        field(0.0, torch.zeros(4, 3), torch.zeros(4, 2))


def test_potential_of_wrong_shape_is_refused() -> None:
    class Column(nn.Module):
        def forward(self, x: Tensor, cond: Tensor | None) -> Tensor:
            return x[:, :1]

    with pytest.raises(ValueError, match=r"potential must return shape \[4\], got \[4, 1\]"):
        PotentialField(Column(), 3)(0.0, torch.zeros(4, 3))


def test_an_affine_field_begins_at_zero_and_is_affine() -> None:
    field, x, cond = AffineField(2, 3), torch.randn(5, 2), torch.randn(5, 3)
    assert torch.equal(field(0.3, x, cond), torch.zeros(5, 2))
    torch.nn.init.normal_(field.output.weight)
    v, jacobian = field.jacobian(0.3, x, cond)
    assert torch.allclose(jacobian, field.output.weight[:, :2].expand(5, -1, -1))
    assert torch.allclose(v, x @ field.output.weight[:, :2].T + cond @ field.output.weight[:, 2:].T, atol=1e-6)
    assert torch.allclose(field(0.3, x, cond[:1]), field(0.3, x, cond[:1].expand(5, -1)))
    with pytest.raises(ValueError, match="cond must have shape"):
        field(0.3, x)
