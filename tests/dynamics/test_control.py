import math

import numpy as np
import pytest
import torch
from torch import Tensor

from driftrl.dynamics.brownian import BrownianGrid
from driftrl.dynamics.control import ControlPath
from driftrl.dynamics.fields import MLPField, Time, VelocityField
from driftrl.dynamics.neural_sde import GeometricSDE, LangevinSDE, LinearNoiseSDE
from driftrl.dynamics.sde import sdeint

F64 = torch.float64
TIMES = [0.0, 0.1, 0.35, 0.4, 0.8, 1.0]


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def gappy(batch: int, channels: int, missing: float = 0.5, seed: int = 0) -> Tensor:
    values, generator = rand(batch, len(TIMES), channels, seed=seed), torch.Generator().manual_seed(seed)
    return values.masked_fill(torch.rand(values.shape, generator=generator) < missing, torch.nan)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (F64, 1e-13)])
def test_path_is_numpys_interpolation_of_what_was_observed(dtype: torch.dtype, tolerance: float) -> None:
    values = gappy(40, 3)
    path = ControlPath(TIMES, values.to(dtype))
    for t in (-0.5, 0.0, 0.05, 0.1, 0.37, 0.4, 0.9, 1.0, 2.0):
        found = path.at(t)
        assert found.dtype == dtype
        for row, channels in enumerate(values.numpy()):
            for channel, column in enumerate(channels.T):
                seen = ~np.isnan(column)
                expected = np.interp(t, np.array(TIMES)[seen], column[seen]) if seen.any() else 0.0
                assert found[row, channel].item() == pytest.approx(expected, abs=tolerance)


def test_gradient_reaches_the_observed_values_alone() -> None:
    values = gappy(3, 2).requires_grad_()
    (gradient,) = torch.autograd.grad(ControlPath(TIMES, values).at(0.37).sum(), values)
    assert gradient.isfinite().all()
    seen = ~values.isnan()
    assert (gradient[~seen] == 0).all()
    weight = gradient.sum(1)[seen.any(1)]
    torch.testing.assert_close(weight, torch.ones_like(weight))  # an average of what was observed


@pytest.mark.parametrize("kind", [LangevinSDE, LinearNoiseSDE, GeometricSDE])
def test_a_driven_sde_is_that_of_its_field_where_the_path_is_constant(kind: type[LangevinSDE]) -> None:
    torch.manual_seed(0)
    field = MLPField(3, 2, hidden=(8,), last_layer_scale=1.0).double()
    z, cond = 1 + rand(4, 3).abs(), rand(4, 2, seed=1)
    noise = BrownianGrid.sample(5, (4, 3), dt=0.2, generator=torch.Generator().manual_seed(0), dtype=F64)
    constant = cond[:, None].expand(-1, len(TIMES), -1)

    def run(constant: Tensor, z: Tensor) -> Tensor:
        return sdeint(kind(ControlPath(TIMES, constant).drive(field), 0.3), z, steps=5, noise=noise)

    expected = sdeint(kind(field, 0.3), z, steps=5, noise=noise, cond=cond)
    torch.testing.assert_close(run(constant, z), expected, rtol=1e-12, atol=1e-12)
    compiled = torch.compile(run, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(constant, z), expected, rtol=1e-12, atol=1e-12)
    moving = gappy(4, 2, 0.3)
    assert torch.autograd.gradcheck(lambda z: run(moving, z), z.requires_grad_())
    assert not torch.allclose(run(moving, z), expected)


class Follow(VelocityField):
    """``v = cond``."""

    def forward(self, t: Time, x: Tensor, cond: Tensor | None = None) -> Tensor:
        assert cond is not None
        return cond


def test_a_drift_that_is_the_path_adds_it_up() -> None:
    values, noise = rand(4, len(TIMES), 2), BrownianGrid(0.25, torch.zeros(4, 4, 2, dtype=F64))
    end = sdeint(LangevinSDE(ControlPath(TIMES, values).drive(Follow(2, 2)), 1.0), values[:, 0], steps=4, noise=noise)
    for row, channels in enumerate(values.numpy()):
        for channel, column in enumerate(channels.T):
            total = column[0] + 0.25 * np.interp([0, 0.25, 0.5, 0.75], TIMES, column).sum()
            assert end[row, channel].item() == pytest.approx(total, abs=1e-12)


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match=r"times must rise, be finite and at least two, got \[0\.0, 0\.5, 0\.5\]"):
        ControlPath([0, 0.5, 0.5], rand(2, 3, 1))
    with pytest.raises(ValueError, match=r"values must have shape \[B, 6, C\], got \[2, 5, 1\]"):
        ControlPath(TIMES, rand(2, 5, 1))


def test_a_driven_field_has_its_weights_refuses_cond_and_times_of_rows() -> None:
    field = MLPField(1, cond_dim=1)
    drift = ControlPath([0, 1], torch.zeros(2, 2, 1)).drive(field)
    assert [*map(id, LangevinSDE(drift, 0.3).parameters())] == [*map(id, field.parameters())]
    with pytest.raises(ValueError, match="cond must be None"):
        drift(0.5, torch.zeros(2, 1), torch.zeros(2, 1))
    with pytest.raises(ValueError, match=r"t must be a number with a control path, got \[2\]"):
        drift(torch.zeros(2), torch.zeros(2, 1))


def test_gaps_between_large_times_are_filled_in_float64() -> None:
    times, values = [1.7e9, 1.7e9 + 60, 1.7e9 + 120], torch.tensor([[[0.0], [float("nan")], [10.0]]])
    assert ControlPath(times, values).at(1.7e9 + 60).item() == pytest.approx(5)
    with pytest.raises(ValueError, match=r"values must be floating point numbers, got torch\.int64"):
        ControlPath([0, 1], torch.zeros(1, 2, 1, dtype=torch.long))


def test_infinite_values_and_times_are_refused() -> None:
    with pytest.raises(ValueError, match="values must be finite, or nan where nothing was observed, got infinite ones"):
        ControlPath([0, 1], torch.tensor([[[math.inf], [1.0]]]))
    with pytest.raises(ValueError, match="times must rise, be finite and at least two"):
        ControlPath([0, math.inf], torch.ones(1, 2, 1))
