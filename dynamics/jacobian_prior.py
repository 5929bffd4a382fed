"""A prior on the Jacobian of a model's step, strong where the step can be flat and weak where it is steep."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .ensemble import Members

BOUND = 3.0
"""Largest |log precision|: weights from 1/20 to 20. Unbounded, they grow as the model goes flat, and flatten it."""


class JacobianPrior(nn.Module):
    """Gaussian prior, of learned precision, on J = d next state / d state of a rollout's step (JAWS, arXiv 2603.05538).

    The entries of J have mean 0 and variance ``1 / (O w(x))``, so minus their log-density is, per entry and up to a
    constant, ``(w |J|^2 / O - log w) / 2``. w is learned with the model. At its optimum ``O / |J|^2`` it is small where
    the step is steep: there the prior leaves it alone. Elsewhere it takes out slopes that only noise has taught.

    Args:
        members: M, networks side by side; each has its own precision.
        inputs: I, length of (obs, action).
        states: O, the first of the inputs.
    """

    def __init__(self, members: int, inputs: int, states: int) -> None:
        super().__init__()
        self.net, self.states = Members(members, (inputs, 64, 1)), states

    def log_precision(self, x: Tensor) -> Tensor:
        """Log w [M, B] of normalised inputs x [M, B, I], within +-BOUND."""
        return BOUND * torch.tanh(self.net(x)[..., 0] / BOUND)

    def forward(self, step: Callable[[Tensor], Tensor], x: Tensor, probe: Tensor, coef: float) -> Tensor:
        """What a fit adds to its loss, mean over the batch, [M]; costs a backward pass that is differentiated.

        coef weighs what the prior asks of the model. w is learned at full weight, lest a weak prior have none of its
        own.

        Args:
            step: inputs x [M, B, I] -> next states [M, B, O], both in units of the states' deviations.
            x: inputs.
            probe: standard normals, [M, B, O]: ``|probe^T J|^2`` is an unbiased estimate of ``|J|^2`` (Hutchinson).
            coef: weight of the prior.
        """
        x = x.detach().requires_grad_()
        (pulled,) = torch.autograd.grad(step(x), x, probe, create_graph=True)
        size = pulled[..., : self.states].square().mean(-1)
        log_precision = self.log_precision(x.detach())
        precision = log_precision.exp()
        of_model = coef * precision.detach() * size
        return 0.5 * (of_model + precision * size.detach() - log_precision).mean(1)
