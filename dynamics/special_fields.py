"""Velocity fields of special form: linear, affine, a known part plus a learned one, and the gradient of a potential."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .fields import Time, VelocityField


class LinearField(VelocityField):
    """``v = A x + b``, constant in time: a field whose flow is known exactly (matrix exponential, log-det = tr A).

    Args:
        matrix: A, [D, D].
        offset: b, [D]; None for zero.

    Raises:
        ValueError: if the shapes do not fit.
    """

    matrix: Tensor
    offset: Tensor | None

    def __init__(self, matrix: Tensor, offset: Tensor | None = None) -> None:
        if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
            raise ValueError(f"matrix must have shape [D, D], got {list(matrix.shape)}")
        if offset is not None and offset.shape != matrix.shape[:1]:
            raise ValueError(f"offset must have shape [{matrix.shape[0]}], got {list(offset.shape)}")
        super().__init__(matrix.shape[0])
        self.register_buffer("matrix", matrix)
        self.register_buffer("offset", offset)

    def forward(self, t: Time, x: Tensor, cond: Tensor | None = None) -> Tensor:
        """Velocity [B, D]; cond must be None."""
        self.check_state(t, x)
        self.check_cond(cond)
        return F.linear(x, self.matrix, self.offset)

    def jacobian_embedded(self, t: Time, x: Tensor, embedded: None) -> tuple[Tensor, Tensor]:
        """Velocity [B, D] and A, [B, D, D]."""
        return self.forward(t, x), self.matrix.expand(x.shape[0], -1, -1)


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


class ResidualField(VelocityField):
    """``known + learned``: physics that is understood plus a correction that is not (PgDMM, arXiv 2110.08607).

    A term with ``cond_dim`` 0 does not see cond.

    Args:
        known: the prior drift.
        learned: the correction; zero at first with ``MLPField``'s default ``last_layer_scale``.

    Raises:
        ValueError: if the two differ in dim, or in cond_dim where both have one.
    """

    def __init__(self, known: VelocityField, learned: VelocityField) -> None:
        if known.dim != learned.dim:
            raise ValueError(f"known and learned must have equal dim, got {known.dim} and {learned.dim}")
        if known.cond_dim and learned.cond_dim and known.cond_dim != learned.cond_dim:
            raise ValueError(
                f"known and learned must have equal cond_dim, or 0, got {known.cond_dim} and {learned.cond_dim}"
            )
        super().__init__(known.dim, max(known.cond_dim, learned.cond_dim))
        self.known = known
        self.learned = learned

    def embed(self, cond: Tensor | None, times: Sequence[float] = ()) -> tuple[Any, Any]:
        """The embeddings of both terms."""
        self.check_cond(cond)
        known, learned = (f.embed(cond if f.cond_dim else None, times) for f in (self.known, self.learned))
        return known, learned

    def forward(self, t: Time, x: Tensor, cond: Tensor | None = None) -> Tensor:
        """Velocity [B, D] at time t (float or [B]), state x [B, D] and conditioning cond [B, C]."""
        return self.forward_embedded(t, x, self.embed(cond))

    def forward_embedded(self, t: Time, x: Tensor, embedded: tuple[Any, Any]) -> Tensor:
        """Sum of both velocities, [B, D]."""
        return self.known.forward_embedded(t, x, embedded[0]) + self.learned.forward_embedded(t, x, embedded[1])

    def divergence_embedded(self, t: Time, x: Tensor, embedded: tuple[Any, Any]) -> tuple[Tensor, Tensor]:
        """Sums of both velocities [B, D] and both divergences [B]."""
        v_known, trace_known = self.known.divergence_embedded(t, x, embedded[0])
        v_learned, trace_learned = self.learned.divergence_embedded(t, x, embedded[1])
        return v_known + v_learned, trace_known + trace_learned

    def jacobian_embedded(self, t: Time, x: Tensor, embedded: tuple[Any, Any]) -> tuple[Tensor, Tensor]:
        """Sums of both velocities [B, D] and both Jacobians [B, D, D]."""
        v_known, jacobian_known = self.known.jacobian_embedded(t, x, embedded[0])
        v_learned, jacobian_learned = self.learned.jacobian_embedded(t, x, embedded[1])
        return v_known + v_learned, jacobian_known + jacobian_learned


class PotentialField(VelocityField):
    """``v = -grad_x U(x, cond)``: the drift of gradient flow and of overdamped Langevin dynamics.

    Works under ``no_grad`` too; with gradients enabled the velocity is differentiable in x, cond and U's parameters.

    Args:
        potential: module ``(x [B, D], cond [B, C] or None) -> U [B]``, each row a function of its own row of x.
        dim: D, size of the state.
        cond_dim: C, size of the conditioning, 0 for none.
    """

    def __init__(self, potential: nn.Module, dim: int, cond_dim: int = 0) -> None:
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
