"""Value gradients: actor and critics learn from short rollouts that are differentiated through the model.

Kubo, Parmas, Ishii 2025 ("Double Horizon Model-Based Policy Optimization", arXiv 2512.15439), after SAC-SVG(H) (Amos et
al. 2021, arXiv 2008.12775) and MVE (Feinberg et al. 2018, arXiv 1803.00101). Long detached rollouts of the present
policy supply start states s_0. From there H steps with reparameterised actions and next states::

    R = sum_{h<H} gamma^h m_h (r_h - alpha log pi_h)                          soft return; m_h: not ended before step h
    y = R + alpha log pi_0 + gamma^H m_H (min Q'(s_H, a_H) - alpha log pi_H)  target, no gradient
    L_critic = 1/2 sum_i (Q_i(s_0, a_0) - y)^2
    L_actor = -(R + gamma^H m_H (mean_i Q_i(s_H, a_H) - alpha log pi_H))      differentiated through the model

Q' is the slow copy, its minimum one over two critics drawn at random, held within the range of values.

Differences from the paper: actor, critics and temperature take their step at the same time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ...dynamics.transition_base import TransitionModel
from ..common.update import Loss, Losses
from .config import LipschitzMBPOConfig
from .critic_regularizers import robust_penalty
from .replay import Search
from .sac import SACPolicy, SquashedSample, frozen, lower

Ended = Callable[[Tensor, Tensor, Tensor], Tensor]
"""obs [B, O], action [B, D], next_obs [B, O] -> whether the episode terminates there, bool [B]."""

RANGE_SHARES = (0.01, 0.99)
"""Quantiles of soft rewards that, received for ever, are the lowest and the highest value."""

RANGE_RATE = 3e-4
"""How far the range of values moves per update."""


class Start(NamedTuple):
    """States in which differentiated rollouts begin, and all their noise."""

    obs: Tensor  # raw, [B, O]
    noise: Tensor  # standard normals of the actions, [H + 1, B, D]
    model_noise: tuple[tuple[Tensor, ...], ...]  # of the H transitions (`TransitionModel.draw`)
    pair: Tensor | None  # the critics of the target where there are more than two, [2]
    search: Search | None  # where critics are made robust
    blur: Tensor | None = None  # noise on what the actor sees, in the units that it sees, [H + 1, B, O]

    def seen(self, state: Tensor, h: int) -> Tensor:
        """What the actor sees of a state at step h of the rollout, [B, O] as the networks see it."""
        return state if self.blur is None else state + self.blur[h]


def value_gradient_losses(
    policy: SACPolicy, start: Start, model: TransitionModel, ended: Ended, config: LipschitzMBPOConfig,
    target_entropy: float,
) -> Losses:  # fmt: skip
    """The losses of critics, actor and temperature, each of which reaches only its own network.

    Args:
        policy: the networks.
        start: where the rollouts begin.
        model: the transition model, whose weights get no gradient.
        ended: the rule by which the task terminates, or what the model learned of it.
        config: hyperparameters.
        target_entropy: entropy that the temperature drives the actor to, in nats.
    """
    alpha = policy.log_alpha.exp().detach()
    obs, gamma = start.obs, config.gamma
    taken: list[tuple[Tensor, SquashedSample]] = []  # state as the networks see it, action
    soft_rewards: list[Tensor] = []
    soft_return, alive = torch.zeros_like(obs[:, 0]), torch.ones_like(obs[:, 0])
    for h, model_noise in enumerate(start.model_noise):
        state = policy.obs_norm(obs)
        chosen = policy.actor.sample(start.seen(state, h), start.noise[h])
        taken.append((state, chosen))
        next_obs, reward = model.step(obs, chosen.action, model_noise)
        soft_rewards.append(reward - alpha * chosen.log_prob)
        soft_return = soft_return + gamma**h * alive * soft_rewards[h]
        alive = alive * ~ended(obs, chosen.action, next_obs)
        obs = next_obs
    last = policy.obs_norm(obs)
    chosen = policy.actor.sample(start.seen(last, -1), start.noise[-1])
    weight = gamma ** len(taken) * alive
    first, begun = taken[0]

    with torch.no_grad():
        slow = policy.target_critic
        bound = slow.half_width
        after = lower(slow(last, chosen.action), start.pair).clamp(slow.center - bound, slow.center + bound)
        target = soft_return + alpha * begun.log_prob + weight * (after - alpha * chosen.log_prob)
    action = begun.action.detach()
    values = policy.critic(first, action)
    critic_loss = 0.5 * (values - target).square().mean(1).sum()

    ahead = frozen(policy.critic, last, chosen.action).mean(0) - alpha * chosen.log_prob
    actor_loss = -(soft_return + weight * ahead).mean()
    surplus = (begun.log_prob.detach() + target_entropy).mean()
    temperature_loss = -(policy.log_alpha * surplus).sum()
    table = {
        "train/critic_loss": Loss(critic_loss),
        "train/actor_loss": Loss(actor_loss),
        "train/ent_coef_loss": Loss(temperature_loss),
    }
    if config.regularizer == "robust":
        penalty = robust_penalty(policy, first, action, values, start.search, config)
        table["lipschitz/penalty"] = Loss(penalty, config.robust_coef)
    low, high = value_range(torch.stack(soft_rewards).detach(), gamma)
    metrics = {
        "train/ent_coef": alpha.sum(),
        "train/entropy": -begun.log_prob.mean(),
        "train/value": values.mean(),
        "value_gradient/lowest_value": low,
        "value_gradient/highest_value": high,
        "value_gradient/alive_share": alive.mean(),
    }
    return Losses(table, metrics)


def draw_blur(share: float, deviation: Tensor, shape: tuple[int, ...], generator: torch.Generator) -> Tensor | None:
    """Noise on what the actor sees, of a share of each observation's deviation [O]; None without."""
    return share * torch.randn(shape, generator=generator, device=generator.device) * deviation if share else None


def value_range(rewards: Tensor, gamma: float) -> tuple[Tensor, Tensor]:
    """Lowest and highest value, scalars: what all but the rarest rewards are worth if they go on for ever.

    The rarest count once: a value may be the reward at a goal that is seldom reached.

    Args:
        rewards: of any shape.
        gamma: discount factor.
    """
    low, high = torch.quantile(rewards.flatten(), rewards.new_tensor(RANGE_SHARES)).unbind()
    horizon = 1 / max(1 - gamma, 1e-4)
    return torch.minimum(low * horizon, rewards.amin()), torch.maximum(high * horizon, rewards.amax())
