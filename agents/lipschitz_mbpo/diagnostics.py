"""Measurements during training of a model and the value learned from it: errors, smoothness."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ...dynamics.koopman import koopman_matrix, lyapunov_exponents
from ...dynamics.lipschitz import spectral_norms
from ...dynamics.transition_base import TransitionModel
from .critic_regularizers import adversary, value_gap
from .replay import Search, TransitionRing, Transitions
from .sac import SACPolicy

SAMPLES = 256
MODEL_STEPS = {1: "model/rollout_error_1", 5: "model/rollout_error", 20: "model/rollout_error_20"}
"""Steps of the model after which its error is logged, and its name."""
EIGENVALUES = 32
"""States of which they are computed."""
STRETCHES = 16
"""Of states, along which growth is followed; fewer of long observations, whose Jacobians are large."""
GRADIENTS = 4
"""Minibatches whose gradients are compared."""


def value_diagnostics(policy: SACPolicy, real: TransitionRing, radius: float) -> dict[str, float]:
    """How smooth the critics are at the newest transitions, at the same action.

    Args:
        policy: with the critics.
        real: transitions of the environment.
        radius: of the changes of a state, in running standard deviations of each observation.

    Returns:
        lipschitz/slope: E|Q(s~, a) - Q(s, a)| / radius at random s~ in the ball, mean over all critics.
        lipschitz/adversarial_gain: mean squared change at FGSM's states over that at random ones.
        lipschitz/spectral_product: product of the spectral norms of a critic's layers, the largest of all, in units
            of the value: with ReLU and no layer norms a bound of its Lipschitz constant.
        lipschitz/largest_value: largest |Q(s, a)| of them.
    """
    newest = real.unpack(real.newest(SAMPLES))
    obs, action, reach = policy.obs_norm(newest.obs), newest.action, radius * policy.obs_std()
    generator = torch.Generator(obs.device).manual_seed(0)  # its own: measuring must not change training
    search = Search(reach, torch.empty_like(obs).uniform_(-1, 1, generator=generator))
    with torch.no_grad():
        values = policy.critic(obs, action)
        nearby = obs + reach * search.start
        gap = value_gap(policy, obs, action, values, "same_action")
        gain = gap(adversary(gap, obs, search, "fgsm")).mean() / gap(nearby).mean().clamp_min(1e-12)
        return {
            "lipschitz/slope": ((policy.critic(nearby, action) - values).abs().mean() / radius).item(),
            "lipschitz/adversarial_gain": gain.item(),
            "lipschitz/spectral_product": spectral_product(policy.critic).amax().item(),
            "lipschitz/largest_value": values.abs().amax().item(),
        }


def spectral_product(critics: nn.Module) -> Tensor:
    """Product of the spectral norms of each critic's layers as they are applied, times its unit of values, [C]."""
    norms = []
    for name, norm in spectral_norms(critics).items():
        layer: Any = critics.get_submodule(name.rpartition(".")[0])
        norms.append(norm if getattr(layer, "spectral_bound", None) is None else norm / layer.divisor())
    return torch.stack(norms).prod(0) * getattr(critics, "half_width", 1.0)


def runs_away(largest: float, policy: SACPolicy, real: TransitionRing, gamma: float) -> bool:
    """Whether a value is twice what can be, with a warning: critics that diverge do so silently.

    Soft rewards are at most the largest seen and the temperature times log 2 per action, the entropy of a uniform
    law on [-1, 1].
    """
    bonus = policy.log_alpha.exp().item() * policy.action_dim * math.log(2)
    limit = 2 * (real.all().reward.abs().max().item() + bonus) / max(1 - gamma, 1e-3)
    if largest > limit:
        text = f"the critics run away: a value of {largest:.3g} where rewards and entropy allow {limit:.3g}"
        warnings.warn(f"{text}; raise robust_coef, or lower gradient_steps or learning_rate", stacklevel=2)
    return largest > limit


@torch.no_grad()
def model_diagnostics(model: TransitionModel, policy: SACPolicy, real: TransitionRing, stride: int) -> dict[str, float]:
    """How far a model is from what was seen, on a sample of the newest transitions.

    Args:
        model: the transition model.
        policy: whose value weighs the errors.
        real: transitions, those of one environment every `stride` rows.
        stride: number of environments.

    Returns:
        model/value_error: value-aware error E[(V(s'_hat) - V(s'))^2], which bounds the error of the Bellman operator
            (arXiv 2302.01244, equation 4).
        model/rollout_error: root mean square error of the states after 5 steps of the model's prediction along the
            actions really taken, in running standard deviations; after 1 and 20 steps with that number in its name.
            Left out if no such stretch is whole.
        model/exploitation: mean reward that 20 steps of the model's prediction along these actions promise, minus the
            real one: above 0 where the policy has learned to live on the model's errors.
        model/disagreement: of the predictions of an ensemble, of snapshots or of draws of dropout, root mean square
            deviation from their mean, in running standard deviations.
        model/spectral_radius: mean over these states of the largest absolute eigenvalue of d next_obs / d obs; above 1
            errors of the state grow along a rollout.
        model/growth: `growth` over 20 steps; left out like the errors.
        model/koopman_radius, model/koopman_radius_real: `koopman_radius` of the model and of what was seen.
    """
    generator = torch.Generator(real.rows.device).manual_seed(0)
    batch = real.unpack(real.newest(SAMPLES * stride))
    predicted, _ = model.sample(batch.obs, batch.action, generator)
    there, value = policy.obs_norm(batch.next_obs), policy.obs_norm(predicted)
    error = (policy.value(value) - policy.value(there)).square().mean()

    found = {"model/value_error": error.item(), "model/spectral_radius": spectral_radius(model, batch).item()}
    if len(batch.obs) > 2 * (batch.obs.shape[1] + batch.action.shape[1]):
        expected, _ = model.predict(batch.obs, batch.action)
        found["model/koopman_radius"] = koopman_radius(batch, expected).item()
        found["model/koopman_radius_real"] = koopman_radius(batch, batch.next_obs).item()
    deviations = model.disagreement(batch.obs, batch.action)
    if len(deviations) > 1:  # members of an ensemble, snapshots, draws of dropout
        varies = (batch.next_obs != batch.next_obs[0]).any(0)  # what is always the same has no deviation to divide by
        spread = (deviations * policy.obs_norm.scale)[..., varies]
        found["model/disagreement"] = spread.square().mean().sqrt().item()

    obs, next_obs, action = batch.obs, batch.next_obs, batch.action
    state, whole = obs, torch.ones(len(obs), dtype=torch.bool, device=obs.device)
    promised = real_reward = torch.zeros_like(batch.reward)
    for step in range(max(MODEL_STEPS)):
        if step:
            whole = whole[:-stride] & (obs[step * stride :] == next_obs[(step - 1) * stride : -stride]).all(1)
            state, promised, real_reward = (each[:-stride] for each in (state, promised, real_reward))
        state, reward = model.predict(state, action[step * stride :])
        promised, real_reward = promised + reward, real_reward + batch.reward[step * stride :]
        if not whole.any():
            return found
        if name := MODEL_STEPS.get(step + 1):
            misses = ((state - next_obs[step * stride :]) * policy.obs_norm.scale)[whole]
            found[name] = misses.square().mean().sqrt().item()
    gain = (promised - real_reward)[whole] / max(MODEL_STEPS)
    first = whole.nonzero()[: max(2, min(STRETCHES, 1000 // obs.shape[1])), 0]  # of each stretch
    places = first + stride * torch.arange(max(MODEL_STEPS), device=first.device)[:, None]
    grown = growth(model, obs[places], action[places], policy.obs_norm.scale)
    return found | {"model/exploitation": gain.mean().item(), "model/growth": grown.item()}


def step_jacobians(model: TransitionModel, obs: Tensor, action: Tensor) -> Tensor:
    """Jacobians d next_obs / d obs [B, O, O] of the model's samples, noise held at 0."""
    drawn = model.draw(len(obs), torch.Generator(obs.device).manual_seed(0))
    noise = tuple(torch.zeros_like(each) if each.is_floating_point() else each for each in drawn)

    def total(state: Tensor) -> Tensor:
        return model.step(state, action, noise)[0].sum(0)  # rows do not depend on each other

    jacobian: Tensor = torch.autograd.functional.jacobian(total, obs, vectorize=True)  # [O, B, O]
    return jacobian.transpose(0, 1)


def spectral_radius(model: TransitionModel, batch: Transitions) -> Tensor:
    """Mean largest absolute eigenvalue of d next_obs / d obs, a scalar."""
    jacobians = step_jacobians(model, batch.obs[:EIGENVALUES], batch.action[:EIGENVALUES])
    radius: Tensor = torch.linalg.eigvals(jacobians).abs().amax(1).mean()
    return radius


def growth(model: TransitionModel, obs: Tensor, action: Tensor, scale: Tensor) -> Tensor:
    """By what factor a small difference of states grows per step of the model along real states and actions, a scalar.

    Geometric mean over stretches of the largest growth, in running standard deviations (`lyapunov_exponents`). One step
    that amplifies does no harm where the next ones do not: this sees the product, `spectral_radius` each step alone.

    Args:
        model: the transition model.
        obs: states of whole stretches, [T, B, O].
        action: actions taken there, [T, B, A].
        scale: 1 / standard deviation of each observation, [O].
    """
    jacobians = torch.stack([step_jacobians(model, *each) for each in zip(obs, action, strict=True)])
    return lyapunov_exponents(jacobians * scale[:, None] / scale)[:, 0].mean().exp()


def koopman_radius(batch: Transitions, next_obs: Tensor) -> Tensor:
    """Largest absolute eigenvalue of the best linear step to next_obs, a scalar: how stable the whole of it is."""
    matrix = koopman_matrix(batch.obs.double(), next_obs.double(), batch.action.double())
    radius: Tensor = torch.linalg.eigvals(matrix).abs().amax()
    return radius


def gradient_diagnostics(policy: SACPolicy, gradients: Iterable[Tensor], real: TransitionRing) -> dict[str, float]:
    """What value gradients are worth.

    Args:
        policy: the networks.
        gradients: of all weights, one vector for each of several minibatches.
        real: transitions of the environment.

    Returns:
        value_gradient/critic_slope: E|dQ/ds| at the newest of them, by the observations as the critics see them, mean
            over the critics.
        value_gradient/actor_noise: variance of a minibatch's gradient of the actor over its squared mean.
    """
    newest = real.unpack(real.newest(SAMPLES))
    obs = policy.obs_norm(newest.obs).detach().requires_grad_()
    with torch.enable_grad():
        (slope,) = torch.autograd.grad(policy.critic(obs, newest.action).mean(0).sum(), obs)
    weights = policy.weights
    sizes = torch.tensor([each.numel() for each in weights.parameters], device=obs.device)
    of_actor = torch.tensor([name.startswith("actor.") for name in weights.names], device=obs.device)
    each = torch.stack([gradient[of_actor.repeat_interleave(sizes)] for gradient in gradients])
    noise = each.var(0).sum() / each.mean(0).square().sum().clamp_min(1e-12)
    return {"value_gradient/critic_slope": slope.norm(dim=1).mean().item(), "value_gradient/actor_noise": noise.item()}
