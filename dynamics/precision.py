"""Mixed precision: the large products of networks in bfloat16, weights and all else in float32.

Micikevicius et al. 2018 (arXiv 1710.03740), Kalamkar et al. 2019 (arXiv 1905.12322). bfloat16 has the range of float32
and 8 bits of precision, so losses need no scaling.

Only products of one hidden layer with the next are made so: that is where the time goes. What networks are given and
what they return is not rounded, nor is what users compute, as it would be within ``torch.autocast``.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class _State(threading.local):
    def __init__(self) -> None:  # of each thread; torch.compile fails on an attribute that appears while it traces
        self.reduced = False


_state = _State()


@contextmanager
def bfloat16_products(wanted: bool = True) -> Iterator[None]:
    """Within it, hidden layers multiply in bfloat16 if wanted, in float32 else; of this thread alone."""
    before, _state.reduced = _state.reduced, wanted
    try:
        yield
    finally:
        _state.reduced = before


def reduced() -> bool:
    """Whether hidden layers are to multiply in bfloat16 at present."""
    return _state.reduced


def bfloat16_product(x: Tensor, weight: Tensor) -> Tensor:
    """``x @ weight`` [..., B, O] of x [..., B, I] and weight [..., I, O]; both are rounded, and so is the result."""
    return (x.bfloat16() @ weight.bfloat16()).to(x.dtype)


def stacked_layer(bias: Tensor, x: Tensor, weight: Tensor, hidden: bool) -> Tensor:
    """``bias + x @ weight`` of M layers side by side, [M, B, O]; in bfloat16 where hidden layers are to.

    Args:
        bias: [M, 1, O].
        x: [M, B, I].
        weight: [M, I, O].
        hidden: whether it goes from hidden units to hidden units.
    """
    return bfloat16_product(x, weight) + bias if hidden and reduced() else torch.baddbmm(bias, x, weight)


def bfloat16_is_fast(device: torch.device) -> bool:
    """Whether the device has instructions for products in bfloat16; others imitate them slowly."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if not hasattr(torch.cpu, "get_capabilities"):  # before torch 2.10 there is no telling
        return True
    has = torch.cpu.get_capabilities()
    return any(has.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
