"""Activations of a network by name, each also with its first derivative, from which closed-form Jacobians are made."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F


def _silu(a: Tensor) -> tuple[Tensor, Tensor]:
    gate = torch.sigmoid(a)
    value = a * gate
    return value, torch.addcmul(gate, value, 1 - gate)


def _mish(a: Tensor) -> tuple[Tensor, Tensor]:
    gate = torch.tanh(F.softplus(a))
    return a * gate, gate + a * torch.sigmoid(a) * (1 - gate * gate)


def _tanh(a: Tensor) -> tuple[Tensor, Tensor]:
    value = torch.tanh(a)
    return value, 1 - value * value


def _elu(a: Tensor) -> tuple[Tensor, Tensor]:
    # The clamp keeps exp finite where its result is not wanted: inf * 0 in the backward pass would be nan.
    return F.elu(a), torch.exp(a.clamp(max=0.0))


def _relu(a: Tensor) -> tuple[Tensor, Tensor]:
    return F.relu(a), (a > 0).to(a.dtype)


Activation: TypeAlias = tuple[Callable[[Tensor], Tensor], Callable[[Tensor], tuple[Tensor, Tensor]]]


ACTIVATIONS: dict[str, Activation] = {
    "silu": (F.silu, _silu),
    "mish": (F.mish, _mish),
    "tanh": (torch.tanh, _tanh),
    "elu": (F.elu, _elu),
    "relu": (F.relu, _relu),
}
"""Name -> (activation, activation with its first derivative)."""
