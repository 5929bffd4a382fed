"""How a learned model of an environment's step is fitted: minibatches, hold-out, early stopping, the best weights."""

from __future__ import annotations

import abc
import copy
import math
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .ensemble import standard_normal
from .jacobian_prior import JacobianPrior
from .precision import bfloat16_products
from .transition_settings import TransitionSettings


class FitData(NamedTuple):
    """The rows of a fit: x [N, I], y [N, T]; for a terminal head the normalised next_obs [N, O] and 0 or 1 [N]."""

    x: Tensor
    y: Tensor
    after: Tensor
    terminated: Tensor | None


@contextmanager
@torch.no_grad()
def holding(parameters: Collection[Tensor], values: Sequence[Tensor] | None) -> Iterator[None]:
    """Let parameters have other values meanwhile; None: their own."""
    if values is None:
        yield
        return
    own = [each.detach().clone() for each in parameters]
    torch._foreach_copy_(list(parameters), list(values))
    try:
        yield
    finally:
        torch._foreach_copy_(list(parameters), own)


def warmed_up(decay: float, updates: int) -> float:
    """Decay of a weight average after so many updates, >= 1: it spans a ninth of them until decay is reached.

    So an early average follows the weights, not their random beginning. Of weights that drift as w_n = n it is 0.9 n.
    """
    return min(decay, updates / (updates + 9))


class Fitted(nn.Module, abc.ABC):
    """The half of a `TransitionModel` that fits it; subclasses say what is learned and from what."""

    obs_dim: int
    members: int
    settings: TransitionSettings
    prior: JacobianPrior | None
    terminal_net: nn.Module | None
    elite_members: Tensor
    member_rows: Tensor
    holdout_rows: Tensor

    @abc.abstractmethod
    def _loss(self, x: Tensor, y: Tensor, noise: Sequence[Tensor]) -> Tensor:
        """Training loss of each member, [M]; a pure function of tensors."""

    def _noise(self, x: Tensor, generator: torch.Generator) -> Sequence[Tensor]:
        """What ``_loss`` needs of randomness."""
        return ()

    @abc.abstractmethod
    def _predict(self, x: Tensor) -> Tensor:
        """Each member's prediction without noise, [M, B, T]."""

    def _score(self, x: Tensor, y: Tensor, noise: Sequence[Tensor]) -> Tensor:
        """What early stopping minimises, [M], positive: the mean square error of ``_predict``, or a subclass's own."""
        return (self._predict(x) - y).square().mean((1, 2))

    def _finish(self, data: FitData, generator: torch.Generator) -> None:
        """Find what a fit does not learn by its gradient."""

    @abc.abstractmethod
    def _next_state(self, x: Tensor, noise: Sequence[Tensor]) -> Tensor:
        """The state after x [M, B, I], [M, B, O], up to a shift, in the units of the states in x."""

    @abc.abstractmethod
    def _terminal_logit(self, x: Tensor, after: Tensor) -> Tensor:
        """Of a terminal head, [B], for inputs x [B, I] and normalised next_obs [B, O]."""

    @abc.abstractmethod
    def _prepare(
        self, obs: Tensor, action: Tensor, reward: Tensor, next_obs: Tensor, terminated: Tensor | None,
        generator: torch.Generator,
    ) -> FitData:  # fmt: skip
        """Check the data, divide its rows, and fit normalisers and ranges."""

    @cached_property
    def optimizer(self) -> torch.optim.Adam:
        """Of all weights. Checkpoints need its state: it is not part of the module's ``state_dict``."""
        return self.settings.optimizer((name, p) for name, p in self.named_parameters() if p.requires_grad)

    @property
    def is_fitted(self) -> bool:
        """Whether it was ever fit to data."""
        return len(self.holdout_rows) > 0

    def _learning(self) -> list[nn.Parameter]:
        """The weights that learn, in their order."""
        return [each for each in self.parameters() if each.requires_grad]

    def adopt_weights(self) -> None:
        """Let the optimizer know weights that were replaced; others keep their moments. ValueError if none learns."""
        learning = set(self._learning())
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
        gradient: Callable[..., tuple[Tensor, ...]] | None = None,
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
            gradient: what gives the same as the method `gradient`, such as a compiled form of it; None: itself.

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
            return self._train(data, generator, max_epochs, deadline, gradient or self.gradient)
        except BaseException:  # nor may an interrupt leave a half-trained model
            self.load_state_dict(before[0])
            self.optimizer.load_state_dict(before[1])
            raise

    def _train(
        self, data: FitData, generator: torch.Generator, max_epochs: int, deadline: float,
        gradient: Callable[..., tuple[Tensor, ...]],
    ) -> dict[str, float]:  # fmt: skip
        learning: list[Tensor] = [*self._learning()]
        parts = dict.fromkeys(learning, slice(None, self.members))  # of the scores
        if self.terminal_net is not None:
            parts |= {p: slice(self.members, None) for p in self.terminal_net.parameters()}
        held = self.holdout_rows.expand(self.members, -1)
        noise = self._noise(data.x[held], generator)  # the same for all epochs
        # The weights at the start are no candidates: where the mean is as good as it gets, the variance is not yet.
        best = data.x.new_full((self.members + (data.terminated is not None),), math.inf)
        reference = best[: self.members]
        weights = {p: p.detach() for p in parts}
        average = [p.detach().clone() for p in learning] if self.settings.ema_decay else None
        epoch, stale, train_loss = 0, 0, math.nan
        # In all fits: the first one's average follows random weights, the next go on from what it kept.
        taken = max((int(state["step"]) for state in self.optimizer.state.values()), default=0)
        for epoch in range(1, max_epochs + 1):
            order = self.member_rows[:, self._permutation(self.member_rows.shape[1], generator)]
            batches = order.split(self.settings.batch_size, 1)
            losses = []
            for rows in batches:
                losses.append(self._step(data, rows, generator, gradient))
                taken += 1
                if average is not None:
                    with torch.no_grad():
                        torch._foreach_lerp_(average, learning, 1 - warmed_up(self.settings.ema_decay, taken))
            train_loss = torch.stack(losses).mean().item()
            with holding(learning, average):
                scores = self._scores(data, noise)
                better = scores < best
                for p, part in parts.items():
                    weights[p] = torch.where(better[part].view(-1, *[1] * (p.ndim - 1)), p.detach(), weights[p])
            if not (math.isfinite(train_loss) and scores.isfinite().all()):
                raise ValueError(
                    f"the model diverged in epoch {epoch}: got training loss {train_loss:.3g} and hold-out errors "
                    f"{scores.tolist()}, expected finite ones; weights are those before this fit; look for outliers"
                )
            best = torch.where(better, scores, best)
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

    def gradient(
        self, x: Tensor, y: Tensor, noise: tuple[Tensor, ...], probe: Tensor | None, ends: tuple[Tensor, ...]
    ) -> tuple[Tensor, ...]:
        """The members' mean loss, and the gradient of a minibatch by each weight that learns; a function of tensors.

        Args:
            x: inputs, [M, B, I].
            y: targets, [M, B, T].
            noise: of the loss.
            probe: of a prior on the Jacobian, [M, B, O].
            ends: for a terminal head the inputs [B, I], the normalised next_obs [B, O] and 0 or 1 [B] of one member.
        """
        with torch.enable_grad():
            with bfloat16_products(self.settings.bfloat16):
                losses = self._loss(x, y, noise)
            total = losses.sum()
            if self.prior is not None and probe is not None:
                step = partial(self._next_state, noise=noise)
                total = total + self.prior(step, x, probe, self.settings.jacobian_coef).sum()
            if ends:
                total = total + self._terminal_loss(*ends)
            return losses.detach().mean(), *torch.autograd.grad(total, self._learning(), materialize_grads=True)

    def _step(
        self, data: FitData, rows: Tensor, generator: torch.Generator, gradient: Callable[..., tuple[Tensor, ...]]
    ) -> Tensor:
        """Gradient step on rows [M, B]; returns the members' mean loss."""
        x, y = data.x[rows], data.y[rows]
        noise, probe = tuple(self._noise(x, generator)), None
        if self.prior is not None:
            probe = standard_normal((*x.shape[:2], self.obs_dim), generator)
        ends = () if data.terminated is None else (data.x[rows[0]], data.after[rows[0]], data.terminated[rows[0]])
        if rows.shape[1] != self.settings.batch_size:  # the last minibatch of an epoch, each time of another size
            gradient = self.gradient
        loss, *gradients = gradient(x, y, noise, probe, ends)
        learning = self._learning()
        for each, found in zip(learning, gradients, strict=True):
            # The fused optimizer goes by the memory: a gradient must lie in it as its weight does.
            each.grad = found if found.stride() == each.stride() else torch.empty_like(each).copy_(found)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss

    @torch.no_grad()
    def _scores(self, data: FitData, noise: Sequence[Tensor]) -> Tensor:
        """Errors on the hold-out: each member's [M], then that of a terminal head."""
        held = self.holdout_rows
        rows = held.expand(self.members, -1)
        scores = self._score(data.x[rows], data.y[rows], noise)
        if data.terminated is None:
            return scores
        return torch.cat([scores, self._terminal_loss(data.x[held], data.after[held], data.terminated[held]).view(1)])

    def _terminal_loss(self, x: Tensor, after: Tensor, terminated: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(self._terminal_logit(x, after), terminated)

    def _permutation(self, n: int, generator: torch.Generator) -> Tensor:
        return torch.randperm(n, generator=generator, device=self.holdout_rows.device)
