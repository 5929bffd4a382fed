"""What keeps fields and value functions smooth, and a velocity field easy to integrate.

All penalties are per row, [B], not averaged, and differentiable in x, cond and the parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from .fields import MLPField, Time, VelocityField, linear_pullback
from .ode import DOPRI5, FieldLike, Tableau, bind, check_batch, combine, error_estimate, stage_slopes


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


def spectral_norms(module: nn.Module) -> dict[str, Tensor]:
    """Largest singular value of every matrix that acts on the state.

    These are the parameters whose name ends in "weight" with 2 dimensions, or 3 for a batch [M, ., .] of matrices,
    without the blocks of ``MLPField`` that act on conditioning and time.

    If the matrices are applied one after the other, the product of their norms, times the largest slope of the
    activation per hidden layer (tanh, elu, relu 1; mish 1.09; silu 1.10), is a Lipschitz constant.

    Exact, from the eigenvalues of the smaller Gram matrix: 0.1, 0.5 and 2 ms for 64, 128 and 256 rows and columns on
    one core. Power iteration takes 0.02 ms, but approaches the norm from below, so that a bound would not hold, and
    needs vectors that are kept, saved and loaded.

    Returns:
        By the parameter's name a norm, [] or [M]; differentiable while the largest singular value is simple.
    """
    norms = {}
    for name, weight in _state_matrices(module).items():
        wide = weight if weight.shape[-2] <= weight.shape[-1] else weight.mT
        norms[name] = torch.linalg.eigvalsh(wide @ wide.mT)[..., -1].clamp(min=0).sqrt()
    return norms


@torch.no_grad()
def spectral_bound_(module: nn.Module, bound: float = 1.0) -> None:
    """Scale every matrix of ``spectral_norms`` whose norm exceeds the bound down to it, in place.

    For use after each optimizer step. Others stay as they are, unlike with spectral normalisation (Miyato et al., arXiv
    1802.05957), which also scales up, so that a layer can be flat.

    Args:
        module: network, changed in place; its gradients and optimizer states are not.
        bound: largest norm allowed, positive.

    Raises:
        ValueError: if the bound is not positive, or the module has no such matrix.
    """
    if not bound > 0:
        raise ValueError(f"bound must be positive, got {bound}")
    weights = _state_matrices(module)
    if not weights:
        raise ValueError(f"module must have a weight of 2 or 3 dimensions, got {type(module).__name__} without")
    for name, norm in spectral_norms(module).items():
        weights[name].mul_((bound / norm).clamp(max=1.0)[..., None, None])


def _state_matrices(module: nn.Module) -> dict[str, Tensor]:
    others = {id(w) for m in module.modules() if isinstance(m, MLPField) for w in (m.cond_weight, m.time_weight)}
    return {
        name: weight
        for name, weight in module.named_parameters()
        if name.endswith("weight") and weight.ndim in (2, 3) and id(weight) not in others
    }


def adversarial_states(
    loss: Callable[[Tensor], Tensor],
    x: Tensor,
    *,
    radius: float | Tensor,
    steps: int = 1,
    step_size: float = 1.0,
    temperature: float | None = None,
    start: Tensor | None = None,
    noise: Sequence[Tensor] = (),
) -> Tensor:
    """States near x at which a loss is high, within ``|x' - x| <= radius`` in every dimension.

    With u = (x' - x) / radius in [-1, 1]^D, from u = ``start``, and h the step size:

        ``temperature=None``  ``u <- clip(u + h sign(dL/du))``: FGSM for one step of size 1 (Goodfellow et al., arXiv
                              1412.6572), PGD for more (Madry et al., arXiv 1706.06083; h = 0.25, say)
        ``temperature=T``     ``u <- reflect(u + h dL/du + sqrt(2 h T) noise)``: Langevin ascent, for many small steps
                              samples of the density ``exp(L / T)`` in the ball. Keep ``h |dL/du|`` well below 1

    Where the loss compares x' with x its gradient at x is zero: start elsewhere. Compiles with ``fullgraph=True``.

    Args:
        loss: states [B, D] -> loss per row, [B], each of its own row only. Called with gradients enabled, ``steps``
            times; gradients of parameters are left alone.
        x: states, [B, D].
        radius: in units of x, or [D] or [B, D] with one per dimension, such as eps times the standard deviations.
        steps: at least 1.
        step_size: h, positive, as a fraction of the radius.
        temperature: T, positive, in units of the loss; None for sign steps.
        start: u to begin with, [B, D] in [-1, 1], uniform random numbers for example; None for zero.
        noise: standard normal, one [B, D] per step; exactly for a temperature.

    Returns:
        States, [B, D], detached.

    Raises:
        ValueError: if an argument is out of range or another shape, noise missing or superfluous, or the loss not [B].
    """
    check_batch(x)
    if steps < 1 or not step_size > 0 or not (temperature is None or temperature > 0):
        given = f"{steps}, {step_size} and {temperature}"
        raise ValueError(f"steps must be at least 1, step_size positive, temperature positive or None, got {given}")
    wanted = 0 if temperature is None else steps
    if len(noise) != wanted:
        raise ValueError(f"noise must hold {wanted} tensors for temperature={temperature}, got {len(noise)}")
    for name, value in [("start", start), *(("noise", each) for each in noise)]:
        if value is not None and value.shape != x.shape:
            raise ValueError(f"{name} must have the shape of x, {list(x.shape)}, got {list(value.shape)}")
    x = x.detach()

    def total(u: Tensor) -> Tensor:
        value = loss(x + radius * u)
        if value.shape != x.shape[:1]:
            raise ValueError(f"loss must return shape [{len(x)}], got {list(value.shape)}; one value per row")
        return value.sum()

    u = torch.zeros_like(x) if start is None else start
    for step in range(steps):
        with torch.no_grad():  # no graph of what the loss closes over
            slope: Tensor = torch.func.grad(total)(u)
        if temperature is None:
            u = (u + step_size * slope.sign()).clamp(-1, 1)
        else:
            u = u + step_size * slope + (2 * step_size * temperature) ** 0.5 * noise[step]
            u = 1 - ((u + 1).remainder(4) - 2).abs()  # reflected at both ends, as often as needed
    return x + radius * u


def local_error_penalty(
    field: FieldLike, t: Time, x: Tensor, cond: Tensor | None = None, *, h: float = 0.1, solver: Tableau = DOPRI5
) -> Tensor:
    """Estimated error of one solver step, ``h |h sum_i error_i k_i|``: low where a field is cheap to integrate.

    At one random time of the path it trains for less (Pal et al., arXiv 2303.02262) what the sum over all steps of a
    solve does (Pal et al., arXiv 2105.03918). Costs one step and, with DOPRI5, one field call more.

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


def stiffness_penalty(field: FieldLike, t: Time, x: Tensor, cond: Tensor | None = None, *, h: float = 0.1) -> Tensor:
    """Stiffness estimate of a DOPRI5 step, ``|k_7 - k_6| / |x' - x_6|`` (Pal et al., arXiv 2105.03918).

    Both slopes belong to the time t + h, so this is ``|J d| / |d|`` along the difference d of two states: at most the
    Lipschitz constant of the field. Arguments as in ``local_error_penalty``.

    Returns:
        Penalty, [B], in 1/time; 0 where both states are equal.
    """
    velocity = bind(field, cond)
    slopes = stage_slopes(velocity, DOPRI5, t, h, x)
    last, end = combine(x, h, DOPRI5.a[-1], slopes[:-1]), combine(x, h, DOPRI5.b, slopes)
    change: Tensor = torch.linalg.vector_norm(velocity(t + h, end) - slopes[-1], dim=-1)
    distance: Tensor = torch.linalg.vector_norm(end - last, dim=-1)
    return change / distance.clamp(min=torch.finfo(x.dtype).tiny)


class _Score(VelocityField):
    """``grad_x log p(t, x, cond)``."""

    def __init__(self, log_density: Callable[[Time, Tensor, Tensor | None], Tensor], drift: VelocityField) -> None:
        super().__init__(drift.dim, drift.cond_dim)
        self.log_density = log_density

    def forward(self, t: Time, x: Tensor, cond: Tensor | None = None) -> Tensor:
        score: Tensor = torch.func.grad(lambda y: self.log_density(t, y, cond).sum())(x)
        return score


def fokker_planck_residual(
    log_density: Callable[[Time, Tensor, Tensor | None], Tensor],
    drift: VelocityField,
    diffusion: float | Tensor,
    t: Time,
    x: Tensor,
    cond: Tensor | None = None,
    *,
    probe: Tensor | None = None,
    width: float = 0.1,
) -> Tensor:
    """By how much a density fails the Fokker-Planck equation of ``dX = f dt + g dW``.

        r = g^2 / 2 (div s + |s|^2) - f.s - div f - d/dt log p,    s = grad log p

    0 everywhere for the density of the SDE's solution; with g = 0, for that of the flow. A penalty, or a diagnostic
    that sampling by ODE and by SDE agree (arXiv 2311.15996, 2506.17139).

    The strong form takes two divergences, each D passes by default. The weak form replaces div w at x by
    ``(w(x + d) - w(x - d)).d / (2 width^2)`` with d = width probe, and the rest by its mean at both points: without
    bias the residual averaged over N(x, width^2 I), by Stein's identity. Its square is biased. For the square take the
    product of the residuals of two independent probes.

    Args:
        log_density: ``(t, x, cond) -> log p``, [B], normalised at all times alike, each row of its own row only.
        drift: f.
        diffusion: g at time t, a number or [B].
        t: times, a float or [B].
        x: states, [B, D].
        cond: conditioning of density and drift, [B, C], or None.
        probe: None for the strong form; standard normal, [B, D], for the weak one.
        width: standard deviation of the average in the weak form, in units of x.

    Returns:
        Residual r, [B], in 1/time.

    Raises:
        ValueError: if shapes do not fit, or the width is not positive.
    """
    drift.check_state(t, x)
    if probe is not None and probe.shape != x.shape:
        raise ValueError(f"probe must have the shape of x, {list(x.shape)}, got {list(probe.shape)}")
    if not width > 0:
        raise ValueError(f"width must be positive, got {width}")
    half = 0.5 * diffusion**2
    score = _Score(log_density, drift)
    times = torch.as_tensor(t, dtype=x.dtype, device=x.device).expand(x.shape[0])

    def rest(y: Tensor, s: Tensor, f: Tensor) -> Tensor:
        """The residual without the divergences."""
        rate: Tensor = torch.func.grad(lambda time: log_density(time, y, cond).sum())(times)
        return half * s.square().sum(-1) - (f * s).sum(-1) - rate

    if probe is None:
        s, spread = score.divergence(times, x, cond)
        f, expansion = drift.divergence(t, x, cond)
        return rest(x, s, f) + half * spread - expansion
    points = (x + width * probe, x - width * probe)
    (s_up, s_down), (f_up, f_down) = ([field(times, y, cond) for y in points] for field in (score, drift))
    column = half.unsqueeze(-1) if isinstance(half, Tensor) and half.ndim else half
    divergence = ((column * (s_up - s_down) - (f_up - f_down)) * probe).sum(-1) / (2 * width)
    return divergence + 0.5 * (rest(points[0], s_up, f_up) + rest(points[1], s_down, f_down))
