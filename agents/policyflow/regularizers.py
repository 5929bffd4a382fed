"""Regularizers of a flow policy: what spreads its actions, and what keeps the flow short and smooth."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .policy import FlowActor
from .ratios import Samples, chord_point


def brownian_loss(velocity: Tensor, samples: Samples, form: str, steps: int) -> Tensor:
    """Brownian regularizer, summed over action dimensions and averaged over the batch.

    "paper" (Algorithm 1): ``|(1 - t) v - (x_t - t v_old)|^2`` pulls the velocity towards minus the score of the flow
    that acted, along which Brownian motion would spread it. Alone, it drives v to x, and the flow to std e * base_std
    where the solver is accurate (2.25 * base_std by two Euler steps).
    "consistent": ``(1 - t) |v - c (x_t - m)|^2`` with the rate c of `spread_rate`: the same gradient for c = 1 while
    the policy is the one that acted, no old velocity, and any target. m is the mean of the base. The weight 1 - t stays
    above 0 at t = 1, where Heun and RK4 have a stage.

    Args:
        velocity: v(t, x_t, s) with gradient, [B, D].
        samples: with the chord and, for "consistent", the rate.
        form: "paper" or "consistent".
        steps: of the solver.
    """
    assert samples.chord is not None
    t = samples.chord.t
    x_t, left = chord_point(samples, t), 1 - t.unsqueeze(-1)
    if form == "paper":
        residual = left * velocity - (x_t - t.unsqueeze(-1) * samples.chord.velocity)
        return residual.square().sum(-1).mean()
    assert samples.spread_rate is not None
    left = left.clamp(min=0.25 / steps)  # half of what is left at the last stage of midpoint
    return (left * (velocity - samples.spread_rate * (x_t - samples.base_mean)).square()).sum(-1).mean()


@torch.no_grad()
def spread_rate(actor: FlowActor, std: float) -> Tensor:
    """Rate c [D] of the linear field ``v = c (x - m)`` whose samples x1 have the standard deviation std.

    They are those of the actor's own solver and steps, from its base, with the noise along its path: K Euler steps of
    an ODE grow the base by ``(1 + c / K)^K``, not by e^c. Where no rate reaches std, the one that comes nearest: noise
    along the path may be wider, and R(c / K)^K, the growth by a solver of higher order, has a lower bound.

    Solved by refining a grid of rates, whose flows are run as one batch: in a linear flow each normal that is drawn
    contributes by itself, and x1's variance is the sum of the squares.
    """
    steps, dim, refinements, points = actor.solver_steps, actor.log_std.shape[0], 5, 64
    draws = 1 + actor.path_length
    obs = torch.zeros(points * draws, actor.field.cond_dim, device=actor.log_std.device, dtype=actor.log_std.dtype)
    mean, log_std = actor.base(obs)
    unit = torch.eye(draws, dtype=obs.dtype, device=obs.device).repeat(1, points).unsqueeze(-1).expand(-1, -1, dim)
    z = mean + log_std.exp() * unit[0]

    def excess(rates: Tensor) -> Tensor:
        """log(std of x1 / std) of rates [points, D]."""
        rate = rates.to(obs).repeat_interleave(draws, 0)
        x1 = actor.flow(z, obs, unit[1:], lambda t, x, cond: rate * (x - mean)) - mean
        return x1.view(points, draws, dim).double().square().sum(1).log() / 2 - math.log(std)

    # For c > 0 a step grows x by at least 1 + c / steps; for c < 0 x has one minimum, and that above -4 steps.
    growth = (math.log(std) - log_std[0].double()).div(steps).exp()
    low, high = torch.full_like(growth, -4.0 * steps), steps * growth.clamp(min=1)
    for _ in range(refinements):
        rates = torch.lerp(low, high, torch.linspace(0, 1, points, dtype=low.dtype, device=low.device).unsqueeze(1))
        found = excess(rates)
        below = (found <= 0) * torch.arange(1, points + 1, device=low.device).unsqueeze(1)
        place = torch.where(below.any(0), below.amax(0) - 1, found.abs().argmin(0))  # the largest root, or the nearest
        before = torch.where(below.any(0), place, place - 1).clamp(min=0)
        low, high = (rates.gather(0, i.unsqueeze(0))[0] for i in (before, (place + 1).clamp(max=points - 1)))
    return ((low + high) / 2).to(obs)


def score_loss(actor: FlowActor, samples: Samples) -> Tensor:
    """Move each action along minus the score, by ``E[n | a, s]``: ``|a(theta) - a - E[n | a, s]|^2 / (2 std_old^2)``.

    a(theta) is the action with what was drawn (z, path and n in units of their deviations) held fixed. As
    ``grad H = -E[score . grad a(theta)]``, the gradient at the policy that acted is that of minus the entropy H of the
    actions, through field, base and action noise; and the move ends when it has been made.
    """
    assert samples.posterior_noise is not None
    noise = (actor.noise_log_std() - samples.log_std).exp() * (samples.action - samples.x1)
    move = _drawn_again(actor, samples)[1] + noise - samples.action
    residual = (move - samples.posterior_noise) * torch.exp(-samples.log_std)
    return 0.5 * residual.square().sum(-1).mean()


def spread_loss(actor: FlowActor, samples: Samples, velocity: Tensor | None, form: str) -> Tensor:
    """`score_loss` or `brownian_loss`, a scalar; velocity is v(t, x_t, s) where the ratio has evaluated it."""
    if form == "score":
        return score_loss(actor, samples)
    if velocity is None:
        assert samples.chord is not None
        velocity = actor.field(samples.chord.t, chord_point(samples, samples.chord.t), samples.obs)
    return brownian_loss(velocity, samples, form, actor.solver_steps)


def transport_cost(actor: FlowActor, samples: Samples) -> Tensor:
    """Mean of ``|x1 - z|^2``, a scalar: how far the flow moves what is drawn from the base, which is held fixed.

    What optimal transport makes small, and a lower bound of the kinetic energy that regularizes flows in Finlay et al.
    2020, arXiv 2002.02798, section 3. In a policy it leaves the action to the base where advantages ask for little, so
    that what their noise has taught fades. Costs one flow, with gradient, where the ratio does not integrate it anyway.
    """
    z, x1 = _drawn_again(actor, samples)
    return (x1 - z).square().sum(-1).mean()


def _drawn_again(actor: FlowActor, samples: Samples) -> tuple[Tensor, Tensor]:
    """Latents z and endpoints x1 [B, D] of the noises that were drawn, as a function of the parameters."""
    mean, log_std = actor.base(samples.obs)
    z = mean + (log_std - samples.base_log_std).exp() * (samples.z - samples.base_mean)
    path = None if samples.path is None else samples.path.transpose(0, 1)
    return z, actor.flow(z, samples.obs, path)
