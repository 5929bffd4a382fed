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
import copy
import math
import time
from collections.abc import Sequence
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .ensemble import Members, Normalizer, standard_normal
from .holdout import divide_rows
from .jacobian_prior import JacobianPrior
from .transition_settings import TransitionSettings


class FitData(NamedTuple):
    """The rows of a fit: x [N, I], y [N, T]; for a terminal head the normalised next_obs [N, O] and 0 or 1 [N]."""

    x: Tensor
    y: Tensor
    after: Tensor
    terminated: Tensor | None


class TransitionModel(nn.Module, abc.ABC):
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
    elite_members: Tensor
    member_rows: Tensor
    holdout_rows: Tensor

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

    @abc.abstractmethod
    def _loss(self, x: Tensor, y: Tensor, noise: Sequence[Tensor]) -> Tensor:
        """Training loss of each member, [M]; a pure function of tensors."""

    def _noise(self, x: Tensor, generator: torch.Generator) -> Sequence[Tensor]:
        """What ``_loss`` needs of randomness."""
        return ()

    @abc.abstractmethod
    def _predict(self, x: Tensor) -> Tensor:
        """Each member's prediction without noise, [M, B, T]."""

    def _step_of_rollout(self, x: Tensor, noise: Sequence[Tensor]) -> Tensor:
        """What a rollout makes of x [M, B, I], [M, B, T], but for noise that does not depend on x; differentiable."""
        return self._predict(x)

    def _score(self, x: Tensor, y: Tensor, noise: Sequence[Tensor]) -> Tensor:
        """What early stopping minimises, [M], positive: the mean square error of ``_predict``, or a subclass's own."""
        return (self._predict(x) - y).square().mean((1, 2))

    def _finish(self, data: FitData, generator: torch.Generator) -> None:
        """Find what a fit does not learn by its gradient."""

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

    @cached_property
    def optimizer(self) -> torch.optim.Adam:
        """Of all weights. Checkpoints need its state: it is not part of the module's ``state_dict``."""
        return self.settings.optimizer((name, p) for name, p in self.named_parameters() if p.requires_grad)

    def adopt_weights(self) -> None:
        """Let the optimizer know weights that were replaced; others keep their moments. ValueError if none learns."""
        learning = {p for p in self.parameters() if p.requires_grad}
        if not learning:
            raise ValueError("weights: got a model none of which learns, expected one at least; use requires_grad_")
        held = {p for group in self.optimizer.param_groups for p in group["params"]}
        if not learning <= held:
            state, named = self.optimizer.state, self.named_parameters()
            self.optimizer = self.settings.optimizer((name, p) for name, p in named if p in learning | held)
            self.optimizer.state.update({p: state[p] for p in learning & held if p in state})

    def fit(
        self, obs: Tensor, action: Tensor, reward: Tensor, next_obs: Tensor, terminated: Tensor | None = None, *,
        generator: torch.Generator, max_epochs: int = 1000, max_seconds: float = math.inf,
    ) -> dict[str, float]:  # fmt: skip
        """Train until no member's hold-out error falls any more, then restore each member's best weights.

        Continues from the present weights and optimizer state. Rows are known by their position: pass those of the
        former fit first and new ones after them. Old rows then stay in the hold-out or in the members' samples (see
        ``holdout.divide_rows``); with fewer rows than before all are divided anew. The hold-out is a uniform sample of
        all rows and was never trained on; MBPO draws it anew in each fit.

        Args:
            obs: [N, O], N at least 2.
            action: [N, A].
            reward: [N].
            next_obs: [N, O], the states reached, before any reset.
            terminated: bool [N], for a terminal head.
            generator: source of all randomness.
            max_epochs: at least 1.
            max_seconds: no epoch but the first begins later than that.

        Returns:
            "model/train_loss" of the last epoch; "model/holdout_mse", the elites' mean, in units of the normalised
            target; "model/epochs"; and "model/terminal_loss", the cross entropy of a terminal head on the hold-out.

        Raises:
            ValueError: on other shapes, on data that are not finite, if no weight learns, or when loss or predictions
                stop being finite: model and optimizer are then as before.
        """
        if max_epochs < 1:
            raise ValueError(f"max_epochs must be at least 1, got {max_epochs}")
        deadline = time.monotonic() + max_seconds
        self.adopt_weights()
        before = copy.deepcopy((self.state_dict(), self.optimizer.state_dict()))
        try:
            data = self._prepare(obs, action, reward, next_obs, terminated, generator)
            return self._train(data, generator, max_epochs, deadline)
        except BaseException:  # nor may an interrupt leave a half-trained model
            self.load_state_dict(before[0])
            self.optimizer.load_state_dict(before[1])
            raise

    def _train(self, data: FitData, generator: torch.Generator, max_epochs: int, deadline: float) -> dict[str, float]:
        parts = {p: slice(None, self.members) for p in self.parameters() if p.requires_grad}  # of the scores
        if self.terminal_net is not None:
            parts |= {p: slice(self.members, None) for p in self.terminal_net.parameters()}
        held = self.holdout_rows.expand(self.members, -1)
        noise = self._noise(data.x[held], generator)  # the same for all epochs
        # The weights at the start are no candidates: where the mean is as good as it gets, the variance is not yet.
        best = data.x.new_full((self.members + (data.terminated is not None),), math.inf)
        reference = best[: self.members]
        weights = {p: p.detach() for p in parts}
        epoch, stale, train_loss = 0, 0, math.nan
        for epoch in range(1, max_epochs + 1):
            order = self.member_rows[:, self._permutation(self.member_rows.shape[1], generator)]
            batches = order.split(self.settings.batch_size, 1)
            train_loss = torch.stack([self._step(data, rows, generator) for rows in batches]).mean().item()
            scores = self._scores(data, noise)
            if not (math.isfinite(train_loss) and scores.isfinite().all()):
                raise ValueError(
                    f"the model diverged in epoch {epoch}: got training loss {train_loss:.3g} and hold-out errors "
                    f"{scores.tolist()}, expected finite ones; weights are those before this fit; look for outliers"
                )
            better = scores < best
            best = torch.where(better, scores, best)
            for p, part in parts.items():
                weights[p] = torch.where(better[part].view(-1, *[1] * (p.ndim - 1)), p.detach(), weights[p])
            gained = scores[: self.members] < (1 - self.settings.min_gain) * reference
            reference = torch.where(gained, scores[: self.members], reference)
            stale = 0 if gained.any() else stale + 1
            waited = stale >= self.settings.patience and stale * len(batches) >= self.settings.patience_updates
            if waited or time.monotonic() > deadline:
                break
        with torch.no_grad():
            for p, value in weights.items():
                p.copy_(value)
        self.elite_members.copy_(best[: self.members].argsort(stable=True)[: len(self.elite_members)])
        with torch.no_grad():
            self._finish(data, generator)
            mse = (self._predict(data.x[held]) - data.y[held]).square().mean((1, 2))[self.elite_members].mean()
        errors = {"model/holdout_mse": mse.item()}
        if self.terminal_net is not None:
            errors["model/terminal_loss"] = best[-1].item()
        return {"model/train_loss": train_loss, "model/epochs": float(epoch)} | errors

    def _step(self, data: FitData, rows: Tensor, generator: torch.Generator) -> Tensor:
        """Gradient step on rows [M, B]; returns the members' mean loss, a tensor."""
        x, y = data.x[rows], data.y[rows]
        noise = self._noise(x, generator)
        losses = self._loss(x, y, noise)
        total = losses.sum()
        if self.prior is not None:
            probe = standard_normal((*x.shape[:2], self.obs_dim), generator)
            step = partial(self._next_state, noise=noise)
            total = total + self.prior(step, x, probe, self.settings.jacobian_coef).sum()
        if data.terminated is not None:
            total = total + self._terminal_loss(data, rows[0])
        self.optimizer.zero_grad()
        total.backward()
        self.optimizer.step()
        return losses.detach().mean()

    def _next_state(self, x: Tensor, noise: Sequence[Tensor]) -> Tensor:
        """The state after x [M, B, I], [M, B, O], up to a shift, in the units of the states in x."""
        obs, action = self.inputs.inverse(x).flatten(0, -2).split([self.obs_dim, self.action_dim], -1)
        move = self._step_of_rollout(x, noise)[..., 1:] * self.targets.scale[1:]
        return (self._known(obs, action).view_as(move) + move) / self.inputs.scale[: self.obs_dim]

    @torch.no_grad()
    def _scores(self, data: FitData, noise: Sequence[Tensor]) -> Tensor:
        """Errors on the hold-out: each member's [M], then that of a terminal head."""
        rows = self.holdout_rows.expand(self.members, -1)
        scores = self._score(data.x[rows], data.y[rows], noise)
        if data.terminated is None:
            return scores
        return torch.cat([scores, self._terminal_loss(data, self.holdout_rows).view(1)])

    def _terminal_loss(self, data: FitData, rows: Tensor) -> Tensor:
        assert data.terminated is not None
        logit = self._terminal_logit(data.x[rows], data.after[rows])
        return F.binary_cross_entropy_with_logits(logit, data.terminated[rows])

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

    def _permutation(self, n: int, generator: torch.Generator) -> Tensor:
        return torch.randperm(n, generator=generator, device=self.low.device)

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
