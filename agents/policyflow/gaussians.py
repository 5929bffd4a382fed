"""Diagonal Gaussians and mixtures of them: densities, and the base whose flow makes a policy a mixture."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..common.networks import mlp


def gaussian_log_prob(x: Tensor, mean: Tensor | float, log_std: Tensor, mask: Tensor | None = None) -> Tensor:
    """Log-density of a diagonal Gaussian: x [B, D], mean and log_std broadcast to it; returns [B], in nats.

    With a mask, bool and broadcast to x, that of the dimensions where it is True.
    """
    each = -0.5 * ((x - mean) * torch.exp(-log_std)).square() - log_std - 0.5 * math.log(2 * math.pi)
    return (each if mask is None else each * mask).sum(-1)


def gaussian_kl(mean: Tensor, log_std: Tensor, other_mean: Tensor | float, other_log_std: Tensor) -> Tensor:
    """KL(N(mean, std^2) || N(other_mean, other_std^2)) of diagonal Gaussians, [B, D] each; returns [B], in nats."""
    scaled = torch.exp(2 * (log_std - other_log_std)) + ((mean - other_mean) * torch.exp(-other_log_std)).square()
    return (other_log_std - log_std + 0.5 * scaled - 0.5).sum(-1)


class Mixture(NamedTuple):
    """K Gaussians per sample, up to their standard deviation, which they share."""

    log_weight: Tensor  # [B, K]
    mean: Tensor  # [B, K, D]


def mixture_log_prob(x: Tensor, mixture: Mixture, log_std: Tensor, mask: Tensor | None = None) -> Tensor:
    """Log-density of a mixture of Gaussians: x [B, D], log_std broadcasts to [B, K, D]; returns [B], in nats.

    With a mask, bool [B, D], that of the dimensions where it is True.
    """
    where = None if mask is None else mask.unsqueeze(1)
    return torch.logsumexp(mixture.log_weight + gaussian_log_prob(x.unsqueeze(1), mixture.mean, log_std, where), 1)


class Points(nn.Module):
    """A base of K learned points: z is the point k with the probability ``softmax(logits(obs))_k``.

    The logits start at 0, so all points are equally probable. They start apart, else they would stay together.

    Args:
        obs_dim: length of the observation vector, O.
        dim: number of action dimensions, D.
        count: K.
        hidden: widths of the hidden layers of the logits' network.
        activation: a key of `ACTIVATIONS`.
        std: standard deviation of the normals at which the points start.
    """

    def __init__(self, obs_dim: int, dim: int, count: int, hidden: tuple[int, ...], activation: str, std: float):
        super().__init__()
        self.places = nn.Parameter(std * torch.randn(count, dim))
        self.logits = mlp([obs_dim, *hidden, count], activation, 0.0)

    def log_weight(self, obs: Tensor) -> Tensor:
        """Log-probabilities [B, K] given obs [B, O]."""
        logits: Tensor = self.logits(obs)
        return logits.log_softmax(-1)

    def draw(self, obs: Tensor, normal: Tensor) -> Tensor:
        """One point per row, [B, D], by standard normals [B, D], of which the first of each row chooses.

        Each with its probability to 6e-8, the rounding of a distribution function in float32.
        """
        below = self.log_weight(obs).exp().cumsum(-1)[:, :-1]
        return self.places[(below < torch.special.ndtr(normal[:, :1])).sum(-1)]

    def most_probable(self, obs: Tensor) -> Tensor:
        """The most probable point of each row, [B, D]."""
        return self.places[self.log_weight(obs).argmax(-1)]

    def entropy(self, obs: Tensor) -> Tensor:
        """Mean entropy of the choice over rows of obs, in nats; a scalar."""
        log_weight = self.log_weight(obs)
        return -(log_weight.exp() * log_weight).sum(-1).mean()
