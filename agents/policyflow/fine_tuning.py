"""What fine-tuning a pretrained policy takes: a step of two learning rates, and steering's ratio."""

from __future__ import annotations

from typing import ClassVar

import torch

from ..common.weights import Weights
from .policy import FlowActor
from .ratios import Ratio, RatioTerms, Samples, gaussian_terms


class SteeringRatio(Ratio):
    """``p(z | s) / p_old(z | s)``, times that of the action noise: exact where the flow is frozen and an ODE.

    The flow carries the same z to the same x1 then, so that nothing need be integrated or asked of the field. (A noisy
    flow depends on the base, `langevin_flow`: it keeps the ratio that the config names.) Training
    the base alone is diffusion steering (Wagenmaker et al., arXiv 2506.15799), here on-policy.
    """

    requires: ClassVar[dict[str, object]] = {"freeze_flow": True}

    def terms(self, actor: FlowActor, samples: Samples) -> RatioTerms:
        """Log-ratio and KL of the Gaussians in z and in the action around an endpoint that stays."""
        return gaussian_terms(actor, samples, torch.zeros_like(samples.x1))


def two_rates(weights: Weights, actor_rate: float, critic_rate: float) -> None:
    """Let the critic learn at another rate than all else, until the shares of the weights are others.

    The optimizer takes a step at the larger rate and the parameters of the smaller one go the share of it that is
    theirs: Adam's step is proportional to its rate. At a rate of 0 parameters stay and their moments move.

    Args:
        weights: of the policy.
        actor_rate: of everything but the critic, >= 0.
        critic_rate: of the critic, >= 0.
    """
    largest = max(actor_rate, critic_rate)
    for group in weights.optimizer.param_groups:
        group["lr"] = largest
    rates = [critic_rate if name.startswith("critic.") else actor_rate for name in weights.names]
    weights.shares = [rate / largest if largest else 1.0 for rate in rates]
    weights.prepare()
