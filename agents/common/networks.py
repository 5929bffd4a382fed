"""Building blocks of the agents' networks."""

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
