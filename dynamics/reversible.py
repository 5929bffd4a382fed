"""Reversible integration of an ODE in equal steps: the memory of a gradient does not grow with the steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .fields import Time, VelocityField
from .ode import Tableau, bind, check_batch, combine, fixed_time, get_tableau, intervals, stage_slopes, stage_times


def odeint_reversible(
    field: VelocityField,
    x: Tensor,
    *,
    steps: int,
    solver: Tableau | str = "midpoint",
    cond: Tensor | None = None,
    t0: float = 0.0,
    t1: float = 1.0,
    coupling: float = 0.99,
    gradient: Literal["reversible", "direct"] = "reversible",
) -> Tensor:
    """``odeint`` by a method that can be run backwards, so that a gradient needs no memory per step.

    The reversible form of any one-step method ``x + psi_h(t, x)`` (McCallum and Foster, arXiv 2410.11648), of the same
    order and at twice its field calls, with y = z = x at t0 and c the coupling::

        y' = c y + (1 - c) z + psi_h(t, z),    z' = z - psi_-h(t + h, y')

    The backward pass recovers the states from the last pair. Its gradient is that of this discrete map, to rounding
    that grows as ``coupling^-steps``; first derivatives only. Three more field calls look for tensors that it would
    leave out.

    Not for stiff fields: y and z part where the field contracts, by about ``e^(k T)`` for ``v = -k x`` over a time T,
    and the result itself is then wrong. Nor for fields that draw random numbers, such as dropout: the way back calls
    them anew. A way back that misses the start by more than a hundredth is an error. Not for ``torch.compile``, but
    with gradient="direct".

    Args:
        field: velocity field, whose parameters and buffers get gradients.
        x: state at t0, [B, D].
        steps: number of steps, at least 1.
        solver: a tableau or a key of ``SOLVERS``.
        cond: conditioning, [B, C], or None.
        t0: start time.
        t1: end time; below t0 to integrate backwards.
        coupling: c, in (0, 1]. Below 1 it keeps y and z together; 1 is least stable and reverses best.
        gradient: "direct" for plain automatic differentiation of the same map, which allows higher derivatives.

    Returns:
        State y at t1, [B, D], differentiable in x, cond and the field's parameters.

    Raises:
        ValueError: if ``steps`` is below 1, the solver or gradient unknown, the coupling outside (0, 1], x not [B, D],
            the field not a VelocityField, or a time in need of a gradient that only "direct" gives, as does a tensor
            that the field depends on and that is no parameter or buffer of it.
        RuntimeError: in the backward pass, if the way back misses the start.
    """
    if not isinstance(field, VelocityField):
        raise ValueError(f"field must be a VelocityField, for its parameters to be known, got {type(field).__name__}")
    if not 0 < coupling <= 1:
        raise ValueError(f"coupling must lie in (0, 1], got {coupling}")
    if gradient not in ("reversible", "direct"):
        raise ValueError(f"gradient must be 'reversible' or 'direct', got {gradient!r}")
    check_batch(x)
    if gradient == "reversible":
        t0, t1, coupling = fixed_time("t0", t0), fixed_time("t1", t1), fixed_time("coupling", coupling)
    method = _Coupled(field, get_tableau(solver), intervals(steps, t0, t1), coupling)
    if gradient == "direct":
        return method.run(x, cond)[0]
    weights = [w for w in (*field.parameters(), *field.buffers()) if w.requires_grad]
    if torch.is_grad_enabled():
        velocity = bind(field, None if cond is None else cond.detach())
        for t in looks(method.course):
            check_leaves("field", [velocity(t, x.detach())], weights)
    end: Tensor = _ReversibleGradient.apply(method, x, cond, *weights)  # type: ignore[no-untyped-call]
    return end


_MAY_MISS = 0.01
"""How far the way back may miss the start, relative to 1 + |x|: rounding of float32 grows to that over long solves."""


@dataclass(frozen=True)
class _Coupled:
    """The method of ``odeint_reversible``."""

    field: VelocityField
    tableau: Tableau
    course: list[tuple[float, float]]
    coupling: float

    def run(self, x: Tensor, cond: Tensor | None) -> tuple[Tensor, Tensor]:
        """Both states at the end."""
        there, back = self.course, [(t + h, -h) for t, h in self.course]
        velocity = bind(self.field, cond, stage_times(self.tableau, there + back))
        y = z = x
        for t, h in self.course:
            y = torch.lerp(z, y, self.coupling) + self.increment(velocity, t, h, z)
            z = z - self.increment(velocity, t + h, -h, y)
        return y, z

    def increment(self, velocity: Callable[[Time, Tensor], Tensor], t: float, h: float, x: Tensor) -> Tensor:
        """psi_h(t, x), [B, D]."""
        return combine(torch.zeros_like(x), h, self.tableau.b, stage_slopes(velocity, self.tableau, t, h, x))


def looks(course: list[tuple[float, float]]) -> set[float]:
    """Times at which to look for what an equation depends on: a term may set in later."""
    return {course[0][0], course[len(course) // 2][0], course[-1][0]}


def check_leaves(name: str, parts: Sequence[Tensor], weights: Sequence[Tensor]) -> None:
    """Raise ValueError if the parts depend on a tensor that needs a gradient and is none of the weights."""
    known, seen = set(map(id, weights)), {(w.grad_fn, w.output_nr) for w in weights}
    open_edges = [(part.grad_fn, part.output_nr) for part in parts]
    while open_edges:
        edge = open_edges.pop()
        node = edge[0]
        if node is None or edge in seen:
            continue
        seen.add(edge)
        variable = getattr(node, "variable", None)
        if variable is not None and id(variable) not in known:
            raise ValueError(
                f"the {name} needs a gradient for a tensor of shape {list(variable.shape)} that is no parameter or "
                "buffer of it; register it, or use gradient='direct'"
            )
        open_edges.extend(node.next_functions)


def check_way_back(found: Tensor, start: Tensor) -> None:
    """Raise RuntimeError if the states that were walked back to are not those of the start: no gradient is right."""
    missed = ((found - start).abs() / (1 + start.abs())).max().item() if start.numel() else 0.0
    if not missed <= _MAY_MISS:
        raise RuntimeError(
            f"the way back misses the start, by {missed:.2g} of 1 + |x|: the field contracts too fast for this method, "
            "draws random numbers or changed since; use gradient='direct', or another solver"
        )


class GradientSums:
    """Gradients of a solve on its conditioning and weights, summed while it is walked back.

    Args:
        tensors: the conditioning, or None, and the weights; those that need no gradient get none.
    """

    def __init__(self, *tensors: Tensor | None) -> None:
        self._tensors = tensors
        self._inputs = [each for each in tensors if each is not None and each.requires_grad]
        self._sums = [torch.zeros_like(each) for each in self._inputs]

    def pull_back(self, parts: Sequence[Tensor], gradients: Sequence[Tensor], state: Tensor) -> Tensor:
        """The gradient on the state of those on parts that are functions of it; what the inputs get is added."""
        pairs = [(part, gradient) for part, gradient in zip(parts, gradients, strict=True) if part.requires_grad]
        if not pairs:  # constants
            return torch.zeros_like(state)
        parts, gradients = zip(*pairs, strict=True)
        found = torch.autograd.grad(parts, [state, *self._inputs], gradients, materialize_grads=True)
        for total, gradient in zip(self._sums, found[1:], strict=True):
            total.add_(gradient)
        return found[0]

    def totals(self) -> tuple[Tensor | None, ...]:
        """The sums in the order of the tensors."""
        by_input = dict(zip(map(id, self._inputs), self._sums, strict=True))
        return tuple(by_input.get(id(each)) for each in self._tensors)


class _ReversibleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, method: _Coupled, x: Tensor, cond: Tensor | None, *weights: Tensor) -> Tensor:
        y, z = method.run(x, cond)
        ctx.method = method
        ctx.save_for_backward(y, z, x, cond, *weights)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        method: _Coupled = ctx.method
        y, z, start, cond, *weights = ctx.saved_tensors
        if cond is not None:
            cond = cond.detach().requires_grad_(ctx.needs_input_grad[2])
        sums = GradientSums(cond, *weights)

        def pull_back(t: float, h: float, state: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
            """psi_h(t, state) and the gradient on state; that on the inputs is added to their sums."""
            with torch.enable_grad():
                state = state.detach().requires_grad_()
                increment = method.increment(bind(method.field, cond), t, h, state)
            return increment.detach(), sums.pull_back([increment], [gradient], state)

        c, grad_z = method.coupling, torch.zeros_like(grad_y)
        for t, h in reversed(method.course):
            increment, grad = pull_back(t + h, -h, y, -grad_z)
            z, grad_y = z + increment, grad_y + grad
            increment, grad = pull_back(t, h, z, grad_y)
            y, grad_z, grad_y = (y - (1 - c) * z - increment) / c, grad_z + (1 - c) * grad_y + grad, c * grad_y
        check_way_back(y, start)
        return (None, grad_y + grad_z, *sums.totals())
