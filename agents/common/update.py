"""One gradient step: losses and their weights, the gradient of the sum, the whole as one function; the rate."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.type_aliases import Schedule
from stable_baselines3.common.utils import ConstantSchedule, FloatSchedule, LinearSchedule
from torch import Tensor, nn

from .weights import Joined, Weights

if TYPE_CHECKING:
    from .policy import BoxPolicy


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

    Attributes:
        names: of the scalars, in their order; known after the first call.
    """

    def __init__(
        self, policy: BoxPolicy, losses: Callable[..., Losses], max_norm: float | None, skips: bool = False
    ) -> None:
        super().__init__()
        self.policy, self.losses, self.max_norm, self.skips = policy, losses, max_norm, skips
        self.names: tuple[str, ...] = ()

    def forward(self, *batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum of the losses, and all scalars to log: values, metrics, "train/loss"."""
        losses = self.losses(self.policy, *batch)
        total = losses.total()
        values = {name: loss.value for name, loss in losses.table.items()}
        return total, values | losses.metrics | {"train/loss": total}

    def clipped(self, *batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """The (clipped) gradient, parameter after parameter, and the scalars, "train/grad_norm" among them."""
        weights = self.policy.latest_weights or Weights.of(self.policy)
        if torch.compiler.is_compiling():  # it cannot look into autograd
            gradients, scalars = self._by_parts([each.detach() for each in weights.parameters], *batch)
            return self._clip(gradients, scalars)
        total, scalars = self(*batch)
        gradients = torch.autograd.grad(total, weights.parameters, materialize_grads=True)
        return self._clip(gradients, scalars)

    def step(self, joined: Joined, *batch: Any) -> Tensor:
        """The whole update: the clipped gradient, a step of Adam or AdamW, and the average that follows.

        Args:
            joined: the weights as one vector with all that belongs to it; written to.
            *batch: of the losses.

        Returns:
            The scalars, [number of names].
        """
        gradient, scalars = self._clip(*self._by_parts(joined.parts(self.policy), *batch))
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

    def _by_parts(self, parameters: Sequence[Tensor], *batch: Any) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
        """The gradients at these values of the weights, and the scalars, by functions that can be traced."""
        weights = self.policy.latest_weights
        assert weights is not None
        by_name, scalars = torch.func.grad(
            lambda values: torch.func.functional_call(self, values, batch), has_aux=True
        )({f"policy.{name}": each for name, each in zip(weights.names, parameters, strict=True)})
        return tuple(by_name.values()), scalars

    def _clip(self, gradients: Sequence[Tensor], scalars: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        vector = torch.cat([each.flatten() for each in gradients])
        norm = vector.norm()
        if self.max_norm is not None:
            vector = (self.max_norm / (norm + 1e-6)).clamp(max=1.0) * vector
        return vector, {name: scalar.detach() for name, scalar in scalars.items()} | {"train/grad_norm": norm}


class LearningRate(BaseAlgorithm):
    """The learning rate of an agent: a number of its Config, by the course that lr_schedule names, or a function.

    A function of what remains of training (1 to 0) makes the Config's lr_schedule "function". Either is read and set as
    `learning_rate` or `lr_schedule`.
    """

    config: Any
    _rate: float
    """The present rate, where lr_schedule adapts it."""
    _assign: Callable[[str, Any, Any], None]  # of `Configured`

    @property
    def learning_rate(self) -> float | Schedule:
        """The Config's number, or the function in use."""
        function: Schedule | None = vars(self).get("learning_rate")
        rate: float = self.config.learning_rate
        return rate if function is None else function

    @learning_rate.setter
    def learning_rate(self, value: float | Schedule) -> None:
        fields = rate_fields(value, self.config)
        if fields.get("lr_schedule") == "function":
            vars(self)["learning_rate"] = value  # below the property: with it, it is saved
        elif vars(self).pop("learning_rate", None) is None and self.config.lr_schedule == "function":
            raise no_function()
        if any(getattr(self.config, name) != each for name, each in fields.items()):
            self.config = dataclasses.replace(self.config, **fields)
        self._rate = self.config.learning_rate

    @property
    def lr_schedule(self) -> Schedule:
        """What remains of training (1 to 0) -> learning rate."""
        return self._rate_at

    @lr_schedule.setter
    def lr_schedule(self, value: Schedule | str) -> None:
        if isinstance(value, str):
            self._assign("lr_schedule", self, value)
        else:
            self.learning_rate = value

    def _rate_at(self, remaining: float) -> float:
        rate, schedule = self.learning_rate, self.config.lr_schedule
        if callable(rate):
            return float(rate(remaining))
        if schedule == "linear":
            return LinearSchedule(rate, 0.0, 1.0)(remaining)
        return self._rate if schedule == "adaptive" else rate

    def _setup_lr_schedule(self) -> None:
        """Nothing to do: `lr_schedule` follows `learning_rate`."""


def no_function() -> ValueError:
    """The error of a lr_schedule "function" without one."""
    return ValueError("lr_schedule: got 'function', expected learning_rate to be one of what remains (1 to 0)")


def rate_fields(value: Any, config: Any) -> dict[str, Any]:
    """The Config's fields for a learning rate: a number, or a function of what remains of training; None: none.

    Raises:
        ValueError: if the Config's lr_schedule is "function" and there is none.
    """
    if value is None and config.lr_schedule == "function":
        raise no_function()
    if value is None:
        return {}
    if isinstance(value, FloatSchedule):
        value = value.value_schedule
    if isinstance(value, ConstantSchedule):
        return {"learning_rate": value.val, "lr_schedule": "constant"}
    if isinstance(value, LinearSchedule) and (value.end, value.end_fraction) == (0, 1):
        return {"learning_rate": value.start, "lr_schedule": "linear"}
    if callable(value):
        return {"learning_rate": float(value(1.0)), "lr_schedule": "function"}
    return {"learning_rate": value} | ({"lr_schedule": "constant"} if config.lr_schedule == "function" else {})
