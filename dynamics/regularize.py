"""Penalties that keep a velocity field smooth and easy to integrate.

All are per row, [B], not averaged, and differentiable in x, cond and the parameters.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .fields import Time, VelocityField, linear_pullback
from .ode import DOPRI5, FieldLike, Tableau, bind, combine, error_estimate, stage_slopes


def jacobian_penalty(
    field: VelocityField,
    t: Time,
    x: Tensor,
    cond: Tensor | None = None,
    *,
    weight: Tensor | None = None,
    probe: Tensor | None = None,
) -> Tensor:
    """Squared Frobenius norm ``|dv/dx|_F^2`` at each row (Finlay et al., arXiv 2002.02798).

    Args:
        field: velocity field.
        t: times, a float or [B].
        x: states, [B, D].
        cond: conditioning, [B, C], or None.
        weight: factor per row, [B], for a penalty that depends on the state; None for 1.
        probe: None for the exact norm, through ``field.jacobian``. A tensor [B, D] of zero mean and unit covariance
            makes it Hutchinson's unbiased estimate ``|probe^T J|^2``, for one backward pass.

    Returns:
        Penalty per row, [B], not averaged, in 1/time^2; differentiable in x, cond and the parameters.

    Raises:
        ValueError: if weight is not [B], probe not [B, D], or t, x or cond do not fit the field.
    """
    field.check_state(t, x)
    if weight is not None and weight.shape != x.shape[:1]:
        raise ValueError(f"weight must have shape [{x.shape[0]}], got {list(weight.shape)}; one weight per row of x")
    if probe is None:
        penalty = field.jacobian(t, x, cond)[1].square().sum((-2, -1))
    else:
        if probe.shape != x.shape:
            raise ValueError(f"probe must have the shape of x, {list(x.shape)}, got {list(probe.shape)}")
        _, pull_back = linear_pullback(field, t, x, field.embed(cond))
        penalty = pull_back(probe).square().sum(-1)
    return penalty if weight is None else weight * penalty


def local_error_penalty(
    field: FieldLike, t: Time, x: Tensor, cond: Tensor | None = None, *, h: float = 0.1, solver: Tableau = DOPRI5
) -> Tensor:
    """Estimated error of one solver step, ``h |h sum_i error_i k_i|``: low where a field is cheap to integrate.

    Evaluated at one random time of the path (Pal et al., arXiv 2303.02262), it replaces the sum over all steps of a
    solve (Pal et al., arXiv 2105.03918) at a fraction of the cost: one step and, with DOPRI5, one field call more.

    Args:
        field: velocity field or callable ``(t, x, cond) -> v``.
        t: times, a float or [B]; ``t + h`` should lie within the flow.
        x: states at t, [B, D], of a path or a solution.
        cond: conditioning, [B, C], or None.
        h: size of the step.
        solver: a tableau with an error estimate.

    Returns:
        Penalty, [B], in units of x times flow time.

    Raises:
        ValueError: if the solver has no error estimate.
    """
    if not solver.error:
        raise ValueError(f"solver must have an error estimate, as DOPRI5 and HEUN have, got {solver.name!r}")
    velocity = bind(field, cond)
    slopes = stage_slopes(velocity, solver, t, h, x)
    if len(solver.error) > len(slopes):
        slopes.append(velocity(t + h, combine(x, h, solver.b, slopes)))
    error: Tensor = torch.linalg.vector_norm(error_estimate(solver, h, slopes), dim=-1)
    return abs(h) * error
