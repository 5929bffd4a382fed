"""How much action values change with the state: the robust regularizer of critics (arXiv 2302.01244)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...dynamics.lipschitz import adversarial_states
from .replay import Minibatch, SearchNoise
from .sac import SACPolicy, frozen


def value_gap(policy: SACPolicy, batch: Minibatch, values: Tensor, actions: str) -> Callable[[Tensor], Tensor]:
    """``states [B, O] -> (Q(s~, a~) - Q(s, a))^2`` [B], summed over both critics; the actor gets no gradient.

    The two actions are (pi(s~), a), (a, a) or (pi(s~), pi(s)); pi is the deterministic action.

    Args:
        policy: with actor and critics.
        batch: with states s and actions a.
        values: Q(s, a), [2, B].
        actions: "paper", "same_action" or "policy".
    """
    obs, action = batch.obs, batch.action
    here = policy.critic(obs, frozen(policy.actor, obs)) if actions == "policy" else values

    def gap(states: Tensor) -> Tensor:
        there = policy.critic(states, action if actions == "same_action" else frozen(policy.actor, states))
        change: Tensor = there - here
        return change.square().sum(0)

    return gap


def adversary(
    gap: Callable[[Tensor], Tensor], obs: Tensor, search: SearchNoise, radius: Tensor, method: str, steps: int = 1,
    temperature: float = 1.0,
) -> Tensor:  # fmt: skip
    """States within a radius of obs at which the gap is high, [B, O], detached.

    Args:
        gap: `value_gap`.
        obs: where the states lie around, [B, O].
        search: noise; with that of the ascent for langevin.
        radius: largest change of each observation, [O].
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
    return adversarial_states(gap, obs, radius=radius, start=search.start, **options)


def search_noise(obs: Tensor, method: str, steps: int, generator: torch.Generator) -> SearchNoise:
    """Noise for `adversary` around obs [B, O]."""
    start = torch.empty_like(obs).uniform_(-1, 1, generator=generator)
    if method != "langevin":
        return SearchNoise(start)
    return SearchNoise(start, torch.randn(len(obs), steps, obs.shape[1], generator=generator, device=obs.device))
