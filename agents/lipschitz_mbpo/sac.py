"""Soft actor-critic (Haarnoja et al. 2018, arXiv 1812.05905): networks and losses, all critics as one network.

Given an observation s::

    a = tanh(u),  u ~ N(m(s), std(s)^2)                       the actor, in [-1, 1]^D
    y = r + gamma (1 - terminated) (min_i Q'_i(s', a') - alpha log pi(a' | s'))
    L_critic = 1/2 sum_i (Q_i(s, a) - y)^2
    L_actor = alpha log pi(a~ | s) - min_i Q_i(s, a~)
    L_alpha = -log alpha (log pi(a~ | s) + target entropy)

Differences from the paper: actor, critics and temperature take their step at the same time, from the same minibatch and
the weights before it (Haarnoja et al. update one after the other); the loss of the temperature is in log alpha.
"""

from __future__ import annotations

import copy
import math
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from gymnasium import spaces
from stable_baselines3.common.type_aliases import PyTorchObs, Schedule
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from ...dynamics.fitting import warmed_up
from ...dynamics.precision import stacked_layer
from ..common.networks import ACTIVATIONS, activation_name, mlp
from ..common.observations import RunningNorm
from ..common.policy import BoxPolicy
from ..common.update import Loss, Losses
from ..storage.values import storable
from .replay import Minibatch

LOG_STD_RANGE = (-20.0, 2.0)
POWER_ITERATIONS = 20
"""Of new weights; later there is one for each of their changes."""


class SquashedSample(NamedTuple):
    """Actions [B, D] in [-1, 1] and their log-densities [B], in nats."""

    action: Tensor
    log_prob: Tensor


class SquashedActor(nn.Module):
    """Gaussian squashed by tanh (arXiv 1812.05905, appendix C).

    Args:
        obs_dim: length of the observation vector, O.
        action_dim: number of action dimensions, D.
        hidden: widths of the hidden layers.
        activation: a key of `ACTIVATIONS`.
    """

    def __init__(self, obs_dim: int, action_dim: int, hidden: tuple[int, ...], activation: str) -> None:
        super().__init__()
        self.body = mlp([obs_dim, *hidden, 2 * action_dim], activation, None)

    def sample(self, obs: Tensor, noise: Tensor) -> SquashedSample:
        """Draw actions given obs [B, O] and standard normal noise [B, D]."""
        mean, log_std = self.body(obs).chunk(2, dim=-1)
        log_std = log_std.clamp(*LOG_STD_RANGE)
        unsquashed = mean + log_std.exp() * noise
        log_prob = -0.5 * noise.square() - log_std - 0.5 * math.log(2 * math.pi)
        # log(1 - tanh(u)^2) = 2 (log 2 - u - softplus(-2 u)), which does not underflow
        log_slope = 2 * (math.log(2) - unsquashed - F.softplus(-2 * unsquashed))
        return SquashedSample(unsquashed.tanh(), (log_prob - log_slope).sum(-1))

    def forward(self, obs: Tensor) -> Tensor:
        """The deterministic action tanh(m(s)), [B, D], given obs [B, O]."""
        mean: Tensor = self.body(obs).chunk(2, dim=-1)[0]
        return mean.tanh()


class StackedLinear(nn.Module):
    """Linear layers of equal shape in one: weight [C, fan_in, fan_out], bias [C, 1, fan_out].

    Args:
        number: C, of layers.
        fan_in: inputs of each.
        fan_out: outputs of each.
        spectral_bound: largest spectral norm of each layer, by ``W / max(1, sigma / bound)`` in the forward pass, with
            sigma by power iteration (Miyato et al. 2018, arXiv 1802.05957); None: as it is.
        hidden: inputs and outputs are hidden units, whose products may be in bfloat16 (`dynamics.precision`).
    """

    u: Tensor
    v: Tensor

    def __init__(
        self, number: int, fan_in: int, fan_out: int, spectral_bound: float | None = None, hidden: bool = False
    ) -> None:
        super().__init__()
        self.hidden = hidden
        bound = fan_in**-0.5  # as nn.Linear's
        self.weight = nn.Parameter(torch.empty(number, fan_in, fan_out).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(number, 1, fan_out).uniform_(-bound, bound))
        self.spectral_bound = spectral_bound
        if spectral_bound is not None:
            self.register_buffer("u", F.normalize(torch.randn(number, fan_in), dim=1))
            self.register_buffer("v", F.normalize(torch.randn(number, fan_out), dim=1))
            for _ in range(POWER_ITERATIONS):
                self.power_iteration()

    @torch.no_grad()
    def power_iteration(self) -> None:
        """Turn u [C, fan_in] and v [C, fan_out] once towards the first singular vectors."""
        self.v.copy_(F.normalize(torch.einsum("ci,cio->co", self.u, self.weight), dim=1))
        self.u.copy_(F.normalize(torch.einsum("cio,co->ci", self.weight, self.v), dim=1))

    def divisor(self) -> Tensor:
        """What the weights are divided by where their norms are bounded, as power iteration has them, [C]."""
        assert self.spectral_bound is not None
        sigma = torch.einsum("ci,cio,co->c", self.u, self.weight, self.v)
        return (sigma / self.spectral_bound).clamp_min(1.0)

    def forward(self, x: Tensor) -> Tensor:
        """Outputs [C, B, fan_out] of inputs [C, B, fan_in]."""
        weight: Tensor = self.weight
        if self.spectral_bound is not None:
            weight = weight / self.divisor()[:, None, None]
        return stacked_layer(self.bias, x, weight, self.hidden)


class Critics(nn.Module):
    """Action-value networks of equal shape, evaluated together.

    Args:
        inputs: length of observation and action vectors together.
        hidden: widths of the hidden layers.
        activation: a key of `ACTIVATIONS`.
        number: C, of networks.
        layer_norm: normalise the inputs of all layers but the first, without weights.
        spectral_bound: of hidden layers (`StackedLinear`). The output layer is free: returns can be large.
        spectral_layers: "all" hidden layers have that bound, or the "last" of them alone (Gogianu et al. 2021, arXiv
            2105.05246).
        bounded: values are ``center + half_width * network``, where the last layer starts at 0.

    Raises:
        ValueError: if ``spectral_layers`` is neither.
    """

    center: Tensor
    half_width: Tensor

    def __init__(
        self, inputs: int, hidden: tuple[int, ...], activation: str, number: int = 2, layer_norm: bool = False,
        spectral_bound: float | None = None, bounded: bool = False, spectral_layers: str = "all",
    ) -> None:  # fmt: skip
        super().__init__()
        if spectral_layers not in ("all", "last"):
            raise ValueError(f"spectral_layers must be 'all' or 'last', got {spectral_layers!r}")
        first, output = 0 if spectral_layers == "all" else len(hidden) - 1, len(hidden)
        layers: list[nn.Module] = []
        for i, (fan_in, fan_out) in enumerate(pairwise((inputs, *hidden, 1))):
            if i:
                layers.append(ACTIVATIONS[activation]())
            if i and layer_norm:
                layers.append(nn.LayerNorm(fan_in, elementwise_affine=False))
            bound = spectral_bound if first <= i < output else None
            layers.append(StackedLinear(number, fan_in, fan_out, bound, hidden=0 < i < output))
        self.layers, self.number, self.bounded = nn.Sequential(*layers), number, bounded
        if bounded:
            self.register_buffer("center", torch.zeros(()))
            self.register_buffer("half_width", torch.ones(()))
            for parameter in layers[-1].parameters():
                nn.init.zeros_(parameter)

    def forward(self, obs: Tensor, action: Tensor) -> Tensor:
        """Values [C, B] of obs [B, O] and action [B, D]."""
        values: Tensor = self.layers(torch.cat([obs, action], -1).expand(self.number, -1, -1)).squeeze(-1)
        return self.center + self.half_width * values if self.bounded else values

    def power_iteration(self) -> None:
        """One more towards the spectral norms, where they are bounded; after each change of the weights."""
        for layer in self.layers:
            if isinstance(layer, StackedLinear) and layer.spectral_bound is not None:
                layer.power_iteration()


def lower(values: Tensor, pair: Tensor | None) -> Tensor:
    """The lower [B] of two critics' values [C, B]; with more than two, of the pair drawn (REDQ, arXiv 2101.05982)."""
    return (values if pair is None else values[pair]).amin(0)


def frozen(module: nn.Module, *arguments: Tensor) -> Tensor:
    """The module's output, differentiable in the arguments but not in its parameters."""
    parameters = {name: parameter.detach() for name, parameter in module.named_parameters()}
    output: Tensor = functional_call(module, parameters, arguments)
    return output


@storable
class SACPolicy(BoxPolicy):
    """Actor, critics with their slow copy, temperature and observation statistics as a Stable-Baselines3 policy.

    Args:
        observation_space: Box, or Dict of Boxes; no images.
        action_space: Box with finite bounds.
        lr_schedule: progress remaining (1 to 0) -> learning rate.
        net_arch: widths of the hidden layers, one list for all networks or {"pi": [...], "qf": [...]}.
        activation_fn: a key of `ACTIVATIONS` or one of its torch modules.
        n_critics: number of critics.
        critic_layer_norm: see `Critics`.
        spectral_bound: see `Critics`.
        spectral_layers: see `Critics`.
        bounded_values: see `Critics`; `move_value_range` tells the range.
        tau: weight of the critics in their slow copy, per update.
        ema_decay: of the average of the actor's weights that acts deterministically, per update; 0: no average.
        temperature: initial entropy temperature alpha.
        learn_temperature: whether alpha learns.
        normalize_observation: standardise observations with running statistics.
        optimizer_class: optimizer of all parameters.
        optimizer_kwargs: its arguments besides the learning rate.

    Raises:
        ValueError: if a space or an argument is not supported.
    """

    followed, follower, followers = "critic", "target_critic", {"averaged_actor": "actor"}
    draws = 1

    def __init__(
        self, observation_space: spaces.Space, action_space: spaces.Space,  # type: ignore[type-arg]
        lr_schedule: Schedule, *, net_arch: list[int] | dict[str, list[int]] | None = None,
        activation_fn: str | type[nn.Module] = "relu", n_critics: int = 2, critic_layer_norm: bool = False,
        spectral_bound: float | None = None, spectral_layers: str = "all", bounded_values: bool = False,
        tau: float = 0.005, ema_decay: float = 0.0, temperature: float = 1.0,
        learn_temperature: bool = True, normalize_observation: bool = False,
        optimizer_class: type[torch.optim.Optimizer] = torch.optim.Adam,
        optimizer_kwargs: dict[str, Any] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(observation_space, action_space, optimizer_class, optimizer_kwargs)
        if not isinstance(net_arch, dict):
            net_arch = dict.fromkeys(("pi", "qf"), [256, 256] if net_arch is None else net_arch)
        self.net_arch = net_arch
        activation = activation_name(activation_fn)
        self._arguments = {
            "net_arch": net_arch, "activation_fn": activation, "n_critics": n_critics,
            "critic_layer_norm": critic_layer_norm, "spectral_bound": spectral_bound,
            "spectral_layers": spectral_layers, "bounded_values": bounded_values,
            "tau": tau, "ema_decay": ema_decay, "temperature": temperature, "learn_temperature": learn_temperature,
            "normalize_observation": normalize_observation, "optimizer_class": optimizer_class,
            "optimizer_kwargs": optimizer_kwargs,
        }  # fmt: skip
        self.obs_norm = RunningNorm(self.obs_dim, enabled=normalize_observation)
        self.actor = SquashedActor(self.obs_dim, self.action_dim, tuple(net_arch["pi"]), activation)
        self.critic = Critics(
            self.obs_dim + self.action_dim, tuple(net_arch["qf"]), activation, n_critics, critic_layer_norm,
            spectral_bound, bounded_values, spectral_layers,
        )  # fmt: skip
        self.target_critic = copy.deepcopy(self.critic).requires_grad_(False)
        self.averaged_actor = copy.deepcopy(self.actor).requires_grad_(False) if ema_decay else None
        self.ema_decay = ema_decay
        self.log_alpha = nn.Parameter(torch.tensor([math.log(temperature)]), requires_grad=learn_temperature)
        self.averaging = tau
        self._make_optimizer(lr_schedule)

    def obs_std(self) -> Tensor:
        """Running standard deviation of each observation, [O], in the units that the networks see."""
        return torch.ones_like(self.obs_norm.scale) if self.obs_norm.enabled else 1 / self.obs_norm.scale

    def power_iteration(self) -> None:
        """See `Critics`; of the slow copy, too."""
        self.critic.power_iteration()
        self.target_critic.power_iteration()

    @torch.no_grad()
    def heat_actor(self, temperature: float, generator: torch.Generator) -> None:
        """Add the noise of a Langevin step of the present learning rate to the actor's weights that learn.

        Steps then sample weights near the best ones, as SGLD's do (Welling, Teh 2011); but Adam scales the gradient and
        not the noise. It is the average of the samples that is to act (arXiv 2603.06028). Temperature 0 draws nothing.
        """
        if not temperature:
            return
        std = math.sqrt(2 * self.optimizer.param_groups[0]["lr"] * temperature)
        for each in self.actor.parameters():
            if each.requires_grad:
                each.add_(torch.randn(each.shape, generator=generator, device=each.device), alpha=std)

    @torch.no_grad()
    def average_actor(self, updates: int) -> None:
        """Let the average follow the actor, where there is one; after each update, with their number so far."""
        if self.averaged_actor is not None:
            means, latest = ([*each.parameters()] for each in (self.averaged_actor, self.actor))
            decay = warmed_up(self.ema_decay, updates)
            for mean, weight in zip(means, latest, strict=True):
                mean.lerp_(weight, 1 - decay)

    @property
    def has_value_range(self) -> bool:
        """Whether the range of bounded values was moved from where it begins."""
        return bool(self.critic.center != 0) or bool(self.critic.half_width != 1)

    def move_value_range(self, low: Tensor, high: Tensor, rate: float) -> None:
        """Move the range of bounded values by a share of the way towards [low, high]."""
        for critics in (self.critic, self.target_critic):
            critics.center.lerp_((low + high) / 2, rate)
            critics.half_width.lerp_((high - low) / 2, rate)

    def values_of_policy(self, obs: Tensor) -> Tensor:
        """All critics' Q(s, pi(s)) at the deterministic action, [C, B]; the actor gets no gradient."""
        values: Tensor = self.critic(obs, frozen(self.actor, obs))
        return values

    def value(self, obs: Tensor) -> Tensor:
        """State value [B] of observations as the networks see them: the lower critic at the deterministic action."""
        values: Tensor = self.critic(obs, self.actor(obs)).amin(0)
        return values

    def forward(self, obs: PyTorchObs, deterministic: bool = False) -> Tensor:
        """Actions [B, D] in [-1, 1] of a batch of observations."""
        return self._predict(obs, deterministic)

    def decide(self, features: Tensor, noise: Tensor | None) -> Tensor:
        """As in `BoxPolicy`."""
        obs = self.obs_norm(features)
        if noise is not None:
            return self.actor.sample(obs, noise[0]).action
        action: Tensor = (self.averaged_actor or self.actor)(obs)
        return action

    def _get_constructor_parameters(self) -> dict[str, Any]:
        spaces_ = {"observation_space": self.observation_space, "action_space": self.action_space}
        return spaces_ | {"lr_schedule": self._dummy_schedule} | self._arguments


def sac_losses(policy: SACPolicy, batch: Minibatch, gamma: float, target_entropy: float) -> tuple[Losses, Tensor]:
    """The losses of critics, actor and temperature, each of which reaches only its own network; Q(s, a) [C, B].

    Args:
        policy: the networks.
        batch: the minibatch.
        gamma: discount factor.
        target_entropy: entropy that the temperature drives the actor to, in nats.
    """
    values, alpha = policy.critic(batch.obs, batch.action), policy.log_alpha.exp().detach()
    with torch.no_grad():
        following = policy.actor.sample(batch.next_obs, batch.next_noise)
        following_value = lower(policy.target_critic(batch.next_obs, following.action), batch.pair)
        next_value = following_value - alpha * following.log_prob
        target = batch.reward + gamma * (1 - batch.terminated) * next_value
    critic_loss = 0.5 * (values - target).square().mean(1).sum()

    chosen = policy.actor.sample(batch.obs, batch.noise)
    actor_loss = (alpha * chosen.log_prob - frozen(policy.critic, batch.obs, chosen.action).amin(0)).mean()
    surplus = (chosen.log_prob.detach() + target_entropy).mean()
    temperature_loss = -(policy.log_alpha * surplus).sum()
    table = {
        "train/critic_loss": Loss(critic_loss),
        "train/actor_loss": Loss(actor_loss),
        "train/ent_coef_loss": Loss(temperature_loss),
    }
    metrics = {
        "train/ent_coef": alpha.sum(),
        "train/entropy": -chosen.log_prob.mean(),
        "train/value": values.mean(),
    }
    return Losses(table, metrics), values
