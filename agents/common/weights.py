"""The weights that learn, as an update uses them: ordinary parameters, views of one vector where they can be."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from .policy import BoxPolicy


class Joined(NamedTuple):
    """The weights as one vector of size P, and all that a step of Adam or AdamW reads and writes.

    Adam: Kingma, Ba 2015, arXiv 1412.6980, algorithm 1; AdamW: Loshchilov, Hutter 2019, arXiv 1711.05101, algorithm 2.
    """

    vector: Tensor  # [P]
    exp_avg: Tensor  # first moment m, [P]
    exp_avg_sq: Tensor  # second moment v, [P]
    taken: Tensor  # steps so far, t, 0-d
    average: Tensor  # of the first parameters, [A]; A = 0: there is none
    options: Tensor  # float64, [7]: rate, betas, eps, weight decay (decoupled; by the gradient), average's rate
    shares: Tensor  # of the rate, for each weight, [P]; [0]: all of it

    def parts(self, policy: BoxPolicy) -> list[Tensor]:
        """The parameters, as views of the vector."""
        weights = policy.latest_weights
        assert weights is not None
        sizes = [each.numel() for each in weights.parameters]
        pairs = zip(self.vector.split(sizes), weights.parameters, strict=True)
        return [part.view(parameter.shape) for part, parameter in pairs]

    def after(self, gradient: Tensor) -> Joined:
        """What it is after a step; gradient: [P]."""
        rate, beta1, beta2, eps, decay, by_gradient, average_rate = self.options.unbind()
        taken = self.taken + 1
        first, second = ((1 - beta ** taken.double()) for beta in (beta1, beta2))  # corrections of the moments' bias
        vector, gradient = (1 - rate * decay).float() * self.vector, gradient + by_gradient.float() * self.vector
        exp_avg = self.exp_avg + (1 - beta1).float() * (gradient - self.exp_avg)
        exp_avg_sq = beta2.float() * self.exp_avg_sq + (1 - beta2).float() * gradient * gradient
        size = exp_avg_sq.sqrt() / second.sqrt().float() + eps.float()
        vector = vector - (rate / first).float() * exp_avg / size
        if len(self.shares):
            vector = torch.lerp(self.vector, vector, self.shares)
        average = self.average + average_rate.float() * (vector[: len(self.average)] - self.average)
        return Joined(vector, exp_avg, exp_avg_sq, taken, average, self.options, self.shares)


class Weights:
    """The parameters of a policy that learn, its optimizer and its weight average, as an update uses them.

    They are ordinary parameters: they can be frozen, replaced, pruned, loaded in part, and the optimizer be another.
    While nothing of the kind has been done they are also views of one vector, as are the optimizer's moments and the
    average: an update is a handful of kernels then, and the same up to rounding. `are_current` notices what was done.

    Args:
        policy: names its modules `followed` and `follower` of the average, and the average's rate.

    Attributes:
        shares: of the learning rate that each parameter has, in [0, 1]: it goes that share of its step, and its moments
            move as ever; none: all of it. Set before `prepare`.
        names: of the parameters that require a gradient and that the optimizer holds.
        parameters: they themselves; first those that the average follows, the larger before the smaller.
        vector: what they are views of, or None.
    """

    shares: Sequence[float] = ()

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
        self._prepared: Joined | None = None  # until the options may be others
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

    def joined(self) -> Joined | None:
        """All of them as one vector with what a step of their optimizer needs; None where a function cannot make it."""
        if self.vector is None or any(self._groups[0][name] for name in ("amsgrad", "maximize")):
            return None
        if self._prepared is not None:
            return self._prepared
        state = self._joined.state[self._vector_parameter]
        if not state:
            zeros = {name: torch.zeros_like(self.vector) for name in ("exp_avg", "exp_avg_sq")}
            state.update({"step": torch.zeros((), device=self.vector.device), **zeros})
        if self._steps is None:
            self._expose_moments()
        group = self._groups[0]
        decoupled = group.get("decoupled_weight_decay", isinstance(self.optimizer, torch.optim.AdamW))
        decays = (group["weight_decay"], 0.0) if decoupled else (0.0, group["weight_decay"])
        numbers = [group["lr"], *group["betas"], group["eps"], *decays, self.rate]
        options = torch.tensor([float(each) for each in numbers], dtype=torch.float64, device=self.vector.device)
        average = self._average[0] if self._average else self.vector[:0]
        shares = [self.vector.new_full((size,), each) for size, each in zip(self._sizes, self.shares, strict=False)]
        self._prepared = Joined(
            self.vector, state["exp_avg"], state["exp_avg_sq"], state["step"], average, options,
            torch.cat(shares) if shares else self.vector[:0],
        )  # fmt: skip
        return self._prepared

    def update(self, gradient: Tensor) -> None:
        """Let the optimizer take a step, and the average follow.

        Args:
            gradient: of all parameters as one vector, in their order.
        """
        partial = [pair for pair in zip(self.parameters, self.shares, strict=False) if pair[1] < 1]
        before = [each.detach().clone() for each, _ in partial]
        self.step(gradient)
        with torch.no_grad():
            for (each, share), old in zip(partial, before, strict=True):
                each.copy_(torch.lerp(old, each, share))
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
        self._prepared = None
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
