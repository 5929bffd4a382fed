"""Fields whose flow is known, and the sum of two fields, to test solvers on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from driftrl.dynamics.fields import Time, VelocityField


class LinearField(VelocityField):
    """``v = A x + b``, constant in time: a field whose flow is known exactly (matrix exponential, log-det = tr A)."""

    matrix: Tensor
    offset: Tensor | None

    def __init__(self, matrix: Tensor, offset: Tensor | None = None) -> None:
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


class SumField(VelocityField):
    """``known + learned``, with embeddings of its own; a term with ``cond_dim`` 0 does not see cond."""

    def __init__(self, known: VelocityField, learned: VelocityField) -> None:
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
