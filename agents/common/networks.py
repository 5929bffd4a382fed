"""Building blocks of the agents' networks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn

from ...dynamics.precision import bfloat16_product, reduced
from ...envs.memory import GIB, check_fits

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


def check_weights(device: torch.device, **networks: tuple[int, Sequence[int]]) -> None:
    """Refuse networks that the memory cannot hold, before PyTorch draws their weights for minutes.

    Args:
        device: where they will be.
        networks: by the name of the option that says their widths, how many networks have them, and the widths.

    Raises:
        ValueError: if weights, gradients and Adam's two moments need more than the memory of the device.
    """
    memory, holder = None, "machine"
    if device.type == "cuda":
        memory, holder = float(torch.cuda.get_device_properties(device).total_memory), "GPU"
    for name, (count, widths) in networks.items():
        weights = count * sum(before * after for before, after in pairwise(widths))
        sizes = " ".join(map(str, widths))
        check_fits(f"{name}: got {sizes}, whose {weights:,} weights take", 16 * weights, holder, memory)


def check_default_dtype() -> None:
    """Refuse another default type of PyTorch's numbers than float32, in which the agents and their files are.

    Raises:
        ValueError: if `torch.set_default_dtype` has set one.
    """
    if (dtype := torch.get_default_dtype()) is not torch.float32:
        raise ValueError(
            f"default dtype: got {dtype}, expected torch.float32, in which agents compute; call "
            "torch.set_default_dtype(torch.float32) before an agent is made, loaded or used"
        )


def lazy_zeros(*shape: int, device: torch.device | str, option: str) -> Tensor:
    """Zeros in float32 that on a CPU take no memory until they are written to; torch.zeros would write them all.

    Raises:
        ValueError: if the system has not that much memory to give; the option is what the user can lower.
    """
    count = math.prod(shape)
    try:
        memory = np.zeros(count + 16, np.float32)
    except MemoryError:
        raise ValueError(
            f"{option}: got a storage of {' x '.join(map(str, shape))} numbers, {4 * count / GIB:,.0f} GiB, more than "
            "the machine can give; lower it"
        ) from None
    start = -memory.ctypes.data // memory.itemsize % 16  # at a multiple of 64 bytes, as torch's tensors begin
    return torch.from_numpy(memory[start : start + count]).view(shape).to(device)


class HiddenLinear(nn.Linear):
    """A layer from hidden units to hidden units, which may multiply in bfloat16 (`dynamics.precision`)."""

    def forward(self, x: Tensor) -> Tensor:
        """Outputs [..., fan_out] of inputs [..., fan_in]."""
        return bfloat16_product(x, self.weight.T) + self.bias if reduced() else super().forward(x)


def mlp(sizes: list[int], activation: str, head_gain: float | None) -> nn.Sequential:
    """Fully connected network with orthogonal weights (gain sqrt(2), head_gain in the last layer), zero biases.

    head_gain None leaves PyTorch's own initialisation.
    """
    layers: list[nn.Module] = []
    for i, (fan_in, fan_out) in enumerate(pairwise(sizes)):
        last = i == len(sizes) - 2
        linear = (HiddenLinear if 0 < i and not last else nn.Linear)(fan_in, fan_out)
        if head_gain is not None:
            nn.init.orthogonal_(linear.weight, head_gain if last else math.sqrt(2.0))
            nn.init.zeros_(linear.bias)
        layers += [linear] if last else [linear, ACTIVATIONS[activation]()]
    return nn.Sequential(*layers)
