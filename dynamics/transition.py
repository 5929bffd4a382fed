"""Learned models of an environment's step, ``(obs, action) -> (next_obs, reward)``, for model-based agents.

`GaussianTransition` is the usual one, `TRANSITIONS` names all. `TransitionModel` fits them and explains the symbols x
and y.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .ensemble import Members
from .transition_base import TransitionModel, TransitionSettings, standard_normal


class GaussianTransition(TransitionModel):
    """Networks of a diagonal Gaussian, alone or as an ensemble (PETS, arXiv 1805.12114; MBPO, arXiv 1906.08253).

    The log-variance is kept between learned bounds, initially -10 and 0.5, whose distance costs 0.01 per dimension. An
    ensemble draws one of its elites for each row of ``sample``; its density is the elites' mixture.

    Args:
        obs_dim: O, at least 1.
        action_dim: A, at least 1.
        settings: None for the defaults of `TransitionSettings`.
        hidden: widths of the hidden layers.
        probabilistic: False for the mean alone, by squared error: no noise in ``sample`` and no ``log_prob``.
        members: M, at least 1. With more than one, each has its own bootstrap sample of the rows.
        elites: the members that predict, those of least hold-out error; 1 to M.

    Raises:
        ValueError: on sizes out of range.
    """

    def __init__(
        self,
        obs_dim: int,
        action_dim: int,
        settings: TransitionSettings | None = None,
        *,
        hidden: Sequence[int] = (200, 200, 200, 200),
        probabilistic: bool = True,
        members: int = 1,
        elites: int = 1,
    ) -> None:
        super().__init__(obs_dim, action_dim, settings, members, elites)
        targets = 1 + obs_dim
        self.net = Members(members, (obs_dim + action_dim, *hidden, (1 + probabilistic) * targets))
        self.bounds = None
        if probabilistic:
            self.bounds = nn.Parameter(torch.tensor([[[-10.0], [0.5]]]).repeat(members, 1, targets))

    def _moments(self, x: Tensor, chosen: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Mean and log-variance, each [M, B, T], of all members or those chosen."""
        out: Tensor = self.net(x, chosen)
        if self.bounds is None:
            return out, None
        mean, log_var = out.chunk(2, -1)
        low, high = (self.bounds if chosen is None else self.bounds[chosen]).split(1, 1)
        log_var = high - F.softplus(high - log_var)
        return mean, low + F.softplus(log_var - low)

    def _loss(self, x: Tensor, y: Tensor, noise: Sequence[Tensor]) -> Tensor:
        mean, log_var = self._moments(x)
        square = (mean - y).square()
        if log_var is None or self.bounds is None:
            return square.mean((1, 2))
        gap = self.bounds[:, 1] - self.bounds[:, 0]
        return (square * torch.exp(-log_var) + log_var).mean((1, 2)) + 0.01 * gap.sum(1)

    def _predict(self, x: Tensor) -> Tensor:
        return self._moments(x)[0]

    def _sample(self, x: Tensor, generator: torch.Generator) -> Tensor:
        # Rows are dealt to the elites at random, as many to each: every row's elite is uniform, the shapes are fixed,
        # and the whole costs as much as one network.
        rows, elites = len(x), len(self.elite_members)
        hand = -(-rows // elites)
        if elites > 1:
            place = self._permutation(hand * elites, generator)[:rows]
            x = x.new_zeros(hand * elites, x.shape[1]).index_copy(0, place, x)
        chosen = None if elites == self.members else self.elite_members
        mean, log_var = self._moments(x.view(elites, hand, -1), chosen)
        if log_var is not None:
            mean = torch.addcmul(mean, standard_normal(mean.shape, generator), torch.exp(0.5 * log_var))
        y = mean.flatten(0, 1)
        return y[place] if elites > 1 else y

    def _log_density(self, x: Tensor, y: Tensor) -> Tensor:
        mean, log_var = self._moments(x.expand(self.members, -1, -1))
        if log_var is None:
            raise ValueError("a deterministic model has no density; build it with probabilistic=True")
        each = -0.5 * ((y - mean).square() * torch.exp(-log_var) + log_var + math.log(2 * math.pi)).sum(-1)
        return each[self.elite_members].logsumexp(0) - math.log(len(self.elite_members))


_PLACES = {
    "gaussian": (".transition", "GaussianTransition"),
    "flow": (".flow_transition", "FlowTransition"),
    "langevin": (".langevin_transition", "LangevinTransition"),
}
"""Name -> module and class of a model."""


class _Transitions(Mapping[str, Callable[..., TransitionModel]]):
    """The models by name, each imported when it is looked up: a Gaussian model loads neither flows nor SDEs."""

    def __getitem__(self, name: str) -> Callable[..., TransitionModel]:
        module, model = _PLACES[name]
        build: Callable[..., TransitionModel] = getattr(importlib.import_module(module, __package__), model)
        return build

    def __iter__(self) -> Iterator[str]:
        return iter(_PLACES)

    def __len__(self) -> int:
        return len(_PLACES)


TRANSITIONS = _Transitions()
"""The named models, for configurations: ``(obs_dim, action_dim, settings, **options)``."""
