"""Latents that explain an action: weighted draws of the flow's noise given what the policy did."""

from __future__ import annotations

import math
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from .gaussians import gaussian_log_prob, mixture_log_prob
from .policy import FlowActor
from .ratios import Samples

LATENTS, OF_DRAWN = 16, 0.1  # of the posterior of the noise, and what the drawn latent's weight counts there
FROM_TANGENT = 0.5
"""Share of the latents that the flow's tangent proposes; the others are fresh ones of the policy."""


class Latents(NamedTuple):
    """Weighted latents of each sample; the first is the one that was drawn."""

    x1: Tensor  # where the flow carries them, [B, M, D]
    log_weight: Tensor  # log of p(action, latent) over the density that it was drawn from, [B, M]


def action_log_density(actor: FlowActor, samples: Samples, generator: torch.Generator, count: int) -> Tensor:
    """Estimate ``log pi(action | obs)``, [B], in nats, by `latents_given_action`; exact if z has no density."""
    if not actor.has_latent:
        return mixture_log_prob(samples.action, actor.mixture(samples.obs), samples.log_std.unsqueeze(1))
    weight = latents_given_action(actor, samples, generator, count).log_weight
    return torch.logsumexp(weight, 1) - math.log(count)


@torch.no_grad()
def posterior_noise(actor: FlowActor, samples: Samples, generator: torch.Generator, count: int = LATENTS) -> Tensor:
    """``E[n | a, s]`` [B, D] of the action noise n: ``-std^2`` times the score of the policy's actions (Tweedie).

    The weighted mean of ``a - x1_j`` over `latents_given_action`; without a latent, n itself. The latent that was drawn
    draws the mean towards the noise that was drawn, away from the flow. So it counts for little where others explain
    the action, and for nearly all where none does.
    """
    assert actor.points is None
    noise = samples.action - samples.x1
    if not actor.has_latent:
        return noise
    latents = latents_given_action(actor, samples, generator, count)
    latents.log_weight[:, 0] += math.log(OF_DRAWN)
    weights = torch.softmax(latents.log_weight, 1).unsqueeze(-1)
    return (weights * (samples.action.unsqueeze(1) - latents.x1)).sum(1)


@torch.no_grad()
def latents_given_action(actor: FlowActor, samples: Samples, generator: torch.Generator, count: int) -> Latents:
    """Draw latents near those that can have made the action, by importance sampling.

    u, standard normal, is the noise of base and path: ``x1 = phi(u)`` and ``action = x1 + n``. Fresh latents rarely
    explain an action of many dimensions. So half of them come from the posterior of the flow's tangent at the drawn u,
    ``action = x1 + G (u' - u) + n``, which is Gaussian and exact where the flow is linear (by Matheron's rule: a draw
    of (u', n) moved onto the action); the other half is fresh and finds what is far. The drawn u, itself a draw from
    the exact posterior, is one of the first half: without it, none may explain the action. Each latent is weighted by
    the mixture of both proposals (balance heuristic, Veach and Guibas 1995).

    Costs ``count + 1`` flows and D backward passes through one.

    Args:
        actor: the policy that acted.
        samples: what it did; z, x1, action, path and the moments of base and action noise are read.
        generator: of the draws.
        count: M, even, at least 2.
    """
    size, dim = samples.z.shape
    near = int(FROM_TANGENT * count)
    with torch.enable_grad():
        base = (samples.z - samples.base_mean) * torch.exp(-samples.base_log_std)
        u = base.unsqueeze(1) if samples.path is None else torch.cat([base.unsqueeze(1), samples.path], 1)
        u.requires_grad_()
        x1 = _ends(actor, samples, u.unsqueeze(1)).squeeze(1)
        rows = [torch.autograd.grad(x1[:, d].sum(), u, retain_graph=True)[0].flatten(1) for d in range(dim)]
    slope = torch.stack(rows, 1).double()  # G, [B, D, L]; narrow noise and a steep flow are too much for float32
    target = samples.action - x1.detach() + torch.einsum("bdl,bl->bd", slope, u.detach().flatten(1).double())
    noise_std = samples.log_std.double().exp()
    factor = torch.linalg.cholesky_ex(slope @ slope.mT + torch.diag_embed(noise_std.square())).L

    normals = partial(torch.randn, generator=generator, dtype=samples.z.dtype, device=samples.z.device)
    drawn = normals((size, count, slope.shape[2])).double()
    noise = noise_std.unsqueeze(1) * normals((size, near, dim))
    gap = target.unsqueeze(1) - drawn[:, :near] @ slope.mT - noise
    drawn[:, :near] += torch.cholesky_solve(gap.mT, factor).mT @ slope
    drawn[:, 0] = u.detach().flatten(1)

    ends = _ends(actor, samples, drawn.to(samples.z).view(size, count, -1, dim))
    log_std = samples.log_std.unsqueeze(1)
    scaled = torch.linalg.solve_triangular(factor, target.unsqueeze(-1), upper=False).squeeze(-1)
    spread = factor.diagonal(dim1=1, dim2=2).log().sum(-1)
    evidence = gaussian_log_prob(scaled, 0.0, torch.zeros_like(scaled)) - spread
    tangent = gaussian_log_prob(target.unsqueeze(1), drawn @ slope.mT, log_std.double()) - evidence.unsqueeze(1)
    fresh = torch.full_like(tangent, math.log(1 - FROM_TANGENT))
    mixture = torch.logaddexp(tangent + math.log(FROM_TANGENT), fresh)
    explained = gaussian_log_prob(samples.action.unsqueeze(1), ends, log_std)
    return Latents(ends, (explained - mixture).to(samples.z))


def _ends(actor: FlowActor, samples: Samples, u: Tensor) -> Tensor:
    """x1 [B, M, D] of latents u [B, M, 1 + K, D]."""
    size, count, _, dim = u.shape
    mean, std = samples.base_mean.unsqueeze(1), samples.base_log_std.exp().unsqueeze(1)
    z = (mean + std * u[:, :, 0]).flatten(0, 1)
    path = u[:, :, 1:].flatten(0, 1).transpose(0, 1)
    return actor.flow(z, samples.obs.repeat_interleave(count, 0), path).view(size, count, dim)
