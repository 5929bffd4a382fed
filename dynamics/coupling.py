"""Pairs of source and data that are close to each other: entropic optimal transport, and so Schroedinger bridges."""

from __future__ import annotations

import math

import torch
from torch import Tensor


@torch.no_grad()
def entropic_plan(x0: Tensor, x1: Tensor, scale: float, *, iterations: int = 200) -> Tensor:
    """Plan of entropic optimal transport between two samples: the ends of a Schroedinger bridge.

    The plan is ``P_ij = u_i exp(-|x0_i - x1_j|^2 / (2 scale^2)) w_j`` with uniform marginals, found by Sinkhorn's
    iterations on logarithms. Its pairs are the ends of the bridge whose reference is Brownian motion of that scale over
    unit time; inside, the bridge is a mixture of Brownian bridges (Leonard, arXiv 1308.0215). So the paths of
    ``brownian_bridge(scale)`` between such pairs have the bridge's marginals, and ``interpolant_sde`` with
    ``eps = scale^2 / 2`` its law (Tong et al., arXiv 2307.03672).

    Costs two passes over N x M numbers per iteration. Few suffice where scale is of the order of the distances; many
    are needed where it is small.

    Args:
        x0: source, [N, D].
        x1: data, [M, D].
        scale: standard deviation of the reference after unit time, positive, in units of x.
        iterations: at least 1.

    Returns:
        P, [N, M], sum 1. Draw a pair by a uniform i and ``torch.multinomial(P[i], 1)``. Sums over j are 1 / N exactly;
        those over i are 1 / M in the limit of many iterations.

    Raises:
        ValueError: if shapes do not fit, or scale or iterations are out of range.
    """
    if x0.ndim != 2 or x1.ndim != 2 or x0.shape[1] != x1.shape[1]:
        raise ValueError(f"x0 and x1 must have shapes [N, D] and [M, D], got {list(x0.shape)} and {list(x1.shape)}")
    if not len(x0) or not len(x1):
        raise ValueError(f"x0 and x1 must have a row at least, got {len(x0)} and {len(x1)}")
    if not scale > 0 or iterations < 1:
        raise ValueError(f"scale must be positive and iterations at least 1, got {scale} and {iterations}")
    middle = x1.mean(0)  # far from the origin the squares of distances would be differences of large numbers
    exact = "donot_use_mm_for_euclid_dist"  # two far clusters have no middle that helps
    kernel = torch.cdist(x0 - middle, x1 - middle, compute_mode=exact).square() / (-2 * scale**2)
    log_n, log_m = math.log(len(x0)), math.log(len(x1))
    u = kernel.new_zeros(len(x0), 1)
    for _ in range(iterations):
        w = -log_m - (kernel + u).logsumexp(0, keepdim=True)
        u = -log_n - (kernel + w).logsumexp(1, keepdim=True)
    return (kernel + u + w).exp()
