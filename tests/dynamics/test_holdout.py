import math

import pytest
import torch
from torch import Tensor

from driftrl.dynamics.holdout import divide_rows


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def nothing_yet(members: int) -> tuple[Tensor, Tensor]:
    return torch.empty(0, dtype=torch.long), torch.empty(members, 0, dtype=torch.long)


def test_rows_keep_their_part_and_the_holdout_is_never_trained_on() -> None:
    (held, rows), trained, rng = nothing_yet(4), set[int](), generator(1)
    for n in (50, 51, 1000, 1000, 30000, 60000):
        old_held, old_rows = held, rows
        held, rows = divide_rows(n, held, rows, rng)
        holdout = set(held.tolist())
        assert len(holdout) == held.numel() == min(n // 5, 5000)
        assert rows.shape == (4, n - len(holdout))
        assert torch.equal(rows[:, : old_rows.shape[1]], old_rows)
        assert not holdout & trained
        trained |= set(range(n)) - holdout
        assert set(rows.flatten().tolist()) <= trained
        if n == old_rows.shape[1] + old_held.numel():
            assert holdout == set(old_held.tolist())
    # A uniform sample of all rows, though most rows came last; and bootstrap samples differ, with e^-1 of rows missing.
    assert held.double().mean().item() == pytest.approx(30000, rel=0.03)
    present = [len(set(member.tolist())) / len(trained) for member in rows]
    assert present == pytest.approx([1 - math.exp(-1)] * 4, abs=0.02)
    assert len({tuple(member[:20].tolist()) for member in rows}) == 4


def test_fewer_rows_are_another_data_set() -> None:
    held, rows = divide_rows(100, *divide_rows(1000, *nothing_yet(4), generator()), generator(1))
    assert rows.shape == (4, 80) and held.shape == (20,)
    assert max(rows.max(), held.max()) < 100


def test_a_single_member_trains_on_every_row_once() -> None:
    held, rows = nothing_yet(1)
    for n in (100, 230):
        held, rows = divide_rows(n, held, rows, generator())
        assert sorted(rows[0].tolist() + held.tolist()) == list(range(n))
