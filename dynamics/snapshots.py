"""An ensemble in time from one network: weights along a Langevin path around where training ended."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .langevin import overdamped

POWER = 0.55
"""By which steps decay, ``(1 + t / every)^-POWER``: in (0.5, 1] the path converges (Welling and Teh 2011)."""


def weight_snapshots(
    gradient: Callable[[Tensor], Tensor],
    weights: Tensor,
    *,
    count: int,
    every: int,
    step: float,
    preconditioner: Tensor,
    generator: torch.Generator,
) -> Tensor:
    """States of stochastic gradient Langevin dynamics on weights w, [count, P] (Welling and Teh 2011; Li et al. 2016).

        ``w <- w - h_t M grad U(w) + sqrt(2 h_t M) noise``, steps h_t falling from ``step``

    With small steps they are samples of ``exp(-U)``: of the posterior, if U is minus its logarithm and grad U its
    estimate on a minibatch, scaled to all rows.

    Args:
        gradient: w [P] -> estimate of grad U, [P].
        weights: where the path begins, [P].
        count: snapshots, at least 1.
        every: steps from one to the next, at least 1.
        step: h_0, positive.
        preconditioner: diagonal of M, positive, [P]; 1 / sqrt of Adam's second moment, for example.
        generator: source of the noise, on the weights' device.

    Raises:
        ValueError: if a number is out of range.
    """
    if count < 1 or every < 1 or not step > 0:
        raise ValueError(f"count, every and step must be at least 1, 1 and positive, got {count}, {every} and {step}")
    w, snapshots = weights.detach()[None], []
    for t in range(count * every):
        noise = torch.randn(1, 1, w.shape[1], generator=generator, device=w.device, dtype=w.dtype)
        h = step * (1 + t / every) ** -POWER
        w = overdamped(lambda _, x, __: -gradient(x[0])[None], w, noise, step=h, preconditioner=preconditioner)
        if (t + 1) % every == 0:
            snapshots.append(w[0])
    return torch.stack(snapshots)
