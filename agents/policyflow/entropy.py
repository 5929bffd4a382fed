"""Entropy of a flow policy's actions: an estimate, and the weight that steers it to a target."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .policy import FlowActor, FlowNoise

RATE, GAIN, WEIGHTS = 0.1, 2.0, (1e-4, 10.0)  # of the steered weight, per nat; bounds, lest it winds up
STATES, SAMPLES, NEIGHBOUR = 64, 64, 3  # of the estimate


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
    action = actor.sample(rows, FlowNoise.of(noise)).action
    return nearest_neighbour_entropy(action.view(-1, samples, action.shape[1])).mean()


def steered_weight(
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
        The weight to keep; flow/entropy, see `policy_entropy`; flow/target_entropy; flow/spread_coef, to be used.
    """
    entropy, goal = policy_entropy(actor, obs).item(), remaining * target[0] + (1 - remaining) * target[1]
    error = min(1.0, max(-1.0, goal - entropy))
    weight = min(max(weight * math.exp(RATE * error), WEIGHTS[0]), WEIGHTS[1])
    used = weight * math.exp(GAIN * error)
    return weight, {"flow/entropy": entropy, "flow/target_entropy": goal, "flow/spread_coef": used}
