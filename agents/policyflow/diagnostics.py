"""Measurements of a flow policy that cost more than a loss: the ratio's bias, the field's Jacobian, entropies."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .entropy import policy_entropy
from .other_ratios import EndpointRatio
from .policy import FlowActor, FlowNoise
from .ratios import Ratio, chord_point, gaussian_log_prob
from .rollout import Samples

SAMPLES = 256
LATENTS = 32


@torch.no_grad()
def flow_diagnostics(actor: FlowActor, ratio: Ratio, samples: Samples, clip_range: float) -> dict[str, float]:
    """Compare the ratio in use with the exact one given z after an update, on a subsample of the rollout.

    Args:
        actor: the updated actor.
        ratio: the ratio that the update used.
        samples: what the last epoch learned from.
        clip_range: clip range of the update.

    Returns:
        flow/ratio_correlation: Pearson correlation of the two log-ratios (the mean one, of several per sample).
        flow/ratio_bias: mean of log(used) - log(exact), in nats.
        flow/ratio_error: root mean square of that difference over the root mean square of log(exact).
        flow/exact_clip_fraction: share of samples whose exact ratio lies outside the clip range.
        flow/jacobian_norm: mean Frobenius norm of dv/dx halfway between z and x1, at t = 1/2.
        flow/action_entropy: see `action_entropy`, in nats.
        flow/entropy: see `policy_entropy`, in nats.
    """
    # Evenly spaced rows: no random numbers, so that measuring does not change training.
    stride = max(1, len(samples.obs) // SAMPLES)
    part = samples.rows(slice(None, None, stride)).rows(slice(SAMPLES))
    used = ratio.terms(actor, part).log_ratio.view(len(part.obs), -1).mean(1)
    exact = EndpointRatio().terms(actor, part).log_ratio
    half = torch.full_like(used, 0.5)
    jacobian = actor.field.jacobian(half, chord_point(part, half), part.obs)[1]
    return {
        "flow/ratio_correlation": torch.corrcoef(torch.stack([used, exact]))[0, 1].item(),
        "flow/ratio_bias": (used - exact).mean().item(),
        "flow/ratio_error": ((used - exact).square().mean() / exact.square().mean()).sqrt().item(),
        "flow/exact_clip_fraction": (exact.expm1().abs() > clip_range).float().mean().item(),
        "flow/jacobian_norm": jacobian.square().sum((-2, -1)).sqrt().mean().item(),
        "flow/action_entropy": action_entropy(actor, part.obs).item(),
        "flow/entropy": policy_entropy(actor, samples.obs).item(),
    }


@torch.no_grad()
def action_entropy(actor: FlowActor, obs: Tensor, latents: int = LATENTS) -> Tensor:
    """Estimate the mean entropy of the actions given obs [B, O], in nats per action vector; returns a scalar.

    Nested Monte Carlo: the density of an action is averaged over fresh latents,
    ``-E log(1/M sum_j N(a; phi_1(z_j), std^2))``. By Jensen's inequality an upper bound of the entropy in
    expectation; tight where the action noise is not much narrower than the spread of the flow's endpoints. Where the
    action noise is correlated, this is the entropy without knowledge of its past.
    """
    generator = torch.Generator(obs.device).manual_seed(0)
    noise = torch.randn(actor.draws, len(obs) * latents, actor.log_std.shape[0], generator=generator, device=obs.device)
    x1 = actor.sample(obs.repeat_interleave(latents, 0), FlowNoise.of(noise)).x1.view(len(obs), latents, -1)
    action = actor.sample(obs, FlowNoise.of(noise[:, -len(obs) :].flip(0))).action
    log_density = gaussian_log_prob(action.unsqueeze(1), x1, actor.noise_log_std())
    return math.log(latents) - torch.logsumexp(log_density, dim=1).mean()
