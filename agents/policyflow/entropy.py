"""Entropy of a flow policy's actions: an estimate, and the weight that steers it to a target."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .policy import FlowActor, FlowNoise
from .posterior import action_log_density
from .ratios import Samples

RATE, GAIN, WEIGHTS = 0.1, 2.0, (1e-4, 10.0)  # of the steered weight, per nat; bounds, lest it winds up
GOLDEN = 0.6180339887498949
STATES, ACTIONS, LATENTS = 64, 256, 16  # of the estimate: states, actions of all states, latents of each action


@torch.no_grad()
def policy_entropy(actor: FlowActor, obs: Tensor, actions: int = ACTIONS, latents: int = LATENTS) -> Tensor:
    """Estimate the entropy of the actions, mean over rows of obs [B, O] spread over all of them; a scalar.

    In nats per action vector, of unclipped actions in normalised units; of correlated noise, without its past. The mean
    of -log pi(a | s) over actions of the policy, by `latents_given_action`. Within 0.1 nats for linear flows of 1 to 21
    dimensions; too low where an action's latents fall into many separate parts (docs/policyflow.md has figures).
    """
    count = min(STATES, len(obs))
    steps = torch.arange(count, device=obs.device, dtype=torch.float64)
    # By the golden ratio, not at equal distances: those can fall on the same environment of a rollout again and again.
    states = obs[(torch.frac(steps * GOLDEN) * len(obs)).long()] if count < len(obs) else obs
    actions = max(actions, 2 * actor.draws * actor.log_std.shape[0])  # enough to standardise all their noise
    rows = states.repeat_interleave(-(-actions // len(states)), 0)
    noise = _standard_noise(len(rows), (actor.draws, actor.log_std.shape[0]), rows)
    drawn = FlowNoise.of(noise)
    path = drawn.path.transpose(0, 1) if actor.path_length else None
    samples = Samples.drawn(actor, rows, actor.sample(rows, drawn), path=path)
    generator = torch.Generator(obs.device).manual_seed(1)
    return -action_log_density(actor, samples, generator, latents).mean()


def _standard_noise(rows: int, shape: tuple[int, int], like: Tensor) -> Tensor:
    """Standard normals [draws, rows, D], always the same, whose second moments over the rows are those of the law.

    That takes most of the sampling error out of the mean of a log-density, which is nearly quadratic in the noise.
    """
    generator = torch.Generator(like.device).manual_seed(0)  # its own: measuring must not change training
    noise = torch.randn(rows, math.prod(shape), generator=generator, dtype=like.dtype, device=like.device)
    if rows > noise.shape[1]:
        noise = math.sqrt(rows) * torch.linalg.qr(noise).Q
    return noise.view(rows, *shape).transpose(0, 1)


def steered_weight(
    entropy: float, weight: float, target: tuple[float, float], remaining: float
) -> tuple[float, dict[str, float]]:
    """Adapt the weight of the entropy term so that the entropy meets its target.

    ``weight exp(RATE error)`` is kept for the next iteration, as Soft Actor-Critic adapts its temperature
    (arXiv 1812.05905, section 5). What is used is that times ``exp(GAIN error)``: entropy answers a weight by changing
    from update to update, and the integral alone would swing around the target. Weights are positive, and the term only
    spreads: where the entropy is above the target, only what the task rewards brings it down.

    Args:
        entropy: `policy_entropy` of the policy that acted.
        weight: the weight that was kept.
        target: entropies at the start and the end of the run, in nats; linear in between.
        remaining: share of the run that remains, from 1 to 0.

    Returns:
        The weight to keep; flow/entropy; flow/target_entropy; flow/spread_coef, to be used.
    """
    goal = remaining * target[0] + (1 - remaining) * target[1]
    error = min(1.0, max(-1.0, goal - entropy))
    weight = min(max(weight * math.exp(RATE * error), WEIGHTS[0]), WEIGHTS[1])
    used = weight * math.exp(GAIN * error)
    return weight, {"flow/entropy": entropy, "flow/target_entropy": goal, "flow/spread_coef": used}
