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
from torch.func import functional_call
from torch.nn import functional as F

from .ensemble import Members, dropout_mask, standard_normal
from .fitting import FitData
from .transition_base import TransitionModel
from .transition_settings import TransitionSettings

DROPOUT_DRAWS = 8
"""Draws of dropout whose disagreement is measured."""
SNAPSHOT_UPDATES, SCALE_DRAWS = 25, 8
"""Updates from one snapshot to the next; minibatches that scale the steps of each weight."""
TAME, WIDEST = 10.0, 0.01
"""Largest gradient along a Langevin path, in root mean squares at its start; largest noise of a step, in those of the
weights."""
MIN_STD = 1e-3
"""Of a homoscedastic model, in units of the normalised target."""


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
        homoscedastic: one standard deviation of each output, whatever the input (DHMBPO, arXiv 2512.15439). The mean
            is fitted by squared error: by likelihood, outputs without noise would outweigh all others. The deviation is
            that of the hold-out, at least 1e-3 of the spread of the targets.
        layer_norm: see `Members`.
        snapshots: weights along a Langevin path after each fit that take turns in ``sample`` as the members of an
            ensemble would (`weight_snapshots`); 0 for the fitted weights alone. For one member with noise.
        dropout: share of the first layer's outputs left out in a fit, in [0, 1); falls linearly to 0 in the last layer.
        rollout_dropout: leave them out in ``step`` and ``sample``, too, for each row anew: Monte Carlo dropout (Gal and
            Ghahramani, arXiv 1506.02142), an ensemble in one network. ``predict`` and ``log_prob`` do not.
        members: M, at least 1. With more than one, each has its own bootstrap sample of the rows.
        elites: the members that predict, those of least hold-out error; 1 to M.

    Raises:
        ValueError: on sizes out of range.
    """

    log_std: Tensor | None

    def __init__(
        self,
        obs_dim: int,
        action_dim: int,
        settings: TransitionSettings | None = None,
        *,
        hidden: Sequence[int] = (200, 200, 200, 200),
        probabilistic: bool = True,
        homoscedastic: bool = False,
        layer_norm: bool = False,
        dropout: float = 0.0,
        rollout_dropout: bool = False,
        snapshots: int = 0,
        members: int = 1,
        elites: int = 1,
    ) -> None:
        super().__init__(obs_dim, action_dim, settings, members, elites)
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {dropout}")
        if rollout_dropout and not (dropout and hidden):
            raise ValueError(f"rollout_dropout: got hidden {list(hidden)} and dropout {dropout}, expected both above 0")
        if snapshots < 0 or (snapshots and (members > 1 or not (probabilistic or homoscedastic))):
            raise ValueError(f"snapshots must be at least 0, and 0 without noise or with members, got {snapshots}")
        targets, varies = 1 + obs_dim, probabilistic and not homoscedastic
        widths = (obs_dim + action_dim, *hidden, (1 + varies) * targets)
        self.net = Members(members, widths, layer_norm)
        self.posterior = Members(snapshots, widths, layer_norm).requires_grad_(False) if snapshots else None
        self.hidden, self.dropout, self.rollout_dropout = tuple(hidden), dropout, rollout_dropout
        self.bounds = None
        self.register_buffer("log_std", torch.zeros(members, 1, targets) if homoscedastic else None)
        if varies:
            self.bounds = nn.Parameter(torch.tensor([[[-10.0], [0.5]]]).repeat(members, 1, targets))

    def _moments(
        self, x: Tensor, chosen: Tensor | None = None, masks: Sequence[Tensor] = ()
    ) -> tuple[Tensor, Tensor | None]:
        """Mean and log-variance, each [M, B, T], of all members or those chosen."""
        return self._noise_of(self.net(x, chosen, masks), chosen)

    def _noise_of(self, out: Tensor, chosen: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if self.log_std is not None:
            log_std = self.log_std if chosen is None else self.log_std[chosen]
            return out, 2 * log_std.expand_as(out)
        if self.bounds is None:
            return out, None
        mean, log_var = out.chunk(2, -1)
        low, high = (self.bounds if chosen is None else self.bounds[chosen]).split(1, 1)
        log_var = high - F.softplus(high - log_var)
        return mean, low + F.softplus(log_var - low)

    def _noise(self, x: Tensor, generator: torch.Generator) -> Sequence[Tensor]:
        return self._masks(x.shape[:-1], generator)

    def _masks(self, rows: Sequence[int], generator: torch.Generator) -> Sequence[Tensor]:
        """Masks of dropout, of mean 1, for the outputs of each hidden layer, [*rows, width]."""
        if not self.dropout:
            return ()
        shares = (self.dropout * (1 - k / len(self.hidden)) for k in range(len(self.hidden)))
        return [
            dropout_mask((*rows, width), share, generator) for width, share in zip(self.hidden, shares, strict=True)
        ]

    def _loss(self, x: Tensor, y: Tensor, noise: Sequence[Tensor]) -> Tensor:
        mean, log_var = self._moments(x, masks=noise)
        square = (mean - y).square()
        if log_var is None or self.log_std is not None:
            return square.mean((1, 2))
        loss = (square * torch.exp(-log_var) + log_var).mean((1, 2))
        assert self.bounds is not None
        return loss + 0.01 * (self.bounds[:, 1] - self.bounds[:, 0]).sum(1)

    def _finish(self, data: FitData, generator: torch.Generator) -> None:
        if self.log_std is not None:
            held = self.holdout_rows.expand(self.members, -1)
            error = self._predict(data.x[held]) - data.y[held]
            self.log_std.copy_(error.square().mean(1, keepdim=True).sqrt().clamp_min(MIN_STD).log())
        if self.posterior is not None:
            self._take_snapshots(self.posterior, data, generator)

    def _take_snapshots(self, posterior: Members, data: FitData, generator: torch.Generator) -> None:
        from .snapshots import weight_snapshots  # loads the Langevin samplers

        rows, named = self.member_rows[0], dict(self.net.named_parameters())
        sizes = [each.numel() for each in named.values()]

        def by_name(vector: Tensor) -> dict[str, Tensor]:
            parts = zip(named.items(), vector.split(sizes), strict=True)
            return {name: part.view_as(each) for (name, each), part in parts}

        def potential(vector: Tensor) -> Tensor:  # minus the log-likelihood of all rows, by those of a minibatch
            drawn = rows[torch.randint(len(rows), (self.settings.batch_size,), generator=generator, device=rows.device)]
            mean, log_var = self._noise_of(functional_call(self.net, by_name(vector), data.x[drawn][None]), None)
            assert log_var is not None
            square = (mean - data.y[drawn]).square()
            return 0.5 * len(rows) * (square * torch.exp(-log_var) + log_var).sum(-1).mean()

        gradient = torch.func.grad(potential)
        vector = torch.cat([each.detach().flatten() for each in named.values()])
        scale = torch.stack([gradient(vector).square() for _ in range(SCALE_DRAWS)]).mean(0).sqrt()
        scale = scale + 1e-3 * scale.mean()

        # Where the data say nothing about a weight it would walk far within the few steps of a path.
        widest = (WIDEST * vector.square().mean().sqrt()) ** 2 / (2 * self.settings.learning_rate)

        def tamed(vector: Tensor) -> Tensor:  # far from where scale was measured the gradient can be huge
            return torch.clamp(gradient(vector), -TAME * scale, TAME * scale)

        snapshots = weight_snapshots(
            tamed, vector, count=len(posterior.weights[0]), every=SNAPSHOT_UPDATES, step=self.settings.learning_rate,
            preconditioner=(1 / scale).clamp(max=widest), generator=generator,
        )  # fmt: skip
        if not snapshots.isfinite().all():
            raise ValueError("the weights diverged along the Langevin path; use snapshots=0, or a homoscedastic model")
        for name, each in posterior.named_parameters():
            each.copy_(torch.cat([by_name(vector)[name] for vector in snapshots]))

    @property
    def _has_noise(self) -> bool:
        """Whether outcomes are Gaussian and not one alone."""
        return self.bounds is not None or self.log_std is not None

    @property
    def _hands(self) -> int:
        """Networks among which rows are dealt."""
        return len(self.elite_members if self.posterior is None else self.posterior.weights[0])

    def _predict(self, x: Tensor) -> Tensor:
        return self._moments(x)[0]

    def _predictions(self, x: Tensor) -> Tensor:
        if self.posterior is None:
            return super()._predictions(x)
        return self._noise_of(self.posterior(x.expand(self._hands, -1, -1)), None)[0]

    @torch.no_grad()
    def disagreement(self, obs: Tensor, action: Tensor) -> Tensor:
        """Deviations [K, B, O] of what each elite, snapshot or draw of dropout predicts for next_obs from their mean.

        Without the clipping.
        """
        if not self.rollout_dropout:
            return super().disagreement(obs, action)
        generator = torch.Generator(obs.device).manual_seed(0)
        drawn = [self.draw(len(obs), generator) for _ in range(DROPOUT_DRAWS)]
        if self._has_noise:  # which is no disagreement
            drawn = [(torch.zeros_like(normal), *rest) for normal, *rest in drawn]
        x = self._x(obs, action)
        y = torch.stack([self._push(x, each) for each in drawn])
        moves = self.targets.inverse(y)[..., 1:]
        return moves - moves.mean(0)

    def draw(self, rows: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        """What is random in a step, of mean 0, and the rows' places in the elites' hands.

        That are standard normals [elites, hand, T] where there is noise, and of each hidden layer with rollout_dropout
        what its mask differs from 1, [elites, hand, width].
        """
        # Rows are dealt to the elites at random, as many to each: every row's elite is uniform, the shapes are fixed,
        # and the whole costs as much as one network.
        elites = self._hands
        hand = -(-rows // elites)
        places = (self._permutation(hand * elites, generator)[:rows],) if elites > 1 else ()
        masks = self._masks((elites, hand), generator) if self.rollout_dropout else ()
        normals = (standard_normal((elites, hand, 1 + self.obs_dim), generator),) if self._has_noise else ()
        return (*normals, *(each - 1 for each in masks), *places)

    def _push(self, x: Tensor, noise: tuple[Tensor, ...]) -> Tensor:
        elites = self._hands
        hand = -(-len(x) // elites)
        if elites > 1:
            x = x.new_zeros(hand * elites, x.shape[1]).index_copy(0, noise[-1], x)
        dealt = x.view(elites, hand, -1)
        further = noise[1:] if self._has_noise else noise
        masks = [1 + each for each in further[: len(self.hidden)]] if self.rollout_dropout else []
        if self.posterior is not None:
            mean, log_var = self._noise_of(self.posterior(dealt, masks=masks), None)
        else:
            mean, log_var = self._moments(dealt, None if elites == self.members else self.elite_members, masks)
        if log_var is not None:
            mean = torch.addcmul(mean, noise[0], torch.exp(0.5 * log_var))
        y = mean.flatten(0, 1)
        return y[noise[-1]] if elites > 1 else y

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
