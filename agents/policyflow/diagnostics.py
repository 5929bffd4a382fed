"""Measurements of a flow policy that cost more than a loss: the ratio's bias, the field's Jacobian, the entropy."""

from __future__ import annotations

import torch

from .entropy import policy_entropy
from .other_ratios import EndpointRatio
from .policy import FlowActor
from .ratios import Ratio, Samples, chord_point

SAMPLES = 256


@torch.no_grad()
def flow_diagnostics(actor: FlowActor, ratio: Ratio, samples: Samples, clip_range: float) -> dict[str, float]:
    """Compare the ratio in use with the exact one given z after an update, on a subsample of the rollout.

    Args:
        actor: the updated actor.
        ratio: the ratio that the update used.
        samples: what the last epoch learned from.
        clip_range: clip range of the update.

    Returns:
        flow/ratio_correlation: Pearson correlation of the two log-ratios (the mean one, of several per sample); this
            and the next three are left out of a mixture, whose ratio is exact without z.
        flow/ratio_bias: mean of log(used) - log(exact), in nats.
        flow/ratio_error: root mean square of that difference over the root mean square of log(exact).
        flow/exact_clip_fraction: share of samples whose exact ratio lies outside the clip range.
        flow/jacobian_norm: mean Frobenius norm of dv/dx halfway between z and x1, at t = 1/2.
        flow/sde_gap: see `sde_gap`, halfway likewise; of a flow that is an SDE while sampling.
        flow/entropy: see `policy_entropy`, in nats.
        flow/components: of a mixture: exponential of the mean entropy of the choice among its points.
    """
    # Evenly spaced rows: no random numbers, so that measuring does not change training.
    stride = max(1, len(samples.obs) // SAMPLES)
    part = samples.rows(slice(None, None, stride)).rows(slice(SAMPLES))
    half = torch.full_like(part.values, 0.5)
    middle = chord_point(part, half)
    jacobian = actor.field.jacobian(half, middle, part.obs)[1]
    found = {
        "flow/jacobian_norm": jacobian.square().sum((-2, -1)).sqrt().mean().item(),
        "flow/entropy": policy_entropy(actor, samples.obs).item(),
    }
    if actor.points is not None:
        return found | {"flow/components": actor.points.entropy(part.obs).exp().item()}
    used = ratio.terms(actor, part).log_ratio.view(len(part.obs), -1).mean(1)
    exact = EndpointRatio().terms(actor, part).log_ratio
    found |= {
        "flow/ratio_correlation": torch.corrcoef(torch.stack([used, exact]))[0, 1].item(),
        "flow/ratio_bias": (used - exact).mean().item(),
        "flow/ratio_error": ((used - exact).square().mean() / exact.square().mean()).sqrt().item(),
        "flow/exact_clip_fraction": (exact.expm1().abs() > clip_range).float().mean().item(),
    }
    if actor.langevin_eps:
        from .noisy_flows import sde_gap  # else its solvers need not be loaded

        found["flow/sde_gap"] = sde_gap(actor.field, half, middle, part.obs, *actor.base(part.obs)).item()
    return found
