"""The updates of an agent: losses and their weights, the gradient, the step and its numbers."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ...dynamics.precision import bfloat16_is_fast, bfloat16_products
from .compiling import Compiled, prepared
from .learning_rate import LearningRate
from .observations import FiniteTransitions, blame
from .ranks import ALONE, Ranks
from .weights import Joined, Weights

if TYPE_CHECKING:
    from .policy import BoxPolicy
    from .snapshot import Snapshot


class Loss(NamedTuple):
    """A term of the objective: its value, a scalar, and the weight with which it counts."""

    value: Tensor
    weight: float | Tensor = 1.0


class Losses(NamedTuple):
    """All terms by the names under which they are logged, and further scalars to log."""

    table: dict[str, Loss]
    metrics: dict[str, Tensor]

    def total(self) -> Tensor:
        """The weighted sum."""
        terms = [loss.value if loss.weight is _ONE else loss.weight * loss.value for loss in self.table.values()]
        total = terms[0]
        for term in terms[1:]:
            total = total + term
        return total


_ONE = Loss._field_defaults["weight"]  # a term that is not weighted: multiplying it would cost a kernel


class Gradient(nn.Module):
    """The gradient of a policy's losses with respect to the weights that learn, as one vector.

    Eager as it stands; `step` is the whole update as one function, to be compiled: the same up to rounding.

    Args:
        policy: with the `Weights`.
        losses: (policy, ...) -> `Losses` of a minibatch.
        max_norm: bound of the gradient's norm; None for no bound.
        skips: whether `step` changes nothing where a scalar is not finite.
        bfloat16: whether hidden layers multiply in bfloat16 (`dynamics.precision`).

    Attributes:
        names: of the scalars, in their order; known after the first call.
    """

    def __init__(
        self, policy: BoxPolicy, losses: Callable[..., Losses], max_norm: float | None, skips: bool = False,
        bfloat16: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.policy, self.losses, self.max_norm, self.skips = policy, losses, max_norm, skips
        self.rounds = bfloat16  # modules have a method bfloat16
        self.names: tuple[str, ...] = ()

    def forward(self, *batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum of the losses, and all scalars to log: values, metrics, "train/loss"."""
        with bfloat16_products(self.rounds):
            losses = self.losses(self.policy, *batch)
        total = losses.total()
        values = {name: loss.value for name, loss in losses.table.items()}
        return total, values | losses.metrics | {"train/loss": total}

    def clipped(self, *batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """The (clipped) gradient, parameter after parameter, and the scalars, "train/grad_norm" among them."""
        return self.clip(*self.own(*batch))

    def own(self, *batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """The gradient before it is clipped, and the scalars: where ranks average them, those of one rank's samples."""
        weights = self.policy.latest_weights or Weights.of(self.policy)
        if torch.compiler.is_compiling():  # it cannot look into autograd
            return self._by_parts([each.detach() for each in weights.parameters], *batch)
        total, scalars = self(*batch)
        return _vector(torch.autograd.grad(total, weights.parameters, materialize_grads=True)), _detached(scalars)

    def clip(self, gradient: Tensor, scalars: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """The gradient of at most the norm `max_norm`, and "train/grad_norm", what it was, beside the scalars."""
        norm = gradient.norm()
        if self.max_norm is not None:
            gradient = (self.max_norm / (norm + 1e-6)).clamp(max=1.0) * gradient
        return gradient, scalars | {"train/grad_norm": norm}

    def step(self, joined: Joined, *batch: Any) -> Tensor:
        """The whole update: the clipped gradient, a step of Adam or AdamW, and the average that follows.

        Args:
            joined: the weights as one vector with all that belongs to it; written to.
            *batch: of the losses.

        Returns:
            The scalars, [number of names].
        """
        gradient, scalars = self.clip(*self._by_parts(joined.parts(self.policy), *batch))
        self.names = tuple(scalars)
        table = torch.stack(list(scalars.values()))
        after = joined.after(gradient)
        if self.skips:
            finite = table.isfinite().all()
            after = Joined(*(torch.where(finite, new, old) for new, old in zip(after, joined, strict=True)))
        for old, new in zip(joined, after, strict=True):
            if new is not old:
                old.copy_(new)
        return table

    def _by_parts(self, parameters: Sequence[Tensor], *batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """The gradient at these values of the weights, and the scalars, by functions that can be traced."""
        weights = self.policy.latest_weights
        assert weights is not None
        by_name, scalars = torch.func.grad(
            lambda values: torch.func.functional_call(self, values, batch), has_aux=True
        )({f"policy.{name}": each for name, each in zip(weights.names, parameters, strict=True)})
        return _vector(by_name.values()), _detached(scalars)


def _vector(gradients: Iterable[Tensor]) -> Tensor:
    return torch.cat([each.flatten() for each in gradients])


def _detached(scalars: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: scalar.detach() for name, scalar in scalars.items()}


_SUMS = ("train/loss", "train/grad_norm")  # not finite for what another term is to blame for
FRUITLESS = 10
"""Epochs (LipschitzMBPO: environment steps) in a row whose every update was left out, after which training ends."""
RECOMPILATIONS = 3
"""Compilations, some 20 s each, that assignments to hyperparameters of a compiled agent may cause."""


class Updates(LearningRate, FiniteTransitions):
    """The part of an agent that makes its updates, compiled or not, and looks at their numbers."""

    policy: BoxPolicy
    _objective: Gradient
    _gradient: Callable[..., tuple[Tensor, dict[str, Tensor]]]  # its `clipped`, or `own` of ranks, perhaps compiled
    _config_changed: Callable[[], None]  # of `Configured`
    _names: tuple[str, ...]  # of the scalars of an update
    _step: Callable[..., Any] | None = None  # its `step`, where updates are compiled for the CPU
    _ranks: Ranks = ALONE
    _updates_left_out = _rollbacks = _recompilations = 0  # so far
    _fruitless = 0  # calls of `_settle` in a row that had no update

    def _use_gradient(self, gradient: Gradient) -> None:
        """Update by another gradient from now on; compiled like the one before, if that happens rarely."""
        compiled = self._step or isinstance(vars(self).get("_gradient"), Compiled)
        several = self._ranks.size > 1  # their mean is clipped, not each
        self._objective, self._gradient, self._step = gradient, gradient.own if several else gradient.clipped, None
        if not compiled:
            return
        self._recompilations += 1
        if self._recompilations <= RECOMPILATIONS:
            self._compile_updates(self.config.compile)
        else:
            text = f"compile: hyperparameters were assigned to for the {self._recompilations}th time; updates are eager"
            warnings.warn(
                f"{text} from now on, which is faster than to compile each time", RuntimeWarning, stacklevel=6
            )

    def _compile_updates(self, wanted: str) -> None:
        """Make updates compiled, as `prepared`, or eager. On a CPU the whole of one is a program, where it can.

        Of several ranks only the gradient is: they average it in the middle of an update.
        """
        device = torch.device(self.device)
        if self._objective.rounds and not bfloat16_is_fast(device):
            text = "precision: got bfloat16, which this device only imitates; updates are slower than in float32"
            warnings.warn(text, RuntimeWarning, stacklevel=4)
        self._gradient = prepared(self._gradient, wanted, device)
        if device.type == "cpu" and self._ranks.size == 1:
            self._step = prepared(self._step or self._objective.step, wanted, device) if wanted else None

    def _update(self, weights: Weights, *batch: Any) -> Tensor | None:
        """One update: the gradient of the sum of the losses, clipped; the optimizer's step; then the average follows.

        Args:
            weights: what learns.
            *batch: of the losses.

        Returns:
            The scalars, [number of `_names`]; None if the update was left out.
        """
        skips = self.config.nonfinite == "skip"
        joined = weights.joined() if self._step is not None else None
        if self._step is not None and joined is not None:  # the same as one program
            table: Tensor = self._step(joined, *batch)
            self._names = self._objective.names
            if getattr(self._step, "failed", False):
                self._compile_updates("")  # the usual eager update is the faster one
            return None if skips and self._refuses(table) else table
        gradient, scalars = self._gradient(*batch)
        if self._ranks.size > 1:
            gradient, scalars = self._objective.clip(*self._averaged(gradient, scalars))
        self._names, table = tuple(scalars), torch.stack(list(scalars.values()))
        if skips and self._refuses(table):
            return None
        weights.update(gradient)
        return table

    def _averaged(self, gradient: Tensor, scalars: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Means over the ranks, by one exchange: so they agree on what is not finite, the KL and the learning rate."""
        numbers = self._ranks.mean_(torch.cat([gradient, torch.stack(list(scalars.values()))]))
        mean, table = numbers.split([len(gradient), len(scalars)])
        return mean, dict(zip(scalars, table.unbind(), strict=True))

    def _adopt_policy(self) -> None:
        """Let training follow the policy as it is: another one, or other weights; whenever there are."""
        if self._objective.policy is not self.policy:
            self._config_changed()
        self.policy.adopt_weights()

    def _weights(self) -> Weights:
        """The policy's weights, ready for updates; all that is compiled looks at them again if they are others."""
        before = self.policy.latest_weights
        if before is None or not before.are_current(self.policy):
            self._adopt_policy()  # a callback changed something
        weights = self.policy.latest_weights
        assert weights is not None
        if weights is not before:
            for each in vars(self).values():
                if isinstance(each, Compiled):
                    each.check_again()
        weights.prepare()
        return weights

    def _before_updates(self) -> Snapshot | None:
        """What can put the weights back to what they are now; None where that is not wanted."""
        if self.config.nonfinite != "rollback":
            return None
        from .snapshot import Snapshot

        return Snapshot(self.policy)

    def _refuses(self, table: Tensor) -> bool:
        """Whether to leave an update out, because one of its scalars is not finite."""
        if table.isfinite().all():
            return False
        self._updates_left_out += 1
        fault = _first_fault(self._names, table[None])
        warnings.warn(f"{fault}; the update is left out", RuntimeWarning, stacklevel=2)
        return True

    def _settle(self, metrics: list[Tensor], before: Snapshot | None) -> dict[str, float]:
        """Means of the scalars over the updates that were made. The one point at which the host waits for the device.

        Args:
            metrics: the scalars of each update, [number of names]; emptied where the updates were taken back.
            before: what `_before_updates` returned.

        Returns:
            The means; none where the updates were taken back, or all left out.

        Raises:
            ValueError: if a scalar or a weight is not finite and nothing can be taken back, or every update was left
                out `FRUITLESS` times in a row.
        """
        self._fruitless = 0 if metrics else self._fruitless + 1
        if self._fruitless >= FRUITLESS:
            raise ValueError("non-finite losses: got no update whose terms are finite; lower learning_rate")
        if not metrics:
            return {}
        table = torch.stack(metrics)
        *means, total = torch.cat([table.mean(0), self._weights().finish()[None]]).tolist()
        if np.isfinite([*means, total]).all():
            return dict(zip(self._names, means, strict=True))
        fault = _first_fault(self._names, table) or f"non-finite weights: {blame(self.policy)}"
        if before is None:
            remedy = "lower learning_rate, or set nonfinite to rollback"
            raise ValueError(f"{fault} at step {self.num_timesteps}; {remedy}")
        before.restore()
        metrics.clear()
        self._rollbacks += 1
        warnings.warn(f"{fault}; the weights go back to those before the updates", RuntimeWarning, stacklevel=2)
        return {}

    def _record(self, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.logger.record(name, value)

    def _record_faults(self) -> None:
        """Log how many there were so far."""
        super()._record_faults()
        self._record_counts({"train/updates_left_out": self._updates_left_out, "train/rollbacks": self._rollbacks})


def _first_fault(names: Sequence[str], table: Tensor) -> str:
    """Description of the first number that is not finite in a table [updates, names]; empty if all are finite."""
    for update, row in enumerate(table.tolist()):
        found = {name: value for name, value in zip(names, row, strict=True) if not np.isfinite(value)}
        for name in sorted(found, key=_SUMS.__contains__):  # terms before what they are part of
            which = f" in update {update}" if len(table) > 1 else ""
            return f"non-finite term of the loss: got {found[name]} for {name}{which}"
    return ""
