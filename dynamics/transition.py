"""Learned models of an environment's step, ``(obs, action) -> (next_obs, reward)``, for model-based agents.

`TransitionModel` fits them and explains the symbols x and y.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .fields import MLPField
from .likelihood import flow_log_prob, standard_normal_log_prob
from .ode import Tableau, odeint, time_grid
from .paths import LINEAR, flow_matching_loss
from .regularize import jacobian_penalty
from .sde import LangevinSDE, sdeint
from .transition_base import Members, TransitionModel, TransitionSettings


def _normal(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, device=generator.device)


class GaussianTransition(TransitionModel):
    """Networks of a diagonal Gaussian, alone or as an ensemble (PETS, arXiv 1805.12114; MBPO, arXiv 1906.08253).

    The log-variance is kept between learned bounds, initially -10 and 0.5, whose distance costs 0.01 per dimension. An
    ensemble draws one of its elites for each row of ``sample``; its density is the elites' mixture.

    Args:
        obs_dim: O, at least 1.
        action_dim: A, at least 1.
        settings: None for the defaults of `TransitionSettings`.
        hidden: widths of the hidden layers.
        probabilistic: False for the mean alone, by squared error: no noise in ``sample`` and no ``log_prob``.
        members: M, at least 1. With more than one, each has its own bootstrap sample of the rows.
        elites: the members that predict, those of least hold-out error; 1 to M.

    Raises:
        ValueError: on sizes out of range.
    """

    def __init__(
        self,
        obs_dim: int,
        action_dim: int,
        settings: TransitionSettings | None = None,
        *,
        hidden: Sequence[int] = (200, 200, 200, 200),
        probabilistic: bool = True,
        members: int = 1,
        elites: int = 1,
    ) -> None:
        super().__init__(obs_dim, action_dim, settings, members, elites)
        targets = 1 + obs_dim
        self.net = Members(members, (obs_dim + action_dim, *hidden, (1 + probabilistic) * targets))
        self.bounds = None
        if probabilistic:
            self.bounds = nn.Parameter(torch.tensor([[[-10.0], [0.5]]]).repeat(members, 1, targets))

    def _moments(self, x: Tensor, chosen: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Mean and log-variance, each [M, B, T], of all members or those chosen."""
        out: Tensor = self.net(x, chosen)
        if self.bounds is None:
            return out, None
        mean, log_var = out.chunk(2, -1)
        low, high = (self.bounds if chosen is None else self.bounds[chosen]).split(1, 1)
        log_var = high - F.softplus(high - log_var)
        return mean, low + F.softplus(log_var - low)

    def _loss(self, x: Tensor, y: Tensor, noise: Sequence[Tensor]) -> Tensor:
        mean, log_var = self._moments(x)
        square = (mean - y).square()
        if log_var is None or self.bounds is None:
            return square.mean((1, 2))
        gap = self.bounds[:, 1] - self.bounds[:, 0]
        return (square * torch.exp(-log_var) + log_var).mean((1, 2)) + 0.01 * gap.sum(1)

    def _predict(self, x: Tensor) -> Tensor:
        return self._moments(x)[0]

    def _sample(self, x: Tensor, generator: torch.Generator) -> Tensor:
        # Rows are dealt out to the elites at random, in hands of equal size: each row's elite is uniform, the shapes
        # are fixed, and the whole costs as much as one network.
        rows, elites = len(x), len(self.elite_members)
        hand = -(-rows // elites)
        if elites > 1:
            place = self._permutation(hand * elites, generator)[:rows]
            x = x.new_zeros(hand * elites, x.shape[1]).index_copy(0, place, x)
        chosen = None if elites == self.members else self.elite_members
        mean, log_var = self._moments(x.view(elites, hand, -1), chosen)
        if log_var is not None:
            mean = torch.addcmul(mean, _normal(mean.shape, generator), torch.exp(0.5 * log_var))
        y = mean.flatten(0, 1)
        return y[place] if elites > 1 else y

    def _log_density(self, x: Tensor, y: Tensor) -> Tensor:
        mean, log_var = self._moments(x.expand(self.members, -1, -1))
        if log_var is None:
            raise ValueError("a deterministic model has no density; build it with probabilistic=True")
        each = -0.5 * ((y - mean).square() * torch.exp(-log_var) + log_var + math.log(2 * math.pi)).sum(-1)
        return each[self.elite_members].logsumexp(0) - math.log(len(self.elite_members))


class FlowTransition(TransitionModel):
    """Conditional flow from N(0, I) to the target, trained by flow matching on straight paths (arXiv 2210.02747).

    It can have several modes. ``predict`` follows the flow from z = 0. Early stopping looks at the loss on the
    hold-out, as the mean square error has no more to gain while the modes still separate. Much of that loss is the
    spread of the data and stays: a ``min_gain`` of 1e-3 and a ``patience`` of 20 suit it better than the defaults.
    ``log_prob`` is the density of the continuous flow; ``sample``'s few steps need not be one to one between modes.

    Args:
        obs_dim: O, at least 1.
        action_dim: A, at least 1.
        settings: None for the defaults of `TransitionSettings`.
        hidden: widths of the field's hidden layers.
        steps: of the solver in ``sample``, at least 1.
        likelihood_steps: of the solver in ``log_prob``, at least 1.
        solver: a tableau or a key of ``ode.SOLVERS``, best one without a stage at t=1, where the field is steepest.
        jacobian_weight: strength of a Jacobian penalty, 0 for none, in the manner of JAWS (arXiv 2603.05538): the
            entries of dv/dx are a priori Gaussian, with a precision w(obs, action) that is learned along and costs
            ``-log w``. Smoothness is so asked for where it is to be had.

    Raises:
        ValueError: on sizes out of range, an unknown solver or a negative weight.
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
        jacobian_weight: float = 0.0,
    ) -> None:
        super().__init__(obs_dim, action_dim, settings)
        if not jacobian_weight >= 0:
            raise ValueError(f"jacobian_weight must be at least 0, got {jacobian_weight}")
        for count in (steps, likelihood_steps):
            time_grid(count, solver)  # raises if one of them is not usable
        self.steps, self.likelihood_steps, self.solver = steps, likelihood_steps, solver
        self.jacobian_weight = jacobian_weight
        self.field = MLPField(1 + obs_dim, obs_dim + action_dim, hidden)
        self.log_precision = None
        if jacobian_weight:
            self.log_precision = Members(1, (obs_dim + action_dim, 64, 1))

    def _noise(self, x: Tensor, generator: torch.Generator) -> Sequence[Tensor]:
        rows, targets = x.shape[1], 1 + self.obs_dim
        x0, t = _normal((rows, targets), generator), torch.rand(rows, generator=generator, device=generator.device)
        return (x0, t) if self.log_precision is None else (x0, t, _normal((rows, targets), generator))

    def _loss(self, x: Tensor, y: Tensor, noise: Sequence[Tensor]) -> Tensor:
        loss = self._matching(x, y, noise)
        if self.log_precision is not None:
            x0, t, probe = noise
            log_weight: Tensor = self.log_precision(x)[0, :, 0]
            at, entries = LINEAR.sample(t, x0, y[0]), y.shape[-1] ** 2
            penalty = jacobian_penalty(self.field, t, at, x[0], weight=log_weight.exp(), probe=probe) / entries
            loss = loss + 0.5 * self.jacobian_weight * (penalty - log_weight).mean()
        return loss

    def _matching(self, x: Tensor, y: Tensor, noise: Sequence[Tensor]) -> Tensor:
        loss = flow_matching_loss(self.field, LINEAR, noise[0], y[0], noise[1], x[0])
        return loss.mean(0, keepdim=True) / y.shape[-1]

    def _score(self, x: Tensor, y: Tensor, noise: Sequence[Tensor]) -> Tensor:
        return self._matching(x, y, noise)

    def _predict(self, x: Tensor) -> Tensor:
        return self._push(x[0], x.new_zeros(x.shape[1], 1 + self.obs_dim))[None]

    def _sample(self, x: Tensor, generator: torch.Generator) -> Tensor:
        return self._push(x, _normal((len(x), 1 + self.obs_dim), generator))

    def _push(self, x: Tensor, z: Tensor) -> Tensor:
        return odeint(self.field, z, steps=self.steps, solver=self.solver, cond=x)

    def _log_density(self, x: Tensor, y: Tensor) -> Tensor:
        base, steps = standard_normal_log_prob, self.likelihood_steps
        return flow_log_prob(self.field, y, base_log_prob=base, steps=steps, solver=self.solver, cond=x)


class LangevinTransition(TransitionModel):
    """Neural SDE over the environment's step: ``dz = g(t, z, obs, action) dt + s(t) dW`` (arXiv 2402.14989).

    z is the state in the units of the target, with the reward so far; it starts at obs and ends as the sample. The
    model *is* its Euler-Maruyama chain of K steps of size h. That chain's likelihood is an integral over K - 1 states,
    estimated on Brownian bridges from start to target (Girsanov's formula, exact for a chain):

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
        start: Tensor = self.targets(torch.zeros_like(still) if self.settings.residual else still)
        return start

    def _noise(self, x: Tensor, generator: torch.Generator) -> Sequence[Tensor]:
        return (_normal((self.steps, x.shape[1], 1 + self.obs_dim), generator),)

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

    def _sample(self, x: Tensor, generator: torch.Generator) -> Tensor:
        scale = self.log_scale[0].exp()
        sde = LangevinSDE(self.field, lambda t: scale[round(t * self.steps)])
        return sdeint(sde, self._start(x), steps=self.steps, generator=generator, cond=x)

    def _log_density(self, x: Tensor, y: Tensor) -> Tensor:
        # The same bridges for all rows: a row's density does not depend on its batch.
        noise = _normal((self.bridges, self.steps, 1, y.shape[1]), torch.Generator(x.device).manual_seed(0))
        return torch.stack([self._bridge_log_prob(x, y, z) for z in noise]).logsumexp(0) - math.log(self.bridges)


TRANSITIONS: dict[str, Callable[..., TransitionModel]] = {
    "gaussian": GaussianTransition,
    "flow": FlowTransition,
    "langevin": LangevinTransition,
}
"""The named models, for configurations: ``(obs_dim, action_dim, settings, **options)``."""
