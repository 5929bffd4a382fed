"""Terms that spread the actions of a flow policy."""

from __future__ import annotations

import math

from torch import Tensor

from .ratios import interpolate
from .rollout import Batch


def brownian_loss(velocity: Tensor, batch: Batch, form: str, std: float) -> Tensor:
    """Brownian regularizer, summed over action dimensions and averaged over the batch.

    "paper" (Algorithm 1): ``|(1 - t) v - (x_t - t v_old)|^2`` pulls the velocity towards minus the score of the flow
    that acted, along which Brownian motion would spread it. Alone, it drives the flow to std e * base_std.
    "consistent": ``(1 - t) |v - c (x_t - m)|^2`` with ``c = log(std / base_std)``: the same gradient for c = 1 while
    the policy is the one that acted, no old velocity, and any target. m is the mean of the base.

    Args:
        velocity: v(t, x_t, s) with gradient, [B, D].
        batch: with t and v_old of the interpolation point.
        form: "paper" or "consistent".
        std: target standard deviation of the flow's samples ("consistent" only).
    """
    x_t, left = interpolate(batch), 1 - batch["t"].unsqueeze(-1)
    if form == "paper":
        residual = left * velocity - (x_t - batch["t"].unsqueeze(-1) * batch["v_old"])
        return residual.square().sum(-1).mean()
    rate = math.log(std) - batch["base_log_std"]
    return (left * (velocity - rate * (x_t - batch["base_mean"])).square()).sum(-1).mean()
