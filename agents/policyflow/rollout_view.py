"""PolicyFlow's last rollout by the names of Stable-Baselines3's rollout buffer, to read."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from stable_baselines3.common.type_aliases import DictRolloutBufferSamples, RolloutBufferSamples
from torch import Tensor

from ..common.observations import split_vectors
from .density import marginal_log_prob

if TYPE_CHECKING:
    from .ratios import Samples
    from .rollout import FlowRollouts

ROWS = 4096
"""Rows whose density is estimated at once: bounds the memory, and changes nothing else."""


class Collected(NamedTuple):
    """A complete rollout: T steps of N environments."""

    samples: Samples  # in the order of their steps, T x N rows
    rewards: Tensor  # as learned from, [T, N]
    episode_starts: np.ndarray  # [T, N]
    decided: np.ndarray  # where the policy chose an action, [T, N]: everywhere without action chunks
    norms: Tensor  # of the weights that acted, by `FlowActor.norms`


class RolloutView:
    """What Stable-Baselines3's `RolloutBuffer` holds, as arrays [T, N, ...] that cannot be written to.

    For callbacks and for code that learns from PPO's rollouts. Observations are the environment's. Actions are in the
    environment's units, not clipped. Rewards, returns, advantages and values are in units of normalised returns
    (`normalize_reward`); a transition that was left out as not finite has advantage 0. `log_probs` are those of
    `FlowPolicy.evaluate_actions`; they can be read until the agent learns from the rollout, for they are estimated when
    they are first asked for. In contrast to the buffer, arrays keep their shape after `get`.

    With action chunks (`chunk`) D is that of a whole chunk; actions, log_probs and advantages mean something where
    `decided` is true, and `get` gives those samples alone.

    Args:
        agent: whose rollout it is.
    """

    def __init__(self, agent: FlowRollouts) -> None:
        self._agent = agent
        self._log_probs: tuple[Collected, np.ndarray] | None = None

    n_envs = property(lambda self: self._agent.n_envs, doc="Environments, N.")
    buffer_size = property(lambda self: self._agent.n_steps, doc="Steps per environment, T.")
    gamma = property(lambda self: self._agent.gamma, doc="Discount factor.")
    gae_lambda = property(lambda self: self._agent.gae_lambda, doc="Decay of the advantage estimation.")
    observation_space = property(lambda self: self._agent.observation_space, doc="The environment's.")
    action_space = property(lambda self: self._agent.action_space, doc="The environment's.")
    device = property(lambda self: self._agent.device, doc="Where `get` puts its samples.")
    pos = property(lambda self: self._agent.steps_collected, doc="Steps of the rollout so far.")
    full = property(lambda self: self._agent.collected is not None, doc="Whether the rollout is complete.")

    def size(self) -> int:
        """Steps of the rollout so far, as `pos`."""
        steps: int = self.pos
        return steps

    def __setattr__(self, name: str, value: Any) -> None:
        if not name.startswith("_"):
            raise AttributeError(f"rollout_buffer.{name}: cannot be set, this is a view; assign to agent.samples")
        super().__setattr__(name, value)

    @property
    def observations(self) -> np.ndarray | dict[str, np.ndarray]:
        """What the policy saw, [T, N, ...]; of Dict observations by their keys."""
        vectors = self._agent.storage.features[:-1].cpu().numpy().copy()  # the next rollout writes to it
        found = split_vectors(vectors, self._agent.observation_space)
        return {key: _locked(part) for key, part in found.items()} if isinstance(found, dict) else _locked(found)

    @property
    def actions(self) -> np.ndarray:
        """What the policy drew, [T, N, D], in the environment's units, not clipped."""
        normalised = self._agent.storage.drawn[2].cpu()
        return _locked(self._agent.policy.to_units(normalised).numpy())

    @property
    def rewards(self) -> np.ndarray:
        """As learned from, [T, N]."""
        return _locked(self._complete().rewards.cpu().numpy())

    @property
    def episode_starts(self) -> np.ndarray:
        """1 where an episode begins, [T, N]."""
        return _locked(self._complete().episode_starts)

    @property
    def decided(self) -> np.ndarray:
        """Whether the policy chose an action there, [T, N]: everywhere without action chunks."""
        return _locked(self._complete().decided)

    @property
    def values(self) -> np.ndarray:
        """V(s) of the policy that acted, [T, N]."""
        return self._grid(self._complete().samples.values)

    @property
    def returns(self) -> np.ndarray:
        """Advantage + value, [T, N]."""
        return self._grid(self._complete().samples.returns)

    @property
    def advantages(self) -> np.ndarray:
        """Not standardised, [T, N]."""
        return self._grid(self._complete().samples.advantages)

    @property
    def log_probs(self) -> np.ndarray:
        """Estimates of log pi(a | s) under the policy that acted, [T, N].

        Raises:
            RuntimeError: if the policy's weights have changed since and nobody asked before.
        """
        rollout = self._complete()
        if self._log_probs is None or self._log_probs[0] is not rollout:
            policy, (obs, action) = self._agent.policy, (rollout.samples.obs, rollout.samples.action)
            if not torch.equal(policy.actor.norms(), rollout.norms):
                raise RuntimeError("log_probs: the policy that acted has changed since; read them in on_rollout_end")
            with torch.no_grad():
                parts = zip(obs.split(ROWS), action.split(ROWS), strict=True)
                counted = policy.widths()
                normalised = torch.cat([marginal_log_prob(policy.actor, *part, counted=counted) for part in parts])
            self._log_probs = (rollout, self._grid(normalised - policy.log_half_ranges()))
        return self._log_probs[1]

    def get(self, batch_size: int | None = None) -> Iterator[RolloutBufferSamples | DictRolloutBufferSamples]:
        """Minibatches of all samples in random order, by NumPy's generator; None: all in one."""
        numbers = [self.actions, self.values, self.log_probs, self.advantages, self.returns]
        actions, *scalars = (self._rows(each) for each in numbers)
        found = self.observations
        chosen = np.flatnonzero(self.decided.T)  # environment after environment, as `_rows`
        order = torch.from_numpy(np.random.permutation(chosen))
        for rows in order.split(batch_size or len(order)):
            rest = (actions[rows], *(each[rows].flatten() for each in scalars))
            if isinstance(found, dict):
                yield DictRolloutBufferSamples({key: self._rows(part)[rows] for key, part in found.items()}, *rest)
            else:
                yield RolloutBufferSamples(self._rows(found)[rows], *rest)

    def _complete(self) -> Collected:
        rollout = self._agent.collected
        if rollout is None:
            raise RuntimeError("rollout_buffer: the rollout is not complete yet; read it in or after on_rollout_end")
        return rollout

    def _grid(self, flat: Tensor) -> np.ndarray:
        return _locked(flat.view(self.buffer_size, self.n_envs).cpu().numpy())

    def _rows(self, array: np.ndarray) -> Tensor:
        """An array [T, N, ...] as a tensor [N x T, ...], environment after environment, as the buffer does."""
        swapped = array.swapaxes(0, 1)
        return torch.tensor(swapped.reshape(-1, *swapped.shape[2:]), device=self.device)


def _locked(array: np.ndarray) -> np.ndarray:
    """A view of the array that cannot be written to."""
    view = array.view()
    view.flags.writeable = False
    return view
