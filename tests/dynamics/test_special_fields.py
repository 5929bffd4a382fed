import pytest
import torch
from torch import Tensor, nn

from driftrl.dynamics.fields import MLPField, VelocityField
from driftrl.dynamics.special_fields import AffineField, PotentialField


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


@pytest.mark.parametrize("field", [AffineField(3), PotentialField(Quartic(), 3)])
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
