"""Advantages and returns: what is to come, from the last step of a rollout to the first."""

from __future__ import annotations

import torch
from torch import Tensor


def recurrence(terms: Tensor, factors: Tensor) -> Tensor:
    """``x_t = terms_t + factors_t x_{t+1}`` with ``x_T = 0``, each tensor [T, N].

    On the CPU a loop. On CUDA by doubling, in 3 log2(T) launches in place of T; equal to rounding.
    """
    return by_doubling(terms, factors) if terms.is_cuda else by_loop(terms, factors)


def by_loop(terms: Tensor, factors: Tensor) -> Tensor:
    """See `recurrence`."""
    values, running = torch.empty_like(terms), torch.zeros_like(terms[0])
    for t in reversed(range(len(terms))):
        running = torch.addcmul(terms[t], factors[t], running)
        values[t] = running
    return values


def by_doubling(terms: Tensor, factors: Tensor) -> Tensor:
    """See `recurrence`. After k rounds each row has the next 2^k terms (Hillis and Steele 1986)."""
    reach = 1
    while reach < len(terms):
        more = torch.addcmul(terms[:-reach], factors[: len(terms) - reach], terms[reach:])
        terms = torch.cat([more, terms[-reach:]])
        factors = factors[:-reach] * factors[reach:]  # of the next 2^k steps, where there are so many
        reach *= 2
    return terms


def discounted_returns(rewards: Tensor, ended: Tensor, before: Tensor, gamma: float) -> Tensor:
    """Discounted return so far, of each step: ``R_t = r_t + gamma (1 - ended_{t-1}) R_{t-1}``, each tensor [T, N].

    Args:
        rewards: r_t.
        ended: bool, where an episode ended.
        before: [N], that of the step before the first; 0 where an episode ended with it.
        gamma: discount factor.
    """
    if rewards.is_cuda:
        return returns_by_doubling(rewards, ended, before, gamma)
    returns, running = torch.empty_like(rewards), before
    for into, reward, left in zip(returns, rewards, (~ended).float(), strict=True):
        torch.add(reward, gamma * running, out=into)
        running = into * left
    return returns


def returns_by_doubling(rewards: Tensor, ended: Tensor, before: Tensor, gamma: float) -> Tensor:
    """See `discounted_returns`."""
    first = rewards[:1] + gamma * before
    factors = torch.cat([torch.zeros_like(first), gamma * ~ended[:-1]])
    return by_doubling(torch.cat([first, rewards[1:]]).flip(0), factors.flip(0)).flip(0)


def generalized_advantage(
    rewards: Tensor, values: Tensor, next_values: Tensor, terminated: Tensor, ended: Tensor, gamma: float, lam: float
) -> Tensor:
    """Generalized advantage estimation (Schulman et al. 2016), each tensor [T, N].

    ``A_t = delta_t + gamma lam (1 - ended_t) A_{t+1}`` with
    ``delta_t = r_t + gamma (1 - terminated_t) V(s_{t+1}) - V(s_t)``.

    Args:
        rewards: r_t.
        values: V(s_t).
        next_values: V of the state *reached* at step t, before any reset.
        terminated: 1 where the episode terminated at step t: nothing is to come.
        ended: 1 where it terminated or was truncated: the next row belongs to another episode.
        gamma: discount factor.
        lam: decay lambda.
    """
    delta = rewards + gamma * (1 - terminated) * next_values - values
    decay = gamma * lam * (1 - ended)
    return recurrence(delta, decay)


def chunk_advantage(
    rewards: Tensor, values: Tensor, next_values: Tensor, terminated: Tensor, ended: Tensor, decided: Tensor,
    gamma: float, lam: float,
) -> Tensor:  # fmt: skip
    """Generalized advantage estimation over decisions, each tensor [T, N]; counts at decisions only.

    For a decision at t that lasted k steps::

        delta = sum_{j<k} gamma^j r_{t+j} + gamma^k (1 - terminated) V(s_{t+k}) - V(s_t)
        A_t = delta + gamma^k lam (1 - ended) A_{t+k}

    Args:
        rewards: r_t.
        values: V(s_t).
        next_values: V of the state reached at step t, before any reset.
        terminated: 1 where the episode terminated at step t.
        ended: 1 where it terminated or was truncated.
        decided: 1 where the policy decided.
        gamma: discount factor of a step.
        lam: decay lambda of a decision.
    """
    after, carried = rewards + gamma * (1 - terminated) * next_values, gamma * lam * (1 - ended)
    last = torch.maximum(torch.cat([decided[1:], torch.ones_like(decided[:1])]), ended) > 0  # steps of their chunks
    gain = recurrence(torch.where(last, after, rewards), gamma * (~last).to(values))
    following = torch.cat([(gain - values)[1:], torch.zeros_like(values[:1])])
    carry = recurrence(torch.where(last, carried * following, 0.0), torch.where(last, carried, gamma))
    return gain - values + carry
