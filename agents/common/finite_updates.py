"""The updates of an agent, compiled or not, and the look at their numbers."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from .compiling import Compiled, owner, prepared
from .observations import FiniteTransitions, blame
from .update import Gradient, LearningRate
from .weights import Weights

if TYPE_CHECKING:
    from .policy import BoxPolicy
    from .snapshot import Snapshot

_SUMS = ("train/loss", "train/grad_norm")  # not finite for what another term is to blame for
RECOMPILATIONS = 3
"""Compilations, some 20 s each, that assignments to hyperparameters of a compiled agent may cause."""


class FiniteUpdates(LearningRate, FiniteTransitions):
    """The part of an agent that looks at the numbers of its updates, too."""

    policy: BoxPolicy
    _gradient: Callable[..., tuple[Tensor, dict[str, Tensor]]]  # `Gradient.clipped`, perhaps compiled
    _config_changed: Callable[[], None]  # of `Configured`
    _names: tuple[str, ...]  # of the scalars of an update
    _step: Callable[..., Any] | None = None  # `Gradient.step`, where updates are compiled for the CPU
    _updates_left_out = _rollbacks = _recompilations = 0  # so far

    def _use_gradient(self, gradient: Gradient) -> None:
        """Update by another gradient from now on; compiled like the one before, if that happens rarely."""
        compiled = self._step or isinstance(vars(self).get("_gradient"), Compiled)
        self._gradient, self._step = gradient.clipped, None
        if not compiled:
            return
        self._recompilations += 1
        if self._recompilations <= RECOMPILATIONS:
            self._compile_updates(True)
        else:
            text = f"compile: hyperparameters were assigned to for the {self._recompilations}th time; updates are eager"
            warnings.warn(
                f"{text} from now on, which is faster than to compile each time", RuntimeWarning, stacklevel=6
            )

    def _compile_updates(self, wanted: bool) -> None:
        """Make updates compiled or eager. On a CPU the whole of an update is one program, where nothing hinders it."""
        device, gradient = torch.device(self.device), owner(self._gradient)
        self._gradient = prepared(self._gradient, wanted, device)
        if device.type == "cpu":
            self._step = prepared(self._step or gradient.step, True, device) if wanted else None

    def _update(self, step: Callable[[Tensor], None], *batch: Any) -> Tensor | None:
        """One update: the gradient of the sum of the losses, clipped; the optimizer's step; then the average follows.

        Args:
            step: takes the step given a gradient: `Weights.update`, or another.
            *batch: of the losses.

        Returns:
            The scalars, [number of `_names`]; None if the update was left out.
        """
        skips = self.config.nonfinite == "skip"
        weights = owner(step)
        joined = weights.joined() if self._step is not None and isinstance(weights, Weights) else None
        if self._step is not None and joined is not None:  # the same as one program
            table: Tensor = self._step(joined, *batch)
            self._names = owner(self._step).names
            return None if skips and self._refuses(table) else table
        gradient, scalars = self._gradient(*batch)
        self._names, table = tuple(scalars), torch.stack(list(scalars.values()))
        if skips and self._refuses(table):
            return None
        step(gradient)
        return table

    def _adopt_policy(self) -> None:
        """Let training follow the policy as it is: another one, or other weights; whenever there are."""
        gradient = owner(self._gradient)
        if isinstance(gradient, Gradient) and gradient.policy is not self.policy:
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
            The means; none where the updates were taken back.

        Raises:
            ValueError: if a scalar or a weight is not finite and nothing can be taken back, or every update was left
                out.
        """
        if not metrics:
            raise ValueError("non-finite losses: got no update whose terms are finite; lower learning_rate")
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
