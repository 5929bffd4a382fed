"""Samples of a flow policy, and importance ratios: how much more likely a policy makes the (z, action) that was drawn.

Those of this file condition on z. p(z) is part of the sampled object, so ``E[ratio * advantage]`` over (z, action) is
unbiased, and a base that is learned contributes its own exact factor ``p(z | s) / p_old(z | s)``. They also condition
on the noise along the flow, whose law does not depend on the policy, and on the memory of correlated action noise:
that is part of the state, with the policy that acted as its filter, and the action is
``N(x1 + std noise_mean, (std noise_scale)^2)``.

A ratio is asked three times. `record` runs once per rollout, while the policy still is the one that acted, and notes
what only that policy knows. `for_epoch` draws from it what an epoch needs. `terms` runs in every minibatch, with
gradient.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from functools import lru_cache
from itertools import repeat
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from ...dynamics.ode import SOLVERS
from .gaussians import gaussian_kl, gaussian_log_prob
from .policy import FlowActor, FlowSample

if TYPE_CHECKING:
    from .pretraining import Expert


class Chord(NamedTuple):
    """A point x_t = (1 - t) z + t x1 of each sample's chord, and the velocity of the policy that acted there."""

    t: Tensor  # flow time, [B]
    velocity: Tensor  # v_old(t, x_t, s), [B, D]


class PastNoise(NamedTuple):
    """Moments of correlated action noise given its past, in units of its standard deviation."""

    mean: Tensor  # [B, D]
    scale: Tensor  # [B, 1]


class Samples(NamedTuple):
    """Samples of a rollout, of an epoch or of a minibatch; first axis B, in a rollout steps x environments.

    Optional parts are decided by the Config: a run has them in all its minibatches or in none.
    """

    obs: Tensor  # normalised, [B, O]
    z: Tensor  # [B, D], as are the next two: normalised action units
    x1: Tensor
    action: Tensor  # not clipped
    base_mean: Tensor  # of the policy that acted, [B, D], as are the next two
    base_log_std: Tensor
    log_std: Tensor  # of the action noise
    values: Tensor  # V(s) of the policy that acted, in units of normalised returns, [B], as are the next two
    returns: Tensor
    advantages: Tensor
    past: PastNoise | None = None  # where the action noise is correlated
    path: Tensor | None = None  # noise of the flow, [B, K, D], where it is no ODE
    recorded: Any = None  # what the ratio in use recorded of the policy that acted: a NamedTuple of its own
    chord: Chord | None = None  # where ratio or regularizers look at the chord
    spread_rate: Tensor | None = None  # of the linear field that reaches spread_std, [B, D], where it is aimed at
    posterior_noise: Tensor | None = (
        None  # E[n | a, s] of the action noise, [B, D], where the entropy's gradient is used
    )
    expert: Expert | None = None  # demonstrations to learn from beside the rollout, where bc_coef is above 0
    error_time: Tensor | None = None  # [B], where the solver's error is penalised

    @classmethod
    def drawn(cls, actor: FlowActor, obs: Tensor, sample: FlowSample, **others: Any) -> Samples:
        """What an actor drew given obs [B, O], each part [B, D], and what is to be known of it.

        Args:
            actor: the policy that acted.
            obs: normalised observations.
            sample: the draw.
            **others: further fields; values, returns and advantages are 0 unless given.
        """
        base_mean, base_log_std = actor.base(obs)
        log_std = actor.noise_log_std().expand_as(base_mean)
        others = dict.fromkeys(("values", "returns", "advantages"), obs.new_zeros(len(obs))) | others
        return cls(obs, *sample, base_mean, base_log_std, log_std, **others)

    def rows(self, index: Tensor | slice) -> Samples:
        """The samples that an index of the first axis chooses."""
        chosen: Samples = _rows(self, index)
        return chosen

    def minibatches(self, size: int, order: Tensor) -> Iterator[Samples]:
        """Minibatches of `size` samples in an order [B]; the last may be smaller."""
        return iter(_split(self.rows(order), int(size)))  # split takes no NumPy integers


def _rows(data: Any, index: Tensor | slice) -> Any:
    if isinstance(data, tuple):
        return type(data)(*[_rows(part, index) for part in data])  # a NamedTuple
    return None if data is None else data[index]


def _split(data: Any, size: int) -> Iterable[Any]:
    """The parts of `size` rows, in their order; cheaper than one after the other."""
    if isinstance(data, Tensor):
        parts: tuple[Tensor, ...] = data.split(size)
        return parts
    if not data:  # None, or nothing recorded
        return repeat(data)
    return map(type(data)._make, zip(*[_split(part, size) for part in data], strict=False))


class RatioTerms(NamedTuple):
    """What the losses need of a ratio."""

    log_ratio: Tensor  # [B], or several per sample [B, N], in nats
    kl: Tensor  # [B], in nats: KL(old || new) of the virtual policy whose ratio this is
    velocity: Tensor | None = None  # [B, D]: v(t, x_t) where the ratio evaluates it, for the regularizers to share


def clipped_surrogate(log_ratio: Tensor, advantages: Tensor, clip_range: float) -> Tensor:
    """PPO's policy loss ``-E[min(rho A, clip(rho, 1 +- clip_range) A)]`` of log-ratios and advantages."""
    ratio = log_ratio.exp()
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - clip_range, 1 + clip_range) * advantages).mean()


class Ratio(ABC):
    """Strategy that compares the policy with the one that acted.

    Args:
        draws: random draws per sample, of the ratios that need several.
    """

    requires: ClassVar[dict[str, object]] = {}
    """The value that a field of the Config must have with this ratio."""
    has_draws: ClassVar[bool] = False
    """Whether `draws` means anything."""
    on_chord: ClassVar[bool] = False
    """Whether `Samples.chord` is read."""

    def __init__(self, draws: int = 8) -> None:
        self.draws = draws

    def record(self, actor: FlowActor, samples: Samples, generator: torch.Generator) -> Any:
        """What is to be known of the policy that acted, with first axis B; called with its weights."""
        del actor, samples, generator
        return None

    def for_epoch(self, actor: FlowActor, samples: Samples) -> Any:
        """What `terms` reads as `samples.recorded` in an epoch, of what `record` returned; after the chord is drawn."""
        del actor
        return samples.recorded

    def loss(self, actor: FlowActor, samples: Samples, clip_range: float) -> tuple[Tensor, RatioTerms]:
        """The policy loss, a scalar, and what it is made of."""
        terms = self.terms(actor, samples)
        return self.surrogate(terms.log_ratio, samples.advantages, clip_range), terms

    @abstractmethod
    def terms(self, actor: FlowActor, samples: Samples) -> RatioTerms:
        """Log-ratio and KL of `actor` against the policy that acted; both 0 while they are the same."""

    def surrogate(self, log_ratio: Tensor, advantages: Tensor, clip_range: float) -> Tensor:
        """The policy loss, a scalar, of log-ratios as in `RatioTerms` and advantages [B]."""
        return clipped_surrogate(log_ratio, advantages.view(-1, *[1] * (log_ratio.ndim - 1)), clip_range)


def gaussian_terms(actor: FlowActor, samples: Samples, shift: Tensor) -> RatioTerms:
    """Ratio and KL of a policy whose flow ends `shift` [B, D] away from x1: Gaussians in z and in the action."""
    noise, (mean, base_log_std, log_std) = samples.action - samples.x1, actor.gaussians(samples.obs)
    old_shift, old_log_std = torch.zeros_like(shift), samples.log_std
    if samples.past is not None:
        log_scale = samples.past.scale.log()
        shift = shift + log_std.exp() * samples.past.mean
        old_shift, old_log_std = old_log_std.exp() * samples.past.mean, old_log_std + log_scale
        log_std = log_std + log_scale
    log_ratio = gaussian_log_prob(noise, shift, log_std) - gaussian_log_prob(noise, old_shift, old_log_std)
    log_ratio = log_ratio + gaussian_log_prob(samples.z, mean, base_log_std)
    log_ratio = log_ratio - gaussian_log_prob(samples.z, samples.base_mean, samples.base_log_std)
    kl = gaussian_kl(old_shift, old_log_std, shift, log_std)
    kl = kl + gaussian_kl(samples.base_mean, samples.base_log_std, mean, base_log_std)
    return RatioTerms(log_ratio, kl)


def chord_point(samples: Samples, t: Tensor) -> Tensor:
    """The point x_t = (1 - t) z + t x1 of the chord, [B, D], at times t [B] (section 3 of the paper)."""
    return torch.lerp(samples.z, samples.x1, t.unsqueeze(-1))


def _remaining(eps: float, steps: int) -> float:
    """What the last `steps` steps of an SDE leave of a displacement where dv/dx = 0: its score pulls to the base."""
    left = 1.0
    for i in range(1, steps + 1):
        left *= 1 - eps / i
    return left


def quadrature(actor: FlowActor) -> tuple[list[float], list[float]]:
    """Times ``(k + c_i) / steps`` of the solver's quadrature and weights ``b_i / steps``, without those of weight 0.

    The weights are the velocities' shares in the endpoint where dv/dx = 0. An SDE adds ``eps t / (1 - t)`` to the share
    of a velocity and forgets early ones.
    """
    tableau, steps, eps = SOLVERS[actor.solver], actor.solver_steps, actor.langevin_eps
    if eps:
        shares = [(1 + eps * k / (steps - k)) * _remaining(eps, steps - 1 - k) / steps for k in range(steps)]
        return [k / steps for k, w in enumerate(shares) if w > 0], [w for w in shares if w > 0]
    nodes = [(k + c) / steps for k in range(steps) for b, c in zip(tableau.b, tableau.c, strict=True) if b > 0]
    return nodes, [b / steps for _ in range(steps) for b in tableau.b if b > 0]


@torch.no_grad()
def chord_velocities(actor: FlowActor, samples: Samples) -> Tensor:
    """The acting policy's velocities on the chord at all M times of the quadrature, [B, M, D]."""
    times = [samples.z.new_full((len(samples.z),), t) for t in quadrature(actor)[0]]
    return torch.stack([actor.field(t, chord_point(samples, t), samples.obs) for t in times], 1)


@lru_cache(64)
def _on_device(values: tuple[float, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Values as a tensor, copied to the device once: a copy waits for it."""
    return torch.tensor(values, device=device, dtype=dtype)


def draw_chord(actor: FlowActor, velocities: Tensor, generator: torch.Generator) -> Chord:
    """One time per sample, and the velocity there, of `chord_velocities` [B, M, D].

    t is drawn with the weights of the solver's quadrature, so that ``E_t[dv]`` is the endpoint's shift to zeroth order
    in the Jacobian, for any solver.
    """
    like = velocities.device, velocities.dtype
    times, weights = (_on_device(tuple(values), *like) for values in quadrature(actor))
    index = torch.multinomial(weights, len(velocities), replacement=True, generator=generator)
    return Chord(times[index], velocities[torch.arange(len(index), device=index.device), index])


class References(NamedTuple):
    """A rollout with what is known of the policy that acted, until its last epoch."""

    samples: Samples
    velocities: Tensor | None  # `chord_velocities`, where ratio or regularizers look at the chord


def record_references(
    actor: FlowActor, ratio: Ratio, samples: Samples, generator: torch.Generator, *, chord: bool = False
) -> References:
    """Note what a ratio, and regularizers on the chord, must know of the policy that acted; while it still acts."""
    velocities = chord_velocities(actor, samples) if chord or ratio.on_chord else None
    return References(samples._replace(recorded=ratio.record(actor, samples, generator)), velocities)


def draw_epoch(actor: FlowActor, ratio: Ratio, references: References, generator: torch.Generator) -> Samples:
    """The samples of an epoch: with a point of the chord drawn anew, and what the ratio draws."""
    samples, velocities = references
    if velocities is not None:
        samples = samples._replace(chord=draw_chord(actor, velocities, generator))
    return samples._replace(recorded=ratio.for_epoch(actor, samples))


class InterpolationRatio(Ratio):
    """PolicyFlow's ratio: the endpoint's shift is taken to be dv = v - v_old at one point of the chord.

    ``rho = N(noise; dv, std^2) / N(noise; 0, std_old^2)`` times the base's factor (arXiv 2602.01156, section 3).
    Exact when the field depends on the observation alone; otherwise biased, the more so the larger |dv/dx| is
    (`docs/policyflow.md`). One field evaluation per minibatch, whatever the solver. Of an SDE, what a move of the base
    does to the endpoint is added, with dv/dx = 0 there as well.
    """

    on_chord = True

    def terms(self, actor: FlowActor, samples: Samples) -> RatioTerms:
        """Log-ratio and KL at the drawn point."""
        assert samples.chord is not None
        t, old_velocity = samples.chord
        velocity = actor.field(t, chord_point(samples, t), samples.obs)
        shift, eps, steps = velocity - old_velocity, actor.langevin_eps, actor.solver_steps
        if eps and samples.path is not None:  # without drift x1 = m + remaining (z - m) + s noise
            mean, log_std = actor.base(samples.obs)
            noise = sum(_remaining(eps, steps - 1 - k) * samples.path[:, k] for k in range(steps))
            shift = shift + (1 - _remaining(eps, steps)) * (mean - samples.base_mean)
            shift = shift + math.sqrt(2 * eps / steps) * (log_std.exp() - samples.base_log_std.exp()) * noise
        return gaussian_terms(actor, samples, shift)._replace(velocity=velocity)
