"""A flow as the model of an environment's step: outcomes of several modes. Symbols as in ``transition_base``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .ensemble import standard_normal
from .fields import MLPField
from .likelihood import flow_log_prob, standard_normal_log_prob
from .ode import Tableau, odeint, time_grid
from .paths import LINEAR, flow_matching_loss
from .transition_base import TransitionModel
from .transition_settings import TransitionSettings


class FlowTransition(TransitionModel):
    """Conditional flow from N(0, I) to the target, trained by flow matching on straight paths (arXiv 2210.02747).

    The density can have several modes. ``predict`` follows the flow from z = 0. ``log_prob`` is the density of the
    continuous flow; between modes the few steps of ``sample`` need not be one to one.

    Early stopping looks at the flow matching loss on the hold-out, because the mean square error stops falling before
    the modes are apart. Most of that loss is the spread of the data, which stays: a ``min_gain`` of 1e-3 and a
    ``patience`` of 20 suit it better than the defaults.

    Args:
        obs_dim: O, at least 1.
        action_dim: A, at least 1.
        settings: None for the defaults of `TransitionSettings`.
        hidden: widths of the field's hidden layers.
        steps: of the solver in ``sample``, at least 1.
        likelihood_steps: of the solver in ``log_prob``, at least 1.
        solver: a tableau or a key of ``ode.SOLVERS``. Best is one without a stage at t=1, where the field is steepest.

    Raises:
        ValueError: on sizes out of range or an unknown solver.
    """

    def __init__(
        self,
        obs_dim: int,
        action_dim: int,
        settings: TransitionSettings | None = None,
        *,
        hidden: Sequence[int] = (256, 256),
        steps: int = 4,
        likelihood_steps: int = 16,
        solver: Tableau | str = "midpoint",
    ) -> None:
        super().__init__(obs_dim, action_dim, settings)
        for count in (steps, likelihood_steps):
            time_grid(count, solver)  # raises if one of them is not usable
        self.steps, self.likelihood_steps, self.solver = steps, likelihood_steps, solver
        self.field = MLPField(1 + obs_dim, obs_dim + action_dim, hidden)

    def _noise(self, x: Tensor, generator: torch.Generator) -> Sequence[Tensor]:
        rows, targets = x.shape[1], 1 + self.obs_dim
        x0, t = (
            standard_normal((rows, targets), generator),
            torch.rand(rows, generator=generator, device=generator.device),
        )
        return x0, t

    def _loss(self, x: Tensor, y: Tensor, noise: Sequence[Tensor]) -> Tensor:
        loss = flow_matching_loss(self.field, LINEAR, noise[0], y[0], noise[1], x[0])
        return loss.mean(0, keepdim=True) / y.shape[-1]

    def _score(self, x: Tensor, y: Tensor, noise: Sequence[Tensor]) -> Tensor:
        return self._loss(x, y, noise)

    def _predict(self, x: Tensor) -> Tensor:
        return self._push(x[0], (x.new_zeros(x.shape[1], 1 + self.obs_dim),))[None]

    def _step_of_rollout(self, x: Tensor, noise: Sequence[Tensor]) -> Tensor:
        return self._push(x[0], (noise[0],))[None]

    def draw(self, rows: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        """The flow's base, [B, T]."""
        return (standard_normal((rows, 1 + self.obs_dim), generator),)

    def _push(self, x: Tensor, noise: tuple[Tensor, ...]) -> Tensor:
        return odeint(self.field, noise[0], steps=self.steps, solver=self.solver, cond=x)

    def _log_density(self, x: Tensor, y: Tensor) -> Tensor:
        base, steps = standard_normal_log_prob, self.likelihood_steps
        return flow_log_prob(self.field, y, base_log_prob=base, steps=steps, solver=self.solver, cond=x)
