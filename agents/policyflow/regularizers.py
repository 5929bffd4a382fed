"""Spreading the actions of a flow policy: regularizers, an estimate of the entropy, and the weight that steers it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .policy import FlowActor
from .ratios import interpolate, record_velocities
from .rollout import Batch

LATENTS = 16  # of the posterior of the noise
RATE, GAIN, WEIGHTS = 0.1, 2.0, (1e-4, 10.0)  # of the steered weight, per nat; bounds, lest it winds up
STATES, SAMPLES, NEIGHBOUR = 64, 64, 3  # of the entropy's estimate


def brownian_loss(velocity: Tensor, batch: Batch, form: str, std: float) -> Tensor:
    """Brownian regularizer, summed over action dimensions and averaged over the batch.

    "paper" (Algorithm 1): ``|(1 - t) v - (x_t - t v_old)|^2`` pulls the velocity towards minus the score of the flow
    that acted, along which Brownian motion would spread it. Alone, it drives the flow to std e * base_std.
    "consistent": ``(1 - t) |v - c (x_t - m)|^2`` with ``c = log(std / base_std)``: the same gradient for c = 1 while
    the policy is the one that acted, no old velocity, and any target. m is the mean of the base.

    Args:
        velocity: v(t, x_t, s) with gradient, [B, D].
        batch: with t and v_old of the interpolation point.
        form: "paper" or "consistent".
        std: target standard deviation of the flow's samples ("consistent" only).
    """
    x_t, left = interpolate(batch), 1 - batch["t"].unsqueeze(-1)
    if form == "paper":
        residual = left * velocity - (x_t - batch["t"].unsqueeze(-1) * batch["v_old"])
        return residual.square().sum(-1).mean()
    rate = math.log(std) - batch["base_log_std"]
    return (left * (velocity - rate * (x_t - batch["base_mean"])).square()).sum(-1).mean()


@torch.no_grad()
def posterior_noise(actor: FlowActor, batch: Batch, generator: torch.Generator, latents: int = LATENTS) -> Tensor:
    """``E[n | a, s]`` [B, D] of the action noise n: ``-std^2`` times the score of the policy's actions (Tweedie).

    The mean over latents of ``a - x1_j``, weighted by the likelihood ``N(a; x1_j, std^2)``. The drawn latent is among
    them, as in the lower bound of semi-implicit distributions (Yin and Zhou 2018, arXiv 1805.11183): with few latents,
    or noise much narrower than the flow's spread, the flow is spread too weakly. Costs ``latents`` flows.
    """
    size, dim = batch["z"].shape
    shape = (actor.draws, size * (latents - 1), dim)
    noise = torch.randn(shape, generator=generator, dtype=batch["z"].dtype, device=batch["z"].device)
    others = actor.sample(batch["obs"].repeat_interleave(latents - 1, 0), noise).x1.view(size, -1, dim)
    each = batch["action"].unsqueeze(1) - torch.cat([batch["x1"].unsqueeze(1), others], 1)
    weights = torch.softmax(-0.5 * (each * torch.exp(-batch["log_std"]).unsqueeze(1)).square().sum(-1), 1)
    return (weights.unsqueeze(-1) * each).sum(1)


def score_loss(actor: FlowActor, batch: Batch) -> Tensor:
    """Move each action along minus the score, by ``E[n | a, s]``: ``|a(theta) - a - E[n | a, s]|^2 / (2 std_old^2)``.

    a(theta) is the action with what was drawn (z, path and n in units of their deviations) held fixed. As
    ``grad H = -E[score . grad a(theta)]``, the gradient at the policy that acted is that of minus the entropy H of the
    actions, through field, base and action noise; and the move ends when it has been made.
    """
    noise = (actor.noise_log_std() - batch["log_std"]).exp() * (batch["action"] - batch["x1"])
    move = _drawn_again(actor, batch)[1] + noise - batch["action"]
    residual = (move - batch["posterior_noise"]) * torch.exp(-batch["log_std"])
    return 0.5 * residual.square().sum(-1).mean()


def transport_cost(actor: FlowActor, batch: Batch) -> Tensor:
    """Mean of ``|x1 - z|^2``, a scalar: how far the flow moves what is drawn from the base, which is held fixed.

    What optimal transport makes small, and a lower bound of the kinetic energy that regularizes flows in Finlay et al.
    2020, arXiv 2002.02798, section 3. In a policy it leaves the action to the base where advantages ask for little, so
    that what their noise has taught fades. Costs one flow, with gradient, where the ratio does not integrate it anyway.
    """
    z, x1 = _drawn_again(actor, batch)
    return (x1 - z).square().sum(-1).mean()


def _drawn_again(actor: FlowActor, batch: Batch) -> tuple[Tensor, Tensor]:
    """Latents z and endpoints x1 [B, D] of the noises that were drawn, as a function of the parameters."""
    mean, log_std = actor.base(batch["obs"])
    z = mean + (log_std - batch["base_log_std"]).exp() * (batch["z"] - batch["base_mean"])
    path = batch["path"].transpose(0, 1) if "path" in batch else None
    return z, actor.flow(z, batch["obs"], path)


def record_spread(actor: FlowActor, batch: Batch, form: str, weight: float, generator: torch.Generator) -> Batch:
    """Add the loss's weight as "brownian_weight" [B], and what `spread_loss` needs of the policy that acted."""
    batch = batch | {"brownian_weight": torch.full_like(batch["values"], weight)}
    if form == "score":
        return batch | {"posterior_noise": posterior_noise(actor, batch, generator)}
    return batch if "v_nodes" in batch else record_velocities(actor, batch)


def spread_loss(actor: FlowActor, batch: Batch, velocity: Tensor | None, form: str, std: float) -> Tensor:
    """`score_loss` or `brownian_loss`, a scalar; velocity is v(t, x_t, s) where the ratio has evaluated it."""
    if form == "score":
        return score_loss(actor, batch)
    velocity = actor.field(batch["t"], interpolate(batch), batch["obs"]) if velocity is None else velocity
    return brownian_loss(velocity, batch, form, std)


def nearest_neighbour_entropy(samples: Tensor, neighbour: int = NEIGHBOUR) -> Tensor:
    """Differential entropy [S], in nats, of the laws that samples [S, N, D] come from, N > neighbour, all distinct.

    ``psi(N) - psi(k) + log V_D + D mean log r_k`` with the distance r_k to the k-th neighbour and the volume V_D of the
    unit ball (Kozachenko and Leonenko 1987; k: Goria et al. 2005). Biased where the density changes within r_k.
    """
    size, dim = samples.shape[1:]
    exact = "donot_use_mm_for_euclid_dist"  # the quick way loses the small distances to rounding
    distances = torch.cdist(samples, samples, compute_mode=exact)
    distance = distances.kthvalue(neighbour + 1, dim=-1).values  # the first is the sample itself
    counts = torch.digamma(samples.new_tensor([size, neighbour]))
    log_volume = 0.5 * dim * math.log(math.pi) - math.lgamma(0.5 * dim + 1)
    return counts[0] - counts[1] + log_volume + dim * distance.log().mean(-1)


@torch.no_grad()
def policy_entropy(actor: FlowActor, obs: Tensor, states: int = STATES, samples: int = SAMPLES) -> Tensor:
    """`nearest_neighbour_entropy` of the actions, mean over evenly spaced rows of obs [B, O]; a scalar.

    In nats per action vector, of unclipped actions in normalised units; of correlated noise, without its past.
    """
    rows = obs[:: max(1, len(obs) // states)][:states].repeat_interleave(samples, 0)
    generator = torch.Generator(obs.device).manual_seed(0)  # its own: measuring must not change training
    shape = (actor.draws, len(rows), actor.log_std.shape[0])
    noise = torch.randn(shape, generator=generator, dtype=obs.dtype, device=obs.device)
    action = actor.sample(rows, noise).action
    return nearest_neighbour_entropy(action.view(-1, samples, action.shape[1])).mean()


def steer(
    actor: FlowActor, obs: Tensor, weight: float, target: tuple[float, float], remaining: float
) -> tuple[float, dict[str, float]]:
    """Adapt the weight of the entropy term so that the entropy meets its target.

    ``weight exp(RATE error)`` is kept for the next iteration, as Soft Actor-Critic adapts its temperature
    (arXiv 1812.05905, section 5). What is used is that times ``exp(GAIN error)``: entropy answers a weight by changing
    from update to update, and the integral alone would swing around the target. Weights are positive, and the term only
    spreads: where the entropy is above the target, only what the task rewards brings it down.

    Args:
        actor: the policy that acted.
        obs: normalised observations of the rollout, [B, O].
        weight: the weight that was kept.
        target: entropies at the start and the end of the run, in nats; linear in between.
        remaining: share of the run that remains, from 1 to 0.

    Returns:
        The weight to keep; flow/entropy, see `policy_entropy`; flow/target_entropy; flow/brownian_coef, to be used.
    """
    entropy, goal = policy_entropy(actor, obs).item(), remaining * target[0] + (1 - remaining) * target[1]
    error = min(1.0, max(-1.0, goal - entropy))
    weight = min(max(weight * math.exp(RATE * error), WEIGHTS[0]), WEIGHTS[1])
    used = weight * math.exp(GAIN * error)
    return weight, {"flow/entropy": entropy, "flow/target_entropy": goal, "flow/brownian_coef": used}
