"""The flow policy: a base distribution, a velocity field that carries it to the actions, action noise, a critic.

Given an observation s::

    z ~ base(s)                     base: N(0, base_std^2), N(0, s^2) or N(m(s), s^2), one of K points, or z = 0
    x1 = phi_1(z; s)                phi: the flow of dx/dt = v(t, x, s) from t = 0 to 1, or an SDE of the same v
    action = x1 + n,  n ~ N(0, std^2)

The actor works in normalised actions, in which the action space is [-1, 1]^D; `unscale_action` maps them to the
environment's units. Actions are stored unclipped and clipped only on their way to the environment.
"""

from __future__ import annotations

import copy
import math
from typing import Any, NamedTuple

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.type_aliases import PyTorchObs, Schedule
from torch import Tensor, nn

from ...dynamics.fields import MLPField
from ...dynamics.ode import FieldLike, odeint
from ...dynamics.special_fields import AffineField
from ..common.networks import activation_name, mlp
from ..common.observations import RunningNorm
from ..common.policy import BoxPolicy
from ..storage.values import storable
from .chunks import predict_next
from .gaussians import Mixture, Points, gaussian_log_prob, mixture_log_prob

LOG_STD_RANGE = (-5.0, 2.0)


class FlowNoise(NamedTuple):
    """Standard normals that a draw from the policy takes: for z and the action [B, D], for the flow's path [K, B, D].

    K is 0 where the flow is an ODE, the number of solver steps of an SDE, one less of a chain. A base of points takes
    the first normal of a row alone.
    """

    base: Tensor
    action: Tensor
    path: Tensor

    @classmethod
    def of(cls, normals: Tensor) -> FlowNoise:
        """The noise in one tensor [draws, B, D]."""
        return cls(normals[0], normals[1], normals[2:])


class FlowSample(NamedTuple):
    """One draw from the policy, each [B, D] in normalised action units."""

    z: Tensor
    x1: Tensor
    action: Tensor


class FlowActor(nn.Module):
    """The distribution of (z, action) given normalised observations.

    Args:
        obs_dim: length of the observation vector, O.
        action_dim: number of action dimensions, D.
        hidden: widths of the velocity field's hidden layers, and of the base's mean network; none: both are linear.
        activation: a key of `ACTIVATIONS`.
        base: "standard" N(0, base_std^2), fixed; "learned" N(0, s^2), s a parameter; "gaussian" N(m(obs), s^2);
            "mixture" one of K learned `Points`: the action is a mixture of K Gaussians, whose density is exact.
        base_std: (initial) standard deviation of the base; 0, if it is fixed: z = 0, a Gaussian policy.
        log_std_init: initial log standard deviation of the action noise.
        solver: name of the ODE solver.
        solver_steps: number of its steps.
        langevin_eps: noise of the flow while sampling, see `langevin_flow`; 0: an ODE. Above 0 only by euler.
        chained: learned noise at every step instead, see `gaussian_chain`; only by euler.
        action_std_min: floor of the standard deviation of the action noise; None: that of `LOG_STD_RANGE`.
        components: K of the mixture.
    """

    def __init__(
        self, obs_dim: int, action_dim: int, *, hidden: tuple[int, ...], activation: str, base: str, base_std: float,
        log_std_init: float, solver: str, solver_steps: int, langevin_eps: float = 0.0, chained: bool = False,
        action_std_min: float | None = None, components: int = 5,
    ) -> None:  # fmt: skip
        super().__init__()
        self.log_std_range = (math.log(action_std_min), LOG_STD_RANGE[1]) if action_std_min else LOG_STD_RANGE
        self.solver, self.solver_steps, self.langevin_eps = solver, solver_steps, langevin_eps
        self.path_length = solver_steps if langevin_eps else solver_steps - 1 if chained else 0
        """Standard normals per dimension along the flow: K of `FlowNoise`."""
        self.draws = 2 + self.path_length
        if langevin_eps or chained:
            from .noisy_flows import gaussian_chain, langevin_flow  # else their solvers need not be loaded

            self._langevin_flow, self._gaussian_chain = langevin_flow, gaussian_chain
        # Last layers are zero: the flow starts as the identity (the paper's best initialisation), the base at mean 0.
        self.field: MLPField | AffineField = (
            MLPField(action_dim, obs_dim, hidden=hidden, activation=activation, last_layer_scale=0.0)
            if hidden
            else AffineField(action_dim, obs_dim)
        )
        self.base_mean = mlp([obs_dim, *hidden, action_dim], activation, 0.0) if base == "gaussian" else None
        is_mixture = base == "mixture"
        self.points = Points(obs_dim, action_dim, components, hidden, activation, base_std) if is_mixture else None
        self.has_latent = base_std > 0 and not is_mixture
        """Whether z has a density. Else the action is a `mixture` of Gaussians, without points of one."""
        self.base_log_std = nn.Parameter(
            torch.full((action_dim,), math.log(base_std) if self.has_latent else -math.inf),
            requires_grad=base in ("learned", "gaussian"),
        )
        self.log_std = nn.Parameter(torch.full((action_dim,), float(log_std_init)))
        inner = torch.full((solver_steps - 1, action_dim), float(log_std_init))
        self.chain_log_std = nn.Parameter(inner) if chained else None

    def base(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log standard deviation of z given obs [B, O]; both [B, D]. Of points, the most probable one."""
        log_std = self.base_log_std.clamp(*LOG_STD_RANGE).expand(obs.shape[0], -1)
        if self.points is not None:
            return self.points.most_probable(obs), log_std
        return (torch.zeros_like(log_std) if self.base_mean is None else self.base_mean(obs)), log_std

    def base_noise_log_std(self) -> Tensor:
        """Log standard deviation of the base, [D]; -inf where z has no density."""
        return self.base_log_std.clamp(*LOG_STD_RANGE) if self.has_latent else self.base_log_std

    def noise_log_std(self) -> Tensor:
        """Log standard deviation of the action noise, [D]."""
        return self.log_std.clamp(*self.log_std_range)

    def gaussians(self, obs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean and log standard deviation of z, [B, D] each, given obs [B, O]; the latter of the action noise, [D]."""
        return *self.base(obs), self.noise_log_std()

    def joint_entropy(self, obs: Tensor) -> Tensor:
        """Entropy of all that is drawn given obs [B, O], in nats per sample, up to a constant; a scalar, mean over obs.

        That of the action noise, of the base (one without spread adds nothing) and of a chain's inner steps.
        """
        base_log_std = self.base_noise_log_std().nan_to_num(neginf=0.0)
        entropy = (self.noise_log_std() + base_log_std + math.log(2 * math.pi * math.e)).sum()
        if self.chain_log_std is not None:
            entropy = entropy + self.chain_log_std.clamp(*LOG_STD_RANGE).sum()
        return entropy if self.points is None else entropy + self.points.entropy(obs)

    def norms(self) -> Tensor:
        """Norms of all parameters: they differ as soon as it has learned, been loaded or been written to."""
        return torch.stack(torch._foreach_norm([each.detach() for each in self.parameters()]))

    def flow(self, z: Tensor, obs: Tensor, path: Tensor | None = None, field: FieldLike | None = None) -> Tensor:
        """Carry z [B, D] to x1 [B, D] given obs [B, O]: by the ODE or, along the noise of each step, a noisy flow.

        Args:
            z: start.
            obs: normalised observations.
            path: standard normals, [K, B, D] as in `FlowNoise`, or None: the ODE.
            field: in place of the actor's own.
        """
        field = self.field if field is None else field
        if path is None or self.path_length == 0:
            return odeint(field, z, steps=self.solver_steps, solver=self.solver, cond=obs)
        if self.chain_log_std is not None:
            return self.chain(z, obs, path, field)[-1]
        return self._langevin_flow(field, z, obs, path, *self.base(obs), self.langevin_eps)

    def chain(self, z: Tensor, obs: Tensor, path: Tensor, field: FieldLike | None = None) -> Tensor:
        """The states of a chain, [K + 1, B, D]: see `gaussian_chain`."""
        assert self.chain_log_std is not None
        return self._gaussian_chain(
            self.field if field is None else field, z, obs, path, self.chain_log_std.clamp(*LOG_STD_RANGE)
        )

    def sample(self, obs: Tensor, noise: FlowNoise) -> FlowSample:
        """Draw given obs [B, O]."""
        if self.points is not None:
            z = self.points.draw(obs, noise.base)
        else:
            mean, log_std = self.base(obs)
            z = mean + log_std.exp() * noise.base if self.has_latent else mean
        x1 = self.flow(z, obs, noise.path)
        return FlowSample(z, x1, x1 + self.noise_log_std().exp() * noise.action)

    def mode(self, obs: Tensor) -> Tensor:
        """The deterministic action [B, D]: the ODE from the mean of the base, no noise."""
        return self.flow(self.base(obs)[0], obs)

    def mixture(self, obs: Tensor) -> Mixture:
        """The law of the action given obs [B, O] where z has no density: K Gaussians, or one."""
        assert not self.has_latent
        if self.points is None:
            return Mixture(obs.new_zeros(len(obs), 1), self.mode(obs).unsqueeze(1))
        log_weight = self.points.log_weight(obs)
        size, count = log_weight.shape
        x1 = self.flow(self.points.places.repeat(size, 1), obs.repeat_interleave(count, 0))
        return Mixture(log_weight, x1.view(size, count, -1))

    def log_prob(self, obs: Tensor, sample: FlowSample) -> Tensor:
        """Joint log-density of (z, action) given obs and the path's noise, [B], in nats, of uncorrelated actions.

        Of a mixture, that of the action.
        """
        mean, base_log_std, log_std = self.gaussians(obs)
        if self.points is not None:
            return mixture_log_prob(sample.action, self.mixture(obs), log_std)
        density = gaussian_log_prob(sample.action, sample.x1, log_std)
        return density + gaussian_log_prob(sample.z, mean, base_log_std) if self.has_latent else density


@storable
class FlowPolicy(BoxPolicy):
    """Actor, critic and normalisers as a Stable-Baselines3 policy for Box actions and vector observations.

    Args:
        observation_space: Box, or Dict of Boxes; no images.
        action_space: Box with finite bounds.
        lr_schedule: progress remaining (1 to 0) -> learning rate.
        net_arch: widths of the hidden layers, one list for both networks or {"pi": [...], "vf": [...]}.
        activation_fn: a key of `ACTIVATIONS` or one of its torch modules.
        base, base_std, components, log_std_init, solver, solver_steps, langevin_eps, chained, action_std_min: see
            `FlowActor`.
        critic_gain: of the critic's last layer at the start; 0: all values are 0, no state is preferred.
        normalize_observation: standardise observations with running statistics.
        observation_epsilon: added to their variance before.
        ema_decay: decay of the weight average used for prediction; 0 for none.
        chunk, execute: steps that an action of the networks covers, and those of them that are done (`chunks.py`).
        optimizer_class: optimizer of all parameters.
        optimizer_kwargs: its arguments besides the learning rate.

    Raises:
        ValueError: if a space or an argument is not supported.
    """

    followed, follower = "actor", "averaged_actor"

    def __init__(
        self, observation_space: spaces.Space[Any], action_space: spaces.Space[Any], lr_schedule: Schedule, *,
        net_arch: list[int] | dict[str, list[int]] | None = None, activation_fn: str | type[nn.Module] = "silu",
        base: str = "learned", base_std: float = 0.1, log_std_init: float = math.log(0.5), solver: str = "euler",
        solver_steps: int = 2, langevin_eps: float = 0.0, chained: bool = False, critic_gain: float = 1.0,
        normalize_observation: bool = True, observation_epsilon: float = 1e-8, ema_decay: float = 0.0,
        action_std_min: float | None = None, chunk: int = 1, execute: int | None = None, components: int = 5,
        optimizer_class: type[torch.optim.Optimizer] = torch.optim.AdamW,
        optimizer_kwargs: dict[str, Any] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(observation_space, action_space, optimizer_class, optimizer_kwargs, chunk)
        self.execute = execute or chunk
        if not 1 <= self.execute <= chunk:
            raise ValueError(f"execute: got {execute}, expected 1 to chunk = {chunk}")
        if not isinstance(net_arch, dict):
            net_arch = dict.fromkeys(("pi", "vf"), [64, 64] if net_arch is None else net_arch)
        net_arch = {"pi": [], "vf": []} | net_arch
        self.net_arch = net_arch
        if base not in ("standard", "learned", "gaussian", "mixture"):
            raise ValueError(f"base: got {base!r}, expected standard, learned, gaussian or mixture")
        if not (base_std > 0 or (base_std == 0 and base == "standard")):
            raise ValueError(f"base_std: got {base_std}, expected a number above 0, or 0 with base standard")
        if not 0 <= langevin_eps <= 1:
            raise ValueError(f"langevin_eps: got {langevin_eps}, expected a number in [0, 1]")
        if (langevin_eps or chained) and solver != "euler":
            raise ValueError(f"solver: got {solver}, expected euler, the one that integrates the flow as an SDE")
        if base == "mixture" and (langevin_eps or chained or components < 2):
            got = f"langevin_eps {langevin_eps}, chained {chained}, components {components}"
            raise ValueError(f"base: got mixture with {got}; expected 0, False and at least 2")
        if langevin_eps and chained:
            raise ValueError(f"langevin_eps: got {langevin_eps}, expected 0 with chained, which has noise of its own")
        activation = activation_name(activation_fn)
        self._arguments = {
            "net_arch": net_arch, "activation_fn": activation, "base": base, "base_std": base_std,
            "log_std_init": log_std_init, "solver": solver, "solver_steps": solver_steps, "langevin_eps": langevin_eps,
            "chained": chained, "critic_gain": critic_gain, "normalize_observation": normalize_observation,
            "observation_epsilon": observation_epsilon, "ema_decay": ema_decay, "action_std_min": action_std_min,
            "chunk": chunk, "execute": execute, "components": components, "optimizer_class": optimizer_class,
            "optimizer_kwargs": optimizer_kwargs,
        }  # fmt: skip
        self.obs_norm = RunningNorm(self.obs_dim, epsilon=observation_epsilon, enabled=normalize_observation)
        self.return_norm = RunningNorm(1)
        self.actor = FlowActor(
            self.obs_dim, self.action_dim, hidden=tuple(net_arch["pi"]), activation=activation, base=base,
            base_std=base_std, log_std_init=log_std_init, solver=solver, solver_steps=solver_steps,
            langevin_eps=langevin_eps, chained=chained, action_std_min=action_std_min, components=components,
        )  # fmt: skip
        self.critic = mlp([self.obs_dim, *net_arch["vf"], 1], activation, critic_gain)
        self.averaging = 1 - ema_decay
        self.averaged_actor = copy.deepcopy(self.actor).requires_grad_(False) if ema_decay else None
        self.draws = self.actor.draws
        self._make_optimizer(lr_schedule)

    def act(self, features: Tensor, normals: Tensor) -> Tensor:
        """Draw a `FlowSample`, as one tensor [3, N, D], given raw observation vectors [N, O] and one `FlowNoise`."""
        return torch.stack(self.actor.sample(self.obs_norm(features), FlowNoise.of(normals)))

    def value(self, obs: Tensor) -> Tensor:
        """State value [B] of normalised observations [B, O], in units of normalised returns."""
        value: Tensor = self.critic(obs)
        return value.squeeze(-1)

    def forward(self, obs: PyTorchObs, deterministic: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """Normalised actions [B, D] (unclipped), values [B, 1] and log-densities [B] as of `FlowActor.log_prob`.

        Args:
            obs: batch of observations.
            deterministic: z at the mean of the base and no noise.
        """
        vector = self.obs_norm(self.features(obs))
        if deterministic:
            x1 = self.actor.mode(vector)
            sample = FlowSample(self.actor.base(vector)[0], x1, x1)
        else:
            normals = torch.randn(self.draws, len(vector), self.action_dim, device=vector.device)
            sample = self.actor.sample(vector, FlowNoise.of(normals))
        return sample.action, self.value(vector).unsqueeze(-1), self.actor.log_prob(vector, sample)

    def predict_values(self, obs: PyTorchObs) -> Tensor:
        """Values [B, 1] of a batch of observations, in units of normalised returns."""
        return self.value(self.obs_norm(self.features(obs))).unsqueeze(-1)

    def evaluate_actions(self, obs: PyTorchObs, actions: Tensor, latents: int = 64) -> tuple[Tensor, Tensor, None]:
        """Values [B, 1], estimates of the log-density of actions [B], and None: the entropy has no closed form.

        The density is that of unclipped actions in the environment's units, averaged over the latents, see
        `marginal_log_prob`; all differentiable, so that the policy can be fitted to demonstrations.

        Args:
            obs: batch of observations.
            actions: [B, ...], in the environment's units, as those of `PolicyFlow.rollout_buffer`.
            latents: points that the latents are averaged over, at least 1.
        """
        from .density import marginal_log_prob  # it is made of this module's actor

        flat = actions.reshape(len(actions), -1).to(self.actor.log_std)
        if flat.shape[1] != self.action_dim or latents < 1:
            got = f"{list(actions.shape)} and {latents}"
            raise ValueError(f"actions and latents: got {got}, expected [B, {self.action_dim}] and at least 1")
        vector, normalised = self.obs_norm(self.features(obs).to(flat)), self.to_normalised(flat)
        log_prob = marginal_log_prob(self.actor, vector, normalised, latents, self.widths()) - self.log_half_ranges()
        return self.value(vector).unsqueeze(-1), log_prob, None

    def predict(
        self, observation: Any, state: tuple[np.ndarray, ...] | None = None,
        episode_start: np.ndarray | None = None, deterministic: bool = False,
    ) -> tuple[np.ndarray, tuple[np.ndarray, ...] | None]:  # fmt: skip
        """As in Stable-Baselines3. With action chunks the state is what is still to be done of them.

        Without the state that the last call returned, the policy decides anew in every call.
        """
        if self.chunk == 1:
            return super().predict(observation, state, episode_start, deterministic)
        self.set_training_mode(False)
        obs, vectorized = self.obs_to_tensor(observation)
        chosen = self._predict(obs, deterministic).cpu().numpy()
        chunks = chosen.reshape(len(chosen), self.chunk, *(self._action_shape or ()))
        actions, state = predict_next(self, chunks, state, episode_start)
        actions = self.unscale_action(actions)
        return (actions if vectorized else actions[0]), state

    def decide(self, features: Tensor, noise: Tensor | None) -> Tensor:
        """As in `BoxPolicy`, by the averaged actor where there is one."""
        obs, actor = self.obs_norm(features), self.actor if self.averaged_actor is None else self.averaged_actor
        return (actor.mode(obs) if noise is None else actor.sample(obs, FlowNoise.of(noise)).action).clamp(-1, 1)

    def _get_constructor_parameters(self) -> dict[str, Any]:
        spaces_ = {"observation_space": self.observation_space, "action_space": self.action_space}
        return spaces_ | {"lr_schedule": self._dummy_schedule} | self._arguments
