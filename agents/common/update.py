"""One gradient step: losses and their weights, the gradient of the sum, the optimizer's step, average, rate."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.type_aliases import Schedule
from stable_baselines3.common.utils import ConstantSchedule, FloatSchedule, LinearSchedule
from torch import Tensor, nn

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

    Eager as it stands; `Compiled` makes one graph of `forward`, which is the same up to rounding.

    Args:
        policy: with the `Weights`.
        losses: (policy, ...) -> `Losses` of a minibatch.
        max_norm: bound of the gradient's norm; None for no bound.
    """

    def __init__(self, policy: BoxPolicy, losses: Callable[..., Losses], max_norm: float | None) -> None:
        super().__init__()
        self.policy, self.losses, self.max_norm = policy, losses, max_norm

    def forward(self, *batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum of the losses, and all scalars to log: values, metrics, "train/loss"."""
        losses = self.losses(self.policy, *batch)
        total = losses.total()
        values = {name: loss.value for name, loss in losses.table.items()}
        return total, values | losses.metrics | {"train/loss": total}

    def clipped(self, *batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """The (clipped) gradient, parameter after parameter, and the scalars, "train/grad_norm" among them."""
        weights = self.policy.latest_weights or Weights.of(self.policy)
        if torch.compiler.is_compiling():  # it cannot look into autograd, and eager mode is slow with torch.func
            detached = {
                f"policy.{name}": each.detach() for name, each in zip(weights.names, weights.parameters, strict=True)
            }
            by_name, scalars = torch.func.grad(
                lambda parameters: torch.func.functional_call(self, parameters, batch), has_aux=True
            )(detached)
            gradients = tuple(by_name.values())
        else:
            total, scalars = self(*batch)
            gradients = torch.autograd.grad(total, weights.parameters, materialize_grads=True)
        vector = torch.cat([each.flatten() for each in gradients])
        norm = vector.norm()
        if self.max_norm is not None:
            vector = (self.max_norm / (norm + 1e-6)).clamp(max=1.0) * vector
        return vector, {name: scalar.detach() for name, scalar in scalars.items()} | {"train/grad_norm": norm}


class Weights:
    """The parameters of a policy that learn, its optimizer and its weight average, as an update uses them.

    They are ordinary parameters: they can be frozen, replaced, pruned, loaded in part, and the optimizer be another.
    While nothing of the kind has been done they are also views of one vector, as are the optimizer's moments and the
    average: an update is a handful of kernels then, and the same up to rounding. `are_current` notices what was done.

    Args:
        policy: names its modules `followed` and `follower` of the average, and the average's rate.

    Attributes:
        names: of the parameters that require a gradient and that the optimizer holds.
        parameters: they themselves; first those that the average follows, the larger before the smaller.
        vector: what they are views of, or None.
    """

    def __init__(self, policy: BoxPolicy) -> None:
        self.optimizer, self.rate = policy.optimizer, policy.averaging
        self._groups, self._state = self.optimizer.param_groups, self.optimizer.state
        self._held = held_by(self.optimizer)
        held = {id(parameter) for parameter in self._held}
        named = [(name, each) for name, each in policy.named_parameters() if each.requires_grad and id(each) in held]
        first, named = f"{policy.followed}.", in_order(policy, named)
        self.names, self.parameters = [name for name, _ in named], [each for _, each in named]
        for name, each in named:
            if 0 in [stride for stride, size in zip(each.stride(), each.shape, strict=True) if size > 1]:
                raise ValueError(
                    f"weights: elements of {name} share their memory (expand), expected one each; clone it"
                )
            if not each.is_contiguous():  # fused optimizers go by the memory, of gradients and moments, too
                each.data = each.detach().contiguous()
                for key, moment in self._state.get(each, {}).items():
                    self._state[each][key] = moment.contiguous() if isinstance(moment, Tensor) else moment
        self._sizes = [each.numel() for each in self.parameters]
        average: nn.Module | None = getattr(policy, policy.follower)
        followed = dict(getattr(policy, policy.followed).named_parameters())
        means = dict(average.named_parameters()) if average else {}
        # What neither learns nor differs needs no average; and of minus infinity, a base of width 0, there is none.
        moving = [name for name, mean in means.items() if not torch.equal(mean, followed[name])]
        learning = [name.removeprefix(first) for name in self.names if name.startswith(first)]
        self._average, self._followed = list[Tensor](), list[Tensor]()
        self.vector: Tensor | None = None
        if self.parameters and (not means or set(moving) <= set(learning)) and self._can_join():
            self.vector = _join(self.parameters)
            if means and learning:
                self._average = [_join([means[name] for name in learning])]
                self._followed = [self.vector[: len(self._average[0])]]
            self._share_moments()
        else:
            names = sorted({*moving, *learning}) if means else []
            self._average, self._followed = ([each[name].detach() for name in names] for each in (means, followed))
            for each in policy.parameters():
                each.grad = None  # left by whoever differentiated before: an optimizer would follow it
        owned = [(each._parameters, name, one) for each in policy.modules() for name, one in each._parameters.items()]
        self._seen = [
            (owner, name, each, each.requires_grad, each.data_ptr()) for owner, name, each in owned if each is not None
        ]

    @classmethod
    def of(cls, policy: BoxPolicy) -> Weights:
        """Those of a policy, ready for updates: the latest ones, or others if parameters or optimizer were changed."""
        if policy.latest_weights is None or not policy.latest_weights.are_current(policy):
            policy.latest_weights = cls(policy)
        policy.latest_weights.prepare()
        return policy.latest_weights

    def are_current(self, policy: BoxPolicy) -> bool:
        """Whether policy and optimizer are still what this was made of."""
        optimizer = policy.optimizer
        return (
            optimizer is self.optimizer
            and optimizer.param_groups is self._groups
            and optimizer.state is self._state
            and self.rate == policy.averaging
            and [*map(id, held_by(optimizer))] == [*map(id, self._held)]
            and (self.vector is None or not _is_watched(optimizer))
            and all(
                owner.get(name) is each and each.requires_grad == learns and each.data_ptr() == at
                for owner, name, each, learns, at in self._seen
            )
            and (self.vector is None or self._moments_are_shared())
        )

    def update(self, gradient: Tensor) -> None:
        """Let the optimizer take a step, and the average follow.

        Args:
            gradient: of all parameters as one vector, in their order.
        """
        self.step(gradient)
        self.average()

    def average(self) -> None:
        """Move the average towards what it follows."""
        for mean, followed in zip(self._average, self._followed, strict=True):
            mean.lerp_(followed, self.rate)

    def step(self, gradient: Tensor) -> None:
        """Let the optimizer take a step.

        Args:
            gradient: of all parameters as one vector, in their order.
        """
        if self.vector is None:
            for parameter, part in zip(self.parameters, gradient.split(self._sizes), strict=True):
                parameter.grad = part.view_as(parameter)
            self.optimizer.step()
            return
        self._vector_parameter.grad = gradient
        self._joined.step()
        if self._steps is None:
            self._expose_moments()

    def prepare(self) -> None:
        """Take over the optimizer's present options, such as its learning rate; before the updates of an iteration."""
        if self.vector is not None:
            options = {name: value for name, value in self._groups[0].items() if name != "params"}
            self._joined.param_groups[0].update(options)

    def finish(self) -> Tensor:
        """Bring the optimizer's own step counts up to date. Returns a number that is finite if all weights are, 0-d."""
        if self.vector is None:
            return torch.stack([each.detach().sum() for each in self.parameters]).sum()
        if self._steps is not None:
            self._counted.copy_(self._joined.state[self._vector_parameter]["step"])
            self._steps.copy_(self._counted)
        return self.vector.sum()

    def _can_join(self) -> bool:
        """Whether a step on one vector is the step on each parameter, and nobody else needs them where they are."""
        if len({each.data_ptr() for each in self.parameters}) < len(self.parameters):  # tied by their data
            return False
        if any(each.device.type == "cpu" and each.is_shared() for each in self.parameters):  # among processes
            return False
        if type(self.optimizer) not in (torch.optim.Adam, torch.optim.AdamW) or len(self._groups) != 1:
            return False
        if _is_watched(self.optimizer):
            return False
        return len({(each.device, each.dtype) for each in self.parameters}) == 1 and self._moments_agree()

    def _moments_agree(self) -> bool:
        """Whether all parameters have taken the same number of steps."""
        states = [self._state.get(each) for each in self.parameters]
        if not any(states):
            return True
        return all(states) and len({float(state["step"]) for state in states if state}) == 1

    def _share_moments(self) -> None:
        """An optimizer of the vector, with the moments that the parameters' own has."""
        assert self.vector is not None
        group = self._groups[0]
        self._vector_parameter = nn.Parameter(self.vector)
        kind: Any = type(self.optimizer)
        self._joined: torch.optim.Optimizer = kind([self._vector_parameter], fused=group["fused"])
        self._steps: Tensor | None = None
        states = [self._state[each] for each in self.parameters if self._state.get(each)]
        if states:
            moments = {
                name: value.clone() if name == "step" else torch.cat([each[name].flatten() for each in states])
                for name, value in states[0].items()
            }
            self._joined.state[self._vector_parameter] = moments
            self._expose_moments()

    def _expose_moments(self) -> None:
        """Make the moments of the parameters' own optimizer views of the vector's."""
        moments = self._joined.state[self._vector_parameter]
        self._counted = moments["step"].clone()
        self._steps = self._counted.repeat(len(self.parameters))
        parts = {name: value.split(self._sizes) for name, value in moments.items() if name != "step"}
        self._exposed = list[dict[str, Tensor]]()
        for i, parameter in enumerate(self.parameters):
            views = {name: part[i].view_as(parameter) for name, part in parts.items()}
            self._exposed.append({"step": self._steps[i], **views})
            self._state[parameter] = dict(self._exposed[-1])

    def _moments_are_shared(self) -> bool:
        """Whether nobody has stepped, loaded, changed or cleared the parameters' own optimizer."""
        states = [self._state.get(each) for each in self.parameters]
        if self._steps is None:
            return not any(states)
        for state, exposed in zip(states, self._exposed, strict=True):
            if state is None or any(state.get(name) is not each for name, each in exposed.items()):
                return False
        return bool((self._steps == self._counted).all())


def in_order(policy: BoxPolicy, named: Iterable[tuple[str, nn.Parameter]]) -> list[tuple[str, nn.Parameter]]:
    """Named parameters as a vector holds them: first those that the average follows, the larger before the smaller."""
    first = f"{policy.followed}."
    return sorted(named, key=lambda item: (not item[0].startswith(first), -item[1].numel()))


def held_by(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """The parameters of an optimizer, of all groups."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _is_watched(optimizer: torch.optim.Optimizer) -> bool:
    """Whether something waits for the optimizer's own steps: a hook, or a scheduler of the learning rate."""
    hooks = optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks
    return bool(hooks) or "step" in vars(optimizer)


def _join(parameters: list[nn.Parameter]) -> Tensor:
    """Make the parameters views of one vector, which is returned: what is done to it is done to all of them at once."""
    vector = torch.cat([parameter.detach().flatten() for parameter in parameters])
    for parameter, part in zip(parameters, vector.split([p.numel() for p in parameters]), strict=True):
        parameter.data = part.view_as(parameter)
    return vector


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
