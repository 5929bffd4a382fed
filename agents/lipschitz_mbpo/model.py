"""The transition model that a Config asks for, and how its rollouts end: by the rule of the task, or a learned one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from stable_baselines3.common.vec_env import VecEnv

from ...dynamics.transition import TRANSITIONS, GaussianTransition
from ...dynamics.transition_base import TransitionModel
from ...dynamics.transition_settings import TransitionSettings
from ...envs.known import known_task_of
from ...envs.termination import no_end, termination_function
from ..common.compiling import is_altered, owner, prepared
from .config import NETWORKS, LipschitzMBPOConfig
from .user_functions import KnownStep, Rule, UsersRule


def build_model(
    config: LipschitzMBPOConfig, obs_dim: int, action_dim: int, learns_end: bool, known_step: KnownStep | None = None
) -> TransitionModel:
    """The transition model, with a terminal head if it learns how episodes end."""
    settings = TransitionSettings(
        terminal_head=learns_end, known_step=known_step, batch_size=config.model_batch_size,
        patience_updates=config.model_patience, ema_decay=config.model_ema_decay,
        jacobian_coef=config.model_jacobian_coef, bfloat16=config.bfloat16,
    )  # fmt: skip
    if config.model_weight_decay is not None:
        settings = replace(settings, weight_decay=config.model_weight_decay, decoupled=True)
    sizes, hidden = (obs_dim, action_dim), config.model_hidden
    if config.model in ("flow", "langevin"):  # the spread of the data stays in their hold-out loss: gains are small
        return TRANSITIONS[config.model](*sizes, replace(settings, min_gain=1e-3), hidden=hidden)
    assert config.model in NETWORKS
    return GaussianTransition(
        *sizes, settings, hidden=hidden, probabilistic=config.model != "deterministic",
        homoscedastic=config.model == "homoscedastic", layer_norm=config.model_layer_norm,
        dropout=config.model_dropout, rollout_dropout=config.rollout_dropout, snapshots=config.snapshots,
        members=config.members, elites=config.elites,
    )  # fmt: skip


def fit_gradient(before: Callable[..., Any] | None, model: TransitionModel, wanted: str) -> Callable[..., Any]:
    """The gradient of a model's fits, compiled if so wanted, and once for all fits of a model.

    Args:
        before: what the last fit used.
        model: what is fitted.
        wanted: as `prepared` has it; networks with hooks or parametrizations are fitted eagerly.
    """
    gradient = before if before is not None and owner(before) is model else model.gradient
    return prepared(gradient, "" if is_altered(model) else wanted, torch.device("cpu"))


def termination_rule(choice: str, given: Rule | None, env: VecEnv | None) -> Rule | None:
    """The rule that ends model rollouts; None: the model learns it.

    Args:
        choice: the Config's termination.
        given: the user's own rule, which goes before the task's.
        env: the environment, if there is one.

    Raises:
        ValueError: if the task's rule is asked for and not known.
    """
    if choice == "learned":
        return None
    if choice == "never":
        return no_end
    rule = None if given is None else UsersRule(given)
    task = None if rule or env is None else known_task_of(env)
    if task is not None:
        return termination_function(*task)
    if rule is None and choice == "task" and env is not None:
        raise ValueError("termination: got task, but no rule of this environment is known; give one or use learned")
    return rule
