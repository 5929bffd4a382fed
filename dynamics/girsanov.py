"""Divergence between two SDEs of the same noise, by Girsanov's theorem."""

from __future__ import annotations

import torch
from torch import Tensor

from .ode import FieldLike, bind, fixed_time, intervals
from .sde import EULER_MARUYAMA, SDE, bind_sde


def girsanov_kl(
    sde: SDE, other_drift: FieldLike, path: Tensor, *, cond: Tensor | None = None, t0: float = 0.0, t1: float = 1.0
) -> Tensor:
    """Per path, ``1/2 integral |(f - f_other) / g|^2 dt``: its mean over paths of ``sde`` is a KL divergence.

    It is the divergence KL(sde || other) between the laws of two SDEs that share diffusion and start and differ in
    their drift (Girsanov's theorem; with another diffusion it is infinite). On Euler-Maruyama paths it is exactly the
    KL between the two chains. Use it as the latent cost of a neural SDE, or to tell two drifts apart.

    Args:
        sde: the equation that made the paths, with g nowhere 0.
        other_drift: field or callable ``(t, x, cond) -> [B, D]``.
        path: states at equal steps from t0 to t1, [steps + 1, B, D], as from ``sdeint_path``.
        cond: conditioning of both drifts, [B, C], or None.
        t0: start time.
        t1: end time.

    Returns:
        [B], in nats, differentiable.

    Raises:
        ValueError: if path is not [steps + 1, B, D] with at least one step, t1 not above t0, or a drift not [B, D].
    """
    if path.ndim != 3 or path.shape[0] < 2 or not t1 > t0:
        raise ValueError(
            f"path must have shape [steps + 1, B, D] and t1 be above t0, got {list(path.shape)}, t0={t0}, t1={t1}"
        )
    t0, t1 = fixed_time("t0", t0), fixed_time("t1", t1)
    course = intervals(path.shape[0] - 1, t0, t1)
    times = [t for t, _ in course]
    equation, other = bind_sde(sde, EULER_MARUYAMA, cond, times), bind(other_drift, cond, times)
    total = path.new_zeros(path.shape[1])
    for (t, h), x in zip(course, path[:-1].unbind(), strict=True):
        ratio = (equation.drift(t, x) - other(t, x)) / equation.diffusion(t, x)
        total = torch.add(total, ratio.square().sum(-1), alpha=0.5 * h)
    return total
