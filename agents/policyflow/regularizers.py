"""Regularizers of a flow policy: what spreads its actions, and what keeps the flow short and smooth."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .policy import FlowActor
from .ratios import chord_point
from .rollout import Samples


def brownian_loss(velocity: Tensor, samples: Samples, form: str, std: float) -> Tensor:
    """Brownian regularizer, summed over action dimensions and averaged over the batch.

    "paper" (Algorithm 1): ``|(1 - t) v - (x_t - t v_old)|^2`` pulls the velocity towards minus the score of the flow
    that acted, along which Brownian motion would spread it. Alone, it drives the flow to std e * base_std.
    "consistent": ``(1 - t) |v - c (x_t - m)|^2`` with ``c = log(std / base_std)``: the same gradient for c = 1 while
    the policy is the one that acted, no old velocity, and any target. m is the mean of the base.

    Args:
        velocity: v(t, x_t, s) with gradient, [B, D].
        samples: with the chord.
        form: "paper" or "consistent".
        std: target standard deviation of the flow's samples ("consistent" only).
    """
    assert samples.chord is not None
    t = samples.chord.t
    x_t, left = chord_point(samples, t), 1 - t.unsqueeze(-1)
    if form == "paper":
        residual = left * velocity - (x_t - t.unsqueeze(-1) * samples.chord.velocity)
        return residual.square().sum(-1).mean()
    rate = math.log(std) - samples.base_log_std
    return (left * (velocity - rate * (x_t - samples.base_mean)).square()).sum(-1).mean()


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


def spread_loss(actor: FlowActor, samples: Samples, velocity: Tensor | None, form: str, std: float) -> Tensor:
    """`score_loss` or `brownian_loss`, a scalar; velocity is v(t, x_t, s) where the ratio has evaluated it."""
    if form == "score":
        return score_loss(actor, samples)
    if velocity is None:
        assert samples.chord is not None
        velocity = actor.field(samples.chord.t, chord_point(samples, samples.chord.t), samples.obs)
    return brownian_loss(velocity, samples, form, std)


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
