"""What every learned model of an environment's step shares: normalisation, hold-out, early stopping, clipping.

    ====== ========= =========================================================================
    symbol shape     meaning
    ====== ========= =========================================================================
    x      [M, B, I] normalised (obs, action), I = O + A, one slice per member of an ensemble
    y      [M, B, T] normalised target (reward, next_obs - what is known of it), T = 1 + O; known is mostly obs
    ====== ========= =========================================================================

A new model says how y follows from x: a loss, a prediction, a sampler and a density. `TransitionModel` does the rest.
Randomness comes from the generators passed in, on the data's device. Only initial weights come from torch's global one.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .ensemble import Members, Normalizer
from .fitting import FitData, Fitted
from .holdout import divide_rows
from .jacobian_prior import JacobianPrior
from .transition_settings import TransitionSettings


class TransitionModel(Fitted):
    """A distribution of (next_obs, reward) given (obs, action), fitted with early stopping.

    Every parameter of an ensemble has the members as its first axis: each trains and is restored by itself.

    Args:
        obs_dim: O, at least 1.
        action_dim: A, at least 1.
        settings: None for the defaults of `TransitionSettings`.
        members: M, at least 1.
        elites: the members that predict, those of least hold-out error; 1 to M.

    Raises:
        ValueError: on sizes out of range.
    """

    low: Tensor
    high: Tensor

    def __init__(
        self, obs_dim: int, action_dim: int, settings: TransitionSettings | None = None, members: int = 1,
        elites: int = 1,
    ) -> None:  # fmt: skip
        super().__init__()
        if obs_dim < 1 or action_dim < 1:
            raise ValueError(f"obs_dim and action_dim must be at least 1, got {obs_dim} and {action_dim}")
        if not 1 <= elites <= members:
            raise ValueError(f"elites must be between 1 and members, got {elites} of {members}")
        self.obs_dim, self.action_dim, self.members = obs_dim, action_dim, members
        self.settings = settings or TransitionSettings()
        self.inputs, self.targets = Normalizer(obs_dim + action_dim), Normalizer(1 + obs_dim)
        self.terminal_net = None
        if self.settings.terminal_head:
            self.terminal_net = Members(1, (2 * obs_dim + action_dim, 128, 128, 1))
        self.prior = None
        if self.settings.jacobian_coef:
            self.prior = JacobianPrior(members, obs_dim + action_dim, obs_dim)
        self.register_buffer("low", torch.full((1 + obs_dim,), -math.inf))
        self.register_buffer("high", torch.full((1 + obs_dim,), math.inf))
        self.register_buffer("elite_members", torch.arange(elites))
        self.register_buffer("member_rows", torch.empty(members, 0, dtype=torch.long))
        self.register_buffer("holdout_rows", torch.empty(0, dtype=torch.long))

    def _step_of_rollout(self, x: Tensor, noise: Sequence[Tensor]) -> Tensor:
        """What a rollout makes of x [M, B, I], [M, B, T], but for noise that does not depend on x; differentiable."""
        return self._predict(x)

    def _predictions(self, x: Tensor) -> Tensor:
        """What each network that is used predicts without noise, [.., B, T], for x [B, I]."""
        return self._predict(x.expand(self.members, -1, -1))[self.elite_members]

    @abc.abstractmethod
    def draw(self, rows: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        """What ``step`` needs of randomness for so many rows."""

    @abc.abstractmethod
    def _push(self, x: Tensor, noise: tuple[Tensor, ...]) -> Tensor:
        """The sample y [B, T] that the noise leads to from x [B, I], differentiable in x."""

    @abc.abstractmethod
    def _log_density(self, x: Tensor, y: Tensor) -> Tensor:
        """Log density [B] of y [B, T] for x [B, I]."""

    def step(self, obs: Tensor, action: Tensor, noise: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """As ``sample`` for given noise, differentiable in obs and action (reparameterised).

        Clipped components have no gradient.

        Args:
            obs: [B, O].
            action: [B, A].
            noise: of ``draw``.

        Raises:
            ValueError: on other shapes.
        """
        return self._outcome(obs, action, self._push(self._x(obs, action), noise))

    @torch.no_grad()
    def sample(self, obs: Tensor, action: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw next_obs [B, O] and reward [B] for obs [B, O] and action [B, A], clipped to the range of the data.

        On a CPU calls of about 5,000 rows are the fastest per row.

        Raises:
            ValueError: on other shapes.
        """
        return self.step(obs, action, self.draw(len(obs), generator))

    @torch.no_grad()
    def predict(self, obs: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        """``sample`` without noise: what the elites predict, averaged."""
        return self._outcome(obs, action, self._predictions(self._x(obs, action)).mean(0))

    @torch.no_grad()
    def disagreement(self, obs: Tensor, action: Tensor) -> Tensor:
        """Deviations [elites, B, O] of what each elite predicts for next_obs from their mean, without the clipping."""
        moves = self.targets.inverse(self._predictions(self._x(obs, action)))[..., 1:]
        return moves - moves.mean(0)

    def log_prob(self, obs: Tensor, action: Tensor, reward: Tensor, next_obs: Tensor) -> Tensor:
        """Log density [B] of reward [B] and next_obs [B, O], in nats and the data's units, without the clipping.

        Raises:
            ValueError: on other shapes, or if the model has no density.
        """
        y = self.targets(self._target(obs, action, reward, next_obs))
        return self._log_density(self._x(obs, action), y) - self.targets.scale.log().sum()

    @torch.no_grad()
    def terminal(self, obs: Tensor, action: Tensor, next_obs: Tensor) -> Tensor:
        """Whether a transition terminates with a probability above one half, bool [B].

        Raises:
            ValueError: on other shapes, or if the model has no terminal head.
        """
        return self._terminal_logit(self._x(obs, action), self._after(next_obs, len(obs))) > 0

    def _next_state(self, x: Tensor, noise: Sequence[Tensor]) -> Tensor:
        """The state after x [M, B, I], [M, B, O], up to a shift, in the units of the states in x."""
        obs, action = self.inputs.inverse(x).flatten(0, -2).split([self.obs_dim, self.action_dim], -1)
        move = self._step_of_rollout(x, noise)[..., 1:] * self.targets.scale[1:]
        return (self._known(obs, action).view_as(move) + move) / self.inputs.scale[: self.obs_dim]

    def _terminal_logit(self, x: Tensor, after: Tensor) -> Tensor:
        if self.terminal_net is None:
            raise ValueError("the model has no terminal head; build it with TransitionSettings(terminal_head=True)")
        logit: Tensor = self.terminal_net(torch.cat([x, after], -1)[None])
        return logit[0, :, 0]

    def _prepare(
        self, obs: Tensor, action: Tensor, reward: Tensor, next_obs: Tensor, terminated: Tensor | None,
        generator: torch.Generator,
    ) -> FitData:  # fmt: skip
        """Check the data, divide its rows, and fit normalisers and ranges."""
        if (terminated is not None) != (self.terminal_net is not None):
            got, expected = ("None", "bool [N]") if terminated is None else (list(terminated.shape), "None")
            raise ValueError(f"terminated: got {got}, expected {expected}; settings.terminal_head decides")
        n = len(obs)
        target, inputs = self._target(obs, action, reward, next_obs), self._join(obs, action)
        if n < 2 or (terminated is not None and terminated.shape != (n,)):
            shape = None if terminated is None else list(terminated.shape)
            raise ValueError(f"at least 2 rows, and terminated [N], are needed; got N = {n} and terminated {shape}")
        for name, tensor in (("obs", obs), ("action", action), ("reward", reward), ("next_obs", next_obs)):
            bad = n - int(tensor.view(n, -1).isfinite().all(1).sum())
            if bad:
                raise ValueError(f"{name}: got {bad} of {n} rows with nan or infinity, expected finite data")
        self.holdout_rows, self.member_rows = divide_rows(n, self.holdout_rows, self.member_rows, generator)
        training = torch.ones(n, dtype=torch.bool, device=obs.device).index_fill(0, self.holdout_rows, False)
        self.inputs.fit(inputs[training])
        if self.settings.normalize_targets:
            self.targets.fit(target[training])
        seen = torch.cat([reward[:, None], next_obs], 1)
        self.low.copy_(seen.amin(0))
        self.high.copy_(seen.amax(0))
        flags = None if terminated is None else terminated.to(self.low)
        return FitData(self.inputs(inputs), self.targets(target), self._after(next_obs, n), flags)

    def _join(self, obs: Tensor, action: Tensor) -> Tensor:
        expected = ([len(obs), self.obs_dim], [len(obs), self.action_dim])
        if (list(obs.shape), list(action.shape)) != expected:
            raise ValueError(f"obs and action: got {list(obs.shape)} and {list(action.shape)}, expected {expected}")
        return torch.cat([obs, action], 1).to(self.low)

    def _x(self, obs: Tensor, action: Tensor) -> Tensor:
        x: Tensor = self.inputs(self._join(obs, action))
        return x

    def _after(self, next_obs: Tensor, rows: int) -> Tensor:
        if next_obs.shape != (rows, self.obs_dim):
            raise ValueError(f"next_obs: got {list(next_obs.shape)}, expected {[rows, self.obs_dim]}")
        return (next_obs.to(self.low) - self.inputs.mean[: self.obs_dim]) / self.inputs.scale[: self.obs_dim]

    def _known(self, obs: Tensor, action: Tensor) -> Tensor:
        """What is known of next_obs, [B, O]: a function of the user, that it stays near obs, or nothing."""
        step = self.settings.known_step
        known = step(obs, action) if step else obs if self.settings.residual else torch.zeros_like(obs)
        if known.shape != obs.shape:
            raise ValueError(f"known_step: got {list(known.shape)}, expected next_obs {list(obs.shape)}")
        return known

    def _target(self, obs: Tensor, action: Tensor, reward: Tensor, next_obs: Tensor) -> Tensor:
        expected = ([len(obs)], [len(obs), self.obs_dim])
        if (list(reward.shape), list(next_obs.shape)) != expected:
            raise ValueError(
                f"reward and next_obs: got {list(reward.shape)} and {list(next_obs.shape)}, expected {expected}"
            )
        return torch.cat([reward[:, None], next_obs - self._known(obs, action)], 1).to(self.low)

    def _outcome(self, obs: Tensor, action: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """next_obs [B, O] and reward [B] of y [B, T], clipped."""
        reward, move = self.targets.inverse(y).split([1, self.obs_dim], 1)
        outcome = torch.cat([reward, self._known(obs, action).to(move) + move], 1).clamp(self.low, self.high)
        return outcome[:, 1:], outcome[:, 0]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name in ("member_rows", "holdout_rows"):  # their lengths are those of the data
            if prefix + name in state_dict:
                setattr(self, name, torch.empty_like(state_dict[prefix + name], device=self.low.device))
        super()._load_from_state_dict(state_dict, prefix, *args)
