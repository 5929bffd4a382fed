"""Linear views of a nonlinear step: eigenvalues of the best linear map, growth along trajectories."""

from __future__ import annotations

import torch
from torch import Tensor


def koopman_matrix(before: Tensor, after: Tensor, control: Tensor | None = None) -> Tensor:
    """The matrix A of the best linear step ``after = A before + B control + c``, [O, O], by least squares.

    Dynamic mode decomposition with control (Proctor et al., arXiv 1409.6358): A approximates the Koopman operator on
    the states themselves, as Koopman VAE's does in a latent space (arXiv 2310.02619). Its eigenvalues do not depend on
    the units of the states. They say how modes of the data grow (|lambda| > 1), fade and turn per step.

    Args:
        before: states, [N, O], N above O + C.
        after: the states that follow, [N, O].
        control: actions, [N, C], or None.

    Raises:
        ValueError: if shapes do not fit, rows are too few, or a number is not finite.
    """
    if control is not None and (control.ndim != 2 or len(control) != len(before)):
        raise ValueError(f"control must have shape [{len(before)}, C], got {list(control.shape)}")
    inputs = before if control is None else torch.cat([before, control], 1)
    if before.ndim != 2 or after.shape != before.shape or len(inputs) <= inputs.shape[1]:
        raise ValueError(
            f"before and after must have the same shape [N, O] with N above {inputs.shape[-1]}, the number of inputs, "
            f"got {list(before.shape)} and {list(after.shape)}"
        )
    if not (inputs.is_floating_point() and inputs.isfinite().all() and after.isfinite().all()):
        raise ValueError("before, after and control must hold finite floating-point numbers")
    tiny, dtype = torch.finfo(inputs.dtype).eps, before.dtype
    inputs, after = inputs.double(), after.double()
    mean, scale = inputs.mean(0), inputs.std(0)
    # Inputs that never change say nothing; the mean of equal numbers is one of them but for rounding.
    still = scale <= 100 * tiny * mean.abs() + tiny**2
    scale = scale.masked_fill(still, 1.0)
    centred = ((inputs - mean) / scale).masked_fill(still, 0.0)
    # A pseudo-inverse: inputs that repeat others, to rounding, get the least coefficients. Rounding of the inputs does
    # not grow with their number N, that of the decomposition may.
    cut = max(inputs.shape[1] * tiny, len(inputs) * torch.finfo(inputs.dtype).eps)
    found = torch.linalg.pinv(centred, rtol=cut) @ (after - after.mean(0))
    matrix: Tensor = (found / scale[:, None])[: before.shape[1]].mT
    return matrix.to(dtype)


def lyapunov_exponents(jacobians: Tensor) -> Tensor:
    """Rates at which small differences grow along trajectories, [B, O], the largest first, in 1 / step.

    By repeated QR decompositions of the product of the steps' Jacobians (Benettin et al. 1980): products themselves
    overflow, and all their columns turn to the fastest direction. ``exp`` of the first is the growth per step; above 1
    errors of the start are amplified. For few steps these are averages over those, which depend on the units of the
    states; the exponents proper are the limit of many.

    Args:
        jacobians: d next state / d state at each step, the first step first, [T, B, O, O].

    Raises:
        ValueError: if they are not [T, B, O, O] with T at least 1.
    """
    if jacobians.ndim != 4 or jacobians.shape[0] < 1 or jacobians.shape[2] != jacobians.shape[3]:
        raise ValueError(f"jacobians must have shape [T, B, O, O], got {list(jacobians.shape)}")
    frame = torch.eye(jacobians.shape[-1], dtype=jacobians.dtype, device=jacobians.device).expand_as(jacobians[0])
    total = jacobians.new_zeros(jacobians.shape[1:3])
    for jacobian in jacobians:
        frame, stretch = torch.linalg.qr(jacobian @ frame)
        total = total + stretch.diagonal(dim1=-2, dim2=-1).abs().log()
    return total.div(len(jacobians)).sort(-1, descending=True).values
