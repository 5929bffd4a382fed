"""How much action values change with the state: the robust regularizer of critics (arXiv 2302.01244)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...dynamics.lipschitz import adversarial_states
from ..common.update import Loss, Losses
from .config import LipschitzMBPOConfig
from .replay import Minibatch, Search
from .sac import SACPolicy, sac_losses


def losses(policy: SACPolicy, batch: Minibatch, config: LipschitzMBPOConfig, target_entropy: float) -> Losses:
    """The terms of the objective for a minibatch, with their weights: SAC's and the robust penalty of the critics."""
    terms, values = sac_losses(policy, batch, config.gamma, target_entropy)
    if config.regularizer == "robust":
        penalty = robust_penalty(policy, batch.obs, batch.action, values, batch.search, config)
        terms.table["lipschitz/penalty"] = Loss(penalty, config.robust_coef)
    return terms


def robust_penalty(
    policy: SACPolicy, obs: Tensor, action: Tensor, values: Tensor, search: Search | None, config: LipschitzMBPOConfig
) -> Tensor:
    """``mean max_s~ (Q(s~, pi(s~)) - Q(s, a))^2`` over states s~ within the radius of s, a scalar (arXiv 2302.01244).

    Args:
        policy: with actor and critics.
        obs: states s, [B, O].
        action: a, [B, D].
        values: Q(s, a), [C, B].
        search: its noise.
        config: hyperparameters.
    """
    assert search is not None
    gap = value_gap(policy, obs, action, values, config.robust_actions)
    method, steps, temperature = config.adversary, config.adversary_steps, config.adversary_temperature
    return gap(adversary(gap, obs, search, method, steps, temperature)).mean()


def value_gap(
    policy: SACPolicy, obs: Tensor, action: Tensor, values: Tensor, actions: str
) -> Callable[[Tensor], Tensor]:
    """``states [B, O] -> (Q(s~, a~) - Q(s, a))^2`` [B], summed over the critics; the actor gets no gradient.

    The two actions are (pi(s~), a), (a, a) or (pi(s~), pi(s)); pi is the deterministic action.

    Args:
        policy: with actor and critics.
        obs: states s, [B, O].
        action: a, [B, D].
        values: Q(s, a), [C, B].
        actions: "paper", "same_action" or "policy".
    """
    here = policy.values_of_policy(obs) if actions == "policy" else values

    def gap(states: Tensor) -> Tensor:
        same = actions == "same_action"
        there = policy.critic(states, action) if same else policy.values_of_policy(states)
        change: Tensor = there - here
        return change.square().sum(0)

    return gap


def adversary(
    gap: Callable[[Tensor], Tensor], obs: Tensor, search: Search, method: str, steps: int = 1,
    temperature: float = 1.0,
) -> Tensor:  # fmt: skip
    """States within a radius of obs at which the gap is high, [B, O], detached.

    Args:
        gap: `value_gap`.
        obs: where the states lie around, [B, O].
        search: radius and noise; with that of the ascent for langevin.
        method: "fgsm" (one sign step, from the start across the whole ball: to a corner), "pgd" (several) or "langevin"
            (ascent at a temperature).
        steps: of pgd and langevin.
        temperature: of langevin, in units of the gap.
    """
    steps = 1 if method == "fgsm" else steps
    options: dict[str, Any] = {"steps": steps, "step_size": 2 / steps}
    if method == "langevin":
        assert search.ascent is not None
        options |= {"temperature": temperature, "noise": search.ascent.unbind(1)}
    return adversarial_states(gap, obs, radius=search.radius, start=search.start, **options)


def draw_search(obs: Tensor, radius: Tensor, method: str, steps: int, generator: torch.Generator) -> Search:
    """A `Search` around obs [B, O] for `adversary`."""
    start = torch.empty_like(obs).uniform_(-1, 1, generator=generator)
    if method != "langevin":
        return Search(radius, start)
    ascent = torch.randn(len(obs), steps, obs.shape[1], generator=generator, device=obs.device)
    return Search(radius, start, ascent)
