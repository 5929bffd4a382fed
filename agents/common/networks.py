"""Building blocks of the agents: networks, densities, running statistics, parameters as one vector."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "silu": nn.SiLU, "mish": nn.Mish, "tanh": nn.Tanh, "elu": nn.ELU, "relu": nn.ReLU,
}  # fmt: skip


def activation_name(activation: str | type[nn.Module]) -> str:
    """The key of `ACTIVATIONS` that a key or one of its modules stands for.

    Raises:
        ValueError: if it is neither.
    """
    for name, module in ACTIVATIONS.items():
        if activation in (name, module):
            return name
    raise ValueError(f"unknown activation: got {activation!r}, expected one of {', '.join(ACTIVATIONS)}")


def gaussian_log_prob(x: Tensor, mean: Tensor | float, log_std: Tensor) -> Tensor:
    """Log-density of a diagonal Gaussian: x [B, D], mean and log_std broadcast to it; returns [B], in nats."""
    return (-0.5 * ((x - mean) * torch.exp(-log_std)).square() - log_std - 0.5 * math.log(2 * math.pi)).sum(-1)


def gaussian_kl(mean: Tensor, log_std: Tensor, other_mean: Tensor | float, other_log_std: Tensor) -> Tensor:
    """KL(N(mean, std^2) || N(other_mean, other_std^2)) of diagonal Gaussians, [B, D] each; returns [B], in nats."""
    scaled = torch.exp(2 * (log_std - other_log_std)) + ((mean - other_mean) * torch.exp(-other_log_std)).square()
    return (other_log_std - log_std + 0.5 * scaled - 0.5).sum(-1)


def lazy_zeros(*shape: int, device: torch.device | str) -> Tensor:
    """Zeros in float32 that on a CPU take no memory until they are written to; torch.zeros would write them all."""
    count = math.prod(shape)
    memory = np.zeros(count + 16, np.float32)
    start = -memory.ctypes.data // memory.itemsize % 16  # at a multiple of 64 bytes, as torch's tensors begin
    return torch.from_numpy(memory[start : start + count]).view(shape).to(device)


def mlp(sizes: list[int], activation: str, head_gain: float | None) -> nn.Sequential:
    """Fully connected network with orthogonal weights (gain sqrt(2), head_gain in the last layer), zero biases.

    head_gain None leaves PyTorch's own initialisation.
    """
    layers: list[nn.Module] = []
    for i, (fan_in, fan_out) in enumerate(pairwise(sizes)):
        last = i == len(sizes) - 2
        linear = nn.Linear(fan_in, fan_out)
        if head_gain is not None:
            nn.init.orthogonal_(linear.weight, head_gain if last else math.sqrt(2.0))
            nn.init.zeros_(linear.bias)
        layers += [linear] if last else [linear, ACTIVATIONS[activation]()]
    return nn.Sequential(*layers)


class RunningNorm(nn.Module):
    """Running mean and variance of a stream of vectors, merged batch by batch (Chan et al. 1979).

    Args:
        dim: length of the vectors.
        clip: bound on the magnitude of what `forward` returns, in standard deviations.
    """

    mean: Tensor
    var: Tensor
    count: Tensor
    shift: Tensor
    scale: Tensor

    def __init__(self, dim: int, clip: float = 10.0) -> None:
        super().__init__()
        self.clip = clip
        # float64: the statistics run over millions of samples. What `forward` needs of them is kept in float32.
        self.register_buffer("mean", torch.zeros(dim, dtype=torch.float64))
        self.register_buffer("var", torch.ones(dim, dtype=torch.float64))
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))
        self.register_buffer("shift", torch.zeros(dim))
        self.register_buffer("scale", torch.ones(dim))

    @torch.no_grad()
    def update(self, batch: Tensor) -> None:
        """Merge a batch [B, dim] into the statistics."""
        batch = batch.double()
        n = batch.shape[0]
        total = self.count + n
        delta = batch.mean(0) - self.mean
        spread = self.var * self.count + batch.var(0, unbiased=False) * n + delta.square() * self.count * n / total
        self.mean += delta * n / total
        self.var.copy_(spread / total)
        self.count.copy_(total)
        self.shift.copy_(self.mean)
        self.scale.copy_((self.var + 1e-8).rsqrt())

    def forward(self, x: Tensor) -> Tensor:
        """Standardise x [B, dim] and clip it to +-clip; before the first batch only clip it."""
        return ((x - self.shift) * self.scale).clamp(-self.clip, self.clip)
