"""Which rows of a growing data set are held out, and which ones each member of an ensemble trains on."""

from __future__ import annotations

import torch
from torch import Tensor

HOLDOUT_FRACTION, MAX_HOLDOUT = 0.2, 5000
"""Part of the rows that is held out, and how many at most (MBPO)."""


def divide_rows(n: int, holdout: Tensor, members: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Extend a division of the rows 0, 1, ... to n rows.

    Known rows stay where they are, except that some leave the hold-out for training where it would grow beyond its
    size. The hold-out is always a uniform sample of all rows: new rows enter it in their share, and those that leave
    it are chosen at random. With fewer rows than before everything is divided anew.

    Args:
        n: number of rows, at least 2.
        holdout: rows held out so far, [H], int64.
        members: rows that each member trains on so far, [M, R], int64; with more than one member bootstrap samples.
        generator: source of randomness, on the rows' device.

    Returns:
        Hold-out and members' rows for n rows, in the same form.
    """

    def permutation(count: int) -> Tensor:
        return torch.randperm(count, generator=generator, device=holdout.device)

    known = holdout.numel() + members.shape[1]
    if n < known:
        holdout, members, known = holdout[:0], members[:, :0], 0
    size = max(1, min(int(HOLDOUT_FRACTION * n), MAX_HOLDOUT))
    stay = min(holdout.numel(), size * known // n)
    held = holdout[permutation(holdout.numel())]
    new = known + permutation(n - known)
    added = torch.cat([held[stay:], new[size - stay :]])
    choice = torch.arange(len(added), device=added.device).expand(len(members), -1)
    if len(members) > 1 and len(added):
        choice = torch.randint(len(added), choice.shape, generator=generator, device=added.device)
    return torch.cat([held[:stay], new[: size - stay]]), torch.cat([members, added[choice]], 1)
