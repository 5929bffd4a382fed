"""Whether sampling by ODE and by SDE agree: the Fokker-Planck equation of a velocity field and its own score."""

from __future__ import annotations

import torch
from torch import Tensor

from .fields import Time, VelocityField
from .paths import LINEAR, Path, score_from_velocity


def fokker_planck_residual(
    field: VelocityField, t: Time, x: Tensor, cond: Tensor | None = None, *, path: Path = LINEAR
) -> Tensor:
    """By how much the score s that follows from a velocity v fails the equation of the flow's density.

        r = ds/dt + grad (div v + v . s),    s = `score_from_velocity`

    It is the gradient of the residual of the log-density's Fokker-Planck equation,
    ``d/dt log p + div f + f . s - g^2 / 2 (div s + |s|^2)`` with ``f = v + eps s`` and ``g^2 = 2 eps`` of
    `interpolant_sde`, in which eps cancels: one residual serves all noise levels and needs no density. It is 0
    everywhere exactly if s is the score of the flow's own marginals, so that ODE and SDEs of every level have the same
    marginals. A trained field fails it, because nothing in flow matching ties its score to its flow.

    As a penalty its square closes the gap (arXiv 2311.15996, 2506.17139); take ``(1 - t)^2 r``, as r grows like
    1 / (1 - t)^2. Costs the divergence, which `MLPField` of one or two hidden layers has in closed form, with its
    gradient.

    Args:
        field: v, the marginal velocity of a path from N(0, I).
        t: times in [0, 1), a float or [B].
        x: states, [B, D].
        cond: conditioning, [B, C], or None.
        path: a path without noise term.

    Returns:
        r, [B, D], in 1 / (x time), differentiable in x, cond and the field's parameters.

    Raises:
        ValueError: if shapes do not fit or the path has a noise term.
    """
    field.check_state(t, x)
    times = torch.as_tensor(t, dtype=x.dtype, device=x.device).expand(x.shape[0])

    def score(time: Tensor) -> Tensor:
        return score_from_velocity(path, time, x, field(time, x, cond))

    def flux(y: Tensor) -> Tensor:
        v, expansion = field.divergence(times, y, cond)
        return (expansion + (v * score_from_velocity(path, times, y, v)).sum(-1)).sum()

    # torch.func rather than torch.autograd: it also works under no_grad, and compiles. ds/dt by two backward passes.
    _, pull_back, *_ = torch.func.vjp(score, times)
    _, push_forward, *_ = torch.func.vjp(lambda u: pull_back(u)[0], x)
    rate: Tensor = push_forward(torch.ones_like(times))[0]
    gradient: Tensor = torch.func.grad(flux)(x)
    return rate + gradient
