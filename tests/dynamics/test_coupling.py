import math

import pytest
import torch

from driftrl.dynamics.coupling import entropic_plan

F64 = torch.float64


def quantiles(n: int, mean: float, deviation: float, dtype: torch.dtype = F64) -> torch.Tensor:
    """Points of equal mass of a normal distribution, [n, 1]."""
    levels = (torch.arange(n, dtype=F64) + 0.5) / n
    points: torch.Tensor = mean + deviation * torch.special.ndtri(levels)
    return points[:, None].to(dtype)


@pytest.mark.parametrize("scale", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_plan_between_gaussians_in_closed_form(scale: float, dtype: torch.dtype) -> None:
    """Covariance ``(sqrt(4 s0^2 s1^2 + scale^4) - scale^2) / 2`` (Mallasto et al., arXiv 2006.03416)."""
    x0, x1 = quantiles(400, -1, 0.7, dtype), quantiles(300, 2, 1.2, dtype)
    plan = entropic_plan(x0, x1, scale)
    covariance = (plan * (x0 - x0.mean()) * (x1 - x1.mean()).T).sum().item()
    exact = (math.sqrt(4 * 0.7**2 * 1.2**2 + scale**4) - scale**2) / 2
    assert covariance == pytest.approx(exact, rel=0.02)  # the tails beyond the outermost quantiles are missing
    torch.testing.assert_close(plan.sum(1), torch.full((400,), 1 / 400, dtype=dtype), rtol=1e-4, atol=0)
    torch.testing.assert_close(plan.sum(0), torch.full((300,), 1 / 300, dtype=dtype), rtol=1e-3, atol=0)


def test_plan_is_the_kernel_up_to_a_factor_of_rows_and_one_of_columns() -> None:
    x0, x1 = quantiles(20, 0, 1), quantiles(30, 1, 2)
    ratio = entropic_plan(x0, x1, 0.8).log() + (x0 - x1.T).square() / (2 * 0.8**2)
    centred = ratio - ratio.mean(0) - ratio.mean(1, keepdim=True) + ratio.mean()
    torch.testing.assert_close(centred, torch.zeros_like(centred), rtol=0, atol=1e-12)


def test_bad_arguments_are_refused() -> None:
    x = torch.zeros(4, 2)
    with pytest.raises(ValueError, match=r"shapes \[N, D\] and \[M, D\], got \[4, 2\] and \[4, 3\]"):
        entropic_plan(x, torch.zeros(4, 3), 1.0)
    with pytest.raises(ValueError, match=r"scale must be positive and iterations at least 1, got 0\.0 and 200"):
        entropic_plan(x, x, 0.0)


def test_plans_do_not_depend_on_where_the_origin_is() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 100, 2, generator=generator)
    exact = entropic_plan(a.double(), b.double(), 0.2)
    for shift in (0.0, 1000.0):
        far = entropic_plan(((a.double() + shift).float()), (b.double() + shift).float(), 0.2)
        assert (far - exact).abs().sum() / 2 < 2e-3  # the rounding of the points themselves
    with pytest.raises(ValueError, match="must have a row at least, got 0 and 100"):
        entropic_plan(a[:0], b, 0.2)


def test_two_far_clusters_are_paired_as_near_ones() -> None:
    near = [torch.randn(40, 2, generator=torch.Generator().manual_seed(k)) for k in range(2)]
    plans = []
    for distance in (50.0, 1e4):
        x0, x1 = (torch.cat([each - distance, each + distance]) for each in near)
        plans.append(entropic_plan(x0, x1, 0.5))
    assert (plans[0] - plans[1]).abs().sum() < 0.05  # float32 resolves 1e-3 at 1e4
