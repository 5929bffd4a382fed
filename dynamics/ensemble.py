"""Parts of learned models: networks side by side, and the normalisation of what goes in and out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .precision import stacked_layer

FEW = 0.1
"""Share of zeros up to which their gaps are drawn faster than each unit by itself."""

SPARE = 6.0
"""Standard deviations by which more gaps are drawn than will do on average; more are drawn if these do not."""


class Members(nn.Module):
    """Multilayer perceptrons side by side, [M, B, I] -> [M, B, O], one batched matrix product per layer.

    SiLU between the layers; initial weights truncated normal with standard deviation ``1 / (2 sqrt(inputs))`` (MBPO).
    Hidden layers may multiply in bfloat16 (`precision`).

    Args:
        members: M, at least 1.
        widths: of the input, the hidden layers and the output.
        layer_norm: normalise what every layer but the first gets, without weights (DHMBPO, arXiv 2512.15439).
            The first of these norms adds 1 to the variance, the others 0.1: inputs that hardly differ stay small.
    """

    def __init__(self, members: int, widths: Sequence[int], layer_norm: bool = False) -> None:
        super().__init__()
        if min(widths) < 1:
            raise ValueError(f"widths must be at least 1, got {tuple(widths)}")
        self.layer_norm = layer_norm
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for i, o in pairwise(widths):
            std = 0.5 / math.sqrt(i)
            self.weights.append(nn.init.trunc_normal_(torch.empty(members, i, o), 0.0, std, -2 * std, 2 * std))
            self.biases.append(torch.zeros(members, 1, o))

    def forward(self, x: Tensor, chosen: Tensor | None = None, masks: Sequence[Tensor] = ()) -> Tensor:
        """Outputs of all members, or of those whose indices are chosen.

        Args:
            x: inputs, [M, B, I].
            chosen: indices of members.
            masks: factors of the first layers' outputs, [M, B, width] each: dropout.
        """
        for k, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            if k:
                x = F.silu(x * masks[k - 1] if k <= len(masks) else x)
                x = F.layer_norm(x, x.shape[-1:], eps=1.0 if k == 1 else 0.1) if self.layer_norm else x
            if chosen is not None:
                bias, weight = bias[chosen], weight[chosen]
            x = stacked_layer(bias, x, weight, hidden=0 < k < len(self.weights) - 1)
        return x


class Normalizer(nn.Module):
    """Shift and scale to mean 0 and standard deviation 1 per column; the identity before ``fit``."""

    mean: Tensor
    scale: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("scale", torch.ones(dim))

    def fit(self, data: Tensor) -> None:
        """Take mean and standard deviation of data [N, D]; a constant column keeps its unit."""
        std, mean = torch.std_mean(data.double(), 0, correction=0)
        self.mean.copy_(mean)
        self.scale.copy_(torch.where(std > 1e-6 * mean.abs() + 1e-12, std, 1.0))

    def forward(self, data: Tensor) -> Tensor:
        """Normalise [..., D]."""
        return (data - self.mean) / self.scale

    def inverse(self, normalised: Tensor) -> Tensor:
        """Undo ``forward``."""
        return torch.addcmul(self.mean, normalised, self.scale)


def dropout_mask(shape: Sequence[int], left_out: float, generator: torch.Generator) -> Tensor:
    """Independent factors of mean 1, float32 on the generator's device: 0 with probability left_out, else all the same.

    Args:
        shape: of the mask.
        left_out: probability, in (0, 1).
        generator: source of randomness.
    """
    kept = 1 - left_out
    if left_out < 1e-15:  # none, and the gaps between them would not fit in an integer
        return torch.ones(shape, device=generator.device)
    if generator.device.type != "cpu" or left_out > FEW:
        return torch.empty(shape, device=generator.device).bernoulli_(kept, generator=generator) / kept
    # The gaps between zeros are geometric, and for a small share far fewer numbers than the mask has.
    mask = torch.full(shape, 1 / kept)
    flat, zeros = mask.view(-1), left_out * mask.numel()
    last, drawn = -1, max(8, int(zeros + SPARE * math.sqrt(zeros)))
    while last < len(flat):
        places = last + torch.empty(drawn, dtype=torch.int64).geometric_(left_out, generator=generator).cumsum(0)
        flat[places[places < len(flat)]] = 0.0
        last = int(places[-1])
    return mask


def standard_normal(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Standard normal numbers on the generator's device."""
    return torch.randn(shape, generator=generator, device=generator.device)
