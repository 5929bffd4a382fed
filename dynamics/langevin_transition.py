"""A neural SDE as the model of an environment's step. Symbols as in ``transition_base``."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .brownian import BrownianGrid
from .ensemble import standard_normal
from .fields import MLPField
from .neural_sde import LangevinSDE
from .ode import odeint
from .sde import sdeint
from .transition_base import TransitionModel
from .transition_settings import TransitionSettings


class LangevinTransition(TransitionModel):
    """Neural SDE over the environment's step: ``dz = g(t, z, obs, action) dt + s(t) dW`` (arXiv 2402.14989).

    z is the state in the units of the target, with the reward so far; it starts at obs, or at
    what is known of the step, and ends as the sample. The model *is* its Euler-Maruyama chain of K steps of size h.
    That chain's likelihood is an integral over K - 1 states, estimated on Brownian bridges from start to target
    (Girsanov's formula, exact for a chain):

        p(y) = N(y; z_0, sum_k s_k^2 h) E_bridge exp sum_k [g_k (z_{k+1} - z_k) - g_k^2 h / 2] / s_k^2

    A fit maximises the mean logarithm with one bridge per row, a lower bound (Jensen); ``log_prob`` averages p over
    ``bridges``, the same at each call. There is no gap for K = 1, nor where g does not depend on t and z. Early
    stopping looks at the bound.

    Args:
        obs_dim: O, at least 1.
        action_dim: A, at least 1.
        settings: None for the defaults of `TransitionSettings`.
        hidden: widths of the drift's hidden layers.
        steps: K, at least 1.
        bridges: for ``log_prob``, at least 1.

    Raises:
        ValueError: on sizes out of range.
    """

    def __init__(
        self,
        obs_dim: int,
        action_dim: int,
        settings: TransitionSettings | None = None,
        *,
        hidden: Sequence[int] = (256, 256),
        steps: int = 4,
        bridges: int = 32,
    ) -> None:
        super().__init__(obs_dim, action_dim, settings)
        if steps < 1 or bridges < 1:
            raise ValueError(f"steps and bridges must be at least 1, got {steps} and {bridges}")
        self.steps, self.bridges = steps, bridges
        self.field = MLPField(1 + obs_dim, obs_dim + action_dim, hidden)
        self.log_scale = nn.Parameter(torch.zeros(1, steps, 1 + obs_dim))

    def _start(self, x: Tensor) -> Tensor:
        """No move and no reward, [B, T], for x [B, I]."""
        still = F.pad(self.inputs.inverse(x)[:, : self.obs_dim], (1, 0))
        near = self.settings.residual or self.settings.known_step is not None
        start: Tensor = self.targets(torch.zeros_like(still) if near else still)
        return start

    def _noise(self, x: Tensor, generator: torch.Generator) -> Sequence[Tensor]:
        return (standard_normal((self.steps, x.shape[1], 1 + self.obs_dim), generator),)

    def _loss(self, x: Tensor, y: Tensor, noise: Sequence[Tensor]) -> Tensor:
        return -self._bridge_log_prob(x[0], y[0], noise[0]).mean(0, keepdim=True) / y.shape[-1]

    def _score(self, x: Tensor, y: Tensor, noise: Sequence[Tensor]) -> Tensor:
        return torch.exp(2 * self._loss(x, y, noise))  # for a Gaussian in proportion to its variance

    def _bridge_log_prob(self, x: Tensor, y: Tensor, noise: Tensor) -> Tensor:
        """Logarithm [B] of the estimate of p(y) by one bridge per row, made of noise [K, B, T]."""
        h, z0 = 1 / self.steps, self._start(x)
        var = (2 * self.log_scale[0]).exp().unsqueeze(1) * h  # [K, 1, T]
        passed = var.cumsum(0)
        total = passed[-1]
        walk = (var.sqrt() * noise).cumsum(0)
        inner = z0 + walk + passed / total * (y - z0 - walk[-1])
        path = torch.cat([z0[None], inner[:-1], y[None]])
        times = (torch.arange(self.steps, device=x.device) * h).repeat_interleave(len(x))
        drift = self.field(times.to(x), path[:-1].flatten(0, 1), x.repeat(self.steps, 1)).view_as(inner)
        girsanov = (drift * h * (path.diff(dim=0) - 0.5 * h * drift) / var).sum((0, 2))
        prior = -0.5 * ((y - z0).square() / total + total.log() + math.log(2 * math.pi)).sum(-1)
        return prior + girsanov

    def _predict(self, x: Tensor) -> Tensor:
        return odeint(self.field, self._start(x[0]), steps=self.steps, solver="euler", cond=x[0])[None]

    def draw(self, rows: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        """Brownian increments of the chain, [K, B, T]."""
        return (standard_normal((self.steps, rows, 1 + self.obs_dim), generator) * self.steps**-0.5,)

    def _push(self, x: Tensor, noise: tuple[Tensor, ...]) -> Tensor:
        scale = self.log_scale[0].exp()
        sde = LangevinSDE(self.field, lambda t: scale[round(float(t) * self.steps)])
        return sdeint(sde, self._start(x), steps=self.steps, noise=BrownianGrid(1 / self.steps, noise[0]), cond=x)

    def _log_density(self, x: Tensor, y: Tensor) -> Tensor:
        # The same bridges for all rows: a row's density does not depend on its batch.
        noise = standard_normal((self.bridges, self.steps, 1, y.shape[1]), torch.Generator(x.device).manual_seed(0))
        return torch.stack([self._bridge_log_prob(x, y, z) for z in noise]).logsumexp(0) - math.log(self.bridges)
