"""Measurements during training that cost more than a loss.

Of a flow policy: the ratio's bias, |J|, entropy. Of a model and the value learned from it: errors, smoothness.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping

import torch
from stable_baselines3.common.logger import Logger
from torch import Tensor

from ..dynamics.lipschitz import spectral_norms
from ..dynamics.transition_base import TransitionModel
from .entropy import policy_entropy
from .flow_policy import FlowActor
from .lipschitz import adversary, value_gap
from .networks import gaussian_log_prob
from .ratios import Ratio, interpolate
from .replay import Transitions
from .rival_ratios import EndpointRatio
from .rollout import Batch
from .sac import SACPolicy

SAMPLES = 256
LATENTS = 32
MODEL_STEPS = 5


@torch.no_grad()
def flow_diagnostics(actor: FlowActor, ratio: Ratio, batch: Batch, clip_range: float) -> dict[str, float]:
    """Compare the ratio in use with the exact one given z after an update, on a subsample of the rollout.

    Args:
        actor: the updated actor.
        ratio: the ratio that the update used.
        batch: what the last epoch learned from.
        clip_range: clip range of the update.

    Returns:
        flow/ratio_correlation: Pearson correlation of the two log-ratios (the mean one, of several per sample).
        flow/ratio_bias: mean of log(used) - log(exact), in nats.
        flow/ratio_error: root mean square of that difference over the root mean square of log(exact).
        flow/exact_clip_fraction: share of samples whose exact ratio lies outside the clip range.
        flow/jacobian_norm: mean Frobenius norm of dv/dx halfway between z and x1, at t = 1/2.
        flow/action_entropy: see `action_entropy`, in nats.
        flow/entropy: see `policy_entropy`, in nats.
    """
    # Evenly spaced rows: no random numbers, so that measuring does not change training.
    stride = max(1, len(batch["obs"]) // SAMPLES)
    part = {name: tensor[::stride][:SAMPLES] for name, tensor in batch.items()}
    used = ratio.terms(actor, part).log_ratio.view(len(part["obs"]), -1).mean(1)
    exact = EndpointRatio().terms(actor, part).log_ratio
    half = torch.full_like(used, 0.5)
    jacobian = actor.field.jacobian(half, interpolate(part | {"t": half}), part["obs"])[1]
    return {
        "flow/ratio_correlation": torch.corrcoef(torch.stack([used, exact]))[0, 1].item(),
        "flow/ratio_bias": (used - exact).mean().item(),
        "flow/ratio_error": ((used - exact).square().mean() / exact.square().mean()).sqrt().item(),
        "flow/exact_clip_fraction": (exact.expm1().abs() > clip_range).float().mean().item(),
        "flow/jacobian_norm": jacobian.square().sum((-2, -1)).sqrt().mean().item(),
        "flow/action_entropy": action_entropy(actor, part["obs"]).item(),
        "flow/entropy": policy_entropy(actor, batch["obs"]).item(),
    }


@torch.no_grad()
def action_entropy(actor: FlowActor, obs: Tensor, latents: int = LATENTS) -> Tensor:
    """Estimate the mean entropy of the actions given obs [B, O], in nats per action vector; returns a scalar.

    Nested Monte Carlo: the density of an action is averaged over fresh latents,
    ``-E log(1/M sum_j N(a; phi_1(z_j), std^2))``. By Jensen's inequality an upper bound of the entropy in
    expectation; tight where the action noise is not much narrower than the spread of the flow's endpoints. Where the
    action noise is correlated, this is the entropy without knowledge of its past.
    """
    generator = torch.Generator(obs.device).manual_seed(0)
    noise = torch.randn(actor.draws, len(obs) * latents, actor.log_std.shape[0], generator=generator, device=obs.device)
    x1 = actor.sample(obs.repeat_interleave(latents, 0), noise).x1.view(len(obs), latents, -1)
    action = actor.sample(obs, noise[:, -len(obs) :].flip(0)).action
    log_density = gaussian_log_prob(action.unsqueeze(1), x1, actor.noise_log_std())
    return math.log(latents) - torch.logsumexp(log_density, dim=1).mean()


def value_diagnostics(policy: SACPolicy, batch: Batch, radius: float) -> dict[str, float]:
    """How smooth the critics are, at the same action.

    Args:
        policy: with the critics.
        batch: obs [B, O] as the networks see them, action [B, D].
        radius: of the changes of a state, in running standard deviations of each observation.

    Returns:
        lipschitz/slope: E|Q(s~, a) - Q(s, a)| / radius at random s~ in the ball, mean over both critics.
        lipschitz/adversarial_gain: mean squared change at FGSM's states over that at random ones.
        lipschitz/spectral_product: product of the spectral norms of a critic's layers, the larger of both: with ReLU
            a bound of its Lipschitz constant.
        lipschitz/largest_value: largest |Q(s, a)| of the batch.
    """
    obs, action, reach = batch["obs"], batch["action"], radius * policy.unit()
    generator = torch.Generator(obs.device).manual_seed(0)  # its own: measuring must not change training
    ball = batch | {"start": torch.empty_like(obs).uniform_(-1, 1, generator=generator)}
    with torch.no_grad():
        values = policy.critic(obs, action)
        nearby = obs + reach * ball["start"]
        gap = value_gap(policy, ball, values, "same_action")
        gain = gap(adversary(gap, ball, reach, "fgsm")).mean() / gap(nearby).mean().clamp_min(1e-12)
        return {
            "lipschitz/slope": ((policy.critic(nearby, action) - values).abs().mean() / radius).item(),
            "lipschitz/adversarial_gain": gain.item(),
            "lipschitz/spectral_product": torch.stack([*spectral_norms(policy.critic).values()]).prod(0).amax().item(),
            "lipschitz/largest_value": values.abs().amax().item(),
        }


def record(logger: Logger, values: Mapping[str, float]) -> None:
    """Log values by name."""
    for name, value in values.items():
        logger.record(name, value)


def runs_away(largest: float, real: Transitions, gamma: float) -> bool:
    """Whether a value is twice what the rewards seen allow, with a warning: critics that diverge do so silently."""
    limit = 2 * real.all()["reward"].abs().max().item() / max(1 - gamma, 1e-3)
    if largest > limit:
        text = f"the critics run away: a value of {largest:.3g} where rewards allow {limit:.3g}"
        warnings.warn(f"{text}; raise robust_coef, or lower gradient_steps or learning_rate", stacklevel=2)
    return largest > limit


@torch.no_grad()
def model_diagnostics(model: TransitionModel, policy: SACPolicy, real: Transitions, stride: int) -> dict[str, float]:
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
    predicted, _ = model.sample(batch["obs"], batch["action"], generator)
    there, value = policy.normalize(batch["next_obs"]), policy.normalize(predicted)
    error = (policy.value(value) - policy.value(there)).square().mean()

    obs, next_obs, action = batch["obs"], batch["next_obs"], batch["action"]
    state, whole = obs, torch.ones(len(obs), dtype=torch.bool, device=obs.device)
    for step in range(MODEL_STEPS):
        if step:
            whole = whole[:-stride] & (obs[step * stride :] == next_obs[(step - 1) * stride : -stride]).all(1)
            state = state[:-stride]
        state, _ = model.predict(state, action[step * stride :])
    last = next_obs[(MODEL_STEPS - 1) * stride :]
    misses = ((state - last) * policy.obs_norm.scale)[whole]
    return {"model/value_error": error.item(), "model/rollout_error": misses.square().mean().sqrt().item()}
