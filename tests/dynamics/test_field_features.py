"""The time features that a field keeps between integrations are always those of its own frequencies."""

from __future__ import annotations

import copy
import pickle

import torch
from torch import Tensor, nn

from driftrl.dynamics.fields import MLPField
from driftrl.dynamics.ode import odeint

from .draws import rand


def mlp() -> MLPField:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return MLPField(3, hidden=(7,), last_layer_scale=1.0).double()


class Integral(nn.Module):
    """Flow of a field, for `functional_call`."""

    def __init__(self, field: MLPField) -> None:
        super().__init__()
        self.field = field

    def forward(self, x: Tensor) -> Tensor:
        return odeint(self.field, x, steps=3)


def numbers(field: MLPField) -> dict[str, Tensor]:
    """Parameters and buffers, by their names in `Integral`."""
    return {f"field.{name}": tensor for name, tensor in field.state_dict().items()}


def test_transforms_leave_nothing_behind_in_a_field() -> None:
    field, x = mlp(), rand(4, 3)
    fresh = odeint(copy.deepcopy(field), x, steps=3)
    frequencies = field.angular_frequencies

    def total(state: dict[str, Tensor], y: Tensor) -> Tensor:
        end: Tensor = torch.func.functional_call(Integral(field), state, (y,))
        return end.sum()

    state = numbers(field)
    torch.func.grad(total)(state, x)
    copy.deepcopy(field)
    pickle.dumps(field)
    stacked = {name: torch.stack([tensor, 2 * tensor]) for name, tensor in state.items()}
    ours, theirs = torch.func.vmap(total, (0, None))(stacked, x)
    torch.testing.assert_close(ours, fresh.sum())
    assert not torch.isclose(theirs, ours)
    assert field.angular_frequencies is frequencies
    torch.testing.assert_close(odeint(field, x, steps=3), fresh)


def test_solver_uses_the_frequencies_of_the_moment() -> None:
    field, other, x = mlp(), mlp(), rand(4, 3)
    odeint(field, x, steps=3)
    other.angular_frequencies.mul_(2)
    expected = odeint(copy.deepcopy(other), x, steps=3)
    torch.testing.assert_close(torch.func.functional_call(Integral(field), numbers(other), (x,)), expected)
    field.load_state_dict(other.state_dict())
    assert torch.equal(odeint(field, x, steps=3), expected)
    field.angular_frequencies.div_(2)
    assert not torch.isclose(odeint(field, x, steps=3), expected).all()
    assert torch.equal(odeint(pickle.loads(pickle.dumps(other)), x, steps=3), expected)
