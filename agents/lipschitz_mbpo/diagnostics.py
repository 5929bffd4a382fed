"""Measurements during training of a model and the value learned from it: errors, smoothness."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from ...dynamics.lipschitz import spectral_norms
from ...dynamics.transition_base import TransitionModel
from .critic_regularizers import adversary, value_gap
from .replay import Search, TransitionRing
from .sac import Critics, SACPolicy, StackedLinear

SAMPLES = 256
MODEL_STEPS = 5


def value_diagnostics(policy: SACPolicy, real: TransitionRing, radius: float) -> dict[str, float]:
    """How smooth the critics are at the newest transitions, at the same action.

    Args:
        policy: with the critics.
        real: transitions of the environment.
        radius: of the changes of a state, in running standard deviations of each observation.

    Returns:
        lipschitz/slope: E|Q(s~, a) - Q(s, a)| / radius at random s~ in the ball, mean over all critics.
        lipschitz/adversarial_gain: mean squared change at FGSM's states over that at random ones.
        lipschitz/spectral_product: product of the spectral norms of a critic's layers, the largest of all: with ReLU
            a bound of its Lipschitz constant.
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


def spectral_product(critics: Critics) -> Tensor:
    """Product of the spectral norms of each critic's layers as they are applied, [C]."""
    layers = [layer for layer in critics.layers if isinstance(layer, StackedLinear)]
    norms = [norm for layer in layers for norm in spectral_norms(layer).values()]
    return torch.stack([norm.clamp(max=layer.spectral_bound) for layer, norm in zip(layers, norms, strict=True)]).prod(
        0
    )


def runs_away(largest: float, real: TransitionRing, gamma: float) -> bool:
    """Whether a value is twice what the rewards seen allow, with a warning: critics that diverge do so silently."""
    limit = 2 * real.all().reward.abs().max().item() / max(1 - gamma, 1e-3)
    if largest > limit:
        text = f"the critics run away: a value of {largest:.3g} where rewards allow {limit:.3g}"
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
        model/rollout_error: root mean square error of the states after `MODEL_STEPS` steps of the model's prediction
            along the actions really taken, in running standard deviations; NaN if no such stretch is whole.
    """
    generator = torch.Generator(real.rows.device).manual_seed(0)
    batch = real.unpack(real.newest(SAMPLES * stride))
    predicted, _ = model.sample(batch.obs, batch.action, generator)
    there, value = policy.obs_norm(batch.next_obs), policy.obs_norm(predicted)
    error = (policy.value(value) - policy.value(there)).square().mean()

    obs, next_obs, action = batch.obs, batch.next_obs, batch.action
    state, whole = obs, torch.ones(len(obs), dtype=torch.bool, device=obs.device)
    for step in range(MODEL_STEPS):
        if step:
            whole = whole[:-stride] & (obs[step * stride :] == next_obs[(step - 1) * stride : -stride]).all(1)
            state = state[:-stride]
        state, _ = model.predict(state, action[step * stride :])
    last = next_obs[(MODEL_STEPS - 1) * stride :]
    misses = ((state - last) * policy.obs_norm.scale)[whole]
    return {"model/value_error": error.item(), "model/rollout_error": misses.square().mean().sqrt().item()}
