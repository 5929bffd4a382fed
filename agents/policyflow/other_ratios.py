"""Importance ratios beside PolicyFlow's, so that one code base compares them; and the table of all.

What each costs and works with, whether it is unbiased and how its gradient and mean were measured:
`docs/flow_ratios.md`.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from .gaussians import Mixture, gaussian_kl, gaussian_log_prob, mixture_log_prob
from .policy import LOG_STD_RANGE, FlowActor
from .ratios import (
    InterpolationRatio,
    Ratio,
    RatioTerms,
    Samples,
    clipped_surrogate,
    gaussian_terms,
)

ODE: dict[str, object] = {"langevin_eps": 0.0}
INDEPENDENT: dict[str, object] = ODE | {"exploration_noise": "gaussian"}


def estimated_kl(log_ratio: Tensor) -> Tensor:
    """``rho - 1 - log rho`` [B], whose mean over actions of the old policy is KL(old || new) if E[rho] = 1.

    The estimator k3 of Schulman, *Approximating KL divergence* (2020): never negative.
    """
    return log_ratio.expm1() - log_ratio


class EndpointRatio(Ratio):
    """The exact ratio given z (and path): the flow is integrated again, with gradient through every solver step.

    ``rho = N(action; phi_1(z), std^2) / N(action; x1, std_old^2)`` times the base's factor. Without latent (base_std 0)
    that is Gaussian PPO. Costs as many field evaluations as a rollout step.
    """

    def terms(self, actor: FlowActor, samples: Samples) -> RatioTerms:
        """Log-ratio and KL through the solver."""
        path = None if samples.path is None else samples.path.transpose(0, 1)
        return gaussian_terms(actor, samples, actor.flow(samples.z, samples.obs, path) - samples.x1)


class FlowSteps(NamedTuple):
    """Of the flow that acted: its K Euler steps, or in an epoch the drawn one, without the axis K."""

    point: Tensor  # x_k, [B, K, D]
    velocity: Tensor  # v_old(t_k, x_k), [B, K, D]
    transport: Tensor  # Phi_k = d x1 / d x_{k+1}, [B, K, D, D]


class AdjointRatio(Ratio):
    """The interpolation ratio with its two approximations to first order removed.

    x1 moves by ``mean_k Phi_k dv(t_k, x_k)`` to first order when the field moves by dv, x_k being the K Euler steps of
    the flow that acted (not of the chord) and ``Phi_k = d x1 / d x_{k+1}``. One k per sample is drawn, and the ratio
    is that of a Gaussian whose mean moves by ``Phi_k dv``. At the policy that acted its gradient is
    ``lambda_k . grad v`` with the adjoint ``lambda_k = Phi_k^T noise / std^2``: unbiased, given z, for the discrete
    flow. Recording Phi_k, from the Jacobians of one sweep, and not lambda_k alone keeps E[rho] = 1 and the KL exact.
    One field evaluation per minibatch.
    """

    requires = ODE | {"solver": "euler"}
    on_chord = True  # of which it takes the time

    @torch.no_grad()
    def record(self, actor: FlowActor, samples: Samples, generator: torch.Generator) -> FlowSteps:
        """The steps of the flow that acted."""
        del generator
        assert actor.solver == "euler", actor.solver
        x, steps = samples.z, actor.solver_steps
        points, velocities, jacobians = [], [], []
        for k in range(steps):
            t = x.new_full((len(x),), k / steps)
            points.append(x)
            velocities.append(actor.field(t, x, samples.obs))  # as `terms` does, to the last bit
            jacobians.append(actor.field.jacobian(t, x, samples.obs)[1])
            x = x + velocities[-1] / steps
        transports = [torch.eye(x.shape[1], dtype=x.dtype, device=x.device).expand(len(x), -1, -1)]
        for jacobian in reversed(jacobians[1:]):
            transports.insert(0, transports[0] + transports[0] @ jacobian / steps)
        return FlowSteps(torch.stack(points, 1), torch.stack(velocities, 1), torch.stack(transports, 1))

    def for_epoch(self, actor: FlowActor, samples: Samples) -> FlowSteps:
        """The step whose time was drawn."""
        assert samples.chord is not None
        step = (samples.chord.t * actor.solver_steps).round().long()
        row = torch.arange(len(step), device=step.device)
        return FlowSteps(*(each[row, step] for each in samples.recorded))

    def terms(self, actor: FlowActor, samples: Samples) -> RatioTerms:
        """Log-ratio and KL at the step whose time was drawn."""
        assert samples.chord is not None
        drawn: FlowSteps = samples.recorded
        change = actor.field(samples.chord.t, drawn.point, samples.obs) - drawn.velocity
        return gaussian_terms(actor, samples, (drawn.transport @ change.unsqueeze(-1)).squeeze(-1))


class Latents(NamedTuple):
    """Latents of the marginal ratio."""

    normals: Tensor  # in units of the base, [B, M, D]; the first is the one that was drawn
    log_density: Tensor  # of the action under the policy that acted, [B]


class MarginalRatio(Ratio):
    """The ratio of the actions alone, z averaged out over M latents: ``mean_j N(a; x1_j) / mean_j N_old(a; x1_old_j)``.

    The drawn latent is among them and they are the same in both: the ratio is 1 while the policy is the one that acted.
    Given the latents the action is a draw from the denominator: for any M, E[rho] = 1 and the gradient there unbiased.
    The log-ratio goes from that given z (M = 1) to that of the policy (M -> infinity). A latent is ``m + s e``
    with e fixed, so a learned base gets its gradient through the flow. Costs M times the endpoint ratio.
    """

    requires = INDEPENDENT
    has_draws = True

    @torch.no_grad()
    def record(self, actor: FlowActor, samples: Samples, generator: torch.Generator) -> Latents:
        """The latents, and the acting policy's log-density of the action."""
        z = samples.z
        drawn = (z - samples.base_mean) / samples.base_log_std.exp()
        shape = (len(z), self.draws - 1, z.shape[1])
        others = torch.randn(shape, generator=generator, dtype=z.dtype, device=z.device)
        normals = torch.cat([drawn.unsqueeze(1), others], 1)
        return Latents(normals, self._log_density(actor, samples, normals))

    def _log_density(self, actor: FlowActor, samples: Samples, normals: Tensor) -> Tensor:
        mean, log_std = actor.base(samples.obs)
        z = mean.unsqueeze(1) + log_std.exp().unsqueeze(1) * normals
        x1 = actor.flow(z.flatten(0, 1), samples.obs.repeat_interleave(normals.shape[1], 0)).view_as(normals)
        each = gaussian_log_prob(samples.action.unsqueeze(1), x1, actor.noise_log_std())
        return torch.logsumexp(each, 1) - math.log(normals.shape[1])

    def terms(self, actor: FlowActor, samples: Samples) -> RatioTerms:
        """Log-ratio of the actions, and its estimated KL."""
        recorded: Latents = samples.recorded
        log_ratio = self._log_density(actor, samples, recorded.normals) - recorded.log_density
        return RatioTerms(log_ratio, estimated_kl(log_ratio))


class MixtureRatio(Ratio):
    """The ratio of the actions of a mixture: ``sum_k w_k N(a; phi_1(c_k)) / sum_k w_old,k N_old(a; phi_1,old(c_k))``.

    Exact, and of the action alone: which point was drawn need not be known, and its choice adds no variance to the
    gradient, as it would to that of the joint ratio of (k, a). The KL is that of (k, a), which has a closed form and
    bounds that of the actions. K flows per minibatch and rollout.
    """

    requires = INDEPENDENT | {"base": "mixture"}

    @torch.no_grad()
    def record(self, actor: FlowActor, samples: Samples, generator: torch.Generator) -> Mixture:
        """The Gaussians of the policy that acted."""
        del generator
        return actor.mixture(samples.obs)

    def terms(self, actor: FlowActor, samples: Samples) -> RatioTerms:
        """Log-ratio of the actions, and KL of (k, a)."""
        old: Mixture = samples.recorded
        new, log_std, old_log_std = actor.mixture(samples.obs), actor.noise_log_std(), samples.log_std.unsqueeze(1)
        log_ratio = mixture_log_prob(samples.action, new, log_std) - mixture_log_prob(samples.action, old, old_log_std)
        kl = old.log_weight - new.log_weight + gaussian_kl(old.mean, old_log_std, new.mean, log_std)
        return RatioTerms(log_ratio, (old.log_weight.exp() * kl).sum(1))


class ChainSteps(NamedTuple):
    """The K steps of a chain, [B, K, D] each: the states before them, and the acting policy's Gaussians after them."""

    states: Tensor
    means: Tensor
    log_std: Tensor


class ChainRatio(Ratio):
    """ReinFlow's ratio: learned noise at every Euler step makes the flow a chain of Gaussians (arXiv 2505.22094).

    ``log rho = sum_k log N(x_{k+1}; x_k + v / K, s_k^2) - log N_old(...)`` over the steps, the last of which ends in
    the action: one ratio of the whole chain, exact, on the grid that sampled it. All steps are one batch for the field,
    K evaluations, none after another. The policy samples such chains (`FlowActor.chain`). Here s_k is a parameter; the
    paper's is a network's.
    """

    requires = INDEPENDENT | {"solver": "euler"}

    @torch.no_grad()
    def record(self, actor: FlowActor, samples: Samples, generator: torch.Generator) -> ChainSteps:
        """The chain's states after z and before x1, and the means and deviations of its steps."""
        del generator
        path = samples.z.unsqueeze(0)[:0] if samples.path is None else samples.path.transpose(0, 1)
        states = actor.chain(samples.z, samples.obs, path)[:-1].transpose(0, 1)
        means, log_std = self._steps(actor, samples.obs, states)
        return ChainSteps(states, means, log_std.expand_as(means))

    def _steps(self, actor: FlowActor, obs: Tensor, states: Tensor) -> tuple[Tensor, Tensor]:
        """Means [B, K, D] and log standard deviations [K, D] of the steps."""
        assert actor.chain_log_std is not None
        steps = actor.solver_steps
        t = (torch.arange(steps, dtype=states.dtype, device=states.device) / steps).repeat(len(states))
        velocity = actor.field(t, states.flatten(0, 1), obs.repeat_interleave(steps, 0)).view_as(states)
        inner = actor.chain_log_std.clamp(*LOG_STD_RANGE)
        return states + velocity / steps, torch.cat([inner, actor.noise_log_std().unsqueeze(0)])

    def _each(self, actor: FlowActor, samples: Samples) -> tuple[Tensor, Tensor]:
        """Log-ratio and KL of z and of each step, [B, K + 1]."""
        old: ChainSteps = samples.recorded
        reached = torch.cat([old.states[:, 1:], samples.action.unsqueeze(1)], 1)
        means, log_std = self._steps(actor, samples.obs, old.states)
        log_ratio = gaussian_log_prob(reached, means, log_std) - gaussian_log_prob(reached, old.means, old.log_std)
        old_base, base = (samples.base_mean, samples.base_log_std), actor.base(samples.obs)
        of_z = gaussian_log_prob(samples.z, *base) - gaussian_log_prob(samples.z, *old_base)
        kl = gaussian_kl(old.means, old.log_std, means, log_std)
        kl_of_z = gaussian_kl(*old_base, *base)
        return torch.cat([of_z.unsqueeze(1), log_ratio], 1), torch.cat([kl_of_z.unsqueeze(1), kl], 1)

    def terms(self, actor: FlowActor, samples: Samples) -> RatioTerms:
        """Log-ratio and KL of the chain."""
        log_ratio, kl = self._each(actor, samples)
        return RatioTerms(log_ratio.sum(1), kl.sum(1))


class ChainStepsRatio(ChainRatio):
    """DPPO's ratios: one, and one clipping, per step of the chain, z included (arXiv 2409.00588), not discounted."""

    def terms(self, actor: FlowActor, samples: Samples) -> RatioTerms:
        """Log-ratios [B, K + 1], and the chain's KL."""
        log_ratio, kl = self._each(actor, samples)
        return RatioTerms(log_ratio, kl.sum(1))


class FlowMatchingPairs(NamedTuple):
    """N pairs of flow time and noise per sample, and the acting policy's losses there."""

    t: Tensor  # [B, N]
    z: Tensor  # [B, N, D]
    loss: Tensor  # [B, N]


class FPORatio(Ratio):
    """FPO's ratio: losses of conditional flow matching in place of log-densities (arXiv 2507.21053, section 3.3).

    ``rho = exp(mean_i l_old,i - l_i)`` with ``l_i = t_i^2 |v(t_i, x_i) - (a - z_i)|^2 / (D base_std^2)`` at
    ``x_i = (1 - t_i) z_i + t_i a``: the error of the noise z_i / base_std that the velocity tells, averaged over action
    dimensions, as in the public code. The same N pairs (t_i, z_i), drawn afresh from U(0, 1) and the base, are in both
    losses. Not a ratio of densities: E[rho] is not 1, and a field not trained by flow matching is no minimum of l. It
    does not see the action noise, whose standard deviation stays as it is. N evaluations per minibatch.
    """

    requires = INDEPENDENT | {"base": "standard", "ent_coef": 0}
    has_draws = True

    @torch.no_grad()
    def record(self, actor: FlowActor, samples: Samples, generator: torch.Generator) -> FlowMatchingPairs:
        """The pairs, and the acting policy's losses."""
        z = samples.z
        t = torch.rand((len(z), self.draws), generator=generator, dtype=z.dtype, device=z.device)
        noise = torch.randn((*t.shape, z.shape[1]), generator=generator, dtype=z.dtype, device=z.device)
        noise = samples.base_log_std.exp().unsqueeze(1) * noise
        return FlowMatchingPairs(t, noise, self._losses(actor, samples, t, noise))

    def _losses(self, actor: FlowActor, samples: Samples, t: Tensor, z: Tensor) -> Tensor:
        action = samples.action.unsqueeze(1)
        x = torch.lerp(z, action, t.unsqueeze(-1))
        obs = samples.obs.repeat_interleave(t.shape[1], 0)
        velocity = actor.field(t.flatten(), x.flatten(0, 1), obs).view_as(z)
        error = (velocity - (action - z)) * torch.exp(-samples.base_log_std).unsqueeze(1)
        return t.square() * error.square().mean(-1)

    def _change(self, actor: FlowActor, samples: Samples) -> Tensor:
        """Old losses minus new ones, [B, N]."""
        pairs: FlowMatchingPairs = samples.recorded
        return pairs.loss - self._losses(actor, samples, pairs.t, pairs.z)

    def terms(self, actor: FlowActor, samples: Samples) -> RatioTerms:
        """Log-ratio, and the KL that it would have if E[rho] were 1."""
        log_ratio = self._change(actor, samples).mean(1)
        return RatioTerms(log_ratio, estimated_kl(log_ratio))


class FPOPlusPlusRatio(FPORatio):
    """FPO++'s ratios and surrogate: one ratio per pair, an asymmetric trust region (arXiv 2602.02481)."""

    limit = 10.0  # of the log-ratio

    def terms(self, actor: FlowActor, samples: Samples) -> RatioTerms:
        """Log-ratios [B, N], and the mean of their estimated KLs."""
        log_ratio = self._change(actor, samples).clamp(-self.limit, self.limit)
        return RatioTerms(log_ratio, estimated_kl(log_ratio).mean(1))

    def surrogate(self, log_ratio: Tensor, advantages: Tensor, clip_range: float) -> Tensor:
        """PPO's where the advantage is positive, else SPO's ``-(rho A - |A| (rho - 1)^2 / (2 clip_range))``.

        SPO (arXiv 2401.16025) pulls a ratio that strays back, where clipping has no gradient.
        """
        advantages = advantages.unsqueeze(1).expand_as(log_ratio)
        ratio, gain, harm = log_ratio.exp(), advantages.clamp(min=0), advantages.clamp(max=0)
        penalty = harm.abs() * (ratio - 1).square() / (2 * clip_range)
        return clipped_surrogate(log_ratio, gain, clip_range) - (ratio * harm - penalty).mean()


RatioName: TypeAlias = Literal[
    "interpolation", "endpoint", "adjoint", "marginal", "mixture", "chain", "chain_steps", "fpo", "fpo++"
]
RATIOS: dict[str, type[Ratio]] = {
    "interpolation": InterpolationRatio,
    "endpoint": EndpointRatio,
    "adjoint": AdjointRatio,
    "marginal": MarginalRatio,
    "mixture": MixtureRatio,
    "chain": ChainRatio,
    "chain_steps": ChainStepsRatio,
    "fpo": FPORatio,
    "fpo++": FPOPlusPlusRatio,
}
"""Every ratio by its name in the Config."""
