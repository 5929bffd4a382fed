import math

import pytest
import torch
from scipy import stats
from torch import Tensor

from driftrl.dynamics.brownian import BrownianGrid
from driftrl.dynamics.brownian_tree import _GOLDEN, BrownianTree, _hash

F64 = torch.float64


N = 40_000


# Sample second moments of N standardised Gaussian pairs deviate by sqrt(2 / N) = 0.7 % (variance) or 0.5 % (product):
# 5 standard errors.
TOLERANCE = 5 * math.sqrt(2 / N)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def assert_independent(parts: dict[str, tuple[Tensor, float]]) -> None:
    """Each (sample [N], variance) has that variance, and no two are correlated."""
    z = torch.stack([sample.flatten() / math.sqrt(variance) for sample, variance in parts.values()])
    second = z @ z.mT / z.shape[1]
    torch.testing.assert_close(second, torch.eye(len(parts), dtype=z.dtype), rtol=0, atol=TOLERANCE)
    assert z.mean(1).abs().max() < 5 / math.sqrt(z.shape[1])


def grid(
    steps: int = 8, batch: int = 3, dim: int = 2, dt: float = 0.25, levy: bool = True, seed: int = 0
) -> BrownianGrid:
    return BrownianGrid.sample(steps, (batch, dim), dt=dt, generator=generator(seed), levy=levy, dtype=F64)


def test_grid_moments() -> None:
    sample = grid(2, N, 1, dt=0.3)
    assert sample.h is not None
    assert_independent(
        {"w0": (sample.w[0], 0.3), "w1": (sample.w[1], 0.3), "h0": (sample.h[0], 0.025), "h1": (sample.h[1], 0.025)}
    )


def test_levy_area_is_the_area_between_path_and_chord() -> None:
    """A path of straight pieces has no area within them; the trapezoidal rule is exact for it."""
    fine = BrownianGrid(0.1, grid(6).w, torch.zeros(6, 3, 2, dtype=F64))
    coarse, path = fine.coarsen(6), fine.path()
    chord = torch.linspace(0, 1, 7, dtype=F64).view(-1, 1, 1) * path[-1]
    assert coarse.h is not None
    torch.testing.assert_close(coarse.h[0], torch.trapezoid(path - chord, dim=0) / 6, rtol=0, atol=1e-14)
    torch.testing.assert_close(coarse.path()[-1], path[-1])


def test_path_covariance_is_the_earlier_time_and_that_of_the_bridge() -> None:
    path = grid(4, N, 1, dt=0.25).path()[..., 0]
    times = torch.linspace(0, 1, 5, dtype=F64)
    earlier = torch.minimum(times[:, None], times)
    torch.testing.assert_close(path @ path.mT / N, earlier, rtol=0, atol=TOLERANCE)
    bridge = path - times[:, None] * path[-1]
    torch.testing.assert_close(bridge @ bridge.mT / N, earlier - times[:, None] * times, rtol=0, atol=TOLERANCE)


def test_grid_draws_from_the_generator_only_in_any_dtype() -> None:
    state = torch.get_rng_state()
    a, b = (BrownianGrid.sample(3, (2, 2), dt=0.1, generator=generator(5)) for _ in range(2))
    assert torch.equal(a.w, b.w)
    assert a.w.dtype == torch.float32
    assert torch.equal(torch.get_rng_state(), state)


QUERIES = [0.1, 0.7, 0.0, 1.0, 0.25, 1 / 3, 0.7 + 1e-9, 0.5, 1e-7]


def test_tree_gives_the_same_path_whatever_the_order_of_queries() -> None:
    tree = BrownianTree(3, (4, 2), dtype=F64)
    kept = {name: repr(value) for name, value in vars(tree).items()}
    forwards = {t: tree(t) for t in QUERIES}
    backwards = {t: BrownianTree(3, (4, 2), dtype=F64)(t) for t in reversed(QUERIES)}
    assert all(torch.equal(forwards[t], backwards[t]) for t in QUERIES)
    assert {name: repr(value) for name, value in vars(tree).items()} == kept  # nothing is stored
    assert not torch.equal(BrownianTree(4, (4, 2), dtype=F64)(0.1), forwards[0.1])
    assert torch.equal(BrownianTree(3 + 2**64, (4, 2), dtype=F64)(0.1), forwards[0.1])
    assert torch.equal(forwards[0.0], torch.zeros(4, 2, dtype=F64))


def test_tree_draws_from_splitmix64() -> None:
    """The published test vector: the first outputs of the generator for the seed 1234567."""
    state = 1234567 + torch.arange(1, 6) * _GOLDEN
    expected = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    assert [value % 2**64 for value in _hash(state).tolist()] == expected


@pytest.mark.parametrize("seed", [0, -_GOLDEN])
def test_no_seed_starts_the_generator_at_its_fixed_point(seed: int) -> None:
    """SplitMix64's output function maps 0 to 0, which makes a radius of 8.6; one above 5 has a probability of 4e-6."""
    assert all(BrownianTree(seed, (1, dim), dtype=F64)(1.0).abs().max() < 5 for dim in (1, 2, 5))


def test_tree_rows_do_not_depend_on_the_batch() -> None:
    torch.testing.assert_close(BrownianTree(3, (7, 2), dtype=F64)(0.3)[:4], BrownianTree(3, (4, 2), dtype=F64)(0.3))


def test_tree_increments_and_areas_are_independent_with_the_right_variance() -> None:
    """Steps of very different size at odd times, among them one that starts where another ends."""
    tree = BrownianTree(0, (N, 1), t0=-1.0, t1=2.0, dtype=F64)
    parts: dict[str, tuple[Tensor, float]] = {}
    for start, end in [(0.3, 0.3 + 1e-6), (-1.0, 0.1), (0.1, 0.3), (1.3, 2.0), (0.5, 0.75)]:
        w, h = tree.increment(start, end)
        parts |= {f"w{start}": (w, end - start), f"h{start}": (h, (end - start) / 12)}
    assert_independent(parts)


def test_tree_halves_have_variance_half_and_area_a_24th() -> None:
    tree = BrownianTree(1, (N, 1), dtype=F64)
    (w_left, h_left), (w_right, h_right) = tree.increment(0.0, 0.5), tree.increment(0.5, 1.0)
    assert_independent({"wl": (w_left, 1 / 2), "wr": (w_right, 1 / 2), "hl": (h_left, 1 / 24), "hr": (h_right, 1 / 24)})


def test_tree_is_gaussian_and_has_the_covariance_of_brownian_motion() -> None:
    tree = BrownianTree(2, (N, 1), dtype=F64)
    times = torch.tensor([0.1, 1 / 3, 0.7, 1.0], dtype=F64)
    path = torch.stack([tree(t)[:, 0] for t in times.tolist()])
    torch.testing.assert_close(path @ path.mT / N, torch.minimum(times[:, None], times), rtol=0, atol=TOLERANCE)
    for row, t in zip(path, times.tolist(), strict=True):
        assert stats.kstest(row.numpy(), stats.norm(scale=math.sqrt(t)).cdf).pvalue > 1e-4


def test_tree_increments_add_up() -> None:
    """The grid over small steps, coarsened, is the increment over the large one: W and its integral are consistent."""
    tree = BrownianTree(5, (3, 2), t0=1.0, t1=4.0, dtype=F64)
    coarse, (w, h) = tree.grid(7, 1.5, 3.25).coarsen(7), tree.increment(1.5, 3.25)
    torch.testing.assert_close(coarse.w[0], w, rtol=0, atol=1e-13)
    torch.testing.assert_close(coarse.h, h[None], rtol=0, atol=1e-13)
    torch.testing.assert_close(tree.grid(4).path()[2], tree(2.5), rtol=0, atol=1e-13)
    assert tree.grid(4).dt == 0.75


def test_tree_with_a_time_per_row_is_the_tree_at_each_of_the_times() -> None:
    tree = BrownianTree(5, (4, 2), t0=1.0, t1=4.0, dtype=F64)
    start, end = torch.tensor([1.0, 1.3, 2.5, 3.1], dtype=F64), torch.tensor([4.0, 1.4, 2.625, 3.1 + 1e-6], dtype=F64)
    at, (w, h) = tree(start), tree.increment(start, end)
    for b in range(4):
        assert torch.equal(at[b], tree(start[b].item())[b])
        w_row, h_row = tree.increment(start[b].item(), end[b].item())
        torch.testing.assert_close(torch.stack([w[b], h[b]]), torch.stack([w_row[b], h_row[b]]), rtol=0, atol=1e-15)
    assert torch.equal(tree.rows(torch.tensor([2, 0]))(start[[2, 0]]), at[[2, 0]])
    assert tree.rows(torch.tensor([2, 0])).shape == (2, 2)


def test_tree_results_have_the_requested_dtype() -> None:
    tree, precise = BrownianTree(5, (3, 2)), BrownianTree(5, (3, 2), dtype=F64)
    (w, h), (w64, h64) = tree.increment(0.3, 0.3001), precise.increment(0.3, 0.3001)
    assert (tree(0.3).dtype, w.dtype) == (torch.float32, torch.float32)
    torch.testing.assert_close(torch.stack([w, h]).double(), torch.stack([w64, h64]), rtol=1e-6, atol=0)


@pytest.mark.gpu
def test_tree_is_the_same_on_a_gpu() -> None:
    cpu, gpu = (BrownianTree(3, (5, 2), dtype=F64, device=device) for device in ("cpu", "cuda"))
    for t in QUERIES:
        torch.testing.assert_close(gpu(t).cpu(), cpu(t), rtol=0, atol=1e-12)


def test_bad_arguments_are_refused() -> None:
    w = torch.zeros(2, 3, 1)
    with pytest.raises(ValueError, match=r"dt must be positive, got 0\.0"):
        BrownianGrid(0.0, w)
    with pytest.raises(ValueError, match=r"w must have shape \[steps, B, D\] .*got \[3, 1\]"):
        BrownianGrid(0.1, w[0])
    with pytest.raises(ValueError, match=r"h must be like w, \(\[2, 3, 1\], torch.float32, .*float64"):
        BrownianGrid(0.1, w, w.double())
    with pytest.raises(ValueError, match="steps must be at least 1 and dt positive, got 0 and"):
        BrownianGrid.sample(0, (3, 1), dt=0.1, generator=generator())
    with pytest.raises(ValueError, match="factor must divide the 2 steps, got 3"):
        BrownianGrid(0.1, w).coarsen(3)
    with pytest.raises(ValueError, match=r"t1 must be above t0, got t0=1\.0 and t1=1\.0"):
        BrownianTree(0, (3, 1), t0=1.0)
    with pytest.raises(ValueError, match=r"shape must be \(B, D\), each at least 1, got \(0, 1\)"):
        BrownianTree(0, (0, 1))
    tree = BrownianTree(0, (3, 1))
    with pytest.raises(ValueError, match=r"t must lie in \[0\.0, 1\.0\], got 1\.5"):
        tree(1.5)
    with pytest.raises(ValueError, match=r"times must increase, got 0\.5 before 0\.5"):
        tree.increment(0.5, 0.5)
    with pytest.raises(ValueError, match=r"t must be a number or have shape \[3\], got \[2\]"):
        tree(torch.zeros(2))
    with pytest.raises(ValueError, match=r"t must lie in \[0\.0, 1\.0\], got tensor\(\[0\.0000, 0\.5000, 1\.5000"):
        tree(torch.tensor([0.0, 0.5, 1.5]))
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        tree.grid(0)


def test_increments_below_a_billionth_of_the_interval_are_refused() -> None:
    paths = BrownianTree(11, (20_000, 1), t0=2.0, t1=5.0, dtype=F64)
    size = 3 * 2.0**-30
    w, h = paths.increment(3.5, 3.5 + size)
    for found, expected in ((w.var(), size), (h.var(), size / 12)):
        assert found.item() == pytest.approx(expected, rel=5 * math.sqrt(2 / 20_000))  # 5 standard errors
    with pytest.raises(ValueError, match=r"times must be 2\^-30 of the interval at least from those before them"):
        paths.increment(3.5, 3.5 + size / 2)
