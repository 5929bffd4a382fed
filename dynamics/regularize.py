"""Penalties that keep a velocity field easy to integrate."""

from __future__ import annotations

from torch import Tensor

from .fields import Time, VelocityField, linear_pullback


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
        weight: factor per row, [B], for a penalty that depends on the state (JAWS, arXiv 2603.05538); None for 1.
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
