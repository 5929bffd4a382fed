"""How much action values change with the state: the robust regularizer of critics (arXiv 2302.01244)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..dynamics.lipschitz import adversarial_states
from .compiling import Batch
from .sac import SACPolicy, frozen


def value_gap(policy: SACPolicy, batch: Batch, values: Tensor, pairing: str) -> Callable[[Tensor], Tensor]:
    """``states [B, O] -> (Q(s~, a~) - Q(s, a))^2`` [B], summed over both critics; the actor gets no gradient.

    The two actions are (pi(s~), a), (a, a) or (pi(s~), pi(s)) by the pairing; pi is the deterministic action.

    Args:
        policy: with actor and critics.
        batch: obs [B, O] and action [B, D].
        values: Q(s, a) of that action, [2, B].
        pairing: "paper", "same_action" or "policy".
    """
    obs, action = batch["obs"], batch["action"]
    here = policy.critic(obs, frozen(policy.actor, obs)) if pairing == "policy" else values

    def gap(states: Tensor) -> Tensor:
        there = policy.critic(states, action if pairing == "same_action" else frozen(policy.actor, states))
        change: Tensor = there - here
        return change.square().sum(0)

    return gap


def adversary(
    gap: Callable[[Tensor], Tensor], batch: Batch, radius: Tensor, method: str, steps: int = 1, temperature: float = 1.0
) -> Tensor:
    """States within a radius of obs at which the gap is high, [B, O], detached.

    Args:
        gap: `value_gap`.
        batch: obs; "start", uniform in [-1, 1] like obs; for langevin "ascent_noise", standard normal, [B, steps, O].
        radius: largest change of each observation, [O].
        method: "fgsm" (one sign step, from "start" across the whole ball: to a corner), "pgd" (several) or "langevin"
            (ascent at a temperature).
        steps: of pgd and langevin.
        temperature: of langevin, in units of the gap.
    """
    steps = 1 if method == "fgsm" else steps
    options: dict[str, Any] = {"steps": steps, "step_size": 2 / steps}
    if method == "langevin":
        options |= {"temperature": temperature, "noise": batch["ascent_noise"].unbind(1)}
    return adversarial_states(gap, batch["obs"], radius=radius, start=batch["start"], **options)


def search_noise(obs: Tensor, method: str, steps: int, generator: torch.Generator) -> Batch:
    """Where the search for adversarial states begins, and what shakes it: for the batch of `adversary`."""
    noise: Batch = {"start": torch.empty_like(obs).uniform_(-1, 1, generator=generator)}
    if method == "langevin":
        noise["ascent_noise"] = torch.randn(len(obs), steps, obs.shape[1], generator=generator, device=obs.device)
    return noise
