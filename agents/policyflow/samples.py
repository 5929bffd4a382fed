"""Samples of a flow policy: what is known of an action that was drawn, and what is learned from it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import repeat
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

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
