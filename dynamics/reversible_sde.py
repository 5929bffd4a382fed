"""Reversible integration of an SDE in equal steps: the memory of a gradient does not grow with the steps."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .brownian import BrownianGrid
from .brownian_tree import BrownianTree, check_tree
from .ode import check_batch, fixed_time, intervals
from .reversible import GradientSums, check_leaves, check_way_back, looks
from .sde import REVERSIBLE_HEUN, SDE, bind_sde, check_direction, check_noise


def sdeint_reversible(
    sde: SDE,
    x: Tensor,
    *,
    steps: int,
    noise: BrownianTree | BrownianGrid,
    cond: Tensor | None = None,
    t0: float = 0.0,
    t1: float = 1.0,
    gradient: Literal["reversible", "direct"] = "reversible",
) -> Tensor:
    """``sdeint`` with "reversible_heun" and a gradient that needs no memory per step (Kidger et al., arXiv 2105.13493).

    The backward pass recovers the states from the last ones, and asks the noise for its increments once more: a tree
    holds none of them, a grid is the caller's. The gradient is that of the discrete map, up to the rounding of the way
    back; first derivatives only. One call of the drift and of the noise level per step, there and back each.

    Not for stiff drifts: the method's two states part where the drift contracts, by about ``e^(k T)`` for ``-k x`` over
    a time T, and the result itself is then wrong. Nor for equations that draw random numbers, such as dropout: the way
    back calls them anew. A way back that misses the start by more than a hundredth is an error. Not for
    ``torch.compile``, but with gradient="direct".

    Args:
        sde: the equation, whose parameters and buffers get gradients.
        x: state at t0, [B, D].
        steps: number of steps, at least 1.
        noise: the Brownian paths, or their increments [steps, B, D], of x's shape, dtype and device.
        cond: conditioning, [B, C], or None.
        t0: start time.
        t1: end time, above t0.
        gradient: "direct" for plain automatic differentiation of the same map, which allows higher derivatives.

    Returns:
        State at t1, [B, D], differentiable in x, cond and the equation's parameters.

    Raises:
        ValueError: if steps, times or x are not as above, the noise does not fit or requires a gradient that only
            "direct" gives, or the equation needs a gradient for a tensor that is no parameter or buffer of it.
        RuntimeError: in the backward pass, if the way back misses the start.
    """
    if gradient not in ("reversible", "direct"):
        raise ValueError(f"gradient must be 'reversible' or 'direct', got {gradient!r}")
    check_batch(x)
    t0, t1 = fixed_time("t0", t0), fixed_time("t1", t1)
    course = intervals(steps, t0, t1)
    check_direction(t0, t1)
    if isinstance(noise, BrownianGrid):
        check_noise(noise, x, steps, (t1 - t0) / steps)
        if noise.w.requires_grad and gradient == "reversible":
            raise ValueError("noise must not require a gradient, got one; use gradient='direct'")
    else:
        check_tree(noise, x)
    method = _ReversibleHeun(sde, course, t1, noise)
    if gradient == "direct":
        return method.run(x, cond)[0]
    weights = [w for w in (*sde.parameters(), *sde.buffers()) if w.requires_grad]
    if torch.is_grad_enabled():
        for t in looks(course):
            check_leaves("equation", method.terms(t, x.detach(), None if cond is None else cond.detach()), weights)
    end: Tensor = _ReversibleGradient.apply(method, x, cond, *weights)  # type: ignore[no-untyped-call]
    return end


@dataclass(frozen=True)
class _ReversibleHeun:
    """The method, with its states x and z, and with f and g at z."""

    sde: SDE
    course: list[tuple[float, float]]
    end: float
    noise: BrownianTree | BrownianGrid

    def terms(self, t: float, z: Tensor, cond: Tensor | None) -> tuple[Tensor, Tensor]:
        """Drift in Stratonovich's sense [B, D], and noise level, which broadcasts with it."""
        equation = bind_sde(self.sde, REVERSIBLE_HEUN, cond)
        return equation.drift(t, z), torch.as_tensor(equation.diffusion(t, z), dtype=z.dtype, device=z.device)

    def increments(self, *, back: bool = False) -> Iterator[Tensor]:
        """The steps' w [B, D], in their order or from the last to the first."""
        if isinstance(self.noise, BrownianGrid):
            yield from reversed(self.noise.w.unbind()) if back else self.noise.w.unbind()
            return
        times = [*(t for t, _ in self.course), self.end]
        for w, _ in self.noise.walk(reversed(times) if back else times):
            yield -w if back else w

    def run(self, x: Tensor, cond: Tensor | None) -> tuple[Tensor, Tensor]:
        """Both states at the end."""
        times = tuple(dict.fromkeys(t + c * h for t, h in self.course for c in REVERSIBLE_HEUN.c))
        equation = bind_sde(self.sde, REVERSIBLE_HEUN, cond, times)
        carry = REVERSIBLE_HEUN.start(equation, self.course[0][0], x)
        for (t, h), w in zip(self.course, self.increments(), strict=True):
            carry = REVERSIBLE_HEUN.step(equation, t, h, carry, w, None)
        return carry[0], carry[1]


class _ReversibleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, method: _ReversibleHeun, x: Tensor, cond: Tensor | None, *weights: Tensor) -> Tensor:
        end, z = method.run(x, cond)
        ctx.method = method
        ctx.save_for_backward(end, z, x, cond, *weights)
        return end

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_x: Tensor) -> tuple[Tensor | None, ...]:
        method: _ReversibleHeun = ctx.method
        x, z, start, cond, *weights = ctx.saved_tensors
        if cond is not None:
            cond = cond.detach().requires_grad_(ctx.needs_input_grad[2])
        sums = GradientSums(cond, *weights)

        def differentiable(t: float, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            with torch.enable_grad():
                z = z.detach().requires_grad_()
                return z, *method.terms(t, z, cond)

        t, h = method.course[-1]
        z, f, g = differentiable(t + h, z)
        grad_z, grad_f, grad_g = torch.zeros_like(x), torch.zeros_like(x), torch.zeros_like(g)
        for (t, h), w in zip(reversed(method.course), method.increments(back=True), strict=True):
            half = (0.5 * w * grad_x).sum_to_size(g.shape)
            grad_z = grad_z + sums.pull_back([f, g], [grad_f + 0.5 * h * grad_x, grad_g + half], z)
            before, f_before, g_before = differentiable(t, 2 * x - z - h * f - g * w)
            x = x.detach() - 0.5 * h * (f_before + f) - 0.5 * (g_before + g) * w
            grad_f, grad_g = 0.5 * h * grad_x + h * grad_z, half + (w * grad_z).sum_to_size(g.shape)
            grad_x, grad_z = grad_x + 2 * grad_z, -grad_z
            z, f, g, x = before, f_before, g_before, x.detach()
        check_way_back(x, start)
        grad_start = grad_x + grad_z + sums.pull_back([f, g], [grad_f, grad_g], z)
        return (None, grad_start, *sums.totals())
