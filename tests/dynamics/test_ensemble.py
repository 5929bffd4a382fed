from __future__ import annotations

import pytest
import torch

from driftrl.dynamics import ensemble
from driftrl.dynamics.ensemble import Normalizer, dropout_mask


def test_normalizer_standardises_and_leaves_constant_columns_in_their_unit() -> None:
    normalizer = Normalizer(3)
    data = torch.stack([torch.tensor([1.0, 3.0]), torch.tensor([7.0, 7.0]), torch.tensor([1e-4, 3e-4])], 1)
    assert torch.equal(normalizer(data), data)
    normalizer.fit(data)
    torch.testing.assert_close(normalizer(data), torch.tensor([[-1.0, 0.0, -1.0], [1.0, 0.0, 1.0]]))
    torch.testing.assert_close(normalizer.inverse(normalizer(data)), data)


@pytest.mark.parametrize("left_out", [0.0075, 0.09, 0.4])
def test_zeros_of_a_dropout_mask_are_independent_and_its_mean_is_1(left_out: float) -> None:
    n, draws = 500, 4000
    generator = torch.Generator().manual_seed(0)
    masks = torch.stack([dropout_mask((1, 5, n // 5), left_out, generator).flatten() for _ in range(draws)])
    zero = (masks == 0).double()
    assert masks.unique().tolist() == pytest.approx([0, 1 / (1 - left_out)])
    per_mask, per_place = zero.sum(1), zero.mean(0)
    spread = (left_out * (1 - left_out)) ** 0.5
    assert per_mask.mean().item() == pytest.approx(n * left_out, abs=4 * spread * (n / draws) ** 0.5)
    assert per_mask.var().item() == pytest.approx(n * spread**2, rel=0.15)  # binomial
    assert ((per_place - left_out).abs() < 5 * spread / draws**0.5).all()  # the first place and the last, too
    beside = ((zero[:, 1:] - left_out) * (zero[:, :-1] - left_out)).mean().item()
    assert abs(beside) < 4 * spread**2 / (draws * n) ** 0.5


def test_dropout_mask_draws_gaps_until_they_reach_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ensemble, "SPARE", -1e9)  # 8 at a time
    masks = [dropout_mask((10_000,), 0.05, torch.Generator().manual_seed(seed)) for seed in range(20)]
    zeros = torch.stack([(mask == 0).double() for mask in masks])
    assert zeros[:, -1000:].mean().item() == pytest.approx(0.05, abs=0.01)
    assert zeros.mean().item() == pytest.approx(0.05, abs=0.003)
