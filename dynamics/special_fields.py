"""Velocity fields of special form: affine, and the gradient of a potential."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from .fields import Time, VelocityField


class AffineField(VelocityField):
    """``v = A x + C cond + b`` with parameters that learn, zero at first: an ``MLPField`` without hidden layers.

    Args:
        dim: D, size of the state.
        cond_dim: C, size of the conditioning, 0 for none.
    """

    def __init__(self, dim: int, cond_dim: int = 0) -> None:
        super().__init__(dim, cond_dim)
        self.layers = cast("Sequence[nn.Linear]", nn.ModuleList())
        self.output = nn.Linear(dim + cond_dim, dim)
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)

    def forward(self, t: Time, x: Tensor, cond: Tensor | None = None) -> Tensor:
        """Velocity [B, D] at state x [B, D] and conditioning cond [B, C] or [1, C]."""
        self.check_state(t, x)
        self.check_cond(cond)
        inputs = x if cond is None else torch.cat([x, cond.expand(x.shape[0], -1)], 1)
        v: Tensor = self.output(inputs)
        return v


class PotentialField(VelocityField):
    """``v = -grad_x U(x, cond)``: the drift of gradient flow and of overdamped Langevin dynamics.

    Works under ``no_grad`` too; with gradients enabled the velocity is differentiable in x, cond and U's parameters.

    Args:
        potential: module or function ``(x [B, D], cond [B, C] or None) -> U [B]``, each row a function of its own row
            of x.
        dim: D, size of the state.
        cond_dim: C, size of the conditioning, 0 for none.
    """

    def __init__(self, potential: Callable[[Tensor, Tensor | None], Tensor], dim: int, cond_dim: int = 0) -> None:
        super().__init__(dim, cond_dim)
        self.potential = potential

    def forward(self, t: Time, x: Tensor, cond: Tensor | None = None) -> Tensor:
        """Velocity [B, D] at state x [B, D] and conditioning cond [B, C]; the same at all times t.

        Raises:
            ValueError: if the potential does not return [B].
        """
        self.check_state(t, x)
        self.check_cond(cond)

        def total(y: Tensor) -> Tensor:
            energy: Tensor = self.potential(y, cond)
            if energy.shape != y.shape[:1]:
                # A [B, 1] would pass through the sum, a [B, B] from wrong broadcasting too.
                raise ValueError(f"potential must return shape [{y.shape[0]}], got {list(energy.shape)}; squeeze it")
            return energy.sum()

        gradient: Tensor = torch.func.grad(total)(x)
        return -gradient
