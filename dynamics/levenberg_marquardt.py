"""Langevin steps in the damped metric of the gradients of other chains, after Levenberg and Marquardt."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .langevin import Chains, Energy, adjusted_step, check_steps, check_uniform, gradient_and_energy
from .step_control import select


def levenberg_marquardt(
    energy: Energy,
    x: Tensor,
    noise: Tensor,
    uniform: Tensor,
    *,
    step: float,
    damping: float,
    temperature: float = 1.0,
    cond: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`mala` in the damped low-rank metric of other chains: ``x' = x - step M dU + sqrt(2 step temperature M) noise``.

        M = (damping I + H)^-1,    H C_x H = C_g

    C_x and C_g are the covariances of the positions and of the gradients of other chains: those of one half make the
    metric of the other half, in turn. H is the curvature that turns one into the other. On a Gaussian it is the Hessian
    itself, wherever the chains are, so the steps are Newton's. With k chains a half, H has rank k - 1 at most: the
    Hessian within the span of their positions. Elsewhere steps are plain ones, divided by the damping.

    Given the other half the metric is constant: with Metropolis' adjustment of each row, that all chains are
    independent samples of exp(-U / temperature) is stationary exactly.

    One gradient per step and row, one more at the start; two singular value decompositions [k, D] per step and half.
    Unlike all else here a row depends on its batch.

    Differences from the paper (Levenberg-Marquardt-Langevin, arXiv 2505.24222), which guides the denoising of images:
    its curvature is the outer product of the chain's own last two gradients, of rank 1; it changes the drift alone,
    whose length it then restores. Such steps do not sample exp(-U), and outer products of gradients are the curvature
    only of chains that have settled.

    Args:
        energy: U, ``(x [B, D], cond) -> [B]``.
        x: positions, [B, D], B even and at least 4; better four times D or more, so that k chains span all directions.
        noise: standard normal, [steps, B, D].
        uniform: uniform in [0, 1), [steps, B]: a proposal is taken where it lies below the acceptance probability.
        step: in units of Newton's step; 1 at most, as a rule.
        damping: in units of U / x^2, positive: about the least curvature that matters.
        temperature: in units of U, positive.
        cond: conditioning, [B, C] or [1, C], or None.

    Returns:
        Positions [B, D], and the acceptance probability of every step, [steps, B].

    Raises:
        ValueError: if step, damping or temperature is not positive, B is odd or below 4, a shape differs, the energy
            is not [B], or a position or gradient is not finite (not when compiled).
    """
    check_steps(x, noise, step, temperature, None)
    if not damping > 0:
        raise ValueError(f"damping must be positive, got {damping}")
    if len(x) < 4 or len(x) % 2:
        raise ValueError(f"x must have an even number of rows, 4 at least, got {list(x.shape)}")
    check_uniform(uniform, noise)
    half = len(x) // 2
    rows = slice(None, half), slice(half, None)
    values = [gradient_and_energy(energy, select(cond, part)) for part in rows]
    halves = [Chains(x[part], *value(x[part])) for part, value in zip(rows, values, strict=True)]
    probabilities = []
    for z, level in zip(noise.unbind(), uniform.unbind(), strict=True):
        found = []
        for i, part in enumerate(rows):
            try:
                metric = damped_metric(halves[1 - i].x, halves[1 - i].gradient, damping)
            except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
                raise ValueError("positions and gradients must be finite: they make the other half's metric") from error
            halves[i], probability = adjusted_step(
                values[i], halves[i], z[part], level[part], step, temperature, metric
            )
            found.append(probability)
        probabilities.append(torch.cat(found))
    return torch.cat([each.x for each in halves]), torch.stack(probabilities)


def damped_metric(x: Tensor, gradients: Tensor, damping: float) -> Callable[[Tensor, float], Tensor]:
    """``(v [B, D], p) -> M^p v`` for M of `levenberg_marquardt` by positions and gradients [k, D]."""
    rank = min(len(x) - 1, x.shape[1])
    _, spread, span = torch.linalg.svd(x - x.mean(0), full_matrices=False)
    # Relative to the largest, for any units. Chains at one point say nothing: no curvature rather than nan, for which
    # the least spread has a square.
    numbers = torch.finfo(x.dtype)
    floor = (numbers.eps * spread[:1]).clamp(min=(numbers.tiny / numbers.eps) ** 0.5)
    spread, span = torch.maximum(spread[:rank], floor), span[:rank]
    # In units of the spread, C_g is Z^T Z and H its root.
    _, root, axes = torch.linalg.svd((gradients - gradients.mean(0)) @ span.mT * spread, full_matrices=False)
    curvature, turn = torch.linalg.eigh((axes.mT * root) @ axes / (spread[:, None] * spread))
    directions, damped = turn.mT @ span, damping + curvature.clamp(min=0)

    def power(v: Tensor, p: float) -> Tensor:
        change = damped**-p - damping**-p
        product: Tensor = damping**-p * v + (v @ directions.mT * change) @ directions
        return product

    return power
