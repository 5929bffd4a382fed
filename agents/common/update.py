"""One gradient step: losses and their weights, the gradient of the sum, optimizer, average; and numbers not finite.

A loss, a gradient or a weight that is not finite is treated as an agent's Config says:

    raise      an error that names the term
    skip       such an update is left out. On CUDA every update then waits for the device
    rollback   the weights, their average and the optimizer go back to what they were before the agent's last call of
               `train`; also where only the weights are not finite

The transition model of LipschitzMBPO has its own error.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .compiling import Compiled, compiling_pays
from .observations import FiniteTransitions, blame

if TYPE_CHECKING:
    from .policy import BoxPolicy

_SUMS = ("train/loss", "train/grad_norm")  # not finite for what another term is to blame for


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
        weights = self.policy.latest_weights or self.policy.weights
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
        self._sizes_of_groups = [len(group["params"]) for group in self._groups]
        held = {id(parameter) for group in self._groups for parameter in group["params"]}
        named = [(name, each) for name, each in policy.named_parameters() if each.requires_grad and id(each) in held]
        first = f"{policy.followed}."
        named.sort(key=lambda item: (not item[0].startswith(first), -item[1].numel()))
        self.names, self.parameters = [name for name, _ in named], [each for _, each in named]
        self._sizes = [each.numel() for each in self.parameters]
        average: nn.Module | None = getattr(policy, policy.follower)
        followed = dict(getattr(policy, policy.followed).named_parameters())
        means = dict(average.named_parameters()) if average else {}
        # What neither learns nor differs needs no average; and of minus infinity, a base of width 0, there is none.
        moving = [name for name, mean in means.items() if not torch.equal(mean, followed[name])]
        learning = [name.removeprefix(first) for name in self.names if name.startswith(first)]
        self._average, self._followed = list[Tensor](), list[Tensor]()
        self.vector: Tensor | None = None
        if (not means or set(moving) <= set(learning)) and self._optimizer_is_elementwise():
            self.vector = _join(self.parameters)
            if means:
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

    def are_current(self, policy: BoxPolicy) -> bool:
        """Whether policy and optimizer are still what this was made of."""
        optimizer = policy.optimizer
        return (
            optimizer is self.optimizer
            and optimizer.param_groups is self._groups
            and optimizer.state is self._state
            and self.rate == policy.averaging
            and [len(group["params"]) for group in self._groups] == self._sizes_of_groups
            and (self.vector is None or not _is_watched(optimizer))
            and all(
                owner.get(name) is each and each.requires_grad == learns and each.data_ptr() == at
                for owner, name, each, learns, at in self._seen
            )
            and (self.vector is None or self._moments_are_shared())
        )

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

    def average(self) -> None:
        """Move the average towards what it follows."""
        for mean, followed in zip(self._average, self._followed, strict=True):
            mean.lerp_(followed, self.rate)

    def _optimizer_is_elementwise(self) -> bool:
        """Whether a step on one vector is the step on each parameter."""
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
        for i, parameter in enumerate(self.parameters):
            views = {name: part[i].view_as(parameter) for name, part in parts.items()}
            self._state[parameter] = {"step": self._steps[i], **views}

    def _moments_are_shared(self) -> bool:
        """Whether nobody has stepped, loaded or cleared the parameters' own optimizer."""
        if self._steps is None:
            return not self._state
        first = self._state.get(self.parameters[0], {}).get("exp_avg")
        mine = self._joined.state[self._vector_parameter]["exp_avg"]
        return first is not None and first.data_ptr() == mine.data_ptr() and bool((self._steps == self._counted).all())


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


class Snapshot:
    """Weights, normalisers, average and optimizer of a policy as they are, to go back to."""

    def __init__(self, policy: BoxPolicy) -> None:
        self._policy = policy
        policy.weights.finish()
        self._tensors = [(each, each.detach().clone()) for each in chain(policy.parameters(), policy.buffers())]
        self._moments = {parameter: copy.deepcopy(state) for parameter, state in policy.optimizer.state.items()}

    @torch.no_grad()
    def restore(self) -> None:
        """Put everything back, in place."""
        for tensor, before in self._tensors:
            tensor.copy_(before)
        state = self._policy.optimizer.state
        state.clear()
        state.update({parameter: copy.deepcopy(moments) for parameter, moments in self._moments.items()})
        self._policy.latest_weights = None


class FiniteUpdates(FiniteTransitions):
    """The part of an agent that looks at the numbers of its updates, too."""

    policy: BoxPolicy
    _gradient: Callable[..., tuple[Tensor, dict[str, Tensor]]]  # `Gradient.clipped`, perhaps compiled
    _updates_left_out = _rollbacks = 0  # so far

    def _weights(self) -> Weights:
        """The policy's weights, ready for updates; a compiled gradient looks at them again if they are others."""
        before, weights = self.policy.latest_weights, self.policy.weights
        if weights is not before and isinstance(self._gradient, Compiled):
            self._gradient.check_again()
        return weights

    def _before_updates(self) -> Snapshot | None:
        """What can put the weights back to what they are now; None where that is not wanted."""
        return Snapshot(self.policy) if self.config.nonfinite == "rollback" else None

    def _refuses(self, scalars: Mapping[str, Tensor]) -> bool:
        """Whether to leave an update out, because one of its scalars is not finite."""
        if self.config.nonfinite != "skip" or torch.stack(list(scalars.values())).isfinite().all():
            return False
        self._updates_left_out += 1
        fault = _first_fault(list(scalars), torch.stack(list(scalars.values()))[None])
        warnings.warn(f"{fault}; the update is left out", RuntimeWarning, stacklevel=2)
        return True

    def _settle(self, names: list[str], metrics: list[Tensor], before: Snapshot | None) -> dict[str, float]:
        """Means of the scalars over the updates that were made. The one point at which the host waits for the device.

        Args:
            names: of the scalars.
            metrics: their values in each update, [number of names]; emptied where the updates were taken back.
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
            return dict(zip(names, means, strict=True))
        fault = _first_fault(names, table) or f"non-finite weights: {blame(self.policy)}"
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
        self.logger.record("train/updates_left_out", self._updates_left_out)
        self.logger.record("train/rollbacks", self._rollbacks)


def _first_fault(names: list[str], table: Tensor) -> str:
    """Description of the first number that is not finite in a table [updates, names]; empty if all are finite."""
    for update, row in enumerate(table.tolist()):
        found = {name: value for name, value in zip(names, row, strict=True) if not np.isfinite(value)}
        for name in sorted(found, key=_SUMS.__contains__):  # terms before what they are part of
            which = f" in update {update}" if len(table) > 1 else ""
            return f"non-finite term of the loss: got {found[name]} for {name}{which}"
    return ""


def compiles(policy: nn.Module, wanted: str, updates: int, device: torch.device) -> bool:
    """As `compiling_pays`; but networks that carry hooks or parametrizations are trained eagerly, with a warning."""
    if not compiling_pays(wanted, updates, device):
        return False
    altered = any(
        module._forward_pre_hooks or module._forward_hooks or parametrize.is_parametrized(module)
        for module in policy.modules()
    )
    if altered:
        text = f"compile: got {wanted}, but the networks carry hooks or parametrizations; training is eager"
        warnings.warn(text, RuntimeWarning, stacklevel=3)
    return not altered
